"""A prompt's centroids are the same whatever it is batched with, whoever says what is padding."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from nnsight import NNsight
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor

import lch_plugin as lch
from lch_plugin import Site
from lch_plugin.cotangents import Logit, Metric, logit_difference
from lch_plugin.padding import (
    Finder,
    PadToken,
    known_tokens,
    token_index,
    tokens_in_ids,
    tokens_in_mask,
)
from tests import models
from tests.slow import all_but
from tests.toolkits import needs_saes

F64 = torch.float64
# The tokenizer of the tests begins, ends and pads with token 0.
SHARED, OWN = 0, 1
SITES = (
    *(Site(kind) for kind in ("mlp", "attn", "block", "model")),
    *(Site("span", (0, 2)), Site("neuron", 1, 3), Site("head", 1, 0)),
    Site("head", 1, 1, linearization="detached"),
    Site("block", 1, linearization="detached", label="detached"),
    Site("mlp", 1, expert=True, label="expert"),
    Site("block", 1, expert=True, label="expert"),
    Site("mlp", 1, radius=0.0, n_samples=3, label="local"),
    Site("attn", 1, output_positions=-1, label="last"),
    Site("block", 1, output_positions=[0, -1], label="ends"),
    Site("mlp", cotangent=logit_difference(3, 4), label="metric"),
    Site("model", cotangent=logit_difference(3, 4), label="metric"),
    Site("block", cotangent=Logit(3, 4), label="logit"),
    Site("attn", 1, cotangent=Logit(3, position=-1), label="logit"),
)
MODULES = [
    "transformer.h.*.mlp",
    "transformer.h.1.attn",
    "transformer.h.1",
    "transformer.h.0:transformer.h.2",
]


@cache
def lens(name: str, pad: int) -> Any:
    model = models.bridge("gpt2", F64) if name == "bridge" else models.hooked(F64)
    model.tokenizer.pad_token = f"w{pad}"
    return model


@cache
def attached(name: str, pad: int) -> tuple[Any, list[list[str]]]:
    """A model of its own with all sites, and their names: detached ones are listened to apart."""
    model = models.bridge("gpt2", F64) if name == "bridge" else models.hooked(F64)
    model.tokenizer.pad_token = f"w{pad}"
    handle = lch.attach(model, site=SITES)
    apart = [n for n in handle.hook_names if n.endswith("_detached")]
    return model, [[n for n in handle.hook_names if n not in apart], apart]


@cache
def plain(pad: int) -> Any:
    model = models.huggingface("gpt2", F64)
    model.config.pad_token_id, model.config.eos_token_id = pad, SHARED
    return model


def text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def batch(prompts: list[list[int]], pad: int, side: str) -> tuple[Tensor, Tensor]:
    """Ids of prompts, filled up, and which of them are tokens."""
    n = max(map(len, prompts))
    ids = torch.full((len(prompts), n), pad)
    mask = torch.zeros(len(prompts), n, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        where = slice(n - len(prompt), n) if side == "left" else slice(0, len(prompt))
        ids[row, where], mask[row, where] = torch.tensor(prompt), True
    return ids, mask


def check(found: dict[str, Tensor], alone: list[dict[str, Tensor]], mask: Tensor) -> None:
    """Values of a batch beside those of each prompt alone; at padding all are zero."""
    for name, value in found.items():
        for row, own in enumerate(alone):
            if value.ndim == 1:  # One number a sequence.
                torch.testing.assert_close(value[row], own[name][0], rtol=1e-10, atol=1e-10)
                continue
            expected, tokens = own[name][0], value[row][mask[row]]
            error = (tokens.double() - expected.double()).norm()
            assert error <= 1e-10 * max(1.0, float(expected.double().norm())), name
            assert not value[row][~mask[row]].any(), name


prompts_of = st.lists(
    st.lists(st.integers(2, models.D_VOCAB - 1), min_size=2, max_size=7), min_size=2, max_size=4
)
dtypes = st.sampled_from([torch.bool, torch.int64, torch.int32, torch.float32, torch.float64])


def run(which: tuple[Any, list[list[str]]], given: Any, **kw: Any) -> dict[str, Tensor]:
    model, groups = which
    found: dict[str, Tensor] = {}
    for names in groups:
        with torch.no_grad():
            cache = model.run_with_cache(given, names_filter=names, **kw)[1]
        found |= {name: cache[name] for name in names}
    return found


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    prompts=prompts_of,
    side=st.sampled_from(["left", "right"]),
    pad=st.sampled_from([SHARED, OWN]),
    ends=st.booleans(),
)
@pytest.mark.parametrize("name", all_but(["bridge"], ["bridge", "hooked"]))
def test_texts(name: str, prompts: list[list[int]], side: str, pad: int, ends: bool) -> None:
    """Texts too that end in the token that fills up."""
    # A bridge takes a token that ends text off a lone prompt, and of a batch only if all have one.
    assume(not (name == "bridge" and ends and side == "left"))
    which = model, _ = attached(name, pad)
    model.tokenizer.padding_side = side
    prompts = [[*p, SHARED] if ends and i else p for i, p in enumerate(prompts)]
    texts = [text(prompt) for prompt in prompts]
    with warnings.catch_warnings():
        warnings.simplefilter("error", lch.PaddingWarning)
        found = run(which, texts)
    alone = [run(which, one) for one in texts]
    n, lengths = model.to_tokens(texts).shape[1], [model.to_tokens(t).shape[1] for t in texts]
    place = torch.arange(n)
    rows = [place >= n - own if side == "left" else place < own for own in lengths]
    check(found, alone, torch.stack(rows))


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    prompts=prompts_of,
    side=st.sampled_from(["left", "right"]),
    pad=st.sampled_from([SHARED, OWN]),
    dtype=dtypes,
)
@pytest.mark.parametrize("name", all_but(["bridge"], ["bridge", "hooked"]))
def test_masks(
    name: str, prompts: list[list[int]], side: str, pad: int, dtype: torch.dtype
) -> None:
    assume(name == "bridge" or not dtype.is_floating_point)  # Which a HookedTransformer refuses.
    which = model, _ = attached(name, pad)
    model.tokenizer.padding_side = "right"
    ids, mask = batch(prompts, pad, side)
    found = run(which, ids, attention_mask=mask.to(dtype))
    alone = [run(which, torch.tensor([prompt])) for prompt in prompts]
    check(found, alone, mask)


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(prompts=prompts_of, pad=st.sampled_from([SHARED, OWN]), known=st.booleans())
@pytest.mark.parametrize("name", all_but(["bridge"], ["bridge", "hooked"]))
def test_ids_alone(name: str, prompts: list[list[int]], pad: int, known: bool) -> None:
    """Those that to_tokens gave, or others, before a model without a mask."""
    which = model, _ = attached(name, pad)
    model.tokenizer.padding_side = "right"
    texts, own = [text(prompt) for prompt in prompts], [[SHARED, *p] for p in prompts]
    ids, mask = batch(own, pad, "right")
    if known:
        ids = model.to_tokens(texts)
    found = run(which, ids)
    check(found, [run(which, torch.tensor([prompt])) for prompt in own], mask)


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    prompts=prompts_of,
    side=st.sampled_from(["left", "right"]),
    pad=st.sampled_from([SHARED, OWN]),
    dtype=st.one_of(st.none(), dtypes),
)
@pytest.mark.parametrize("adapter", ["huggingface", "nnsight"])
def test_huggingface_and_nnsight(
    adapter: str, prompts: list[list[int]], side: str, pad: int, dtype: torch.dtype | None
) -> None:
    model = plain(pad)
    assume(dtype is not None or side == "right")
    ids, mask = batch(prompts, pad, side)
    masked: dict[str, Tensor] = {} if dtype is None else {"attention_mask": mask.to(dtype)}
    if side == "left":
        masked["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    read = through_huggingface if adapter == "huggingface" else through_nnsight
    alone = [read(model, input_ids=torch.tensor([prompt])) for prompt in prompts]
    check(read(model, input_ids=ids, **masked), alone, mask)


def through_huggingface(model: Any, **inputs: Tensor) -> dict[str, Tensor]:
    with lch.huggingface.attach(model, MODULES) as handle, torch.no_grad():
        model(**inputs)
    return dict(handle.cache)


def through_nnsight(model: Any, **inputs: Tensor) -> dict[str, Tensor]:
    traced = NNsight(model)
    with traced.trace(**inputs):
        first = traced.transformer.h[0].output[0].save()  # The model is past its inputs by now.
        block = lch.nnsight.centroid(traced.transformer.h[1]).save()
        attn = lch.nnsight.centroid(traced.transformer.h[1].attn).save()
        mlp = lch.nnsight.centroid(traced.transformer.h[1].mlp).save()
    assert first is not None
    return {"block": block, "attn": attn, "mlp": mlp}


def test_invokes_of_one_trace() -> None:
    """nnsight fills up invokes on the left."""
    hf = plain(SHARED)
    model = TransformersModel(hf, tokenizer=models.tokenizer(), task="text-generation")
    with model.trace() as tracer:
        with tracer.invoke("w5 w6 w7 w8 w9"):
            pass
        with tracer.invoke("w3 w4"):
            mu = lch.nnsight.centroid(model.transformer.h[1].mlp).save()
    with model.trace("w3 w4"):
        alone = lch.nnsight.centroid(model.transformer.h[1].mlp).save()
    torch.testing.assert_close(mu[:, -2:], alone)
    assert not mu[:, :-2].any()


# ---------------------------------------------------------------- what is said, and what is refused


def test_ids_that_may_be_text_are_said_once() -> None:
    model = lens("bridge", SHARED)
    model.tokenizer.padding_side = "right"
    ids, _ = batch([[2, 3, 4], [5, 6]], SHARED, "right")
    with lch.attach(model) as handle:
        with pytest.warns(lch.PaddingWarning, match=r"token 0.*rows \[1\].*attention_mask="):
            model.run_with_cache(ids, names_filter=handle.hook_names)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.run_with_cache(ids, names_filter=handle.hook_names)


@pytest.mark.parametrize("pad", [SHARED, OWN])
def test_a_model_that_reads_padding_as_text_is_said(pad: int) -> None:
    """A bridge gives no mask to ids that rows begin with padding in; its own logits change."""
    model = lens("bridge", pad)
    model.tokenizer.padding_side = "left"
    ids, _ = batch([[2, 3, 4], [5, 6]], pad, "left")
    with lch.attach(model):
        with pytest.warns(lch.PaddingWarning, match="reads the padding of rows"):
            model(ids)


def test_a_lone_prompt_is_not_filled_up() -> None:
    """A token that ends it is the prompt's own, and so is one that all rows end in."""
    model = lens("bridge", SHARED)
    for ids in (torch.tensor([[2, 3, 0, 0]]), torch.tensor([[2, 3, 0], [4, 5, 0]])):
        with lch.attach(model, layers=1) as handle, warnings.catch_warnings():
            warnings.simplefilter("error")
            (name,) = handle.hook_names
            mu = model.run_with_cache(ids, names_filter=name)[1][name]
        assert mu.any(-1).all()


@needs_saes
def test_rows_that_are_packed_with_text_have_no_padding() -> None:
    """SAEs train on rows in which a token that ends texts may be anywhere, the end included."""
    from datasets import Dataset
    from sae_lens import StandardTrainingSAEConfig

    model = models.bridge("gpt2")
    seen: list[Tensor] = []
    ids = torch.tensor([[2, 3, 4, 0], [5, 6, 7, 8]]).repeat(16, 1)
    config = lch.saes.runner_config(
        StandardTrainingSAEConfig(d_in=models.D_MODEL, d_sae=8),
        "blocks.1.mlp.hook_centroid",
        training_tokens=64,
        train_batch_size_tokens=16,
        context_size=4,
        lr=1e-3,
    )
    with lch.attach(model, layers=1) as handle:
        model.add_hook(handle.hook_names[0], lambda value, hook: seen.append(value))
        with warnings.catch_warnings():
            warnings.simplefilter("error", lch.PaddingWarning)
            lch.saes.train(model, Dataset.from_dict({"tokens": ids.tolist()}), config)
        model.reset_hooks()
    assert seen
    assert all(value.any(-1).all() for value in seen)


def test_a_metric_of_a_fixed_place_is_refused_where_that_is_padding() -> None:
    model = lens("bridge", OWN)
    ids, mask = batch([[2, 3, 4], [5, 6]], OWN, "right")
    metric = Metric(lambda logits: logits[:, -1, 3] - logits[:, -1, 4])
    for site in (Site("mlp", 1, cotangent=metric), Site("model", cotangent=metric)):
        with lch.attach(model, site=site) as handle:
            with pytest.raises(lch.InputError, match=r"padding \(row 1, position 2\).*position=-1"):
                model.run_with_cache(ids, names_filter=handle.hook_names, attention_mask=mask)


def test_a_position_that_a_short_prompt_lacks_is_refused() -> None:
    model = lens("bridge", OWN)
    ids, mask = batch([[2, 3, 4], [5, 6]], OWN, "left")
    with lch.attach(model, site=Site("attn", 1, output_positions=2)) as handle:
        with pytest.raises(lch.SiteError, match=r"position 2 .*row 1, which has 2 tokens"):
            model.run_with_cache(ids, names_filter=handle.hook_names, attention_mask=mask)


def test_circuits_take_prompts_of_one_length() -> None:
    model = lens("bridge", SHARED)
    with lch.attach(model):
        ids = model.to_tokens(["w2 w3 w4", "w5"])
    with pytest.raises(lch.InputError, match="row 1 of the tokens has 2 tokens and 2 of padding"):
        lch.circuits.neuron_attribution(model, ids)


def test_to_tokens_is_the_models_own_again() -> None:
    model = lens("bridge", SHARED)
    before = set(vars(model))
    with lch.attach(model):
        ids = model.to_tokens(["w2 w3 w4", "w5"])
        ids[1, -1] = 7  # No longer what it was said of.
    assert set(vars(model)) == before
    with lch.attach(model, layers=1) as handle:
        (name,) = handle.hook_names
        mu = model.run_with_cache(ids, names_filter=name)[1][name]
    assert mu[1, -1].any()


@needs_saes
@pytest.mark.parametrize("pad", [0, 1, 2])
def test_the_models_own_trials_know_no_padding(pad: int) -> None:
    """Attaching runs three tokens, and training asks for a width: any of these ids may fill up."""
    model = models.bridge("gpt2", F64)
    model.tokenizer.pad_token = f"w{pad}"
    model.tokenizer.bos_token = model.tokenizer.eos_token = model.tokenizer.unk_token = "w9"
    sites = [Site("mlp", expert=True), Site("attn", 1, output_positions=-1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", lch.PaddingWarning)
        with lch.attach(model, site=sites) as handle, lch.attach(model, 1, "block"):
            from lch_plugin.saes.sources import hook_points

            found = hook_points.width(model, handle.centroid_names[-1], 4)
    assert found == models.D_MODEL


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokenizer_side", ["left", "right"])
def test_shared_padding_is_found_on_either_side(side: str, tokenizer_side: str) -> None:
    model = lens("hooked", SHARED)
    model.tokenizer.padding_side = tokenizer_side
    ids, mask = batch([[2, 3, 4], [5, 6]], SHARED, side)
    with lch.attach(model, layers=1) as handle, warnings.catch_warnings():
        warnings.simplefilter("ignore", lch.PaddingWarning)
        (name,) = handle.hook_names
        mu = model.run_with_cache(ids, names_filter=name)[1][name]
    assert torch.equal(mu.any(-1), mask)


def test_components_called_by_themselves_keep_no_mask() -> None:
    model = lens("hooked", OWN)
    ids, mask = batch([[2, 3, 4], [5, 6]], OWN, "right")
    x = torch.randn(2, 3, models.D_MODEL, dtype=F64, generator=torch.Generator().manual_seed(0))
    found: list[Tensor] = []
    with lch.attach(model, layers=1) as handle, torch.no_grad():
        model.add_hook(handle.hook_names[0], lambda mu, hook: found.append(mu))
        model.embed(ids)
        model.blocks[1].mlp(x)
        model.blocks[1](x, attention_mask=mask.long())
        model.blocks[1](x, attention_mask=mask.flip(0).long())
        model.blocks[1].mlp(x)
        model(x, start_at_layer=1, tokens=ids)
        model.reset_hooks()
    rows = [mu.any(-1) for mu in found]
    whole = torch.ones_like(mask)
    assert [row.tolist() for row in rows] == [
        own.tolist() for own in (whole, mask, mask.flip(0), whole, mask)
    ]


def test_an_encoder_reads_both_ways_and_says_so() -> None:
    """BERT's own values depend on padding that no mask tells it of."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, pad_token_id=OWN,
    )  # fmt: skip
    ids, _ = batch([[2, 3, 4], [5, 6]], OWN, "right")
    with lch.huggingface.attach(
        BertModel(config).eval(), "encoder.layer.0.attention.self"
    ) as handle:
        with pytest.warns(lch.PaddingWarning, match="reads the padding of rows"):
            handle.model(ids)


def test_an_inner_model_that_reads_embeddings_asks_the_outer() -> None:
    class Outer(type(plain(OWN))):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, **kw: Any) -> Any:
            embeds = self.transformer.wte(input_ids)
            return super().forward(inputs_embeds=embeds, **kw)

    torch.manual_seed(0)
    model = Outer(plain(OWN).config).double().eval()
    ids, _ = batch([[2, 3, 4], [5, 6]], OWN, "right")
    with lch.huggingface.attach(model, "transformer.h.1") as handle, torch.no_grad():
        model(ids)
        found = handle.cache["transformer.h.1"]
        model(ids[1:, :2])
    torch.testing.assert_close(found[1:, :2], handle.cache["transformer.h.1"])
    assert not found[1, 2].any()


def test_a_cache_can_be_copied() -> None:
    with lch.huggingface.attach(plain(OWN), "transformer.h.1.mlp") as handle:
        handle.model(torch.tensor([[2, 3]]))
    copied = pickle.loads(pickle.dumps(handle.cache))
    assert torch.equal(copied["transformer.h.1.mlp"], handle.cache["transformer.h.1.mlp"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_ids_of_texts_that_end_in_a_token_of_the_tokenizers(side: str) -> None:
    """A bridge takes it off lone texts: what is marked is what the text has alone."""
    model = models.bridge("gpt2", F64)
    with lch.attach(model):
        ids = model.to_tokens(["w2 w3 w4 w5", "w6 w7 w0"], padding_side=side)
        alone = model.to_tokens("w6 w7 w0")[0]
    tokens = known_tokens(ids)
    assert tokens is not None
    assert torch.equal(ids[1][tokens[1]], alone)


def test_logits_of_the_last_position_alone() -> None:
    metric = logit_difference(3, 4)
    logits = torch.randn(2, 1, 9, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[False, True, True], [True, True, True]])
    assert torch.equal(metric.of(logits, tokens), metric.of(logits))


# ---------------------------------------------------------------- what reads batches besides


@needs_saes
def test_rows_for_saes_are_of_tokens() -> None:
    ids, mask = batch([[2, 3, 4], [5, 6]], OWN, "right")
    (rows,) = lch.saes.Rows(plain(OWN), [ids], "transformer.h.1.mlp")
    (masked,) = lch.saes.Rows(
        plain(OWN), [{"input_ids": ids, "attention_mask": mask.double()}], "transformer.h.1.mlp"
    )
    assert len(rows) == len(masked) == 5
    assert rows.any(-1).all()


@needs_saes
def test_steering_counts_tokens() -> None:
    """The mean KL of a prompt is that of its own tokens, and the norm that it is measured in."""
    model = lens("bridge", OWN)
    ids, _ = batch([[2, 3, 4, 7], [5, 6]], OWN, "right")
    vector = torch.randn(models.D_MODEL, dtype=F64, generator=torch.Generator().manual_seed(0))

    def kl(given: Any) -> Tensor:
        with torch.no_grad():
            return lch.saes.steering_effects(
                model,
                given,
                "blocks.1.mlp",
                vector[None],
                strengths=(0.5,),
                n_random=1,
                generator=torch.Generator().manual_seed(0),
            ).kl

    shorter, longer = ids[1:, :2], ids[:1]
    torch.testing.assert_close(kl([ids]), kl([longer, shorter]))


@needs_saes
def test_responses_are_of_prompts_of_one_length() -> None:
    ids, _ = batch([[2, 3, 4], [5, 6]], OWN, "right")
    with pytest.raises(lch.InputError, match="with padding"):
        lch.saes.CapturedComponent(plain(OWN), [ids], "transformer.h.1.mlp")


@needs_saes
def test_codes_of_given_tokens_leave_padding_out() -> None:
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    from lch_plugin.saes.evaluation.feature_acts import FeatureActs

    hook = "blocks.1.mlp.hook_centroid"
    config = StandardSAEConfig(
        d_in=models.D_MODEL, d_sae=8, dtype="float64", metadata=SAEMetadata(hook_name=hook)
    )
    ids, mask = batch([[2, 3, 4], [5, 6]], OWN, "right")
    codes = FeatureActs(lens("bridge", OWN), StandardSAE(config), ids)
    assert torch.equal(codes.counts(ids), mask)


# ---------------------------------------------------------------- the functions


def masks() -> Iterator[tuple[Tensor, list[list[bool]]]]:
    low = torch.finfo(torch.float32).min
    yield torch.tensor([[0.0, 1.0, 1.0]]), [[False, True, True]]
    yield torch.tensor([[0, 1, 1]], dtype=torch.uint8), [[False, True, True]]
    causal = torch.tensor([[[0, 1, 0], [0, 1, 0], [0, 1, 1]]])
    yield causal, [[False, True, True]]
    yield causal[:, None].bool(), [[False, True, True]]
    added = torch.where(causal == 1, 0.0, low)
    yield added, [[False, True, True]]
    yield added[:, None].expand(-1, 4, -1, -1), [[False, True, True]]
    yield torch.tensor([[1, 1, 0, 1, 1]]), [[False, True, True]]  # Earlier keys are in a cache.


@pytest.mark.parametrize(("mask", "expected"), list(masks()))
def test_masks_in_every_form(mask: Tensor, expected: list[list[bool]]) -> None:
    tokens = tokens_in_mask(mask, 3)
    assert tokens is not None
    assert tokens.tolist() == expected


def test_one_mask_for_every_row() -> None:
    finder = Finder(PadToken(OWN), is_causal=True)
    tokens = finder.tokens(torch.ones(2, 3).long(), torch.tensor([[1, 1, 0]]))
    assert tokens is not None
    assert tokens.tolist() == [[True, True, False]] * 2


def test_a_mask_of_other_positions_says_nothing() -> None:
    assert tokens_in_mask(torch.ones(1, 2), 3) is None
    assert tokens_in_mask(None, 3) is None


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"pad_token_id": None, "eos_token_id": 1}, PadToken(None)),
        ({"pad_token_id": 3, "eos_token_id": [1, 2]}, PadToken(3)),
        ({"pad_token_id": 2, "eos_token_id": [1, 2]}, PadToken(2, is_shared=True)),
        ({"pad_token_id": 0, "decoder_start_token_id": 0}, PadToken(0, begins=True)),
    ],
)
def test_what_fills_up(source: dict[str, Any], expected: PadToken) -> None:
    assert PadToken.of(None, SimpleNamespace(**source)) == expected


def test_padding_on_the_side_that_is_filled_up() -> None:
    """Where both sides look so, one row of text begins with what another is filled up with."""
    ids, pad = torch.tensor([[9, 9, 1], [9, 2, 3], [2, 3, 9]]), PadToken(9, is_shared=True)
    left, right = (tokens_in_ids(ids, pad, side=side) for side in ("left", "right"))
    assert left is not None
    assert right is not None
    assert left.int().tolist() == [[0, 0, 1], [0, 1, 1], [1, 1, 1]]
    assert right.int().tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    ("ids", "pad", "expected"),
    [
        ([[9, 9, 1], [1, 2, 3]], PadToken(9), [[0, 0, 1], [1, 1, 1]]),
        ([[9, 1, 9]], PadToken(9), [[0, 1, 0]]),
        ([[1, 9, 1]], PadToken(9), None),  # Text, whatever it means.
        ([[9, 9, 1], [9, 2, 3]], PadToken(9, is_shared=True), [[0, 1, 1], [1, 1, 1]]),
        ([[9, 1, 9, 9], [9, 2, 3, 9]], PadToken(9, is_shared=True), [[1, 1, 1, 0], [1] * 4]),
        ([[9, 9, 9], [9, 2, 3]], PadToken(9, is_shared=True), [[1, 0, 0], [1, 1, 1]]),
        ([[9, 9], [9, 9]], PadToken(9, is_shared=True), None),
        ([[0, 5, 0], [0, 6, 7]], PadToken(0, begins=True), [[1, 1, 0], [1, 1, 1]]),
        ([[1, 2]], PadToken(None), None),
    ],
)
def test_padding_in_ids(ids: list[list[int]], pad: PadToken, expected: Any) -> None:
    tokens = tokens_in_ids(torch.tensor(ids), pad)
    assert (None if tokens is None else tokens.int().tolist()) == expected


@given(
    rows=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4),
    position=st.integers(-6, 6),
)
def test_positions_are_a_prompts_own(rows: list[list[bool]], position: int) -> None:
    tokens = torch.tensor(rows)
    places = [[i for i, own in enumerate(row) if own] for row in rows]
    if all(-len(own) <= position < len(own) for own in places):
        assert token_index(position, 5, tokens).tolist() == [own[position] for own in places]
    else:
        with pytest.raises(lch.SiteError, match="does not exist"):
            token_index(position, 5, tokens)


def test_an_encoder_decoder() -> None:
    """T5 begins what its decoder writes with the token that fills up."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, pad_token_id=0
    )
    model = T5ForConditionalGeneration(config).double().eval()
    ids = torch.tensor([[2, 3, 4, 1], [5, 1, 0, 0]])
    written = torch.tensor([[0, 7, 8], [0, 9, 0]])
    with lch.huggingface.attach(model, ["decoder.block.1", "encoder.block.0.layer.1"]) as handle:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=(ids != 0).long(), decoder_input_ids=written)
            found = dict(handle.cache)
            model(input_ids=ids[1:, :2], decoder_input_ids=written[1:, :2])
            alone = dict(handle.cache)
    torch.testing.assert_close(found["decoder.block.1"][1:, :2], alone["decoder.block.1"])
    assert not found["decoder.block.1"][1, 2].any()
    name = "encoder.block.0.layer.1"
    torch.testing.assert_close(found[name][1:, :2], alone[name])
    assert not found[name][1, 2:].any()

"""What can be asked of a centroid through HuggingFace, held to TransformerLens and to autograd."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import lch_plugin as lch
from lch_plugin.cotangents import Metric, logit_difference
from tests import models
from tests.adapters.common import NAMES, huggingface, in_float64

IDS = torch.tensor([[3, 14, 15, 9, 2, 6], [5, 35, 8, 9, 7, 9]])
LAYER = 1
# By kind: name in TransformerLens, and in a GPT-2 and a Llama of HuggingFace.
KINDS = ("mlp", "attn", "block", "span")
SETTINGS: dict[str, dict[str, Any]] = {
    "jacobian": {},
    "detached": {"linearization": "detached"},
    "expert": {"expert": True},
    "detached expert": {"linearization": "detached", "expert": True},
    "local": {"radius": 0.5, "n_samples": 8},
    "local with noise": {"sigma": 0.1, "neighbourhood": "gaussian", "n_samples": 4, "centre": True},
    "local metric": {"cotangent": logit_difference(3, 4), "radius": 0.5, "n_samples": 4},
    "metric": {"cotangent": logit_difference(3, 4)},
    "metric and expert": {"cotangent": logit_difference(3, 4), "expert": True},
    "metric at a position": {"cotangent": logit_difference(3, 4, position=2)},
}


def module_name(family: str, kind: str) -> str:
    layers, attention, mlp = NAMES[family]
    if kind == "span":
        return f"{layers}.{LAYER - 1}:{layers}.{LAYER}"
    part = {"attn": f".{attention}", "mlp": f".{mlp}", "block": ""}[kind]
    return f"{layers}.{LAYER}{part}"


def through_transformer_lens(family: str, kind: Any, settings: dict[str, Any]) -> dict[str, Tensor]:
    model = models.boot(copy.deepcopy(huggingface(family)), torch.float64)
    layers = (LAYER - 1, LAYER) if kind == "span" else LAYER
    with lch.attach(model, site=lch.Site(kind, layers, **settings)) as handle:
        name = handle.centroid_names[0]
        wanted = [n for n in handle.hook_names if not n.endswith("_region")]
        with in_float64():
            _, cache = model.run_with_cache(IDS, names_filter=wanted)
        return {hook.removeprefix(name): cache[hook] for hook in wanted}


def through_huggingface(family: str, kind: str, settings: dict[str, Any]) -> dict[str, Tensor]:
    name = module_name(family, kind)
    model = huggingface(family)
    with lch.huggingface.attach(model, name, **settings) as handle, in_float64():
        model(IDS)
    return {hook.removeprefix(name): handle.cache[hook] for hook in handle.hook_names}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", SETTINGS)
def test_both_adapters_give_the_same(family: str, kind: str, asked: str) -> None:
    settings = SETTINGS[asked]
    ours, theirs = (
        through(family, kind, settings)
        for through in (through_huggingface, through_transformer_lens)
    )
    assert ours.keys() == theirs.keys()
    for ending, value in ours.items():
        torch.testing.assert_close(value, theirs[ending], rtol=1e-9, atol=1e-11, msg=ending)


def test_output_positions_choose_what_counts() -> None:
    settings = {"output_positions": -1}
    ours = through_huggingface("gpt2", "block", settings)
    theirs = through_transformer_lens("gpt2", "block", settings)
    torch.testing.assert_close(ours[""], theirs[""], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("asked", ["expert", "metric", "metric and expert", "detached"])
def test_a_prompt_is_the_same_beside_padding(asked: str) -> None:
    model, name = huggingface("llama"), module_name("llama", "block")
    padded = torch.cat([IDS[:, :4], torch.zeros(2, 2, dtype=torch.long)], 1)
    mask = (torch.arange(6) < 4).long().expand(2, -1)
    with lch.huggingface.attach(model, name, **SETTINGS[asked]) as handle, in_float64():
        model(IDS[:, :4])
        alone = dict(handle.cache)
        model(padded, attention_mask=mask)
        for hook, value in alone.items():
            found = handle.cache[hook]
            if found.ndim == 3:
                assert not found[:, 4:].any()
                found = found[:, :4]
            torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-11)


def test_logits_of_a_sequence_as_a_whole_have_no_positions() -> None:
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=50,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).double().eval()
    ids = torch.tensor([[3, 4, 5, 0, 0], [3, 4, 5, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    name, metric = "bert.encoder.layer.1", Metric(lambda logits: logits[:, 1])
    with lch.huggingface.attach(model, name, cotangent=metric) as handle, torch.no_grad():
        model(**inputs)
        together = handle.cache[name]
        assert not together[0, 3:].any()
        model(ids[:1, :3])
        torch.testing.assert_close(together[:1, :3], handle.cache[name], rtol=1e-9, atol=1e-12)
    at_last = Metric(lambda logits: logits[:, -1, 1], position=-1)
    with lch.huggingface.attach(model, name, cotangent=at_last), torch.no_grad():
        with pytest.raises(lch.InputError, match="has no positions"):
            model(**inputs)


def test_several_components_wait_for_one_metric() -> None:
    model, metric = huggingface("gpt2"), logit_difference(3, 4)
    names = [module_name("gpt2", kind) for kind in KINDS]
    together = lch.huggingface.attach(model, names, cotangent=metric)
    with together, in_float64():
        model(IDS)
    for kind, name in zip(KINDS, names, strict=True):
        alone = through_huggingface("gpt2", kind, {"cotangent": metric})[""]
        torch.testing.assert_close(together.cache[name], alone, rtol=1e-9, atol=1e-11)


def test_a_module_that_runs_twice_waits_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(
                nn.Linear(8, 16, dtype=torch.float64),
                nn.GELU(),
                nn.Linear(16, 8, dtype=torch.float64),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(x + self.mlp(x))

    model, metric = Twice(), Metric(lambda logits: logits.pow(2).sum((1, 2)))
    x = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with lch.huggingface.attach(model, "mlp", cotangent=metric) as handle, torch.no_grad():
        model(x)
    first = model.mlp(x)
    read = (x + first).detach().requires_grad_()
    second = model.mlp(read)
    at_the_end = 2 * second.detach()
    expected = torch.autograd.grad(second, read, at_the_end)[0]
    torch.testing.assert_close(handle.cache["mlp", 1], expected)
    own = x.clone().requires_grad_()
    torch.testing.assert_close(
        handle.cache["mlp", 0], torch.autograd.grad(model.mlp(own), own, expected)[0]
    )


def test_waiting_for_the_logits_leaves_nothing_behind() -> None:
    model = models.huggingface("gpt2", torch.float64)
    with torch.no_grad():
        before = model(IDS, use_cache=True)
        with lch.huggingface.attach(model, cotangent=logit_difference(3, 4)):
            after = model(IDS, use_cache=True, output_hidden_states=True)
            assert not torch.is_grad_enabled()
        assert torch.equal(after.logits, before.logits)
        assert not after.logits.requires_grad
        assert not any(h.requires_grad for h in after.hidden_states)
        assert not any(layer.keys.requires_grad for layer in after.past_key_values.layers)


def test_a_metric_that_fails_leaves_the_model_as_it_was() -> None:
    model = models.huggingface("gpt2", torch.float64)
    with torch.no_grad():
        before = model(IDS).logits
        with lch.huggingface.attach(model, cotangent=Metric(lambda logits: logits / 0)):
            with pytest.raises(lch.InputError, match="one differentiable number"):
                model(IDS)
        assert not torch.is_grad_enabled()
        assert torch.equal(model(IDS).logits, before)


def test_another_handle_within_finishes_nothing_of_ours() -> None:
    model, metric = models.huggingface("gpt2", torch.float64), logit_difference(3, 4)
    name = "transformer.h.1.mlp"
    with torch.no_grad(), lch.huggingface.attach(model, name, cotangent=metric) as handle:
        model(IDS)
        alone = handle.cache[name]
        with lch.huggingface.attach(model.transformer, "h.0.mlp"):
            model(IDS)
        assert torch.equal(handle.cache[name], alone)


def test_a_part_of_the_model_alone_has_no_logits() -> None:
    model, metric = models.huggingface("gpt2", torch.float64), logit_difference(3, 4)
    with torch.no_grad(), lch.huggingface.attach(model, cotangent=metric):
        with pytest.raises(lch.SiteError, match="run the model that was attached to"):
            model.transformer(IDS)
        assert not torch.is_grad_enabled()
        assert not model(IDS).logits.requires_grad


class Around(nn.Module):
    """A model of a user's around one of HuggingFace."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_padding_is_known_around_a_model_too() -> None:
    inner, metric = huggingface("llama"), logit_difference(3, 4, position=-1)
    name, mask = "model.layers.1", torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    with lch.huggingface.attach(inner, name, cotangent=metric) as handle, in_float64():
        inner(IDS, attention_mask=mask)
        expected = handle.cache[name]
    outer = Around(inner)
    with lch.huggingface.attach(outer, f"inner.{name}", cotangent=metric) as handle, in_float64():
        outer(IDS, attention_mask=mask)
        assert torch.equal(handle.cache[f"inner.{name}"], expected)


def test_a_model_that_runs_again_within_a_pass_has_its_own_metric() -> None:
    model, metric, busy = models.huggingface("gpt2", torch.float64), logit_difference(3, 4), []
    name = "transformer.h.1"

    def again(_module: nn.Module, _args: Any) -> None:
        if not busy:
            busy.append(1)
            model(IDS + 1)

    with torch.no_grad(), lch.huggingface.attach(model, name, cotangent=metric) as handle:
        model(IDS)
        outer = handle.cache[name]
        model(IDS + 1)
        inner = handle.cache[name]
        hook = model.transformer.h[2].register_forward_pre_hook(again)
        try:
            model(IDS)
        finally:
            hook.remove()
        assert torch.equal(handle.cache[name, 0], inner)
        assert torch.equal(handle.cache[name, 1], outer)


def test_a_loss_is_no_logits() -> None:
    model, metric = models.huggingface("gpt2", torch.float64), logit_difference(3, 4)
    with torch.no_grad(), lch.huggingface.attach(model, cotangent=metric):
        with pytest.raises(lch.InputError, match="without labels"):
            model(IDS, labels=IDS, return_dict=False)


class Pair(tuple):
    """A class of output of a user's own."""


@dataclass
class Named:
    """Another."""

    last_hidden_state: Tensor


@pytest.mark.parametrize(
    "wrap",
    [lambda y: Pair((y,)), Named, lambda y: torch.max(y, -1, keepdim=True), lambda y: [y]],
    ids=["tuple", "dataclass", "torch", "list"],
)
@pytest.mark.parametrize("metric", [False, True])
def test_outputs_keep_their_class(wrap: Any, metric: bool) -> None:
    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, x: Tensor) -> Any:
            return wrap(self.linear(x).tanh())

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wraps = Wraps()

        def forward(self, x: Tensor) -> Tensor:
            out = self.wraps(x)
            kinds.append(type(out))
            value = out.last_hidden_state if isinstance(out, Named) else out[0]
            assert not value.requires_grad or metric
            return value

    kinds: list[type] = []
    model, x = Reads(), torch.randn(1, 3, 4, dtype=torch.float64)
    cotangent = Metric(lambda y: y.pow(2).sum((1, 2))) if metric else None
    with torch.no_grad():
        before = model(x)
        with lch.huggingface.attach(model, "wraps", cotangent=cotangent) as handle:
            assert torch.equal(model(x), before)
    assert len(set(kinds)) == 1
    assert handle.cache["wraps"].shape == x.shape


class Sine(nn.Module):
    """Not affine with any factor held fixed that is known of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sin()


def test_what_is_not_affine_is_refused_at_its_first_pass() -> None:
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.float64), Sine())
    x = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    handle = lch.huggingface.attach(model, "1", linearization="detached")
    with handle, torch.no_grad(), pytest.raises(lch.SiteError, match="is not affine"):
        model(x)
    assert torch.is_grad_enabled()


def test_samples_are_seen_by_nobody() -> None:
    model, calls = models.huggingface("gpt2", torch.float64), []
    name = module_name("gpt2", "attn")
    hook = model.get_submodule(name).c_proj.register_forward_hook(lambda *_: calls.append(1))
    try:
        with lch.huggingface.attach(model, name, radius=0.1, n_samples=4), torch.no_grad():
            model(IDS)
    finally:
        hook.remove()
    assert len(calls) == 1


def test_what_cannot_run_again_is_refused() -> None:
    model = models.huggingface("gpt2", torch.float64)
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        for kind in ("attn", "span"):
            with lch.huggingface.attach(model, module_name("gpt2", kind), radius=0.1):
                with pytest.raises(lch.SiteError, match="without a cache"):
                    model(IDS[:, :1], past_key_values=cache)


def test_a_stretch_within_a_block_runs_again_although_the_block_has_filled_its_cache() -> None:
    model, name = (
        models.huggingface("gpt2", torch.float64),
        "transformer.h.1.ln_2:transformer.h.1.mlp",
    )
    found = []
    for settings in ({}, {"radius": 0.0, "n_samples": 2}):
        with lch.huggingface.attach(model, name, **settings) as handle, torch.no_grad():
            cache = model(IDS, use_cache=True).past_key_values
        found.append(handle.cache[name])
        assert cache.get_seq_length() == IDS.shape[1]
    assert models.relative_error(found[1], found[0]) < 1e-12


def test_a_stretch_that_a_call_passes_twice_cannot_run_again() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.b(self.a(x).tanh()))).tanh()

    with lch.huggingface.attach(Twice(), "a:b", radius=0.1) as handle:
        with pytest.raises(lch.SiteError, match="2 times"):
            handle.model(torch.randn(2, 3))


@pytest.mark.usefixtures("as_users_run")
def test_handles_and_records_say_what_was_asked() -> None:
    model, name = models.huggingface("gpt2", torch.float64), module_name("gpt2", "attn")
    with lch.huggingface.attach(model, name, expert=True, output_positions=-1) as handle:
        assert handle.centroid_names == [name]
        endings = ("", "_offset", "_radius", "_alignment")
        assert handle.hook_names == [f"{name}{ending}" for ending in endings]
        assert handle.methods == {name: "VJP"}
        assert handle.records() == [
            {
                "site": name,
                "cotangent": "ones",
                "linearization": "jacobian",
                "output_positions": [-1],
            }
        ]
    with pytest.raises(lch.InputError, match="no affine expert"):
        lch.huggingface.attach(model, name, radius=0.1, expert=True)
    with pytest.raises(lch.InputError, match="not known"):
        lch.huggingface.attach(model, name, linearization="exact")

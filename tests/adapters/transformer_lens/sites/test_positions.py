"""Which positions count: those that are asked for, and those that are tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lch_plugin as lch
from lch_plugin.cotangents import Logit
from lch_plugin.sites import Site
from tests import models
from tests.adapters.transformer_lens.sites.common import (
    BUILDS,
    F64,
    assert_close,
    gradient,
    graph,
    held,
    names,
    read,
    tolerance,
)

pytestmark = pytest.mark.filterwarnings("ignore:run_with_hooks")


def test_output_positions_choose_what_counts(model: Any) -> None:
    values, _ = graph(model)
    at = names(model)
    x, y = values[at["resid_pre"].format(1)], values[at["resid_post"].format(1)]
    mus = read(
        model,
        Site("block", 1, output_positions=-1, label="last"),
        Site("block", 1, output_positions=[0, 3], label="two"),
        held(1, output_positions=-1, label="last"),
        held(1),
    )
    truth = gradient(y[:, -1], x)
    assert_close(mus["blocks.1.hook_centroid_last"], truth, tolerance(model))
    truth = gradient(y[:, [0, 3]], x)
    assert_close(mus["blocks.1.hook_centroid_two"], truth, tolerance(model))
    pattern = values["blocks.1.attn.hook_pattern"][:, 0]
    whole, last = (mus[f"blocks.1.attn.hook_centroid_head_0{e}"] for e in ("", "_last"))
    # All ones read every position alike, so a source counts by how much of it is attended to.
    ratio = (pattern[:, -1] / pattern.sum(1))[..., None]
    assert_close(last, (whole * ratio).detach())


def test_the_first_position_does_not_see_outputs_before_a_token(gpt2: Any) -> None:
    mu = read(gpt2, Site("block", 1, output_positions=2))["blocks.1.hook_centroid"]
    assert not mu[:, 3:].any()
    assert mu[:, :3].any(-1).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-gpt2", "bridge-llama", "compat-gpt2"])
def test_centroids_do_not_depend_on_what_a_prompt_is_batched_with(name: str, side: str) -> None:
    if name == "compat-gpt2":
        model = models.bridge("gpt2", F64)
        model.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    elif name == "bridge-llama":
        # In float64 HuggingFace's mask overflows to minus infinity, and its own logits to NaN.
        model = models.bridge("llama")
    else:
        model = BUILDS[name]()
    long, short = models.tokens(1, 7, seed=3), models.tokens(1, 4, seed=4)
    pad, mask = torch.zeros(1, 3, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)
    parts = (pad, short) if side == "left" else (short, pad)
    where = slice(3, 7) if side == "left" else slice(0, 4)
    mask[1] = 0
    mask[1, where] = 1
    ids = torch.cat([long, torch.cat(parts, 1)])
    sites = (
        *(Site(kind) for kind in ("mlp", "attn", "block", "model")),
        *(Site("span", (0, 2)), Site("head", index=1)),
        Site("block", cotangent=Logit(3, 4), label="logit"),
    )
    batched = read(model, *sites, ids=ids, attention_mask=mask)
    for row, alone in enumerate((read(model, *sites, ids=long), read(model, *sites, ids=short))):
        for hook, value in alone.items():
            found = batched[hook][row : row + 1]
            assert_close(found if row == 0 else found[:, where], value, 1e-5)
    for hook in ("blocks.1.hook_centroid", "blocks.2.hook_centroid_from_0"):
        padding = batched[hook][1][mask[1] == 0]
        assert not padding.any(), "outputs at padding must not count"


def test_strings_of_different_lengths_are_padded_and_do_not_leak() -> None:
    model = models.bridge("gpt2", F64)
    prompts = ["w1 w2 w3 w4 w5", "w6 w7"]
    with lch.attach(model, site="block"), torch.no_grad():
        name = "blocks.1.hook_centroid"
        batched = model.run_with_cache(prompts, names_filter=name, padding_side="left")[1][name]
        alone = model.run_with_cache(prompts[1], names_filter=name)[1][name]
    n = alone.shape[1]
    assert_close(batched[1:, -n:], alone, 1e-6)


def test_the_stacks_of_an_encoder_decoder_have_masks_of_their_own() -> None:
    from tests import families

    model = families.bridge("bart")
    ids = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(0))
    decoder_ids = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    with lch.attach(model, site="block") as handle, torch.no_grad():

        def run(**masks: Tensor) -> dict[str, Tensor]:
            kw = {"names_filter": handle.hook_names, "decoder_input_ids": decoder_ids, **masks}
            return dict(model.run_with_cache(ids, **kw)[1])

        of_encoder = run(attention_mask=mask)
        of_decoder = run(attention_mask=torch.ones_like(mask), decoder_attention_mask=mask)
    encoder, decoder = "encoder_blocks.0.hook_centroid", "decoder_blocks.0.hook_centroid"
    assert not of_encoder[encoder][1, 3:].any()
    assert of_encoder[decoder][1, 3:].any(-1).all()
    assert not of_decoder[decoder][1, 3:].any()
    assert of_decoder[encoder][1, 3:].any(-1).all()


@pytest.mark.parametrize("additive", [False, True])
def test_padding_is_found_in_masks_by_query(gpt2: Any, additive: bool) -> None:
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    by_query = (mask[:, None, None] & torch.ones(6, 6).tril().bool()).expand(2, 1, 6, 6)
    if additive:
        by_query = torch.zeros(2, 1, 6, 6, dtype=F64).masked_fill(~by_query, torch.finfo(F64).min)
    mu = read(gpt2, Site("block", 1), attention_mask=by_query)["blocks.1.hook_centroid"]
    assert not mu[1, 4:].any()
    assert_close(
        mu, read(gpt2, Site("block", 1), attention_mask=mask.long())["blocks.1.hook_centroid"], 1e-6
    )

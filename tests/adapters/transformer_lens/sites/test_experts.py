"""A centroid with its offset, radius, alignment and region."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens.toolkit import HookedTransformer
from lch_plugin.sites import Site
from tests import models
from tests.adapters.transformer_lens.sites.common import BUILDS, F64, IDS, names, read

pytestmark = pytest.mark.filterwarnings("ignore:run_with_hooks")


def test_experts_reproduce_the_output(model: Any) -> None:
    v = torch.linspace(-1, 2, models.D_MODEL, dtype=F64)
    with torch.no_grad():
        _, cache = model.run_with_cache(IDS)
    for kind in ("mlp", "block"):
        mus = read(model, Site(kind, 1, cotangent=v, expert=True))
        path = "blocks.1.mlp.hook_centroid" if kind == "mlp" else "blocks.1.hook_centroid"
        mu, offset, radius, alignment = (
            mus[path + e] for e in ("", "_offset", "_radius", "_alignment")
        )
        at = names(model)
        if kind == "mlp" and isinstance(model, HookedTransformer):
            x = model.blocks[1].ln2(cache["blocks.1.hook_resid_mid"]).detach()
            y = cache[at["mlp_out"].format(1)]
        elif kind == "mlp":
            x, y = cache["blocks.1.mlp.hook_in"], cache["blocks.1.mlp.hook_out"]
        else:
            x, y = cache[at["resid_pre"].format(1)], cache[at["resid_post"].format(1)]
        total = partial(
            torch.sum, **({"dim": -1, "keepdim": True} if kind == "mlp" else {"dim": (-2, -1)})
        )
        torch.testing.assert_close(total(mu * x) + offset, total(v * y))
        torch.testing.assert_close(radius, total(mu.square()) + 2 * offset)
        torch.testing.assert_close(alignment[..., 0], torch.cosine_similarity(mu, x, dim=-1))


@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-gpt2", "opt"])
def test_values_beside_a_centroid_are_sliced_as_transformer_lens_slices(name: str) -> None:
    """Positions are the last dimension but one of whatever has them; a sequence's number has none.

    OPT joins batch and position where its MLPs are.
    """
    model = models.bridge("opt", F64) if name == "opt" else BUILDS[name]()
    ids = models.tokens(3, 5, seed=2)
    site = [Site(k, 1, expert=True) for k in ("mlp", "block")]
    with lch.attach(model, site=site) as handle, torch.no_grad():
        names = handle.hook_names
        whole = model.run_with_cache(ids, names_filter=names)[1]
        last = model.run_with_cache(ids, names_filter=names, pos_slice=-1)[1]
        alone = model.run_with_cache(ids[:1], names_filter=names)[1]
        flat = model.run_with_cache(ids[:1], names_filter=names, remove_batch_dim=True)[1]
    assert sorted(whole) == sorted(names)
    for point, value in whole.items():
        of_sequence = point in ("blocks.1.hook_centroid_offset", "blocks.1.hook_centroid_radius")
        assert value.shape[:2] == ((3,) if of_sequence else (3, 5))
        torch.testing.assert_close(last[point], value if of_sequence else value[:, -1:])
        assert torch.equal(flat[point], alone[point][0])


def test_names_of_all_hook_points_and_of_the_centroids_alone(gpt2: Any) -> None:
    site = [Site("mlp", 1, expert=True), Site("block", 1, radius=0.1, n_samples=2)]
    with lch.attach(gpt2, site=site) as handle:
        assert handle.centroid_names == ["blocks.1.mlp.hook_centroid", "blocks.1.hook_centroid"]
        endings = ("", "_offset", "_radius", "_alignment"), ("", "_variance", "_standard_error")
        assert handle.hook_names == [
            name + ending
            for name, own in zip(handle.centroid_names, endings, strict=True)
            for ending in own
        ]
        assert handle.methods.keys() == set(handle.centroid_names)


def relu_model() -> HookedTransformer:
    model = models.lens_model(act_fn="relu", normalization_type="LN")
    return model.to(F64)


def test_a_relu_mlp_is_its_expert_within_a_region() -> None:
    model = relu_model()
    ids = IDS % model.cfg.d_vocab
    inputs: list[Tensor] = []
    mlp = model.blocks[0].mlp
    hook = mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    mus = read(model, Site("mlp", 0, expert=True), ids=ids)
    hook.remove()
    x = inputs[-1].detach()
    name = "blocks.0.mlp.hook_centroid"
    region = mus[name + "_region"]
    z = x @ mlp.W_in + mlp.b_in
    assert torch.equal(region, z > 0)
    # The nearest boundary of the region is the nearest zero of a pre-activation.
    distance = (z.abs() / mlp.W_in.norm(dim=0)).min(-1).values[..., None]
    direction = torch.randn(x.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    moved = x + 0.99 * distance * direction / direction.norm(dim=-1, keepdim=True)
    with torch.no_grad():
        total = mlp(moved).sum(-1)
    # b_out is part of the module's output, and of the offset.
    torch.testing.assert_close(
        total, (mus[name] * moved).sum(-1) + mus[name + "_offset"].squeeze(-1)
    )


def test_smooth_activations_have_no_region_code(gpt2: Any) -> None:
    assert "blocks.1.mlp.hook_centroid_region" not in read(gpt2, Site("mlp", 1, expert=True))

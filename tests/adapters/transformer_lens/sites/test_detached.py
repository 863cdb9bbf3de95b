"""The detached linearisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lch_plugin as lch
from lch_plugin.cotangents import Random
from lch_plugin.sites import Site
from tests import models
from tests.adapters.transformer_lens.sites.common import F64, IDS, read

pytestmark = pytest.mark.filterwarnings("ignore:run_with_hooks")


def without_biases(family: str = "gpt2") -> Any:
    hf = models.huggingface(family, F64)
    for name, parameter in hf.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return models.boot(hf, F64)


@pytest.mark.parametrize("kind", ["mlp", "attn", "block", "span", "model"])
def test_without_biases_the_detached_expert_is_the_component(kind: Any) -> None:
    model = without_biases()
    if kind == "model":  # Position embeddings come after the token embeddings: a bias of a kind.
        nn.init.zeros_(model.pos_embed.original_component.weight)
    layers = (0, 2) if kind == "span" else None if kind == "model" else 1
    width = models.D_VOCAB if kind == "model" else models.D_MODEL
    v = Random(1).at(torch.empty(1, width, dtype=F64))
    site = Site(kind, layers, cotangent=v, linearization="detached", expert=True)
    mus = read(model, site)
    (mu,) = (value for name, value in mus.items() if name.endswith(("centroid", "from_0")))
    (offset,) = (value for name, value in mus.items() if name.endswith("_offset"))
    scale = float(mu.norm()) + 1
    assert float(offset.abs().max()) < 1e-10 * scale
    plain = read(model, Site(kind, layers, cotangent=v))
    assert models.relative_error(mu, next(iter(plain.values()))) > 1e-2, "not the Jacobian"


def test_with_biases_the_offset_is_what_they_contribute() -> None:
    hf = models.huggingface("gpt2", F64)
    block = hf.transformer.h[1]
    x = torch.randn(1, 4, models.D_MODEL, dtype=F64, generator=torch.Generator().manual_seed(0))
    biases = [p for name, p in block.named_parameters() if name.endswith("bias")]

    def of_biases(*values: Tensor) -> Tensor:
        names = [name for name, _ in block.named_parameters() if name.endswith("bias")]
        return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,)).sum()

    def flat(row: Tensor) -> Tensor:
        return block(row.view(1, 4, -1)).reshape(1, -1)

    expert = lch.affine_expert(lch.detached(flat), x.reshape(1, -1))
    # With the factors fixed the output is linear in inputs and biases together.
    from lch_plugin.linearization import DetachedMode

    with DetachedMode() as mode:
        total = block(mode.follow(x.clone().requires_grad_())).sum()
    grads = torch.autograd.grad(total, biases, allow_unused=True)
    assert float(of_biases(*biases).detach()) == pytest.approx(float(total.detach()), abs=1e-9)
    share = sum(
        float((g * b).sum().detach()) for g, b in zip(grads, biases, strict=True) if g is not None
    )
    assert float(expert.offset) == pytest.approx(share, abs=1e-10)


def test_detached_sites_leave_the_logits_to_the_last_bit(model: Any) -> None:
    with torch.no_grad():
        expected = model(IDS)
    with lch.attach(model, site=Site("block", linearization="detached")) as handle, torch.no_grad():
        logits, cache = model.run_with_cache(IDS, names_filter=handle.hook_names)
    assert torch.equal(logits, expected)
    assert len(cache) == 3


def test_detached_sites_are_refused_where_they_would_change_the_callers_gradients(
    gpt2: Any,
) -> None:
    with lch.attach(gpt2, site=Site("block", linearization="detached")) as handle:
        with pytest.raises(lch.SiteError, match=r"no_grad\(\)"):
            gpt2.run_with_cache(IDS, names_filter=handle.hook_names)
        assert torch.is_grad_enabled()
        assert torch._C._len_torch_function_stack() == 0


def test_one_pass_has_one_linearisation(gpt2: Any) -> None:
    sites = (Site("span", (0, 2)), Site("block", 1, linearization="detached", label="d"))
    with lch.attach(gpt2, site=sites) as handle, torch.no_grad():
        for name in handle.hook_names:
            gpt2.run_with_cache(IDS, names_filter=name)
        with pytest.raises(lch.SiteError, match="overlap"):
            gpt2.run_with_cache(IDS, names_filter=handle.hook_names)
        assert not torch.is_grad_enabled()
        gpt2.run_with_cache(IDS, names_filter=handle.hook_names[0])

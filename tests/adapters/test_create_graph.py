"""Centroids that can be differentiated again, held to autograd through the modules themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lch_plugin as lch
from lch_plugin.cotangents import Random, logit_difference
from tests import models
from tests.adapters.common import NAMES

IDS = torch.tensor([[3, 14, 15, 9, 2, 6]])
LAYER = 1
FAMILIES = ("gpt2", "llama")
KINDS = ("mlp", "attn", "block")
F64 = torch.float64


def module_name(family: str, kind: str) -> str:
    layers, attention, mlp = NAMES[family]
    return f"{layers}.{LAYER}" + {"attn": f".{attention}", "mlp": f".{mlp}", "block": ""}[kind]


def penalty(mu: Tensor) -> Tensor:
    """A function of a centroid whose derivative tells its entries apart."""
    weights = torch.linspace(-1, 2, mu.numel(), dtype=mu.dtype).view_as(mu)
    return (weights * mu * mu).sum()


def by_autograd(model: nn.Module, family: str, kind: str, v: Any) -> dict[str, Tensor]:
    """Gradients of the penalty in all parameters, with nothing of ours."""
    module, found = model.get_submodule(module_name(family, kind)), {}

    def on_output(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        x = args[0] if args else kwargs["hidden_states"]
        w = v.at(y).expand_as(y)
        (found["mu"],) = torch.autograd.grad(y, x, w, create_graph=True)

    hook = module.register_forward_hook(on_output, with_kwargs=True)
    try:
        model(IDS)
    finally:
        hook.remove()
    return gradients(model, penalty(found["mu"]))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, parameters.values(), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(parameters.items(), found, strict=True)
    }


def through_huggingface(model: nn.Module, family: str, kind: str, v: Any) -> dict[str, Tensor]:
    name = module_name(family, kind)
    with lch.huggingface.attach(model, name, cotangent=v, create_graph=True) as handle:
        model(IDS)
        return gradients(model, penalty(handle.cache[name]))


def through_transformer_lens(model: nn.Module, family: str, kind: Any, v: Any) -> dict[str, Tensor]:
    bridge, found = models.boot(model, F64), []
    with lch.attach(bridge, site=lch.Site(kind, LAYER, cotangent=v, create_graph=True)) as handle:
        hooks = [(handle.hook_names[0], lambda mu, hook: found.append(mu))]
        bridge.run_with_hooks(IDS, fwd_hooks=hooks)
        return gradients(bridge, penalty(found[0]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_of_modules_equal_autograd(family: str, kind: str) -> None:
    v = Random(0)
    model = models.huggingface(family, F64)
    expected = by_autograd(model, family, kind, v)
    assert sum(bool(g.any()) for g in expected.values()) > 5
    found = through_huggingface(model, family, kind, v)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_of_sites_equal_autograd(family: str, kind: str) -> None:
    v = Random(0)
    expected = by_autograd(models.huggingface(family, F64), family, kind, v)
    found = through_transformer_lens(models.huggingface(family, F64), family, kind, v)
    # A bridge calls the same parameters by other names, and has queries, keys and values apart.
    ours, theirs = (
        torch.stack([g.norm() for g in all_.values()]).norm() for all_ in (found, expected)
    )
    # Llama's norms compute in float32.
    torch.testing.assert_close(ours, theirs, rtol=1e-8 if family == "gpt2" else 1e-5, atol=0)


def mlp(act: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), act(), nn.Linear(7, 4)).to(F64)


@pytest.mark.parametrize("act", [nn.GELU, nn.SiLU, nn.Tanh, nn.Softplus, nn.ReLU])
@pytest.mark.parametrize("settings", [{}, {"expert": True}, {"radius": 0.3, "n_samples": 3}])
def test_closed_forms_can_be_differentiated_again(
    act: Callable[[], nn.Module], settings: dict[str, Any]
) -> None:
    model, x = nn.Sequential(mlp(act)), torch.randn(2, 3, 4, dtype=F64)
    own = x.clone().requires_grad_()
    with lch.huggingface.attach(model, "0", create_graph=True, **settings) as handle:
        assert handle.methods == {"0": "closed form"}
        model(own)
        values = [handle.cache[name] for name in handle.hook_names]
    if "radius" in settings:
        generator = torch.Generator().manual_seed(0)
        local = lch.local_centroid(
            model, own, generator=generator, statistics=True, create_graph=True, **settings
        )
        # Without the standard error, whose square root has no derivative at zero.
        truth, values = [local.mean, local.variance], values[:2]
    else:
        expert = lch.affine_expert(model, own, create_graph=True)
        rest = (expert.offset, expert.radius, expert.alignment)
        truth = [expert.centroid, *(r[..., None] for r in rest)][: len(values)]
    inputs = [own, *model.parameters()]
    ours, theirs = (
        torch.autograd.grad(sum(penalty(t) for t in all_), inputs, allow_unused=True)
        for all_ in (values, truth)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_the_mathematics_can_be_differentiated_again() -> None:
    model = mlp(nn.GELU)

    def of(x: Tensor) -> Tensor:
        return lch.centroid(model, x, create_graph=True)

    x = torch.randn(2, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(of, x)
    torch.testing.assert_close(of(x).detach(), lch.centroid(model, x))
    assert not lch.centroid(model, x).requires_grad


def test_local_centroids_of_modules_are_means_of_differentiable_ones() -> None:
    model = models.huggingface("gpt2", F64)
    name = module_name("gpt2", "attn")
    settings: dict[str, Any] = {"radius": 1e-7, "n_samples": 2, "create_graph": True}
    with lch.huggingface.attach(model, name, cotangent=Random(0), **settings) as handle:
        model(IDS)
        found = gradients(model, penalty(handle.cache[name]))
    expected = by_autograd(model, "gpt2", "attn", Random(0))
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-5)


def test_where_no_graph_can_be_kept_it_says_so() -> None:
    model = models.huggingface("gpt2", F64)
    for kind in KINDS:
        name = module_name("gpt2", kind)
        with lch.huggingface.attach(model, name, create_graph=True), torch.no_grad():
            with pytest.raises(lch.InputError, match="gradients are off"):
                model(IDS)
        with lch.attach(models.bridge("gpt2", F64), site=lch.Site(kind, create_graph=True)) as h:
            lens = h._tracker.runs.model
            with torch.no_grad(), pytest.raises(lch.InputError, match="gradients are off"):
                lens.run_with_cache(IDS)
    for settings in ({"linearization": "detached"}, {"cotangent": logit_difference(3, 4)}):
        with pytest.raises(lch.InputError, match="create_graph=True goes with neither"):
            lch.Site("block", create_graph=True, **settings)
    with torch.no_grad(), pytest.raises(lch.InputError, match="gradients are off"):
        lch.centroid(nn.Linear(2, 2), torch.ones(1, 2), create_graph=True)

"""Users' hooks within an MLP, and before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens import attached_readers
from lch_plugin.adapters.transformer_lens.toolkit import HookedTransformer
from lch_plugin.mlp import activation_and_derivative
from tests import models
from tests.adapters.transformer_lens.common import IDS, NAMES, cached, pre_activation_name


def test_interventions_upstream_are_seen(model: Any) -> None:
    model = model.to(torch.float64)

    def shift(value: Tensor, hook: Any) -> Tensor:
        return value + torch.linspace(-1, 1, value.shape[-1], dtype=value.dtype)

    hooked = isinstance(model, HookedTransformer)
    mlp_input = "blocks.1.ln2.hook_normalized" if hooked else "blocks.1.mlp.hook_in"
    pre = pre_activation_name(model)
    mlp = model.blocks[1].mlp
    act = getattr(mlp, "act_fn", None) or mlp.original_component.act
    with lch.attach(model, layers=1):
        plain = cached(model)[NAMES[1]]
        for point in ("blocks.0.hook_resid_pre" if hooked else "blocks.0.hook_in", mlp_input, pre):
            with model.hooks(fwd_hooks=[(point, shift)]):
                cache = cached(model, [pre, NAMES[1]])
            _, derivative = activation_and_derivative(act, cache[pre])
            expected = (derivative * mlp.W_out.sum(-1)) @ mlp.W_in.T
            torch.testing.assert_close(cache[NAMES[1]], expected, rtol=1e-10, atol=1e-12)
            assert models.relative_error(cache[NAMES[1]], plain) > 1e-3


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_users_hooks_inside_the_component_fire_once(family: str) -> None:
    model, fired = models.bridge(family), []
    for name, point in model.blocks[1].mlp.named_modules():
        if isinstance(point, HookPoint):
            point.add_hook(lambda value, hook, name=name: fired.append(name))
        elif isinstance(point, nn.Module):
            point.register_forward_hook(lambda *call, name=name: fired.append("module " + name))
    model(IDS)
    expected = sorted(fired)
    del fired[:]
    handle = lch.attach(model)
    assert not [name for name in fired if not name.startswith("module")]  # silenced
    del fired[:]
    cached(model)
    assert sorted(fired) == expected
    handle.detach()


def test_an_exception_half_way_leaves_nothing_stale(model: Any) -> None:
    def fail(value: Tensor, hook: Any) -> None:
        raise RuntimeError("user error")

    with lch.attach(model):
        expected = cached(model)
        hooks = [(pre_activation_name(model), fail), (NAMES[1], lambda value, hook: None)]
        with pytest.raises(RuntimeError, match="user error"):
            model.run_with_hooks(IDS, fwd_hooks=hooks)
        model.reset_hooks()
        other = models.tokens(seed=5)
        fresh = cached(model, ids=other)
        again = cached(model)
        assert all(torch.equal(again[name], expected[name]) for name in NAMES)
        assert not torch.equal(fresh[NAMES[1]], expected[NAMES[1]])


@pytest.mark.parametrize("point", ["gate.hook_out", "in.hook_out", "hook_in"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_interventions_on_gated_mlps_are_seen(family: str, point: str) -> None:
    model = models.bridge(family, torch.float64)
    name, names = (
        f"blocks.1.mlp.{point}",
        ["blocks.1.mlp.gate.hook_out", "blocks.1.mlp.in.hook_out"],
    )

    def shift(value: Tensor, hook: Any) -> Tensor:
        return value + torch.linspace(-1, 1, value.shape[-1], dtype=value.dtype)

    with lch.attach(model, layers=1) as handle:
        plain = cached(model, NAMES[1])[NAMES[1]]
        with model.hooks(fwd_hooks=[(name, shift)]):
            cache = cached(model, [*names, NAMES[1]])
        mlp = attached_readers(model)[NAMES[1]].parts.weights
        value, derivative = activation_and_derivative(mlp.act, cache[names[0]])
        s = mlp.W_out.sum(-1)
        expected = (derivative * cache[names[1]] * s) @ mlp.W_gate.T + (value * s) @ mlp.W_in.T
    torch.testing.assert_close(cache[NAMES[1]], expected, rtol=1e-10, atol=1e-12)
    assert models.relative_error(plain, expected) > 1e-3
    assert handle.hook_names == [NAMES[1]]


def test_a_forward_pass_within_a_hook_does_not_disturb_the_outer_one(model: Any) -> None:
    inner = models.tokens(seed=9)

    def run_again(value: Tensor, hook: Any) -> None:
        if not running:
            running.append(True)
            model(inner)

    running: list[bool] = []
    with lch.attach(model):
        expected = cached(model)
        with model.hooks(fwd_hooks=[(pre_activation_name(model), run_again)]):
            cache = cached(model)
    assert running
    for name in NAMES[1:]:  # The cache's own hook at layer 0 has seen the inner pass last.
        assert torch.equal(cache[name], expected[name])

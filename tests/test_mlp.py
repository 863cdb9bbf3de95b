"""Closed forms, held to autograd and to removing neurons one at a time, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

import lch_plugin as lch
from lch_plugin.mlp import (
    MLP,
    GatedMLP,
    PlainMLP,
    activation_and_derivative,
    is_vanishing,
    mlp_centroid,
    neuron_scores,
    pull_back,
)

D_IN, D_MLP, D_OUT = 6, 9, 5
ACTIVATIONS = [F.gelu, F.silu, F.relu, torch.tanh, lambda z: F.gelu(z, approximate="tanh")]


def make_mlp(gated: bool, act: int = 0, dtype: torch.dtype = torch.float64) -> MLP:
    W, V = torch.randn(2, D_IN, D_MLP, dtype=dtype)
    a, b = torch.randn(2, D_MLP, dtype=dtype)
    W_out = torch.randn(D_MLP, D_OUT, dtype=dtype)
    return (
        GatedMLP(W, a, V, b, W_out, ACTIVATIONS[act])
        if gated
        else PlainMLP(W, a, W_out, ACTIVATIONS[act])
    )


def forward(mlp: MLP, x: Tensor, keep: Tensor | None = None) -> Tensor:
    """The MLP written out, with only the neurons in ``keep``."""
    pre = mlp.pre_activations(x)
    hidden = mlp.act(pre[0]) * (pre[1] if len(pre) == 2 else 1)
    return (hidden if keep is None else hidden * keep) @ mlp.W_out


def ablated_scores(mlp: MLP, x: Tensor, v: Tensor | None) -> Tensor:
    """The paper's score read literally: remove each neuron in turn and recompute."""
    full = lch.centroid(lambda x: forward(mlp, x), x, v)
    scores = []
    for j in range(D_MLP):
        keep = torch.ones(D_MLP, dtype=x.dtype)
        keep[j] = 0
        without = lch.centroid(lambda x, keep=keep: forward(mlp, x, keep), x, v)
        scores.append((without - full).square().mean() / full.norm())
    return torch.stack(scores)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    gated=st.booleans(),
    act=st.integers(0, len(ACTIVATIONS) - 1),
    own_cotangent=st.booleans(),
)
def test_closed_forms_equal_autograd_and_ablation(
    seed: int, gated: bool, act: int, own_cotangent: bool
) -> None:
    torch.manual_seed(seed)
    mlp, x = make_mlp(gated, act), torch.randn(4, D_IN, dtype=torch.float64)
    v = torch.randn(D_OUT, dtype=torch.float64) if own_cotangent else None
    truth = lch.centroid(lambda x: forward(mlp, x), x, v)
    if truth.norm() < 1e-6:  # ReLU may switch every neuron off; then there is nothing to compare.
        return
    mu = mlp_centroid(mlp, mlp.pre_activations(x), v)
    torch.testing.assert_close(mu, truth, rtol=1e-10, atol=1e-12)
    scores = neuron_scores(mlp, x, v)
    torch.testing.assert_close(scores, ablated_scores(mlp, x, v), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("gated", [False, True])
def test_closed_form_runs_in_every_grad_mode_without_a_graph(mode: type, gated: bool) -> None:
    torch.manual_seed(0)
    mlp, x = make_mlp(gated), torch.randn(4, D_IN, dtype=torch.float64)
    truth = lch.centroid(lambda x: forward(mlp, x), x)
    with mode():
        mu = mlp_centroid(mlp, tuple(z.requires_grad_() for z in mlp.pre_activations(x)))
    torch.testing.assert_close(mu.clone(), truth)
    assert not mu.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_half_precision_is_promoted_also_under_autocast(dtype: torch.dtype, gated: bool) -> None:
    torch.manual_seed(0)
    half = make_mlp(gated, dtype=dtype)
    wide = type(half)(
        **{k: v.double() if isinstance(v, Tensor) else v for k, v in vars(half).items()}
    )
    pre = tuple(z.to(dtype) for z in wide.pre_activations(torch.randn(4, D_IN).double()))
    truth = mlp_centroid(wide, tuple(z.double() for z in pre))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mu = mlp_centroid(half, pre)
    assert mu.dtype == torch.float32
    torch.testing.assert_close(mu.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activation_derivative_equals_finite_differences(act) -> None:
    z = torch.linspace(-3, 3, 50, dtype=torch.float64)
    value, derivative = activation_and_derivative(act, z)
    torch.testing.assert_close(value, act(z))
    slope = (act(z + 1e-6) - act(z - 1e-6)) / 2e-6
    torch.testing.assert_close(derivative, slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_centered_weights_are_recognised_in_every_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    W_out = torch.randn(64, 128, dtype=torch.float64)
    centered = W_out - W_out.mean(-1, keepdim=True)
    W_in = torch.randn(8, 64, dtype=dtype)
    assert is_vanishing(PlainMLP(W_in, None, centered.to(dtype), F.gelu))
    assert not is_vanishing(PlainMLP(W_in, None, W_out.to(dtype), F.gelu))
    v = torch.randn(128)
    assert not is_vanishing(PlainMLP(W_in, None, centered.to(dtype), F.gelu), v)
    assert is_vanishing(PlainMLP(W_in, None, centered.to(dtype), F.gelu), torch.full((128,), 3.0))


@pytest.mark.parametrize("name", sorted(set(ACT2FN) - {"xielu", "prelu"}))
def test_pull_back_is_the_derivative_of_every_activation_of_transformers(name: str) -> None:
    act = ACT2FN[name]
    z = torch.linspace(-9, 9, 200, dtype=torch.float64)  # None at a kink.
    weight = torch.linspace(-2, 3, 200, dtype=torch.float64)
    leaf = z.clone().requires_grad_()
    (truth,) = torch.autograd.grad(act(leaf), leaf, weight)
    torch.testing.assert_close(pull_back(act.forward, z, weight), truth, rtol=1e-12, atol=1e-13)


def test_activations_are_recognised_one_by_one() -> None:
    z, one = torch.linspace(-3, 3, 13, dtype=torch.float64), torch.ones(13, dtype=torch.float64)
    for act in (F.gelu, F.silu, F.relu, torch.tanh):  # Built-in functions, all of one module.
        truth = activation_and_derivative(act, z)[1]
        torch.testing.assert_close(pull_back(act, z, one), truth)

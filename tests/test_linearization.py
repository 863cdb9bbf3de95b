"""The detached linearisation: same values, and an affine map that is exact at any input."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import lch_plugin as lch
from lch_plugin.linearization import DetachedMode

D = 6
F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=generator(seed))


W, V, U = weight(D, D), weight(D, D, seed=1), weight(D, D, seed=2)
MIX = weight(D, D * D, seed=4)
GAIN = nn.Parameter(1 + 0.1 * weight(D, seed=3))
Component = Callable[[Tensor], Tensor]


def attention(x: Tensor) -> Tensor:
    scores = (x @ W) @ (x @ V).transpose(-1, -2)
    return torch.softmax(scores, -1) @ (x @ U)


def sdpa(x: Tensor) -> Tensor:
    q, k, v = ((x @ M)[:, None] for M in (W, V, U))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]


def linear_attention(x: Tensor) -> Tensor:
    return torch.einsum("bts,bse->bte", torch.bmm(x @ W, (x @ V).transpose(1, 2)), x @ U)


def rms_by_hand(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + GAIN)


def norm_by_hand(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return GAIN * (centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt())


def gelu_by_hand(x: Tensor) -> Tensor:
    z = x @ W
    return (0.5 * z * (1.0 + torch.tanh(0.8 * (z + 0.04 * torch.pow(z, 3.0))))) @ V


def experts(x: Tensor) -> Tensor:
    weights, chosen = torch.topk(F.softmax(x @ W, -1), 2)
    outputs = torch.stack([F.silu(x @ V) @ U, F.gelu(x @ U) @ W, x @ W, x @ V, x @ U, x], -2)
    return (
        outputs.gather(-2, chosen[..., None].expand(*chosen.shape, D)) * weights[..., None]
    ).sum(-2)


# Without a bias anywhere, so that the affine map is linear.
COMPONENTS: dict[str, Component] = {
    "attention": attention,
    "scaled_dot_product_attention": sdpa,
    "linear attention": linear_attention,
    "layer_norm": lambda x: F.layer_norm(x, (D,), GAIN) @ W,
    "rms_norm": lambda x: F.rms_norm(x, (D,), GAIN) @ W,
    "RMS norm by hand": rms_by_hand,
    "layer norm by hand": norm_by_hand,
    "normalize": lambda x: F.normalize(x, dim=-1) @ W,
    "GELU by hand": gelu_by_hand,
    "gated": lambda x: (F.silu(x @ W) * (x @ V)) @ U,
    "gated, gate second": lambda x: ((x @ V) * F.gelu(x @ W)) @ U,
    "gated by sigmoid": lambda x: torch.sigmoid(x @ W) * (x @ V),
    "glu": lambda x: F.glu(torch.cat([x @ W, x @ V], -1)) @ U,
    "squared ReLU": lambda x: torch.square(F.relu(x @ W)) @ V,
    "soft cap": lambda x: 3 * torch.tanh((x @ W) / 3) @ V,
    "gated by 1 - tanh": lambda x: (x @ V) * (1 - torch.tanh(x @ W)),
    "gated by a projected tanh": lambda x: (x @ U) * (1 + torch.tanh(x @ W).type_as(x) @ V),
    "mixed by a projected tanh": lambda x: (
        (x @ U)[..., None, :]
        @ (torch.eye(D, dtype=F64) + (torch.tanh(x @ W) @ MIX).unflatten(-1, (D, D)))
    )[..., 0, :],
    "gated by logsigmoid": lambda x: F.logsigmoid(x @ W) * (x @ V),
    "SoLU": lambda x: ((x @ W) * torch.softmax(x @ W, -1)) @ V,
    "gated by tanh": lambda x: (1 + torch.tanh(x @ W)) * (x @ V),
    "soft cap of a pattern": lambda x: torch.softmax(5 * torch.tanh(x @ W), -1) * (x @ V),
    "clamp": lambda x: (x @ W).clamp(-100, 100) @ V,
    "experts": experts,
    **{
        act.__name__: lambda x, act=act: act(x @ W) @ V
        for act in (F.gelu, F.silu, F.mish, F.elu, F.selu, F.celu, F.hardswish, F.relu, F.relu6)
    },
}


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 3))
@pytest.mark.parametrize("name", COMPONENTS)
def test_without_biases_the_centroid_reproduces_the_output(
    name: str, seed: int, scale: float
) -> None:
    f = COMPONENTS[name]
    x = scale * torch.randn(2, 4, D, dtype=F64, generator=generator(seed))
    v = torch.randn(2, 4, D, dtype=F64, generator=generator(seed + 1))
    assert torch.equal(lch.detached(f)(x), f(x))
    mu = lch.centroid(lch.detached(f), x, v)
    output = v * f(x)
    torch.testing.assert_close((mu * x).sum(), output.sum(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_replay_is_the_affine_map_itself(name: str) -> None:
    f = COMPONENTS[name]
    x, other = (torch.randn(2, 4, D, dtype=F64, generator=generator(s)) for s in (5, 6))
    with DetachedMode() as mode:
        leaf = mode.follow(x.clone().requires_grad_())
        y = f(leaf)
    (mu,) = torch.autograd.grad(y.sum(), leaf)

    def replayed(at: Tensor) -> Tensor:
        with DetachedMode(replay=mode.recorded) as replay:
            return f(replay.follow(at.clone().requires_grad_()))

    torch.testing.assert_close(replayed(x), y)
    change = replayed(other).sum() - y.sum()
    torch.testing.assert_close(change, (mu * (other - x)).sum())
    # Affine between the two as well.
    middle = replayed((x + other) / 2)
    torch.testing.assert_close(middle, (replayed(x) + replayed(other)) / 2)


@pytest.mark.parametrize("name", ["attention", "gated", "gelu", "layer_norm"])
def test_it_is_not_the_jacobian(name: str) -> None:
    f = COMPONENTS[name]
    x = torch.randn(1, 4, D, dtype=F64, generator=generator())
    detached, plain = lch.centroid(lch.detached(f), x), lch.centroid(f, x)
    assert float((detached - plain).norm() / plain.norm()) > 0.05


def test_of_a_relu_network_it_is_the_jacobian() -> None:
    def f(x: Tensor) -> Tensor:
        return F.relu(F.relu(x @ W) @ V) @ U

    x = torch.randn(5, D, dtype=F64, generator=generator())
    torch.testing.assert_close(lch.centroid(lch.detached(f), x), lch.centroid(f, x))


def test_the_offset_is_what_the_biases_contribute() -> None:
    layers = [nn.Linear(D, D, dtype=F64) for _ in range(3)]
    network = nn.Sequential(
        *(m for pair in pairwise(layers) for m in (pair[0], nn.GELU())), layers[-1]
    )
    x = torch.randn(1, D, dtype=F64, generator=generator())
    expert = lch.affine_expert(lch.detached(network), x)
    biases = [layer.bias for layer in layers]
    with DetachedMode() as mode:
        total = network(mode.follow(x.clone().requires_grad_())).sum()
    shares = torch.autograd.grad(total, biases)
    share = sum((g * b.detach()).sum() for g, b in zip(shares, biases, strict=True))
    torch.testing.assert_close(expert.offset[0], share)


def test_activations_at_zero_have_the_slope_for_a_ratio() -> None:
    for act, slope in ((F.gelu, 0.5), (F.silu, 0.5)):
        x = torch.zeros(1, D, dtype=F64)
        mu = lch.centroid(lch.detached(act), x)
        torch.testing.assert_close(mu, torch.full_like(x, slope), rtol=1e-5, atol=0)


def test_logsigmoid_is_a_constant_as_it_is_no_multiple_of_its_input() -> None:
    x = torch.full((1, D), 1e-9, dtype=F64)
    mu = lch.centroid(lch.detached(lambda t: F.logsigmoid(t) + t), x)
    torch.testing.assert_close(mu, torch.ones_like(x))


def test_weights_that_require_gradients_are_not_taken_for_inputs() -> None:
    x = torch.randn(1, D, dtype=F64, generator=generator())
    gated = lch.centroid(lch.detached(lambda t: t * (1.0 + GAIN)), x)
    torch.testing.assert_close(gated, (1.0 + GAIN.detach()).expand_as(x))


def test_paused_gradients_are_as_usual() -> None:
    x = torch.randn(1, D, dtype=F64, generator=generator()).requires_grad_()
    with DetachedMode() as mode:
        mode.follow(x)
        with mode.paused():
            y = F.gelu(x)
    (paused,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(paused, lch.centroid(F.gelu, x.detach()))
    assert not mode.recorded


def test_products_in_place_are_refused_and_arguments_may_be_named() -> None:
    x = torch.randn(1, D, dtype=F64, generator=generator())

    def in_place(t: Tensor) -> Tensor:
        h = 2 * t
        h.mul_(t + 1)
        return h

    with pytest.raises(lch.NotDifferentiableError, match=r"a \* b"):
        lch.centroid(lch.detached(in_place), x)
    by_name = lch.centroid(lch.detached(lambda t: torch.mul(input=t, other=F.gelu(input=t))), x)
    by_position = lch.centroid(lch.detached(lambda t: t * F.gelu(t)), x)
    assert torch.equal(by_name, by_position)


def test_the_callers_tensor_is_left_as_it_was() -> None:
    x = torch.randn(1, D, dtype=F64)
    lch.detached(F.gelu)(x)
    assert not vars(x)


@pytest.mark.parametrize("name", ["attention", "scaled_dot_product_attention"])
def test_through_patterns_attention_keeps_its_jacobian(name: str) -> None:
    f = COMPONENTS[name]
    x = torch.randn(2, 4, D, dtype=F64, generator=generator())
    with DetachedMode(through_patterns=True) as mode:
        leaf = mode.follow(x.clone().requires_grad_())
        y = f(leaf)
    (mu,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.equal(y, f(x))
    assert not mode.recorded
    torch.testing.assert_close(mu, lch.centroid(f, x))


def test_through_patterns_all_else_is_held_fixed() -> None:
    """The product rule by hand, for a gate and a norm after attention."""

    def after(y: Tensor) -> Tensor:
        return F.silu(F.layer_norm(y, (D,))) @ W

    x = torch.randn(2, 4, D, dtype=F64, generator=generator())
    with DetachedMode(through_patterns=True) as mode:
        leaf = mode.follow(x.clone().requires_grad_())
        total = after(attention(leaf)).sum()
    (mu,) = torch.autograd.grad(total, leaf)
    cotangent = lch.centroid(lch.detached(after), attention(x))
    torch.testing.assert_close(mu, lch.centroid(attention, x, cotangent))
    assert len(mode.recorded) == 2


@pytest.mark.parametrize("name", ["SoLU", "experts"])
def test_through_patterns_other_softmaxes_are_held_fixed(name: str) -> None:
    """Of what attention has passed on as well, which is no score for having been contracted."""
    f = COMPONENTS[name]
    x = torch.randn(2, 4, D, dtype=F64, generator=generator())
    with DetachedMode(through_patterns=True) as mode:
        leaf = mode.follow(x.clone().requires_grad_())
        total = f(attention(leaf) @ V).sum()
    (mu,) = torch.autograd.grad(total, leaf)
    cotangent = lch.centroid(lch.detached(f), attention(x) @ V)
    torch.testing.assert_close(mu, lch.centroid(attention, x, cotangent @ V.T))

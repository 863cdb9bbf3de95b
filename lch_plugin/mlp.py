"""Closed-form experts of MLPs: centroids and neuron scores without autograd.

An MLP's Jacobian is two weight matrices around a diagonal, so its centroid needs nothing but
the pre-activations the model has just computed. With ``s = W_out v`` (the sum of each row of
``W_out`` for the all-ones cotangent)::

    plain  y = act(z) W_out,           z = x W_in + b
           mu = (act'(z) * s) W_in^T
    gated  y = (act(g) * u) W_out,     g = x W_gate + b_gate,  u = x W_in + b_in
           mu = (act'(g) * u * s) W_gate^T + (act(g) * s) W_in^T

by the chain rule; output biases and whatever else is constant drop out. Removing neuron ``j``
takes exactly its own term of these sums away, which gives every neuron's score at once
(`neuron_scores`). Weights are in TransformerLens orientation: ``(d_in, d_mlp)`` for the input
side and ``(d_mlp, d_out)`` for the output side.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lch_plugin.weak_cache import WeakCache

Activation = Callable[[Tensor], Tensor]

# ||W_out v|| over what a random direction of the same norm would give: about 1 for trained
# weights, 1e-3 or less (bfloat16; 1e-7 in float32) where v is orthogonal to every row.
_VANISHING_READ = 1e-2


@dataclass(frozen=True)
class PlainMLP:
    """``y = act(x W_in + b_in) W_out``: GPT-2, GPT-NeoX, OPT."""

    W_in: Float[Tensor, "d_in d_mlp"]
    b_in: Float[Tensor, " d_mlp"] | None
    W_out: Float[Tensor, "d_mlp d_out"]
    act: Activation

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Tensor]:
        """``(z,)``, each of shape ``(*batch, d_mlp)``."""
        return (_linear(x, self.W_in, self.b_in),)

    def input_gradients(
        self, pre: tuple[Tensor, ...], s: Float[Tensor, "*#batch d_mlp"]
    ) -> tuple[tuple[Float[Tensor, "*batch d_mlp"], Float[Tensor, "d_in d_mlp"]], ...]:
        """Pairs ``(coefficients, W)`` with ``mu = sum(coefficients @ W.T)``."""
        (z,) = pre
        return ((pull_back(self.act, z, s), self.W_in),)

    def activations(self, pre: tuple[Tensor, ...]) -> Float[Tensor, "*batch d_mlp"]:
        """What ``W_out`` reads."""
        return self.act(pre[0])

    def neurons(self, indices: list[int]) -> PlainMLP:
        """The MLP that these neurons are."""
        b_in = None if self.b_in is None else self.b_in[indices]
        return PlainMLP(self.W_in[:, indices], b_in, self.W_out[indices], self.act)


@dataclass(frozen=True)
class GatedMLP:
    """``y = (act(x W_gate + b_gate) * (x W_in + b_in)) W_out``: Llama, Qwen, Gemma, Phi-3."""

    W_gate: Float[Tensor, "d_in d_mlp"]
    b_gate: Float[Tensor, " d_mlp"] | None
    W_in: Float[Tensor, "d_in d_mlp"]
    b_in: Float[Tensor, " d_mlp"] | None
    W_out: Float[Tensor, "d_mlp d_out"]
    act: Activation

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Tensor, Tensor]:
        """``(g, u)``, each of shape ``(*batch, d_mlp)``."""
        return _linear(x, self.W_gate, self.b_gate), _linear(x, self.W_in, self.b_in)

    def input_gradients(
        self, pre: tuple[Tensor, ...], s: Float[Tensor, "*#batch d_mlp"]
    ) -> tuple[tuple[Float[Tensor, "*batch d_mlp"], Float[Tensor, "d_in d_mlp"]], ...]:
        """Pairs ``(coefficients, W)`` with ``mu = sum(coefficients @ W.T)``."""
        g, u = pre
        return (pull_back(self.act, g, u * s), self.W_gate), (self.act(g) * s, self.W_in)

    def activations(self, pre: tuple[Tensor, ...]) -> Float[Tensor, "*batch d_mlp"]:
        """What ``W_out`` reads."""
        g, u = pre
        return self.act(g) * u

    def neurons(self, indices: list[int]) -> GatedMLP:
        """The MLP that these neurons are."""
        b_gate, b_in = (None if b is None else b[indices] for b in (self.b_gate, self.b_in))
        return GatedMLP(
            *(self.W_gate[:, indices], b_gate, self.W_in[:, indices], b_in),
            *(self.W_out[indices], self.act),
        )


MLP = PlainMLP | GatedMLP


def mlp_centroid(
    mlp: MLP,
    pre: tuple[Float[Tensor, "*batch d_mlp"], ...],
    cotangent: Float[Tensor, "*#batch d_out"] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*batch d_in"]:
    """Centroid ``J^T v`` of an MLP from its pre-activations, in closed form.

    One extra matrix product (two if gated) and no graph.

    Args:
        mlp: the weights.
        pre: what ``mlp.pre_activations(x)`` gives, or the model's own values of them.
        cotangent: ``v``, one for all rows or one a row; all ones if None.
        dtype: as `centroid_of_neurons`.
    """
    return centroid_of_neurons(mlp, pre, read_direction(mlp, cotangent, dtype=dtype), dtype=dtype)


def centroid_of_neurons(
    mlp: MLP,
    pre: tuple[Float[Tensor, "*batch d_mlp"], ...],
    s: Float[Tensor, "*#batch d_mlp"],
    *,
    dtype: torch.dtype | None = None,
    create_graph: bool = False,
) -> Float[Tensor, "*batch d_in"]:
    """Gradient of ``sum_j s_j a_j`` in the MLP's input, ``a`` the activations that ``W_out`` reads.

    With ``s = W_out v`` that is the MLP's centroid, with ``s`` one-hot the centroid of a neuron.

    Args:
        mlp: the weights.
        pre: pre-activations.
        s: weight of each neuron, one for all rows or one a row.
        dtype: dtype of the computation and the result; if None that of the pre-activations, but at
            least float32, also under autocast: the product of a derivative and a row sum would
            otherwise lose what little precision is left.
        create_graph: keep the graph, in the pre-activations, ``s`` and the weights.
    """
    with torch.set_grad_enabled(create_graph), torch.autocast(pre[0].device.type, enabled=False):
        pre = tuple(z.to(dtype or at_least_float32(z)) for z in pre)
        terms = mlp.input_gradients(pre, s.to(pre[0]))
        return _total(c @ W.to(c.dtype).T for c, W in terms)


def neuron_scores(
    mlp: MLP,
    x: Float[Tensor, "n_samples *batch d_in"],
    cotangent: Float[Tensor, " d_out"] | None = None,
) -> Float[Tensor, "*batch d_mlp"]:
    """How far removing each neuron moves the centroids at ``x``: every neuron at once.

    The paper's score of neuron ``j`` (arXiv 2604.11962, circuit discovery) is the mean squared
    change of the centroid over samples and dimensions when ``j`` is removed, over the Frobenius
    norm of all the centroids. The change is ``j``'s own term of the closed form, so::

        plain  score_j = mean_n(act'(z_nj)^2) s_j^2 |w_in_j|^2 / d_in / ||MU||_F
        gated  the squared norm of s_j (act'(g_j) u_j w_gate_j + act(g_j) w_in_j), expanded into
               its two squares and their inner product

    Args:
        mlp: the weights.
        x: points of a neighbourhood, or of several side by side, in the MLP's input space.
        cotangent: ``v``; all ones if None.

    Returns:
        Scores, zero or more: a magnitude, with no sign.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x = _promote(x)
        terms = mlp.input_gradients(mlp.pre_activations(x), read_direction(mlp, cotangent))
        terms = tuple((coefficients, _promote(W)) for coefficients, W in terms)
        squared_change = _total(
            (c * d).mean(0) * (W * V).sum(0) for c, W in terms for d, V in terms
        )
        mu = _total(c @ W.T for c, W in terms)
        # Where every neuron is off the centroids are zero, and so is every change.
        norm = torch.linalg.vector_norm(mu, dim=(0, -1))[..., None]
        return squared_change / x.shape[-1] / norm.clamp_min(torch.finfo(mu.dtype).tiny)


def read_direction(
    mlp: MLP,
    cotangent: Float[Tensor, "*batch d_out"] | None = None,
    *,
    dtype: torch.dtype | None = None,
    create_graph: bool = False,
) -> Float[Tensor, "*batch d_mlp"]:
    """``s = W_out v``: how strongly the cotangent reads each neuron, at least in float32."""
    with torch.set_grad_enabled(create_graph), torch.autocast(mlp.W_out.device.type, enabled=False):
        W_out = mlp.W_out.to(dtype or at_least_float32(mlp.W_out))
        return W_out.sum(-1) if cotangent is None else cotangent.to(W_out) @ W_out.T


def is_vanishing(mlp: MLP, cotangent: Float[Tensor, " d_out"] | None = None) -> bool:
    """Whether the cotangent is numerically orthogonal to everything the MLP writes.

    So it is for all ones after ``center_writing_weights``, which makes each row of ``W_out``
    sum to zero: what is left of the centroid is rounding noise.
    """
    W_out = mlp.W_out.detach()
    return reads_nothing(W_out, W_out.new_ones(W_out.shape[-1]) if cotangent is None else cotangent)


def reads_nothing(W: Float[Tensor, "n d_out"], v: Float[Tensor, " d_out"]) -> bool:
    """Whether a cotangent is numerically orthogonal to every row of a writing weight."""
    W = _promote(W)
    v = v.to(W)
    typical = float(W.norm() * v.norm()) / math.sqrt(W.shape[-1])
    return float((W @ v).norm()) < _VANISHING_READ * typical


def pull_back(
    act: Activation, z: Float[Tensor, "*batch d_mlp"], weight: Float[Tensor, "*#batch d_mlp"]
) -> Float[Tensor, "*batch d_mlp"]:
    """``act'(z) * weight`` for an elementwise ``act``, in any grad mode.

    Activations that torch has a backward kernel for are recognised by what they compute, whatever
    their class: one pass over ``z``, where forward mode makes a dozen for a GELU written out.
    """
    # Not all kernels have a derivative of their own.
    kernel = None if torch.is_grad_enabled() and z.requires_grad else _kernel(act)
    if kernel is None:
        return activation_and_derivative(act, z)[1] * weight
    return kernel(weight.expand_as(z), z)


def activation_and_derivative(
    act: Activation, z: Float[Tensor, "*batch d_mlp"]
) -> tuple[Float[Tensor, "*batch d_mlp"], Float[Tensor, "*batch d_mlp"]]:
    """``act(z)`` and ``act'(z)`` at once, for an elementwise ``act``, in any grad mode."""
    # Forward mode: one pass and no graph, and unlike autograd.grad it runs in inference_mode.
    value, derivative = torch.func.jvp(act, (z,), (torch.ones_like(z),))  # type: ignore[misc]
    return value, derivative


# Each activation beside its backward, (weight, z) -> act'(z) * weight. Functions of ours, which
# look torch's up when called: ours travel to other processes, and torch's do not.
_KERNELS: tuple[tuple[Activation, Callable[[Tensor, Tensor], Tensor]], ...] = (
    (
        lambda z: F.gelu(z, approximate="tanh"),
        lambda weight, z: torch.ops.aten.gelu_backward(weight, z, approximate="tanh"),
    ),
    (
        lambda z: F.gelu(z),
        lambda weight, z: torch.ops.aten.gelu_backward(weight, z),
    ),
    (
        lambda z: F.silu(z),
        lambda weight, z: torch.ops.aten.silu_backward(weight, z),
    ),
    (
        lambda z: F.relu(z),
        lambda weight, z: torch.ops.aten.threshold_backward(weight, z, 0),
    ),
    (
        lambda z: z * torch.sigmoid(1.702 * z),
        lambda weight, z: torch.ops.aten.silu_backward(weight, 1.702 * z),
    ),
)
_recognised: WeakCache[Callable[[Tensor, Tensor], Tensor] | None] = WeakCache()


def _kernel(act: Activation) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Torch's backward kernel of an activation, if it has one."""
    owner = getattr(act, "__self__", None)
    key = owner if isinstance(owner, nn.Module) else act  # A bound method is made anew each time.
    try:
        if key not in _recognised:
            _recognised[key] = _recognise(act)
        return _recognised[key]
    except TypeError:  # No weak reference to it, as to a functools.partial of C code.
        return _recognise(act)


def _recognise(act: Activation) -> Callable[[Tensor, Tensor], Tensor] | None:
    z = torch.cat([torch.linspace(-12, 12, 241), torch.tensor([0.0, 1e-3, -1e-3])]).double()
    try:
        value = act(z)
    except RuntimeError:  # With parameters of another dtype.
        return None
    for known, kernel in _KERNELS:
        if torch.allclose(value, known(z), rtol=1e-12, atol=1e-14):
            return kernel
    return None


def is_piecewise_linear(act: Activation) -> bool:
    """Whether an activation has one slope on each side of zero, as ReLU has."""
    z = torch.tensor([-3.0, -1.0, -0.1, 0.1, 1.0, 3.0], dtype=torch.float64)
    try:
        _, slopes = activation_and_derivative(act, z)
    except RuntimeError:  # With parameters of another dtype, or a backward written by hand.
        return False
    return bool((slopes[:3] == slopes[0]).all() and (slopes[3:] == slopes[3]).all())


def _linear(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    W = _promote(W).to(x.dtype)
    return x @ W if b is None else x @ W + b.to(x.dtype)


def _total(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


def at_least_float32(tensor: Tensor) -> torch.dtype:
    """The tensor's dtype, or float32: half precision is for storing, not for adding up."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _promote(tensor: Tensor) -> Tensor:
    return tensor.to(at_least_float32(tensor))

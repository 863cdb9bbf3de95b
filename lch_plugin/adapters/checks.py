"""What a centroid has to be, whatever the toolkit: read from weights, more than noise, finite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lch_plugin.cotangents import (
    AnyCotangent,
    Cotangent,
    Logit,
    Metric,
    as_cotangent,
    evaluate,
)
from lch_plugin.errors import InputError, NonFiniteError, SiteError, VanishingCentroidError
from lch_plugin.linearization import DetachedMode
from lch_plugin.mlp import MLP, reads_nothing

_READABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Largest relative distance of a closed form from autograd, by the model's dtype: far above
# rounding, and far below what a wrong activation or layout gives.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
# The same of the detached linearisation: HuggingFace's norms compute in float32 at best.
AFFINE_TOLERANCE = {**TOLERANCE, torch.float64: 1e-5, torch.float32: 1e-3}
# A centroid this much smaller than one through a random cotangent is rounding noise.
_VANISHING = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
_CURE = (
    "All ones do that to whatever ends in a LayerNorm (the blocks of BERT) and to writing weights "
    "that were centered. Pass another cotangent, or name another module."
)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps weights of a module elsewhere until the module runs."""
    hooks = (getattr(m, "_hf_hook", None) for m in module.modules())
    # One, or several in a row.
    return any(
        getattr(hook, "offload", False) for one in hooks for hook in getattr(one, "hooks", [one])
    )


def check_loaded(module: nn.Module, name: str) -> None:
    """Refuse a module whose weights cannot be read.

    Raises:
        SiteError: they are on the meta device, or quantised.
    """
    for parameter_name, parameter in module.named_parameters():
        if parameter.is_meta and is_offloaded(module):
            raise SiteError(
                f"{parameter_name} of {name} is offloaded by accelerate, and a closed form reads "
                "weights when it pleases. Name modules in lch.huggingface.attach (such as "
                "'model.layers.*.mlp'), whose centroids then come by a vector-Jacobian product; "
                "or give a device_map with room for them."
            )
        if parameter.is_meta or parameter.dtype not in _READABLE:
            raise SiteError(
                f"{parameter_name} of {name} has dtype {parameter.dtype} on device "
                f"{parameter.device}: loaded floating-point weights are needed. Load the model "
                "with its weights, unquantised."
            )


def check_more_than_noise(
    name: str, mu: float, typical: float, dtype: torch.dtype, *, cure: str
) -> None:
    """Refuse a cotangent that reads next to nothing of what a component writes.

    Args:
        name: of the centroid.
        mu: norm of the centroid.
        typical: the same through a random cotangent of the same norm.
        dtype: what they were computed in.
        cure: ends the message.

    Raises:
        VanishingCentroidError: the centroid is rounding noise.
    """
    # With nothing to read for any cotangent (weights of zeros), nothing is wrong with this one.
    if typical > 0 and mu <= _VANISHING[dtype] * typical:
        raise VanishingCentroidError(
            f"{name}: the cotangent reads next to nothing of what is written there ({mu:.1e}, "
            f"where a random one reads {typical:.1e}), so the centroid would be rounding noise (of "
            f"a block: the cotangent itself). {cure}"
        )


def known_at_once(cotangent: Float[Tensor, " d_out"] | AnyCotangent | None) -> Cotangent:
    """A cotangent as `lch_plugin.cotangents.as_cotangent` has it, if it need not wait for logits.

    Raises:
        InputError: it has to, or is none.
    """
    v = as_cotangent(cotangent)
    if isinstance(v, Logit | Metric):
        raise InputError(
            f"cotangent {v.name!r} is known only once the model has run to its end, which "
            "lch.attach on a TransformerBridge waits for and this does not. Compute the direction "
            "in a first trace or forward pass, and pass it as a tensor."
        )
    return v


def check_cotangent(
    name: str,
    v: Float[Tensor, ...],
    mu: Float[Tensor, ...],
    gradient: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> None:
    """Refuse a cotangent through which a component's centroid is rounding noise.

    Args:
        name: of the centroid.
        v: cotangent, in the shape of the component's output.
        mu: centroid.
        gradient: the centroid through another cotangent.
        dtype: what they were computed in.

    Raises:
        VanishingCentroidError: so it is.
    """
    # A random direction where the cotangent reads anything at all.
    r = noise(v) * (v != 0)
    r = r * (v.norm() / r.norm())
    pairs = [(mu, gradient(r))]
    if v.shape == mu.shape:  # The residual stream itself passes a cotangent on as it is.
        pairs.append((mu - v, pairs[0][1] - r))
    for a, typical in pairs:
        norms = float(a.detach().norm()), float(typical.detach().norm())
        check_more_than_noise(name, *norms, dtype, cure=_CURE)


def check_mlp_cotangent(name: str, mlp: MLP, cotangent: Cotangent) -> None:
    """Refuse a fixed cotangent that is orthogonal to everything an MLP writes, or does not fit.

    Raises:
        InputError: it is not of the shape of the output.
        VanishingCentroidError: the centroid would be rounding noise.
    """
    W_out = mlp.W_out
    check_reads(name, "this MLP", W_out, evaluate(cotangent, W_out.new_ones(W_out.shape[-1])))


def check_reads(
    name: str,
    writer: str,
    W_out: Float[Tensor, "n d_out"],
    v: Float[Tensor, " d_out"],
    *,
    cure: str = _CURE,
) -> None:
    """Refuse a cotangent that is orthogonal to everything a component writes.

    Args:
        name: of the centroid.
        writer: the component, in the message.
        W_out: its writing weights.
        v: cotangent.
        cure: ends the message.

    Raises:
        VanishingCentroidError: the centroid would be rounding noise.
    """
    if reads_nothing(W_out.detach(), v):
        raise VanishingCentroidError(
            f"{name}: the cotangent is orthogonal to everything {writer} writes, so its centroid "
            f"would be rounding noise. {cure}"
        )


def distance_from_affine(fn: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> float:
    """How far a component is from affine with the factors held fixed that it has at an input.

    Zero where it is affine: then its change at another input, read through a cotangent, is what the
    centroid says. Relative to the change itself.

    Args:
        fn: the component, as a function of what it reads.
        x: input.
        v: cotangent, in the shape of ``fn(x)``.

    Raises:
        SiteError: it does other things at another input, so that no factors can be held.
    """
    shift = noise(x) * x.std()
    with torch.enable_grad(), DetachedMode() as mode:
        y = fn(mode.follow(x.detach().requires_grad_()).clone())
    with torch.enable_grad(), DetachedMode(mode.recorded) as replay:
        variable = replay.follow((x.detach() + shift).requires_grad_())
        try:
            shifted = fn(variable.clone())
        except (StopIteration, RuntimeError) as error:
            raise SiteError(f"no detached linearisation of this component: {error}") from None
    (mu,) = torch.autograd.grad(shifted, variable, v.to(shifted))
    return off_by(v, (shifted - y).detach(), mu, shift)


def off_by(v: Tensor, change: Tensor, mu: Tensor, shift: Tensor) -> float:
    """How far the change of an output is from what a centroid says, relative to that change."""
    v, change, mu, shift = (t.double() for t in (v, change, mu, shift))
    off = float((v * change).sum() - (mu * shift).sum())
    return abs(off) / max(float(v.norm() * change.norm()), torch.finfo(torch.float64).tiny)


def not_affine(name: str, kind: str, off: float) -> SiteError:
    """The error that says so."""
    return SiteError(
        f"{name}: with its factors fixed the {kind} is not affine (off by {off:.1e} of its change "
        "at another input), so it has no exact expert of this kind. Some function in it is not "
        "among those of lch_plugin.linearization. Use the Jacobian."
    )


def check_finite(name: str, tensor: Tensor, place: str = "") -> None:
    """Refuse a centroid with NaN or infinite values.

    Args:
        name: of the centroid.
        tensor: the centroid.
        place: follows in the message.

    Raises:
        NonFiniteError: so it is.
    """
    # The sum first, which takes one pass: it is finite unless an entry is not.
    if not tensor.is_floating_point() or bool(tensor.sum().isfinite()):
        return
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise NonFiniteError(
            f"{name} came out with {bad} of {tensor.numel()} values NaN or infinite{place}. Look "
            "at the activations there (half precision overflows at 65504: load the model in "
            "float32), and at masked rows, whose gradients may be NaN where their values are not."
        )


def noise(like: Tensor) -> Tensor:
    """Standard normal noise of a tensor's shape, dtype and device, the same each time."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(like.shape, dtype=torch.float64, generator=generator, device="cpu")
    return numbers.to(like)

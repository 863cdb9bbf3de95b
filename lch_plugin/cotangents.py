"""What a centroid is read through: the ``v`` of ``J^T v``.

The paper's centroid takes all ones. Anything else that weighs the outputs of a component asks the
same affine expert another question, and three kinds of answer exist:

- known beforehand, or from the component's output: an object with a method ``at(y)`` and a
  ``name`` (`Cotangent`); `Ones`, `Vector` and `Random` are three, and a class of your own is a
  fourth;
- the direction in which the residual stream raises a logit, through the final norm as it is in this
  very forward pass: `Logit`;
- the gradient of a metric of the logits, through everything downstream: `Metric`.

The last two are known only once the model has got that far, so their centroids come out of hook
points on the model rather than on the block (`lch_plugin.Site`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lch_plugin.errors import InputError
from lch_plugin.metrics import Metric, check_foil, logit_difference

__all__ = [
    "AnyCotangent",
    "Cotangent",
    "Logit",
    "Metric",
    "Ones",
    "Random",
    "Vector",
    "as_cotangent",
    "decoder_row",
    "evaluate",
    "is_fixed",
    "logit_difference",
]


@runtime_checkable
class Cotangent(Protocol):
    """Weighs the outputs of a component.

    Attributes:
        name: for hook names and records.
    """

    @property
    def name(self) -> str: ...

    def at(self, y: Float[Tensor, "*batch d_out"]) -> Float[Tensor, ...]:
        """``v`` for the output ``y``: ``(d_out,)``, or anything that broadcasts to ``y``."""
        ...


@dataclass(frozen=True)
class Ones:
    """All ones: the paper's centroid."""

    name: str = "ones"

    def at(self, y: Float[Tensor, "*batch d_out"]) -> Float[Tensor, " d_out"]:
        return torch.ones(y.shape[-1], dtype=y.dtype, device=y.device)


@dataclass(frozen=True, eq=False)
class Vector:
    """One direction of the output space, the same at every position.

    Raises:
        InputError: not a floating-point vector, not finite, or all zeros.
    """

    v: Float[Tensor, " d_out"]
    name: str = "vector"

    def __post_init__(self) -> None:
        v = self.v
        if not isinstance(v, Tensor) or v.ndim != 1 or not v.is_floating_point():
            found = f"{tuple(v.shape)}, {v.dtype}" if isinstance(v, Tensor) else type(v).__name__
            raise InputError(
                f"a cotangent is a floating-point vector of the output space, shape (d_out,); got "
                f"{found}."
            )
        _check_direction(v)
        # A copy: what the caller does to theirs afterwards is their affair.
        object.__setattr__(self, "v", v.detach().clone())

    def at(self, y: Float[Tensor, "*batch d_out"]) -> Float[Tensor, " d_out"]:
        return self.v.to(y)


@dataclass(frozen=True)
class Random:
    """A random direction with the norm of all ones, the same for a seed whatever the device."""

    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InputError(f"seed={self.seed!r} must be an integer.")

    @property
    def name(self) -> str:
        return f"random{self.seed}"

    def at(self, y: Float[Tensor, "*batch d_out"]) -> Float[Tensor, " d_out"]:
        generator = torch.Generator().manual_seed(self.seed)
        v = torch.randn(y.shape[-1], dtype=torch.float64, generator=generator)
        return (v * (v.numel() ** 0.5 / v.norm())).to(y)


@dataclass(frozen=True)
class Logit:
    """The direction in which the residual stream raises a token's logit, or a logit difference.

    At each position, ``J_norm^T (W_U[:, token] - W_U[:, foil])`` with ``J_norm`` the Jacobian of
    the final norm at that position in this forward pass: the exact linearisation of the direct path
    from the component to the logits (before a soft cap or a scale of theirs, if the model has one),
    which for the last block is the only path. For components that write to the residual stream.

    Attributes:
        token: id of the token.
        foil: id of the token to compare it with; none if None.
        position: whose logits count, among each prompt's own tokens, padding left out: -1 is the
            last; None for each position's own.

    Raises:
        InputError: the foil is the token itself.
    """

    token: int
    foil: int | None = None
    position: int | None = None

    def __post_init__(self) -> None:
        numbers = (self.token, *(n for n in (self.foil, self.position) if n is not None))
        if any(isinstance(n, bool) or not hasattr(n, "__index__") for n in numbers):
            raise InputError(f"{self} takes token ids and a position, all of them integers.")
        check_foil(self.token, self.foil)

    @property
    def name(self) -> str:
        return f"logit_{self.token}" + ("" if self.foil is None else f"_minus_{self.foil}")


def decoder_row(sae: Any, feature: int) -> Vector:
    """The direction an SAE's feature writes: row ``feature`` of ``W_dec``, shape ``(d_in,)``.

    For an SAE trained on what the component writes (its output, or the residual stream after it).

    Raises:
        InputError: the SAE has no such feature.
    """
    d_sae = sae.W_dec.shape[0]
    if not -d_sae <= feature < d_sae:
        raise InputError(f"feature {feature} does not exist: the SAE has 0 to {d_sae - 1}.")
    return Vector(sae.W_dec[feature].detach(), f"feature{feature % d_sae}")


AnyCotangent: TypeAlias = Cotangent | Logit | Metric
"""What a centroid can be read through."""


def as_cotangent(value: Float[Tensor, " d_out"] | AnyCotangent | None) -> AnyCotangent:
    """A tensor as a `Vector`, None as `Ones`, anything that is a cotangent as it is.

    Raises:
        InputError: nothing of the kind.
    """
    if value is None:
        return Ones()
    if isinstance(value, Tensor):
        return Vector(value)
    if isinstance(value, Logit | Metric | Cotangent) and not isinstance(value, type):
        return value
    raise InputError(
        f"cotangent is a {type(value).__name__}; pass a tensor of shape (d_out,), one of "
        "lch_plugin.cotangents, or an object with a `name` and a method `at(y)`."
    )


def is_fixed(cotangent: AnyCotangent) -> bool:
    """Whether it is one direction, whatever the component computes."""
    return isinstance(cotangent, Ones | Vector | Random)


def evaluate(cotangent: Cotangent, y: Float[Tensor, "*batch d_out"]) -> Float[Tensor, ...]:
    """``cotangent.at(y)``, held to what it has to be.

    Raises:
        InputError: it does not broadcast to ``y``, is not finite or all zeros.
    """
    ours = is_fixed(cotangent)
    # A copy for others, which may write to it.
    v = cotangent.at(y.detach() if ours else y.detach().clone())
    if not isinstance(v, Tensor):
        raise InputError(
            f"cotangent {cotangent.name!r}: at(y) gave a {type(v).__name__}, not a tensor."
        )
    v = v.detach()
    try:
        fits = torch.broadcast_shapes(v.shape, y.shape) == y.shape
        fits = fits and (not ours or v.shape == y.shape[-1:])  # Which one number would do, too.
    except RuntimeError:
        fits = False
    if not fits:
        raise InputError(
            f"cotangent {cotangent.name!r} has shape {tuple(v.shape)}, but has to lie in the "
            f"output space of the component: shape ({y.shape[-1]},), its last dimension. For "
            "another, as a channel of an image, pass an object with a `name` and a method `at(y)` "
            "that gives something that broadcasts to the output."
        )
    if not ours:
        _check_direction(v)
    return v


def _check_direction(v: Tensor) -> None:
    if not bool(v.isfinite().all()):
        raise InputError(
            f"cotangent must be finite; {int((~v.isfinite()).sum())} of its {v.numel()} entries "
            "are not."
        )
    if not bool(v.any()):
        raise InputError("cotangent must not be all zeros: nothing is read through it.")

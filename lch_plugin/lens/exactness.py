"""Whether parts add up to the logits, and how near that has to be."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lch_plugin.errors import SiteError


def off_by(
    parts: Float[Tensor, "*rows part token"], z: Float[Tensor, " token"]
) -> Float[Tensor, "*rows"]:
    """How far parts are from adding up to the logits, relative to their sizes; the worst token."""
    size = parts.abs().sum(-2)
    off = (parts.sum(-2) - z).abs()
    return (off / size.clamp_min(torch.finfo(size.dtype).tiny)).amax(-1)


def tolerance(dtype: torch.dtype) -> float:
    """Half of the digits that a model computes with; norms compute in float32 at most."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) ** 0.5


def is_off(off: Float[Tensor, "*rows"], dtype: torch.dtype) -> Bool[Tensor, "*rows"]:
    """Whether that is more than rounding; so is what is not a number."""
    return ~(off <= tolerance(dtype))


def check_exact(name: str, off: Float[Tensor, "*rows"], dtype: torch.dtype) -> None:
    """Refuse parts that do not add up.

    Args:
        name: of the model.
        off: as `off_by` has it, of each layer or of all together.
        dtype: that the model computes in.

    Raises:
        SiteError: the frozen model is not affine.
    """
    wrong = is_off(off, dtype)
    if bool(wrong.any()):
        where = f", at layers {wrong.nonzero().flatten().tolist()}" if off.ndim else ""
        raise SiteError(
            f"{name}: the parts differ from the logits, by {off.max():.1e} of their size{where}: "
            "with its factors fixed some function after them is not affine. Which "
            'have a detached form is in lch_plugin.linearization. Use linearization="jacobian".'
        )

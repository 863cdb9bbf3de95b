"""Tests of many hypotheses at once, and values that differ by rounding alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

#: Rounding of a value, in units of the spacing of its type: a mean of tens of terms has less.
ROUNDING = 32
# The same in half precision: sums are kept in float32 there and rounded once, and 32 spacings of
# bfloat16 are a quarter of the value.
_ROUNDING_OF_HALVES = 4


def varies(values: np.ndarray, size: float | None = None) -> Any:
    """Whether values differ by more than rounding: `ROUNDING` spacings of their type.

    Args:
        values: ``(n,)`` or ``(n, n_columns)``, floating point.
        size: of the numbers that they were computed from, as a small difference of large numbers
            has the rounding of the large ones; their own largest magnitude if None.

    Returns:
        One answer, or ``(n_columns,)`` of them.
    """
    largest = np.abs(values).max(0) if size is None else size
    return np.ptp(values, axis=0) > ROUNDING * np.finfo(values.dtype).eps * largest


def is_rounding(
    difference: Float[Tensor, ...], size: Float[Tensor, ...] | float, dtype: torch.dtype
) -> bool:
    """Whether all of a difference is no more than rounding.

    Args:
        difference: in any type.
        size: of the numbers that it was computed from, one or one for each coordinate.
        dtype: of these numbers.
    """
    spacing = torch.finfo(dtype).eps
    bound = _ROUNDING_OF_HALVES if spacing > torch.finfo(torch.float32).eps else ROUNDING
    return bool((difference.abs() <= bound * spacing * size).all())


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, by Holm's step-down method.

    To call significant what is at most 0.05 makes one or more false claims in at most one of twenty
    families of tests, however the tests depend on each other.

    Args:
        p_values: of one family, in any order.

    Returns:
        The corrected ones in the same order, at most 1.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    # The smallest stands for as many tests as there are, the next for one fewer, and so on.
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = stepped.clip(max=1)
    return corrected.tolist()

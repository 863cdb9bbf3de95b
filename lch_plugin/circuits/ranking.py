"""Which scores are the highest, and where each stands among the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lch_plugin.errors import InputError


def ranked(values: Float[Tensor, " n"], groups: Sequence[str] | None = None) -> pd.DataFrame:
    """Score, rank and percentile of each, among those of its group, or all if there are none.

    The rank is 1 for the highest; the percentile is the share that is lower, in percent.
    """
    scores = pd.Series(values.cpu().double().numpy(), name="score")
    peers = scores.groupby(np.zeros(len(scores)) if groups is None else list(groups), sort=False)
    lower = peers.rank(method="min", ascending=True) - 1
    return pd.DataFrame(
        {
            "score": scores,
            "rank": peers.rank(method="min", ascending=False).astype(int),
            "percentile": 100 * lower / peers.transform("size"),
        }
    )


def ordered(values: Float[Tensor, " n"], by: str) -> Int[Tensor, " n"]:
    """Places of scores, the highest first, or that of largest magnitude.

    Raises:
        InputError: another ``by``.
    """
    keys = {"score": values, "magnitude": values.abs()}
    if by not in keys:
        raise InputError(f"by={by!r} must be one of {tuple(keys)}.")
    return keys[by].cpu().argsort(descending=True, stable=True)


def highest(values: Float[Tensor, " n"], size: int, by: str, what: str) -> Bool[Tensor, " n"]:
    """Which of some scores are the ``size`` highest, or of largest magnitude.

    Raises:
        InputError: the size is below 1 or above their number, which counts ``what``; or another
            ``by``.
    """
    if not 1 <= size <= len(values):
        raise InputError(f"size={size}: a circuit has 1 to {len(values)} {what}.")
    keep = torch.zeros(len(values), dtype=torch.bool)
    keep[ordered(values, by)[:size]] = True
    return keep


def place(score: Float[Tensor, ""], peers: Float[Tensor, " n"]) -> tuple[int, float]:
    """Rank of a score among its peers, 1 for the highest, and its percentile, in percent."""
    return int((peers > score).sum()) + 1, 100 * float((peers < score).double().mean())

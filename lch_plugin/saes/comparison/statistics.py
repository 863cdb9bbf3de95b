"""Spread over seeds, and whether centroids differ from the other sites."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Paired:
    """A paired t-test over seeds.

    Attributes:
        n: pairs.
        difference: mean of the first minus the second.
        low, high: ends of the 95 % interval of the difference.
        p_value: two-sided. None, as the interval, where the differences are all the same.
    """

    n: int
    difference: float
    low: float | None
    high: float | None
    p_value: float | None

    def to_dict(self) -> dict[str, Any]:
        """In terms of JSON."""
        return asdict(self)


def paired_test(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compare two conditions seed by seed, by scipy's ``ttest_rel``."""
    differences = np.subtract(first, second)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # Differences that are all the same.
        test = stats.ttest_rel(first, second)
        low, high = test.confidence_interval(0.95)
    found = [float(x) for x in (low, high, test.pvalue)]
    known = found if np.ptp(differences) > 0 and all(map(math.isfinite, found)) else [None] * 3
    return Paired(len(differences), float(differences.mean()), *known)


def mean_and_sd(values: Sequence[float]) -> dict[str, float]:
    """Mean, and standard deviation of a sample (one less than their number below the line)."""
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}

"""Spread over seeds, and whether centroids differ from the other sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from lch_plugin.statistics import holm, varies


@dataclass(frozen=True)
class Paired:
    """A paired t-test over seeds.

    Attributes:
        n: pairs.
        difference: mean of the first minus the second.
        low, high: ends of the 95 % interval of the difference; None where there is no test.
        p_value: two-sided; None where there is no test.
        reason: why there is no test; None where there is one.
    """

    n: int
    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """In terms of JSON."""
        return asdict(self)


def paired_test(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compare two conditions seed by seed, by scipy's ``ttest_rel``.

    Where the differences are the same but for rounding, the spread that a test divides by is that
    rounding, and its p-value would mean nothing: then there is no test.

    Args:
        first, second: one score a seed, in the same order.
    """
    pair = np.array([first, second], dtype=float)
    differences = pair[0] - pair[1]
    n, mean = len(differences), float(differences.mean())
    if not np.isfinite(differences).all():
        return Paired(n, mean, None, None, None, "a score is not finite")
    if n == 1:
        return Paired(n, mean, None, None, None, "one seed has no spread")
    if not varies(differences, np.abs(pair).max()):
        reason = "the difference is the same for every seed, but for rounding"
        return Paired(n, mean, None, None, None, reason)
    test = stats.ttest_rel(*pair)
    low, high = test.confidence_interval(0.95)
    return Paired(n, mean, float(low), float(high), float(test.pvalue))


def correct(tests: Sequence[dict[str, Any]]) -> int:
    """Write ``p_corrected`` beside each ``p_value``, by Holm's method for all of them together.

    Args:
        tests: all of one report, as `Paired.to_dict`.

    Returns:
        How many have a p-value.
    """
    made = [test for test in tests if test["p_value"] is not None]
    for test in tests:
        test["p_corrected"] = None
    for test, p in zip(made, holm([test["p_value"] for test in made]), strict=True):
        test["p_corrected"] = p
    return len(made)


def mean_and_sd(values: Sequence[float]) -> dict[str, float]:
    """Mean, and standard deviation of a sample (one less than their number below the line)."""
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}

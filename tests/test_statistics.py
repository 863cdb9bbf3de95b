"""Corrections for many tests, against their definitions; rounding, against spread."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lch_plugin.statistics import holm, varies


def by_closure(p_values: list[float]) -> list[float]:
    """Holm's by its definition: the worst Bonferroni p of all families that a test is in."""
    n = len(p_values)
    families = [f for size in range(1, n + 1) for f in itertools.combinations(range(n), size)]
    bonferroni = {f: min(1.0, len(f) * min(p_values[i] for i in f)) for f in families}
    return [max(p for f, p in bonferroni.items() if i in f) for i in range(n)]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_holms_correction_is_that_of_the_closure(p_values: list[float]) -> None:
    assert holm(p_values) == pytest.approx(by_closure(p_values))


def test_holms_correction_of_known_values() -> None:
    """As R's ``p.adjust(..., "holm")`` has them; ties and order make no difference."""
    assert holm([0.01, 0.04, 0.03, 0.02]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.5, 0.5]) == [1, 1]
    assert holm([]) == []


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_is_no_variation(dtype: type) -> None:
    third = dtype(1) / dtype(3)
    above = np.nextafter(third, dtype(1))
    values = np.stack([[third, third, third, dtype(0)], [third, above, third * 2, dtype(0)]])
    assert varies(values).tolist() == [False, False, True, False]
    assert varies(values[:, 1]) == False  # noqa: E712 (numpy's own)
    assert varies(values[:, 1] - third, size=float(third)) == False  # noqa: E712
    assert varies(values[:, 1] - third)

"""Parameters of which a few stand for all in `make test`; `make test-slow` runs the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def all_but(quick: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """The same values, those that are not among ``quick`` marked slow."""
    chosen = set(quick)

    def slow(value: Any) -> Any:
        of_each_name = value if isinstance(value, tuple) else (value,)
        return pytest.param(*of_each_name, marks=pytest.mark.slow)

    return [v if v in chosen else slow(v) for v in values]

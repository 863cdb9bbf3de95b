"""Parameters of which a few stand for all in `make test`; `make test-slow` runs the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def all_but(quick: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """The same values, those that are not among ``quick`` marked slow."""
    chosen = set(quick)
    return [v if v in chosen else pytest.param(v, marks=pytest.mark.slow) for v in values]

"""Models that tests of sites leave as they found them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.adapters.transformer_lens.sites.common import BUILDS, built


@pytest.fixture(params=BUILDS)
def model(request: pytest.FixtureRequest) -> Any:
    return built(request.param)


@pytest.fixture
def gpt2() -> Any:
    return built("bridge-gpt2")

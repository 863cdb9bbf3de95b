"""A model that tests leave as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.adapters.huggingface.common import assert_untouched, built


@pytest.fixture
def gpt2() -> Iterator[Any]:
    """Built once: every test leaves a model as it found it."""
    model = built("gpt2")
    yield model
    assert_untouched(model)

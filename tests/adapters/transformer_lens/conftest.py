"""A model of every toolkit, as it was booted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lch_plugin.adapters.transformer_lens import closed_forms
from tests.adapters.transformer_lens.common import BACKENDS, IDS


@pytest.fixture(params=BACKENDS)
def model(request: pytest.FixtureRequest) -> Any:
    model = BACKENDS[request.param]()
    with torch.no_grad():
        model.run_with_cache(IDS)  # A bridge finishes setting up its own hooks in its first pass.
    return model


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a centroid is computed."""
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return original(*args, **kwargs)

    original = closed_forms.centroid_of_neurons
    monkeypatch.setattr(closed_forms, "centroid_of_neurons", counted)
    return calls

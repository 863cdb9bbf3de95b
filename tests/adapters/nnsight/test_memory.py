"""Nothing is left behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor, nn

from tests import models
from tests.adapters.nnsight.common import IDS, centroid, plain, site, tokenizer, traced, truth
from tests.models import relative_error

# How a loop over the steps of a generation ends.
pytestmark = pytest.mark.filterwarnings("ignore:.*was never reached", "ignore:Module '")


def test_memory_is_flat() -> None:
    model, counts = traced("llama"), []

    def live() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    for n in (20, 50):
        for _ in range(n):
            with model.trace(IDS):
                centroid(model.model.layers[1])
                mu = centroid(model.model.layers[1].mlp, torch.randn(models.D_MODEL)).save()
        counts.append(live())
    assert mu.grad_fn is None
    assert counts[0] == counts[1]


def test_a_model_may_be_thrown_away() -> None:
    def use() -> weakref.ref[nn.Module]:
        model = TransformersModel(models.huggingface("llama"), tokenizer=tokenizer())
        with model.trace(IDS):
            centroid(model.model.layers[1])
            centroid(model.model.layers[1].mlp)
        return weakref.ref(model.model.layers[1].mlp._module)

    module = use()
    gc.collect()
    assert module() is None


def test_a_failed_trace_leaves_the_next_alone() -> None:
    class Raises:
        name = "raises"

        def at(self, y: Tensor) -> Tensor:
            raise KeyError("mine")

    model = traced("llama")
    for kind in ("mlp", "block"):
        name = site("llama", kind)
        with pytest.raises(KeyError, match="mine"):
            with model.trace(IDS):
                centroid(model.get(name), Raises())
        with model.trace(IDS):
            mu = centroid(model.get(name)).save()
        assert relative_error(mu, truth(plain("llama"), name, IDS)) < 1e-10

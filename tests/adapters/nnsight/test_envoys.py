"""The persistent form: a property of every envoy."""

from __future__ import annotations

import pytest
import torch
from nnsight import Envoy
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor

import lch_plugin as lch
from lch_plugin.cotangents import Random
from tests import models
from tests.adapters.nnsight.common import F64, IDS, plain, site, tokenizer, truth
from tests.models import relative_error

# How a loop over the steps of a generation ends.
pytestmark = pytest.mark.filterwarnings("ignore:.*was never reached", "ignore:Module '")


def test_every_envoy_has_a_centroid() -> None:
    hf = models.huggingface("gpt2", F64)
    model = TransformersModel(hf, tokenizer=tokenizer(), envoys=lch.nnsight.CentroidEnvoy)
    with model.trace(IDS):
        found = {"block": model.transformer.h[1].centroid}.save()
        found["mlp"] = model.transformer.h[1].mlp.centroid
    for kind, mu in found.items():
        assert relative_error(mu, truth(plain("gpt2"), site("gpt2", kind), IDS)) < 1e-10


def test_a_subclass_chooses_its_cotangent() -> None:
    class Randomly(lch.nnsight.CentroidEnvoy):
        cotangent = Random(1)

    hf = models.huggingface("gpt2", F64)
    model = TransformersModel(hf, tokenizer=tokenizer(), envoys={"mlp": Randomly})
    with model.trace(IDS):
        mu = model.transformer.h[1].mlp.centroid.save()
    r = Random(1).at(torch.ones(models.D_MODEL, dtype=F64))
    assert relative_error(mu, truth(plain("gpt2"), site("gpt2", "mlp"), IDS, v=r)) < 1e-10
    assert type(model.transformer.h[1]) is Envoy


def test_what_goes_wrong_in_a_property_is_said() -> None:
    class Faulty:
        name = "faulty"

        def at(self, y: Tensor) -> Tensor:
            return y.nonexistent

    model = TransformersModel(
        models.huggingface("gpt2"), tokenizer=tokenizer(), envoys=lch.nnsight.CentroidEnvoy
    )
    model.transformer.h[1].mlp.cotangent = Faulty()
    with pytest.raises(RuntimeError, match="nonexistent"):
        with model.trace(IDS):
            model.transformer.h[1].mlp.centroid  # noqa: B018

"""Centroids inside nnsight's traces, against gradients taken outside the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nnsight import NNsight
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor, nn
from torch.nn import functional as F

import lch_plugin as lch
from lch_plugin.cotangents import Random
from tests import models
from tests.adapters.nnsight.common import (
    F64,
    IDS,
    NAMES,
    centroid,
    plain,
    site,
    tokenizer,
    traced,
    truth,
)
from tests.models import relative_error

# How a loop over the steps of a generation ends.
pytestmark = pytest.mark.filterwarnings("ignore:.*was never reached", "ignore:Module '")

KINDS = ("mlp", "attn", "block", "norm")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", NAMES)
def test_a_centroid_is_the_gradient(family: str, kind: str) -> None:
    model, name = traced(family), site(family, kind)
    with model.trace(IDS):
        mu = centroid(model.get(name), Random(0)).save()
    r = Random(0).at(torch.ones(models.D_MODEL, dtype=F64))
    assert relative_error(mu, truth(plain(family), name, IDS, v=r)) < 1e-10
    assert not mu.requires_grad
    assert mu.dtype == F64


@pytest.mark.parametrize("family", NAMES)
def test_many_layers_and_sites_in_one_trace(family: str) -> None:
    model, found = traced(family), {}
    with model.trace(IDS):
        for layer in range(models.N_LAYERS):
            for kind in ("block", "attn", "mlp"):
                name = site(family, kind, layer)
                found[name] = centroid(model.get(name)).save()
    assert len(found) == 3 * models.N_LAYERS
    for name, mu in found.items():
        assert relative_error(mu, truth(plain(family), name, IDS)) < 1e-10


class OfTheOutput:
    """A user's own cotangent, which depends on what the module writes."""

    name = "output"

    def at(self, y: Tensor) -> Tensor:
        return y.add_(1)  # It is a copy.


@pytest.mark.parametrize("kind", ["mlp", "attn", "block"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_cotangents(family: str, kind: str) -> None:
    model, name = traced(family), site(family, kind)
    v = torch.linspace(-1, 1, models.D_MODEL)
    found = {}
    for key, cotangent in {"vector": v, "random": Random(3), "own": OfTheOutput()}.items():
        with model.trace(IDS):
            found[key] = centroid(model.get(name), cotangent).save()
    for key, w in {"vector": v, "random": Random(3).at, "own": lambda y: y + 1}.items():
        assert relative_error(found[key], truth(plain(family), name, IDS, v=w)) < 1e-10


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("kind", ["mlp", "block"])
def test_any_grad_mode(kind: str, mode: Callable[[], Any]) -> None:
    model, name = traced("llama"), site("llama", kind)
    with mode():
        with model.trace(IDS):
            mu = centroid(model.get(name)).save()
    assert relative_error(mu, truth(plain("llama"), name, IDS)) < 1e-10
    assert not mu.requires_grad
    assert all(p.grad is None for p in model._module.parameters())


@pytest.mark.parametrize("family", NAMES)
def test_the_model_computes_the_same_to_the_bit(family: str) -> None:
    model = traced(family)
    with model.trace(IDS):
        logits = model.output.logits.save()
    with model.trace(IDS):
        for layer in range(models.N_LAYERS):
            for kind in ("block", "attn", "mlp"):
                centroid(model.get(site(family, kind, layer)), Random(0))
        asked = model.output.logits.save()
    assert torch.equal(asked, logits)
    with torch.no_grad():
        assert torch.equal(plain(family)(IDS).logits, logits)


@pytest.mark.parametrize("kind", ["mlp", "block"])
def test_half_precision_models_give_float32(kind: str) -> None:
    hf = models.huggingface("llama", torch.bfloat16)
    model = TransformersModel(hf, tokenizer=tokenizer())
    with model.trace(IDS):
        mu = centroid(model.get(site("llama", kind))).save()
    assert mu.dtype == torch.float32
    assert relative_error(mu, truth(plain("llama"), site("llama", kind), IDS)) < 0.1


def test_values_next_to_a_centroid_are_as_without_it() -> None:
    """An activation that a closed form evaluates is no call of the model's."""
    model, mlp = traced("phi3"), traced("phi3").model.layers[1].mlp
    with model.trace(IDS):
        alone = mlp.activation_fn.output.save()
    with model.trace(IDS):
        centroid(mlp)
        act, down = mlp.activation_fn.output.save(), mlp.down_proj.input.save()
    assert torch.equal(act, alone)
    assert down.shape[-1] == models.D_MLP


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_the_first_centroid_of_a_model_leaves_every_call_to_the_trace(family: str) -> None:
    """It is found out what a module is while the trace stands down, its activation included."""
    hf = models.huggingface(family, torch.float64)
    model, name = NNsight(hf), site(family, "mlp")
    mlp = model.get(name)
    act = {"gpt2": "act", "phi3": "activation_fn"}[family]
    ids = models.tokens(2, 6)
    with model.trace(ids):
        alone = getattr(mlp, act).output.save()
    fresh = NNsight(models.huggingface(family, torch.float64))
    mlp = fresh.get(name)
    with fresh.trace(ids):
        mu = lch.nnsight.centroid(mlp).save()
        beside = getattr(mlp, act).output.save()
    assert torch.equal(beside, alone)
    assert mu.any()


def test_cotangents_do_not_disturb_an_activation_without_a_kernel() -> None:
    class Squared(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return F.relu(z).square()

    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 8), Squared(), nn.Linear(8, 4)), nn.Tanh())
    model, x = NNsight(net), torch.randn(3, 4)
    with model.trace(x):
        mu = centroid(model[0], OfTheOutput()).save()
    with model.trace(x):
        centroid(model[0])
        act = model[0][1].output.save()
    assert torch.equal(act, net[0][1](net[0][0](x)))
    assert relative_error(mu, truth(net, "0", x, v=net[0](x).detach() + 1)) < 1e-6

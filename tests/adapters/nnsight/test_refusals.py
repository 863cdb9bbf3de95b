"""What cannot work is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nnsight import NNsight
from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
)

import lch_plugin as lch
from lch_plugin.cotangents import Metric
from tests import models
from tests.adapters.nnsight.common import F64, IDS, centroid, site, tokenizer, traced

# How a loop over the steps of a generation ends.
pytestmark = pytest.mark.filterwarnings("ignore:.*was never reached", "ignore:Module '")


def test_outside_a_trace() -> None:
    with pytest.raises(lch.InputError, match="outside a trace"):
        centroid(traced("gpt2").transformer.h[0].mlp)


@pytest.mark.parametrize("kind", ["mlp", "block"])
def test_a_scan_has_no_values(kind: str) -> None:
    model = TransformersModel(models.huggingface("gpt2"), tokenizer=tokenizer())
    with pytest.raises(lch.InputError, match="no values"):
        with model.scan(IDS):
            centroid(model.get(site("gpt2", kind)))
    assert not any(p.is_meta for p in model._module.parameters())


@pytest.mark.usefixtures("as_users_run")
def test_not_an_envoy() -> None:
    model = traced("gpt2")
    with pytest.raises(lch.InputError, match=r"without \.output or \.input"):
        with model.trace(IDS):
            centroid(model.transformer.h[0].mlp.output)


@pytest.mark.parametrize("kind", ["mlp", "attn"])
def test_out_of_order(kind: str) -> None:
    model = traced("gpt2")

    def ask() -> None:
        with model.trace(IDS):
            model.transformer.h[1].output.save()
            centroid(model.get(site("gpt2", kind)))

    with pytest.raises(lch.SiteError, match="order the model runs"):
        ask()


def test_an_input_after_its_centroid() -> None:
    """Nnsight's own error, for a value of nnsight's own."""
    model = traced("gpt2")

    def ask() -> None:
        with model.trace(IDS):
            centroid(model.transformer.h[1].mlp)
            model.transformer.h[1].mlp.input.save()

    with pytest.raises(OutOfOrderError):
        ask()


def test_a_module_that_does_not_run() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = NNsight(Idle())
    with pytest.raises(lch.SiteError, match="does not call it"):
        with model.trace(torch.randn(2, 3)):
            centroid(model.idle)


@pytest.mark.parametrize("kind", ["mlp", "block"])
@pytest.mark.parametrize(
    ("cotangent", "error", "message"),
    [
        (Metric(lambda logits: logits.argmax()), lch.InputError, "differentiable"),
        (torch.ones(5), lch.InputError, "shape"),
        (torch.ones(1), lch.InputError, "shape"),
        (torch.zeros(models.D_MODEL), lch.InputError, "zero"),
        (torch.full((models.D_MODEL,), torch.nan), lch.InputError, "finite"),
        (torch.ones(models.D_MODEL, dtype=torch.int64), lch.InputError, "floating-point"),
        ("ones", lch.InputError, "cotangents"),
    ],
)
@pytest.mark.usefixtures("as_users_run")
def test_cotangents_that_cannot_work(kind: str, cotangent: Any, error: Any, message: str) -> None:
    model = traced("gpt2")
    for _ in range(2):
        with pytest.raises(error, match=message):
            with model.trace(IDS):
                centroid(model.get(site("gpt2", kind)), cotangent)


def test_weights_that_are_not_there() -> None:
    with torch.device("meta"):
        model = NNsight(nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3)))
    with pytest.raises(lch.SiteError, match="meta"):
        with model.trace(torch.randn(2, 3)):
            centroid(model[0])


@pytest.mark.parametrize("kind", ["mlp", "block"])
def test_quantised_weights(kind: str) -> None:
    hf = models.huggingface("llama")
    weight = hf.model.layers[1].mlp.up_proj.weight
    model = TransformersModel(hf, tokenizer=tokenizer())
    hf.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(lch.SiteError, match="unquantised"):
        with model.trace(IDS):
            centroid(model.get(site("llama", kind)))


def test_a_projection_that_nnsight_does_not_know() -> None:
    hf = models.huggingface("llama")
    model, mlp = TransformersModel(hf, tokenizer=tokenizer()), hf.model.layers[1].mlp
    mlp.up_proj = nn.Linear(models.D_MODEL, models.D_MLP, bias=False)
    with pytest.raises(lch.SiteError, match="Wrap it anew"):
        with model.trace(IDS):
            centroid(model.model.layers[1].mlp)


def test_a_model_that_reads_token_ids() -> None:
    model = traced("gpt2")
    with pytest.raises(lch.InputError, match="inputs_embeds"):
        with model.trace(IDS):
            centroid(model)


class OnesOfMine:
    name = "mine"

    def at(self, y: Tensor) -> Tensor:
        return torch.ones_like(y)


@pytest.mark.parametrize("cotangent", [None, torch.ones(models.D_MODEL), OnesOfMine()])
def test_a_vanishing_mlp_is_refused_each_time(cotangent: Any) -> None:
    hf = models.huggingface("gpt2", F64)
    with torch.no_grad():
        weight = hf.transformer.h[1].mlp.c_proj.weight
        weight -= weight.mean(-1, keepdim=True)
    model = TransformersModel(hf, tokenizer=tokenizer())
    mlp = model.transformer.h[1].mlp
    with model.trace(IDS):
        centroid(mlp, torch.randn(models.D_MODEL))  # Another vector of the same name.
    for _ in range(2):
        with pytest.raises(lch.VanishingCentroidError):
            with model.trace(IDS):
                centroid(mlp, cotangent)


@pytest.mark.parametrize("cotangent", [None, torch.ones(32), OnesOfMine()])
def test_a_vanishing_block_is_refused_each_time(cotangent: Any) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    model = NNsight(BertModel(config).double().eval())
    block = model.encoder.layer[1]
    with model.trace(IDS):
        mu = centroid(block, torch.randn(32)).save()
    assert mu.norm() > 0.1
    for _ in range(2):
        with pytest.raises(lch.VanishingCentroidError):
            with model.trace(IDS):
                centroid(block, cotangent)

"""Modules that run twice, vision, plain torch, and models loaded late."""

from __future__ import annotations

from pathlib import Path

import nnsight
import pytest
import torch
from nnsight import NNsight
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    ViTConfig,
    ViTModel,
)

from lch_plugin.cotangents import Random
from tests import models
from tests.adapters.nnsight.common import (
    F64,
    IDS,
    centroid,
    plain,
    site,
    text,
    tokenizer,
    traced,
    truth,
)
from tests.models import relative_error

# How a loop over the steps of a generation ends.
pytestmark = pytest.mark.filterwarnings("ignore:.*was never reached", "ignore:Module '")


class Twice(nn.Module):
    """A block that runs twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(4, 4), nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(self.block(x)) + self.mlp(x)
        return x


@pytest.mark.parametrize("name", ["mlp", "block"])
def test_a_module_that_runs_twice(name: str) -> None:
    torch.manual_seed(0)
    net, x = Twice().double(), torch.randn(3, 4, dtype=F64)
    r = torch.tensor([1.0, -2.0, 0.5, 3.0])
    expected = [truth(net, name, x, v=r, call=call) for call in range(2)]
    model = NNsight(net)
    with model.trace(x):
        mu = centroid(model.get(name), r).save()
    assert relative_error(mu, expected[0]) < 1e-10
    with model.trace(x) as tracer:
        each = [].save()
        for _ in tracer.iter[:2]:
            each.append(centroid(model.get(name), r))
    for mu, step in zip(each, expected, strict=True):
        assert relative_error(mu, step) < 1e-10
    with model.trace(x) as tracer:
        for _ in tracer.iter[1]:
            mu = centroid(model.get(name), r).save()
    assert relative_error(mu, expected[1]) < 1e-10


@pytest.mark.parametrize("kind", ["", ".attention"])
def test_tied_layers_of_albert(kind: str) -> None:
    config = AlbertConfig(
        vocab_size=50,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
    )
    torch.manual_seed(0)
    hf = AlbertModel(config).double().eval()
    name = "encoder.albert_layer_groups.0.albert_layers.0" + kind
    r = Random(0).at(torch.ones(32, dtype=F64))
    expected = [truth(hf, name, IDS, v=r, call=call) for call in range(3)]
    model = NNsight(hf)
    with model.trace(IDS) as tracer:
        each = [].save()
        for _ in tracer.iter[:]:
            each.append(centroid(model.get(name), Random(0)))
    for mu, step in zip(each, expected, strict=True):
        assert relative_error(mu, step) < 1e-9


@pytest.mark.parametrize("name", ["", "0", "2", "2.0", "3"])
def test_plain_torch_models(name: str) -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(6, 9), nn.SiLU(), nn.Linear(9, 6))
    net = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Tanh(), mlp, nn.Linear(6, 3)).double()
    x = torch.randn(2, 4, 6, dtype=F64)
    expected = truth(net, name, x)
    model = NNsight(net)
    with model.trace(x):
        mu = centroid(model.get(name) if name else model).save()
    assert relative_error(mu, expected) < 1e-10


@pytest.mark.parametrize("name", ["layers.1", "layers.1.mlp", "layers.1.attention"])
def test_vision(name: str) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
    )
    hf = ViTModel(config).double().eval()
    pixels = torch.randn(2, 3, 16, 16, dtype=F64)
    expected = truth(hf, name, pixels)
    model = NNsight(hf)
    with model.trace(pixels):
        mu = centroid(model.get(name)).save()
        rest = model.output.last_hidden_state.save()
    assert relative_error(mu, expected) < 1e-10
    with torch.no_grad():
        assert torch.equal(rest, hf(pixels).last_hidden_state)


def test_the_whole_model_reads_embeddings() -> None:
    model = traced("llama")
    embeddings = torch.randn(2, 5, models.D_MODEL, dtype=F64)
    with model.trace(inputs_embeds=embeddings):
        mu = centroid(model).save()
    assert relative_error(mu, truth(plain("llama"), "", inputs_embeds=embeddings)) < 1e-10


def test_renamed_modules() -> None:
    """As nnterp names them, and the projections too."""
    names = {
        "transformer": "model",
        "h": "layers",
        "attn": "self_attn",
        "c_fc": "up_proj",
        "mlp": "feed_forward",
    }
    hf = models.huggingface("gpt2", F64)
    model = TransformersModel(hf, tokenizer=tokenizer(), rename=names)
    with model.trace(IDS):
        layer = model.model.layers[1]
        found = {"block": centroid(layer), "attn": centroid(layer.self_attn)}.save()
        found["mlp"] = centroid(layer.feed_forward)
    for kind, mu in found.items():
        assert relative_error(mu, truth(plain("gpt2"), site("gpt2", kind), IDS)) < 1e-10


def test_the_deprecated_alias() -> None:
    with pytest.warns(nnsight.NNsightDeprecationWarning):
        model = nnsight.LanguageModel(models.huggingface("gpt2", F64), tokenizer=tokenizer())
    with model.trace(text(IDS[0])):
        mu = centroid(model.transformer.h[1].mlp).save()
    assert relative_error(mu, truth(plain("gpt2"), site("gpt2", "mlp"), IDS[:1])) < 1e-10


def test_a_model_that_is_loaded_by_its_first_trace(tmp_path: Path) -> None:
    models.huggingface("gpt2").save_pretrained(tmp_path)
    model = TransformersModel(
        str(tmp_path), task="text-generation", tokenizer=tokenizer(), dtype=F64
    )
    with model.trace(IDS):
        block = centroid(model.transformer.h[1]).save()
        mlp = centroid(model.transformer.h[1].mlp).save()
    for kind, mu in (("block", block), ("mlp", mlp)):
        assert relative_error(mu, truth(plain("gpt2"), site("gpt2", kind), IDS)) < 1e-10


@pytest.mark.parametrize("kind", ["mlp", "block"])
def test_a_trace_may_stop_there(kind: str) -> None:
    model, name, ran = traced("llama"), site("llama", kind), []
    hook = model.model.layers[2]._module.register_forward_hook(lambda *_: ran.append(1))
    with model.trace(IDS) as tracer:
        mu = centroid(model.get(name)).save()
        tracer.stop()
    hook.remove()
    assert relative_error(mu, truth(plain("llama"), name, IDS)) < 1e-10
    assert not ran


def test_a_session_shares_centroids() -> None:
    model, name = traced("llama"), site("llama", "mlp")
    with model.session():
        with model.trace(IDS):
            mu = centroid(model.get(name))
        with model.trace(IDS):
            again = centroid(model.get(name))
            difference = (mu - again).abs().max().save()
    assert difference == 0

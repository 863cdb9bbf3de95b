"""Spans and cotangents from the logits inside a trace, held to TransformerLens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nnsight import NNsight
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor, nn

import lch_plugin as lch
from lch_plugin.cotangents import Logit, Metric, Random, logit_difference
from tests import models

IDS = torch.tensor([[3, 14, 15, 9, 2, 6]])
COTANGENTS = {
    "metric": logit_difference(3, 4),
    "metric at a position": logit_difference(3, 4, position=2),
    "logit": Logit(3),
    "logit at a position": Logit(3, foil=4, position=-1),
    "random": Random(1),
    "ones": None,
}


def through_transformer_lens(site: lch.Site) -> Tensor:
    model = models.bridge("gpt2", torch.float64)
    with lch.attach(model, site=site) as handle, torch.no_grad():
        return model.run_with_cache(IDS, names_filter=handle.hook_names)[1][handle.hook_names[0]]


@pytest.mark.parametrize("asked", COTANGENTS)
def test_a_span_is_that_of_transformer_lens(asked: str) -> None:
    model, v = NNsight(models.huggingface("gpt2", torch.float64)), COTANGENTS[asked]
    with model.trace(IDS):
        mu = lch.nnsight.centroid(model.transformer.h[1:3], v).save()
    expected = through_transformer_lens(lch.Site("span", (1, 2), cotangent=v))
    torch.testing.assert_close(mu, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["mlp", "attn", "block"])
@pytest.mark.parametrize("asked", COTANGENTS)
def test_every_cotangent_is_that_of_transformer_lens(kind: Any, asked: str) -> None:
    model, v = NNsight(models.huggingface("gpt2", torch.float64)), COTANGENTS[asked]
    block = model.transformer.h[1]
    envoy = {"mlp": block.mlp, "attn": block.attn, "block": block}[kind]
    if isinstance(v, Logit) and kind != "block":
        with pytest.raises(lch.InputError, match="take a block"):
            with model.trace(IDS):
                lch.nnsight.centroid(envoy, v).save()
        return
    with model.trace(IDS):
        mu = lch.nnsight.centroid(envoy, v).save()
    expected = through_transformer_lens(lch.Site(kind, 1, cotangent=v))
    torch.testing.assert_close(mu, expected, rtol=1e-9, atol=1e-12)


def test_a_logit_goes_through_the_norm_of_other_families() -> None:
    model = NNsight(models.huggingface("llama", torch.float64))
    with model.trace(IDS):
        mu = lch.nnsight.centroid(model.model.layers[1], Logit(3, foil=4)).save()
    bridge = models.bridge("llama", torch.float64)
    site = lch.Site("block", 1, cotangent=Logit(3, foil=4))
    with lch.attach(bridge, site=site) as handle, torch.no_grad():
        _, cache = bridge.run_with_cache(IDS, names_filter=handle.hook_names)
    # Llama's norms compute in float32.
    torch.testing.assert_close(mu, cache[handle.hook_names[0]], rtol=1e-4, atol=1e-6)


def test_invokes_have_their_own_metric() -> None:
    model = TransformersModel(
        models.huggingface("gpt2", torch.float64), tokenizer=models.tokenizer()
    )
    prompts, v = ["a b c", "d e"], logit_difference(3, 4)
    alone = []
    for prompt in prompts:
        with model.trace(prompt):
            mu = lch.nnsight.centroid(model.transformer.h[1], v).save()
        alone.append(mu)
    with model.trace() as tracer:
        with tracer.invoke(prompts[0]):
            first = lch.nnsight.centroid(model.transformer.h[1], v).save()
        with tracer.invoke(prompts[1]):
            second = lch.nnsight.centroid(model.transformer.h[1], v).save()
    for together, expected in zip((first, second), alone, strict=True):
        n_pos = expected.shape[1]
        own = together[:, -n_pos:]
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-12)
        assert not together[:, :-n_pos].any()


def test_the_logits_are_what_they_were() -> None:
    model = NNsight(models.huggingface("gpt2", torch.float64))
    with model.trace(IDS):
        before = model.output.logits.save()
    with model.trace(IDS):
        lch.nnsight.centroid(model.transformer.h[0:2], logit_difference(3, 4)).save()
        after = model.output.logits.save()
    assert torch.equal(before, after)


def test_members_of_a_list_within_a_block_are_no_blocks() -> None:
    hf = models.huggingface("gpt2", torch.float64)
    # As a mixture keeps its experts.
    hf.transformer.h[1].experts = nn.ModuleList([nn.Identity()])
    hf.transformer.h[1].register_forward_hook(lambda m, _args, y: m.experts[0](y))
    model = NNsight(hf)
    with pytest.raises(lch.InputError, match="take a block"):
        with model.trace(IDS):
            lch.nnsight.centroid(model.transformer.h[1].experts[0], Logit(3)).save()


def test_positions_are_not_counted_where_padding_is_not_known() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = models.huggingface("gpt2", torch.float64)

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids).logits

    model = NNsight(Around())
    v = logit_difference(3, 4, position=-1)
    with pytest.raises(lch.SiteError, match="Wrap the model itself"):
        with model.trace(IDS):
            lch.nnsight.centroid(model.inner.transformer.h[1].mlp, v).save()


def test_running_statistics_cannot_wait() -> None:
    norm = nn.BatchNorm1d(3).double()
    model = NNsight(nn.Sequential(norm, nn.Linear(5, 5).double()).train())
    metric = Metric(lambda y: y.pow(2).sum((1, 2)))
    with pytest.raises(lch.SiteError, match="in a first trace"):
        with model.trace(torch.randn(2, 3, 5, dtype=torch.float64)):
            lch.nnsight.centroid(model[0], metric).save()


def test_what_a_trace_does_not_allow_is_said() -> None:
    model, v = NNsight(models.huggingface("gpt2", torch.float64)), logit_difference(3, 4)
    h = model.transformer.h
    with pytest.raises(lch.InputError, match=r"without torch\.no_grad"):
        with torch.no_grad(), model.trace(IDS):
            lch.nnsight.centroid(h[1], v).save()
    with pytest.raises(lch.SiteError, match="no span"):
        with model.trace(IDS):
            lch.nnsight.centroid([h[0], h[2]]).save()
    with pytest.raises(lch.InputError, match="takes an envoy"):
        with model.trace(IDS):
            lch.nnsight.centroid([]).save()
    with pytest.raises(lch.InputError, match="names a token outside"):
        with model.trace(IDS):
            lch.nnsight.centroid(h[1], Logit(1000)).save()
    constant = Metric(lambda logits: nn.Parameter(torch.ones(1)).sum())
    with pytest.raises(lch.NotDifferentiableError, match="does not depend"):
        with model.trace(IDS):
            lch.nnsight.centroid(h[1], constant).save()

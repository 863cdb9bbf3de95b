"""Direct logit attribution, held to gradients through the norms at a fixed scale."""

from __future__ import annotations

import pytest
import torch

import lch_plugin as lch
from lch_plugin.circuits.reports.direct import direct_logits, promoted_tokens
from lch_plugin.circuits.scores.attribution import metric_gradients
from lch_plugin.cotangents import Metric
from tests import models

IDS, LAST, NEURONS = models.tokens(batch=1), models.N_LAYERS - 1, [3, 0, 17]


@pytest.mark.parametrize("family", ["gpt2", "hooked gpt2", "gpt_neox", "llama", "gemma3_text"])
def test_promoted_tokens_are_those_of_the_gradient_with_scales_fixed(family: str) -> None:
    """From the last layer nothing but the norms lies between a neuron and the logits."""
    dtype = torch.float64
    model = models.hooked(dtype) if family == "hooked gpt2" else models.bridge(family, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln" in name:  # A gain of ones would not be missed.
                parameter.add_(torch.linspace(-0.5, 1.0, parameter.numel()).view_as(parameter))
    name = {p.layer: p.name for p in lch.adapters.transformer_lens.node_points(model, ["neuron"])}
    # One copy of the prompt for each token of the vocabulary, and its logit for the metric.
    each = torch.arange(models.D_VOCAB)
    batch = lch.circuits.Prompts(
        IDS.expand(models.D_VOCAB, -1), Metric(lambda logits: logits[each, -1, each])
    )
    gradients = metric_gradients(model, batch, [name[LAST]], linearization="detached").gradients
    truth = gradients[name[LAST]][:, -1, NEURONS].T
    assert promoted_tokens(model, LAST, NEURONS, 2) == [
        [model.to_string([i]) for i in row] for row in truth.topk(2).indices.tolist()
    ]


def test_hooks_on_norms_are_left_out() -> None:
    model = models.hooked(torch.float64)
    x = torch.randn(2, models.D_MODEL, dtype=torch.float64)
    plain = direct_logits(model, x, x)
    model.ln_final.hook_normalized.add_hook(lambda value, hook: value * 0)
    torch.testing.assert_close(direct_logits(model, x, x), plain)

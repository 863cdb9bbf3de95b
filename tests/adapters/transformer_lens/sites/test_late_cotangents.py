"""Cotangents that are known only when the model has got to its end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lch_plugin.cotangents import Logit, Metric, logit_difference
from lch_plugin.sites import Site
from tests import models
from tests.adapters.transformer_lens.sites.common import (
    F64,
    assert_close,
    gradient,
    graph,
    names,
    read,
    tolerance,
)

pytestmark = pytest.mark.filterwarnings("ignore:run_with_hooks")


def test_a_metric_of_the_logits_reaches_every_component(model: Any) -> None:
    values, logits = graph(model)
    at = names(model)
    metric = logit_difference(3, 4)
    total = metric.fn(logits).sum()
    mus = read(
        model,
        *(Site(kind, cotangent=metric) for kind in ("mlp", "attn", "block", "model")),
        Site("span", (0, 1), cotangent=metric),
        Site("head", 1, 0, cotangent=metric),
        Site("neuron", 1, 3, cotangent=metric),
    )
    for layer in range(3):
        x, y = values[at["resid_pre"].format(layer)], values[at["resid_post"].format(layer)]
        truth = gradient(y, x, gradient(total, y))
        assert_close(mus[f"hook_centroid_block_{layer}"], truth, tolerance(model))
    x, y = values[at["resid_pre"].format(0)], values[at["resid_post"].format(1)]
    truth = gradient(y, x, gradient(total, y))
    assert_close(mus["hook_centroid_span_1_from_0"], truth, tolerance(model))
    truth = gradient(total, values[at["embed"]])
    assert_close(mus["hook_centroid"], truth, tolerance(model))
    assert {"hook_centroid_head_1_0", "hook_centroid_neuron_1_3"} <= mus.keys()
    if "blocks.1.mlp.hook_in" in values:
        for kind in ("mlp", "attn"):
            x, y = (values[f"blocks.1.{kind}.hook_{e}"] for e in ("in", "out"))
            truth = gradient(y, x, gradient(total, y))
            assert_close(mus[f"hook_centroid_{kind}_1"], truth, tolerance(model))


def test_a_logit_is_linearised_through_the_final_norm(model: Any) -> None:
    values, _ = graph(model)
    at = names(model)
    mus = read(
        model,
        Site("block", cotangent=Logit(3, 4)),
        Site("mlp", cotangent=Logit(3)),
        Site("block", 2, cotangent=Logit(3, 4, position=-1), label="last"),
    )
    end = values[at["resid_post"].format(2)]
    normed = values.get("unembed.hook_in", None)
    direct = model.W_U[:, 3] - model.W_U[:, 4]
    if normed is None:
        normed = model.ln_final(end)
    v = gradient(normed, end, direct)
    for layer in range(3):
        x, y = values[at["resid_pre"].format(layer)], values[at["resid_post"].format(layer)]
        truth = gradient(y, x, v)
        assert_close(mus[f"hook_centroid_block_{layer}"], truth, tolerance(model))
    last = torch.zeros(1, 6, 1, dtype=F64)
    last[:, -1] = 1
    truth = gradient(end, values[at["resid_pre"].format(2)], v * last)
    assert_close(mus["hook_centroid_block_2_last"], truth, tolerance(model))
    # An MLP's path to the residual stream leads through its post norm, where there is one.
    if "blocks.1.mlp.hook_in" in values:
        x, y = values["blocks.1.mlp.hook_in"], values["blocks.1.mlp.hook_out"]
        post = "blocks.1.ln2_post.hook_out"
        v = gradient(normed, end, model.W_U[:, 3])
        v = gradient(values[post], y, v) if post in values else v
        assert_close(mus["hook_centroid_mlp_1"], gradient(y, x, v), tolerance(model))


def test_in_the_last_block_a_logit_and_its_metric_agree() -> None:
    model = models.bridge("gpt2", F64)
    metric = Metric(lambda logits: (logits[..., 3] - logits[..., 4]).sum(-1), "difference")
    mus = read(
        model,
        Site("block", 2, cotangent=Logit(3, 4), label="direct"),
        Site("block", 2, cotangent=metric, label="all_paths"),
    )
    assert_close(mus["hook_centroid_block_2_direct"], mus["hook_centroid_block_2_all_paths"])


@pytest.mark.parametrize("cotangent", [Logit(3, 4), logit_difference(3, 4, position=2)])
def test_output_positions_choose_among_late_cotangents_too(gpt2: Any, cotangent: Any) -> None:
    mus = read(
        gpt2,
        *(
            Site(k, 1, cotangent=cotangent, output_positions=2, label="o")
            for k in ("attn", "block")
        ),
        Site("head", 1, 0, cotangent=cotangent, output_positions=2, label="o"),
        Site("block", 1, cotangent=cotangent),
    )
    whole = mus.pop("hook_centroid_block_1")
    assert whole[:, 3:].any() == isinstance(cotangent, Logit)
    for mu in mus.values():
        assert mu[:, :3].any()
        assert not mu[:, 3:].any()

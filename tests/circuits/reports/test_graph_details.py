"""Tokens and attention of a graph's nodes, held to gradients and to the model's own patterns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lch_plugin as lch
from lch_plugin.circuits.graphs import attribution_graph
from lch_plugin.circuits.reports.graph_details import node_details
from lch_plugin.circuits.scores.attribution import metric_gradients
from lch_plugin.cotangents import Metric
from tests import models

IDS = models.tokens(batch=1)
N_POS, LAST = IDS.shape[1], models.N_LAYERS - 1


def batch(twin: bool = False) -> lch.circuits.Prompts:
    metric = lch.circuits.logit_difference([[3]], [[7]])
    return lch.circuits.Prompts(IDS, metric, IDS.flip(1) if twin else None)


def build(family: str) -> Any:
    dtype = torch.float64
    return models.hooked(dtype) if family == "hooked gpt2" else models.bridge(family, dtype)


def expected_logits(model: Any, name: str) -> torch.Tensor:
    """What is held at a hook point times the gradient of each logit of the last position.

    Only the final norm lies between the last MLP and the logits.
    """
    each = torch.arange(models.D_VOCAB)
    copies = lch.circuits.Prompts(
        IDS.expand(models.D_VOCAB, -1), Metric(lambda logits: logits[each, -1, each])
    )
    found = metric_gradients(model, copies, [name], linearization="detached")
    worth = found.gradients[name][:, -1] * found.activations[name][0, -1]
    return worth - worth.mean(0)


@pytest.mark.parametrize("family", ["gpt2", "hooked gpt2", "gpt_neox", "llama"])
@pytest.mark.parametrize("kind", ["neuron", "mlp"])
def test_tokens_are_those_of_the_gradient(family: str, kind: Any) -> None:
    model = build(family)
    points = lch.adapters.transformer_lens.node_points(model, [kind])
    graph = attribution_graph(model, batch(), kinds=[kind], max_nodes=10_000)
    details = node_details(model, batch(), graph, n_tokens=4)
    worth = expected_logits(model, points[-1].name)
    nodes = [7, 0, 31] if kind == "neuron" else [0]
    for index in nodes:
        own = worth[:, index] if kind == "neuron" else worth.sum(-1)
        name = f"m{LAST}.n{index}@{N_POS - 1}" if kind == "neuron" else f"m{LAST}@{N_POS - 1}"
        for listed, largest in ((details[name].promoted, True), (details[name].suppressed, False)):
            values, ids = own.topk(4, largest=largest)
            assert [token for token, _ in listed] == [model.to_string([i]) for i in ids.tolist()]
            found = torch.tensor([value for _, value in listed], dtype=torch.float64)
            torch.testing.assert_close(found, values, rtol=1e-6, atol=1e-9)


def test_everything_written_adds_up_to_the_logits() -> None:
    """In a model without biases and position embeddings there is nothing but these nodes."""
    model = build("llama")
    graph = attribution_graph(model, batch(), kinds=("head", "mlp"), max_nodes=10_000)
    details = node_details(model, batch(), graph, n_tokens=models.D_VOCAB)
    with torch.no_grad():
        logits = model(IDS)[0, -1]
    # Elsewhere the last layer does nothing for the metric, and has no nodes.
    total: dict[str, float] = dict.fromkeys((f"w{i}" for i in range(models.D_VOCAB)), 0.0)
    for key, position in graph.nodes(data="position"):
        if position == N_POS - 1:
            for token, value in details[key].promoted:
                total[token] += value
    found = torch.tensor(list(total.values()), dtype=torch.float64)
    # HuggingFace's norm of a Llama computes in float32, whatever it is given.
    torch.testing.assert_close(found, logits - logits.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "hooked gpt2", "llama"])
def test_heads_show_their_pattern_on_the_clean_prompt(family: str) -> None:
    model = build(family)
    prompt = batch(twin=True)
    graph = attribution_graph(model, prompt, kinds=["head"])
    details = node_details(model, prompt, graph)
    with torch.no_grad():
        cache = model.run_with_cache(IDS)[1]
    heads = [(key, d) for key, d in graph.nodes(data=True) if d["kind"] == "head"]
    assert heads
    for key, data in heads:
        at = data["position"]
        row = cache[f"blocks.{data['layer']}.attn.hook_pattern"][0, data["index"], at, : at + 1]
        assert details[key].attention == pytest.approx(row.tolist())
        assert sum(details[key].attention) == pytest.approx(1)


def test_scores_of_the_task_go_with_their_nodes() -> None:
    model = build("gpt2")
    graph = attribution_graph(model, batch(), max_nodes=40)
    scores = lch.circuits.node_attribution(model, batch(), ["neuron"], method="detached")
    details = node_details(model, batch(), graph, scores)
    assert details.keys() == set(graph)
    for key, data in graph.nodes(data=True):
        scored = details[key].scored
        assert (scored is not None) == (data["kind"] == "neuron")
        if scored is not None:
            assert str(scored.node) == key.split("@")[0]
            assert scored == scores.node(scored.node)
        if data["kind"] in ("metric", "position", "attn_rest", "mlp_rest"):
            assert not details[key].promoted
            assert not details[key].attention

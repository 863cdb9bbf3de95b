"""Interventions: what a graph predicts, and what the model does.

Exactness is asked for in float64.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path

import networkx as nx
import pytest
import torch
from torch import Tensor

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens import node_points, run_edited
from lch_plugin.circuits import (
    Prompts,
    attribution_graph,
    grouped,
    intervene,
    load_graph,
    log_probability,
    logit_difference,
    merge,
    prune,
    save_graph,
)
from lch_plugin.circuits.scores.attribution import activations, metric_gradients
from tests import models
from tests.slow import all_but

F64 = torch.float64
BACKENDS = ("gpt2", "gpt_neox", "llama", "hooked")
PAIR = Prompts(
    models.tokens(1, seed=1), logit_difference([[1, 5]], [[3]]), models.tokens(1, seed=2)
)
LAST = PAIR.clean.shape[1] - 1
ALONE = replace(PAIR, corrupt=None)


@cache
def graph_of(backend: str, linearization: str, twins: bool = True) -> nx.DiGraph:
    prompt = PAIR if twins else ALONE
    return attribution_graph(
        models.float64(backend), prompt, max_nodes=30, linearization=linearization
    )


def some(graph: nx.DiGraph) -> list[str]:
    """The last embedding, and of each layer the head and the neuron that contribute most."""
    found = [f"embedding@{LAST}"]
    for kind in ("head", "neuron"):
        for layer in range(models.N_LAYERS):
            of = [n for n, d in graph.nodes(data=True) if (d["kind"], d["layer"]) == (kind, layer)]
            found += sorted(of, key=lambda n: -abs(graph.nodes[n]["contribution"]))[:1]
    return found


@pytest.mark.parametrize(
    ("backend", "twins"),
    all_but([("gpt2", True), ("llama", False)], list(product(BACKENDS, [True, False]))),
)
def test_the_metric_of_the_frozen_model_changes_by_the_contribution(
    backend: str, twins: bool
) -> None:
    model, graph = models.float64(backend), graph_of(backend, "detached", twins)
    for node in some(graph):
        worth = graph.nodes[node]["contribution"]
        off, twice = (intervene(model, graph, node, scale) for scale in (0.0, 2.0))
        assert off.metric_predicted == pytest.approx(-worth, rel=1e-5, abs=1e-6)
        assert twice.metric_predicted == pytest.approx(worth, rel=1e-5, abs=1e-6)
        # The frozen model is affine.
        predicted = dict(zip(off.nodes, off.predicted.tolist(), strict=True))
        for name, value in zip(twice.nodes, twice.predicted.tolist(), strict=True):
            assert value == pytest.approx(-predicted.get(name, 0), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_changes_are_as_the_jacobian_predicts(backend: str) -> None:
    """For the metric and for every node, by finite differences of what is measured."""
    model, graph = models.float64(backend), graph_of(backend, "jacobian")
    step = 1e-3
    for node in some(graph)[:5]:
        up, down = (intervene(model, graph, node, 1 + sign * step) for sign in (1, -1))
        assert up.nodes == down.nodes
        slope = (up.metric_measured - down.metric_measured) / 2
        assert up.metric_predicted == pytest.approx(slope, rel=1e-3, abs=1e-7)
        expected = (up.measured - down.measured) / 2
        torch.testing.assert_close(up.predicted, expected, rtol=1e-3, atol=1e-7)


def test_what_is_measured_is_what_the_model_does() -> None:
    """Held to a pass in which the nodes are put by hand; two of them, one after the other."""
    model, graph = models.float64("gpt2"), graph_of("gpt2", "detached")
    head, neuron = some(graph)[1], some(graph)[-2]
    found = intervene(model, graph, [head, neuron], -0.5)
    points = {(p.kind, p.layer): p for p in node_points(model)}
    names = [p.name for p in points.values()]
    clean, twin = (activations(model, ids, names) for ids in (PAIR.clean, PAIR.corrupt))

    def put(name: str, value: Tensor) -> Tensor:
        value = value.clone()
        for node in (head, neuron):
            data = graph.nodes[node]
            point = points[data["kind"], data["layer"]]
            if point.name == name:
                at = (0, data["position"], data["index"])
                old, other = (point.split(of[name])[at] for of in (clean, twin))
                point.split(value)[at] = other - 0.5 * (old - other)
        seen[name] = value
        return value

    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        before = PAIR.measure(model(PAIR.clean))
        after = PAIR.measure(run_edited(model, PAIR.clean, {n: partial(put, n) for n in names}))
    assert found.metric == pytest.approx(float(before))
    assert found.metric_measured == pytest.approx(float(after - before))
    slopes = metric_gradients(model, PAIR, names, linearization="detached").gradients
    table = found.to_dataframe()
    assert table["measured"].abs().is_monotonic_decreasing
    assert not {head, neuron} & set(table["node"])
    for row in table.itertuples():
        data = graph.nodes[row.node]
        point = points[data["kind"], data["layer"]]
        at = (0, data["position"], data["index"])
        slope, new, old = (point.split(of[point.name])[at] for of in (slopes, seen, clean))
        assert row.measured == pytest.approx(float((slope * (new - old)).sum()), abs=1e-9)


def test_a_supernode_is_its_members(tmp_path: Path) -> None:
    model, graph = models.float64("gpt2"), graph_of("gpt2", "detached")
    members = some(graph)[1:3]
    save_graph(grouped(graph, {"both": members}), tmp_path / "graph.json")
    expected = intervene(model, graph, members, 0.0)
    found = intervene(model, load_graph(tmp_path / "graph.json"), "both", 0.0)
    assert found.changed == tuple(members)
    assert torch.equal(found.measured, expected.measured)
    # The second holds what it is made to hold: what the first would do to it is not counted.
    worth = sum(graph.nodes[member]["contribution"] for member in members)
    assert abs(found.metric_predicted + worth) > 1e-6
    merged = merge(graph, {"both": members})
    with pytest.raises(lch.InputError, match="of a graph that is not merged"):
        intervene(model, merged, "both", 0.0)


def test_a_graph_that_went_through_a_file_and_was_pruned_is_as_good(tmp_path: Path) -> None:
    model, graph = models.float64("llama"), graph_of("llama", "detached")
    small = prune(graph)
    node = next(name for name in some(graph)[1:] if name in small)
    expected = intervene(model, small, node, 0.0)
    for path in (tmp_path / "graph.json", tmp_path / "graph.graphml"):
        save_graph(small, path)
        found = intervene(model, load_graph(path), node, 0.0)
        assert repr(found) == repr(expected)
        assert torch.equal(found.measured, expected.measured)
    assert repr(expected).startswith(f"Intervention({node} x 0: metric ")
    assert set(expected.r2) <= {"head", "neuron"}


def test_a_real_graph_predicts_small_changes_and_doubts_large_ones() -> None:
    """The embedded model: a neuron near the end is predicted well."""
    model = lch.load_demo_model()
    prompt = lch.circuits.task(model, "an", 1)[0]
    graph = attribution_graph(model, prompt, max_nodes=100)
    last = [n for n, d in graph.nodes(data=True) if d["kind"] == "neuron" and d["layer"] == 3]
    top = max(last, key=lambda n: abs(graph.nodes[n]["contribution"]))
    found = intervene(model, graph, top, 0.0)
    # Only the final norm stands between.
    assert found.metric_measured == pytest.approx(found.metric_predicted, rel=0.2)


@pytest.mark.usefixtures("as_users_run")
def test_bad_input_is_refused() -> None:
    model, graph = models.float64("gpt2"), graph_of("gpt2", "detached")
    node = some(graph)[1]
    for named, match in [
        ("a9.h9@0", r"no node 'a9.h9@0'; its nodes are called"),
        ("metric", "of kind 'metric', which holds nothing"),
        (f"rest m1@{LAST}", "of kind 'mlp_rest'"),
        ([], "at least one"),
        ([node, node], "each once"),
    ]:
        with pytest.raises(lch.InputError, match=match):
            intervene(model, graph, named, 0.0)
    with pytest.raises(lch.InputError, match=r"the metric is .* here and .* in the graph"):
        intervene(models.float64("gpt_neox"), graph, node, 0.0)
    for scale in (float("nan"), float("inf")):
        with pytest.raises(lch.InputError, match="must be finite"):
            intervene(model, graph, node, scale)
    for wrong in (replace(PAIR, clean=PAIR.corrupt), ALONE, PAIR + PAIR):
        with pytest.raises(lch.InputError, match="are others than the graph's"):
            intervene(model, graph, node, 0.0, prompts=wrong)
    custom = Prompts(PAIR.clean, log_probability([[1]]), PAIR.corrupt)
    other = attribution_graph(model, custom, max_nodes=20)
    named = next(n for n, d in other.nodes(data=True) if d["kind"] == "head")
    with pytest.raises(lch.InputError, match=r"Give its prompt as prompts="):
        intervene(model, other, named, 0.0)
    assert intervene(model, other, named, 0.0, prompts=custom).metric_measured != 0

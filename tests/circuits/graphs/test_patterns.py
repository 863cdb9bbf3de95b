"""Edges through attention patterns: what a node does through where a later head looks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from torch import Tensor

from lch_plugin.adapters.transformer_lens import node_points, pattern_names
from lch_plugin.circuits import load_graph, merge, pattern_attribution, save_graph
from lch_plugin.circuits.graphs import attribution_graph
from lch_plugin.circuits.graphs.pruning import node_influence
from lch_plugin.circuits.reports.graph_page import page_data
from lch_plugin.circuits.scores.attribution import activations, embedding_name
from lch_plugin.errors import InputError
from lch_plugin.linearization import DetachedMode
from tests.circuits.graphs.test_building import (
    BACKENDS,
    CLEAN,
    CORRUPT,
    PAIR,
    PROMPT,
    Case,
    flows,
    place,
    run_frozen,
    without,
    write_of,
)


@pytest.fixture(params=BACKENDS)
def paired(request: pytest.FixtureRequest, in_float64: None) -> Case:
    return case_of(request.param)


@cache
def case_of(backend: str) -> Case:
    """As `test_graphs.case`, relative to a twin; values are the differences to it."""
    model: Any = BACKENDS[backend]()
    graph = attribution_graph(model, PAIR, max_nodes=80, patterns=True)
    mode = DetachedMode(through_patterns=True)
    metric = run_frozen(model, mode, {})
    points = {("attn" if p.kind == "head" else "mlp", p.layer): p for p in node_points(model)}
    names = [embedding_name(model), *(point.name for point in points.values())]
    clean, corrupt = (activations(model, ids, names) for ids in (CLEAN, CORRUPT))
    values = {name: clean[name] - corrupt[name] for name in names}
    return Case(backend, model, graph, mode.recorded, metric, points, values)


def sources_of(graph: nx.DiGraph, target: str) -> list[str]:
    """The embedding and the head whose pattern edges into a head are the strongest."""
    found = []
    for kind in ("embedding", "head"):
        edges = [
            (abs(data.get("pattern", 0.0)), source)
            for source, _, data in graph.in_edges(target, data=True)
            if graph.nodes[source]["kind"] == kind
        ]
        found += [max(edges)[1]] if edges else []
    return found


def slope(case: Case, source: str, target: str, step: float = 1e-4) -> float:
    """How the metric changes with a share of the source in what the target reads.

    The target's pattern is computed from what it reads; those behind it are held.
    """
    key, position, index = place(case.graph, target)
    point, layer = case.points[key], key[1]
    names = [embedding_name(case.model), point.name, *pattern_names(case.model)[layer + 1 :]]
    clean = activations(case.model, CLEAN, names)

    def only_target(value: Tensor) -> Tensor:
        new = point.split(clean[point.name]).clone()
        new[0, position, index] = point.split(value)[0, position, index]
        return new.reshape(value.shape)

    edits = {name: lambda _value, held=clean[name]: held for name in names[2:]}
    moved = []
    for sign in (1, -1):
        vector = -sign * step * write_of(case, source)
        added = without(vector, case.graph.nodes[source]["position"])
        mode = DetachedMode(replay=case.recorded, through_patterns=True)
        moved.append(run_frozen(case.model, mode, {**edits, point.name: only_target}, {key: added}))
    return (moved[0] - moved[1]) / (2 * step)


def test_weight_and_pattern_are_the_slope_of_a_model_whose_heads_look_anew(paired: Case) -> None:
    graph, checked = paired.graph, 0
    heads = [n for n, data in graph.nodes(data=True) if data["kind"] == "head"]
    for layer in range(3):
        here = [name for name in heads if graph.nodes[name]["layer"] == layer]
        target = max(here, key=lambda name: abs(graph.nodes[name]["pattern"]))
        for source in sources_of(graph, target):
            edge = graph.edges[source, target]
            expected = edge["weight"] + edge["pattern"]
            found = slope(paired, source, target)
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-8)
            checked += abs(edge["pattern"]) > 1e-3
    assert checked >= 3


def test_beside_patterns_the_flow_is_what_it_was(paired: Case) -> None:
    plain = attribution_graph(paired.model, PAIR, max_nodes=80)
    assert set(plain) == set(paired.graph)
    for source, target, weight in paired.graph.edges(data="weight"):
        expected = plain.edges.get((source, target), {"weight": 0.0})["weight"]
        assert weight == pytest.approx(expected, rel=1e-12, abs=1e-14)
    for error in flows(paired.graph):
        assert error < 1e-9


def test_patterns_into_a_node_and_the_rest_are_what_its_pattern_is_worth(paired: Case) -> None:
    """Position by position they add up to the scores of heads, those of rests included."""
    scores = pattern_attribution(paired.model, PAIR)
    every_head = attribution_graph(paired.model, PAIR, kinds=("head",), patterns=True)
    for graph in (paired.graph, every_head):
        of_head: Counter[tuple[int, int]] = Counter()
        of_layer: Counter[int] = Counter()
        for name, data in graph.nodes(data=True):
            said = sum(edge.get("pattern", 0.0) for _, _, edge in graph.in_edges(name, data=True))
            if data["kind"] not in ("head", "attn_rest"):
                assert "pattern" not in data
                assert said == 0
                continue
            assert said + data["pattern_rest"] == pytest.approx(data["pattern"], abs=1e-12)
            of_layer[data["layer"]] += data["pattern"]
            if data["kind"] == "head":
                of_head[data["layer"], data["index"]] += data["pattern"]
        for layer, total in of_layer.items():
            assert total == pytest.approx(float(scores.of("head", layer).sum()), abs=1e-6)
        if graph is every_head:
            assert len(of_head) == len(scores.values)
            for (layer, index), total in of_head.items():
                assert total == pytest.approx(float(scores.of("head", layer)[index]), abs=1e-6)


def test_where_the_twin_is_the_prompt_there_are_none() -> None:
    model: Any = BACKENDS["gpt2"]()
    graph = attribution_graph(model, replace(PAIR, corrupt=CLEAN.clone()), patterns=True)
    for _, data in graph.nodes(data=True):
        assert data.get("pattern", 0.0) == 0
        assert data.get("pattern_rest", 0.0) == 0


@pytest.mark.parametrize("suffix", [".json", ".graphml"])
def test_files_keep_them(paired: Case, suffix: str, tmp_path: Path) -> None:
    save_graph(paired.graph, tmp_path / f"graph{suffix}")
    read = load_graph(tmp_path / f"graph{suffix}")
    assert dict(read.edges) == dict(paired.graph.edges)
    assert dict(read.nodes) == dict(paired.graph.nodes)


def test_they_need_a_twin_and_the_detached_model() -> None:
    model: Any = BACKENDS["gpt2"]()
    with pytest.raises(InputError, match="no corrupt twin"):
        attribution_graph(model, PROMPT, patterns=True)
    with pytest.raises(InputError, match="linearization='jacobian'"):
        attribution_graph(model, PAIR, patterns=True, linearization="jacobian")


def test_supernodes_keep_what_goes_through_patterns(paired: Case) -> None:
    graph = paired.graph
    heads = [name for name, data in graph.nodes(data=True) if data["kind"] == "head"]
    layer = max(graph.nodes[name]["layer"] for name in heads)
    group = [name for name in heads if graph.nodes[name]["layer"] == layer]
    merged = merge(graph, {"late": group})
    for key in ("pattern", "pattern_rest"):
        total = sum(graph.nodes[name][key] for name in group)
        assert merged.nodes["late"][key] == pytest.approx(total, abs=1e-12)
    said = sum(data.get("pattern", 0.0) for _, _, data in merged.in_edges("late", data=True))
    rest = merged.nodes["late"]["pattern"] - said
    assert rest == pytest.approx(merged.nodes["late"]["pattern_rest"], abs=1e-9)


def test_a_node_that_only_moves_where_a_head_looks_has_influence(paired: Case) -> None:
    graph = paired.graph.copy()
    target = max(
        (name for name, kind in graph.nodes(data="kind") if kind == "head"),
        key=lambda name: sum(abs(graph.edges[e].get("pattern", 0.0)) for e in graph.in_edges(name)),
    )
    source = sources_of(graph, target)[0]
    graph.edges[source, target]["weight"] = 0.0
    graph.remove_edges_from([e for e in graph.out_edges(source) if e[1] != target])
    assert node_influence(graph)[source] > 0
    assert node_influence(without_patterns(graph))[source] == 0
    data = page_data(graph)
    index = {node["key"]: i for i, node in enumerate(data["nodes"])}
    assert [index[source], index[target]] not in [edge[:2] for edge in data["edges"]]
    assert data["nodes"][index[target]]["pattern"] == graph.nodes[target]["pattern"]


def without_patterns(graph: nx.DiGraph) -> nx.DiGraph:
    bare = graph.copy()
    for _, _, data in bare.edges(data=True):
        data.pop("pattern", None)
    return bare

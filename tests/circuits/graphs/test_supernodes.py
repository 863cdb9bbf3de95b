"""Supernodes: what is grouped, and that nothing is lost when groups become one node."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networkx.utils import graphs_equal

from lch_plugin.circuits import (
    Prompts,
    attribution_graph,
    grouped,
    load_graph,
    logit_difference,
    merge,
    node_details,
    prune,
    same_token,
    same_write,
    save_graph,
)
from lch_plugin.circuits.graphs.supernodes import _alike
from lch_plugin.circuits.graphs.writes import node_writes
from lch_plugin.errors import InputError
from tests import models

PROMPT = Prompts(models.tokens(1, 6), logit_difference([[3]], [[4]]), models.tokens(1, 6, seed=5))
MODEL = models.bridge("gpt2", torch.float64)
GRAPH = attribution_graph(MODEL, PROMPT, max_nodes=60)
NODES = [name for name in GRAPH if name != "metric"]


def some_groups(n: int, seed: int) -> dict[str, list[str]]:
    """Groups of nodes of all kinds, not all of them in one."""
    order = torch.randperm(len(NODES), generator=torch.Generator().manual_seed(seed)).tolist()
    return {f"group {i}": [NODES[j] for j in order[i : len(order) // 2 : n]] for i in range(n)}


@given(n=st.integers(1, 12), seed=st.integers(0, 100))
@settings(max_examples=15, deadline=None)
def test_merging_conserves_what_flows(n: int, seed: int) -> None:
    groups = some_groups(n, seed)
    merged = merge(GRAPH, groups)
    assert not nx.number_of_selfloops(merged)
    assert len(merged) == len(GRAPH) - sum(map(len, groups.values())) + n
    into, out = (dict(of(weight="weight")) for of in (merged.in_degree, merged.out_degree))
    total = sum(weight for _, _, weight in merged.edges(data="weight"))
    total += sum(merged.nodes[name]["internal"] for name in groups)
    assert total == pytest.approx(sum(w for _, _, w in GRAPH.edges(data="weight")), abs=1e-9)
    for name, data in merged.nodes(data=True):
        inside = data.get("internal", 0.0)
        entering = into[name] + inside + data["offset"]
        assert entering == pytest.approx(data["contribution"], abs=1e-9)
        if name != "metric":
            assert out[name] + inside == pytest.approx(data["contribution"], abs=1e-9)
    for name, members in groups.items():
        own = [GRAPH.nodes[member] for member in members]
        for key in ("contribution", "offset"):
            assert merged.nodes[name][key] == pytest.approx(sum(d[key] for d in own), abs=1e-9)
        strongest = max(own, key=lambda data: abs(data["contribution"]))
        for key in ("layer", "position", "token"):
            assert merged.nodes[name][key] == strongest[key]
        outside = {t for m in members for t in GRAPH.successors(m) if t not in members}
        assert len(set(merged.successors(name))) <= len(outside)


def test_what_is_in_no_group_stays_as_it_is() -> None:
    assert graphs_equal(merge(GRAPH, {}), GRAPH)
    assert graphs_equal(grouped(GRAPH, {}), GRAPH)
    members = NODES[-3:]
    merged = merge(GRAPH, {"end": members})
    rest = [name for name in GRAPH if name not in members]
    assert graphs_equal(merged.subgraph(rest), GRAPH.subgraph(rest))
    # The groups that a graph has are those that are merged.
    assert graphs_equal(merge(grouped(GRAPH, {"end": members})), merged)


@pytest.mark.parametrize("ending", ["json", "graphml"])
def test_supernodes_go_through_files(tmp_path: Path, ending: str) -> None:
    groups = some_groups(4, 0)
    whole, path = grouped(GRAPH, groups), tmp_path / f"graph.{ending}"
    for graph in (whole, merge(whole), grouped(merge(whole), {"more": NODES[-2:]})):
        save_graph(graph, path)
        assert graphs_equal(load_graph(path), graph)
    assert "supernodes" not in GRAPH.graph


def test_viewers_find_them_and_what_they_add_is_read(tmp_path: Path) -> None:
    groups, path = some_groups(3, 1), tmp_path / "graph.json"
    save_graph(grouped(GRAPH, groups), path)
    data: dict[str, Any] = json.loads(path.read_text())
    names = {node["node_id"]: node["lch"]["name"] for node in data["nodes"]}
    assert {
        name: [names[one] for one in ids] for name, *ids in data["qParams"]["supernodes"]
    } == groups
    # They show those of pinned nodes alone.
    pinned = {names[one] for one in data["qParams"]["pinnedIds"]}
    assert pinned == {"metric", *(member for members in groups.values() for member in members)}
    made = [["mine", *list(names)[:2]], ["mine", list(names)[2]]]
    one, two, three = list(names.values())[:3]
    # circuit-tracer's own server saves them as text.
    for saved in (made, json.dumps(made)):
        data["qParams"]["supernodes"] = saved
        path.write_text(json.dumps(data))
        assert load_graph(path).graph["supernodes"] == {"mine": [one, two], "mine'": [three]}
    del data["qParams"]["supernodes"]
    path.write_text(json.dumps(data))
    assert graphs_equal(load_graph(path), GRAPH)


def test_pruning_keeps_the_members_that_stay() -> None:
    small = prune(GRAPH)
    gone = [name for name in GRAPH if name not in small][:2]
    kept = [name for name in small if name != "metric"][:2]
    pruned = prune(grouped(GRAPH, {"all gone": gone[:1], "half": [gone[1], *kept]}))
    assert pruned.graph["supernodes"] == {"half": kept}
    assert "supernodes" not in prune(grouped(GRAPH, {"all gone": gone})).graph
    assert graphs_equal(grouped(pruned, {}), small)


def test_nodes_that_write_the_same_token() -> None:
    details = node_details(MODEL, PROMPT, GRAPH)
    found = same_token(details)
    assert found
    listed = [node for nodes in found.values() for node in nodes]
    assert len(set(listed)) == len(listed)
    for name, nodes in found.items():
        assert len(nodes) > 1
        (token,) = {details[node].promoted[0][0] for node in nodes}
        assert name == f"writes {token!r}"
        assert {GRAPH.nodes[node]["kind"] for node in nodes} <= {"head", "neuron"}
    # Whoever is left out has a token of its own.
    tokens = [details[n].promoted[0][0] for n in details if details[n].promoted and n[0] != "e"]
    assert len(listed) == sum(tokens.count(token) > 1 for token in tokens)
    merge(GRAPH, found)


def test_nodes_that_write_alike() -> None:
    found = same_write(MODEL, PROMPT, GRAPH, threshold=0.5)
    writes = node_writes(MODEL, PROMPT, GRAPH).writes
    assert found
    for name, nodes in found.items():
        assert name == f"like {nodes[0]}"
        sizes = [abs(GRAPH.nodes[node]["contribution"]) for node in nodes]
        assert sizes == sorted(sizes, reverse=True)
        stacked = torch.nn.functional.normalize(torch.stack([writes[n] for n in nodes]), dim=-1)
        assert float((stacked @ stacked.T).min()) >= 0.5 - 1e-9
    # A neuron writes in one direction wherever it is, forward or back.
    same = same_write(MODEL, PROMPT, GRAPH, threshold=0.999)
    assert same
    assert all(len({node.split("@")[0] for node in nodes}) == 1 for nodes in same.values())
    merge(GRAPH, found)


def test_no_two_of_a_group_are_unlike() -> None:
    """B is like A and like C, but A and C are unlike: the first comes first."""
    angles = torch.tensor([0.0, 40.0, 80.0, 200.0]).deg2rad()
    vectors = dict(zip("abcd", torch.stack([angles.cos(), angles.sin()], -1), strict=True))
    assert _alike(vectors, 0.7) == {"like a": ["a", "b"]}
    assert _alike({k: vectors[k] for k in "cba"}, 0.7) == {"like c": ["c", "b"]}
    assert _alike({}, 0.7) == {}


def test_refused(tmp_path: Path) -> None:
    first, second = NODES[:2]
    for groups, message in (
        ({first: [second]}, "has the name of a node"),
        ({"a": []}, r"has the members \[\]"),
        ({"a": first}, "list its nodes"),
        ({"a": [first, "m9.n1@2"]}, "no node 'm9.n1@2'"),
        ({"a": [first, "metric"]}, "holds the metric"),
        ({"a": [first], "b": [second, first]}, "in the supernodes 'a' and 'b'"),
        ({"a": [first, first]}, "each node is in one, once"),
    ):
        for made in (grouped, merge):
            with pytest.raises(InputError, match=message) as raised:
                made(GRAPH, groups)
            assert "\n" not in str(raised.value)
    broken = GRAPH.copy()
    broken.graph["supernodes"] = {"a": ["nobody"]}
    with pytest.raises(InputError, match="no node 'nobody'"):
        save_graph(broken, tmp_path / "graph.json")
    for threshold in (0.0, 1.5, float("nan")):
        with pytest.raises(InputError, match="it is a cosine"):
            same_write(MODEL, PROMPT, GRAPH, threshold)
    cyclic = merge(GRAPH, {"ends": [NODES[0], NODES[-1]]})
    with pytest.raises(InputError, match="before its supernodes are merged"):
        prune(cyclic)

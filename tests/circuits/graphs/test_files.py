"""Graphs as files: nothing is lost, and viewers find what they read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from networkx.utils import graphs_equal

from lch_plugin.circuits import Prompts, logit_difference
from lch_plugin.circuits.graphs import attribution_graph, load_graph, prune, save_graph
from lch_plugin.errors import InputError, OutputError
from tests import models

# What the schema of attribution graphs (Neuronpedia's graph-schema.json) requires, and its types.
METADATA = {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str}
NODE = {
    **{"node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str},
    **{"jsNodeId": str, "clerp": str},
}
LINK = {"source": str, "target": str, "weight": float}
# Text that XML cannot hold, or changes; the last is of a byte that is no UTF-8.
AWKWARD = ["\n", "\r", "", " ", "\x00", 'é"<&>', "\u2028", "\udc80"]


@pytest.fixture(scope="module")
def graph() -> nx.DiGraph:
    prompt = Prompts(models.tokens(1, len(AWKWARD)), logit_difference([[3]], [[4]]))
    found = attribution_graph(models.bridge("gpt2", torch.float64), prompt, max_nodes=30)
    found.graph["tokens"] = AWKWARD
    for _, node in found.nodes(data=True):
        node["token"] = AWKWARD[node["position"]]
    return found


def types(graph: nx.DiGraph) -> list[type]:
    return [type(value) for _, data in graph.nodes(data=True) for _, value in sorted(data.items())]


@pytest.mark.parametrize("ending", ["json", "graphml"])
@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
def test_a_graph_comes_back_to_the_last_bit(
    graph: nx.DiGraph, tmp_path: Path, ending: str, pruned: bool
) -> None:
    graph = prune(graph) if pruned else graph
    path = tmp_path / "new" / f"graph.{ending}"
    save_graph(graph, path)
    found = load_graph(path)
    assert graphs_equal(found, graph)
    assert types(found) == types(graph)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def check(data: dict[str, Any], required: dict[str, type]) -> None:
    for key, kind in required.items():
        assert type(data[key]) is kind, (key, data[key])


def test_viewers_find_what_they_read(graph: nx.DiGraph, tmp_path: Path) -> None:
    save_graph(prune(graph), tmp_path / "climbed.json")
    data = json.loads((tmp_path / "climbed.json").read_text())
    check(data["metadata"], METADATA)
    assert data["metadata"]["slug"] == "climbed"
    assert data["metadata"]["pruning_settings"]["node_threshold"] == 0.8
    check(data["qParams"], {"pinnedIds": list, "supernodes": list, "linkType": str})
    ids = [node["node_id"] for node in data["nodes"]]
    assert len(set(ids)) == len({node["jsNodeId"] for node in data["nodes"]}) == len(ids)
    for node in data["nodes"]:
        check(node, NODE)
        assert node["layer"] == "E" or int(node["layer"]) <= models.N_LAYERS
        assert node["ctx_idx"] < len(data["metadata"]["prompt_tokens"])
        assert node["influence"] <= data["metadata"]["node_threshold"]
    # What they show is told apart by layer, number and position; errors by their type besides.
    things = [
        (n["layer"], n["feature"], n["ctx_idx"], "error" in n["feature_type"] and n["feature_type"])
        for n in data["nodes"]
    ]
    assert len(set(things)) == len(things)
    assert len(data["links"]) == prune(graph).number_of_edges()
    for link in data["links"]:
        check(link, LINK)
        assert {link["source"], link["target"]} <= set(ids)
    (logit,) = (node for node in data["nodes"] if node["feature_type"] == "logit")
    assert logit["is_target_logit"]
    assert logit["token_prob"] == 1.0
    # Both viewers take the probability out of the label in this way, and stop without it.
    assert float(logit["clerp"].split("(p=")[1].split(")")[0]) == 1
    assert {"embedding", "mlp reconstruction error"} <= {n["feature_type"] for n in data["nodes"]}


def test_graphml_is_read_by_others(graph: nx.DiGraph, tmp_path: Path) -> None:
    save_graph(graph, tmp_path / "graph.graphml")
    found = nx.read_graphml(tmp_path / "graph.graphml")
    assert set(found) == set(graph)
    assert {(s, t): w for s, t, w in found.edges(data="weight")} == {
        (s, t): w for s, t, w in graph.edges(data="weight")
    }
    assert found.nodes["metric"]["contribution"] == graph.nodes["metric"]["contribution"]


def test_what_is_there_stays_if_the_new_cannot_be_written(
    graph: nx.DiGraph, tmp_path: Path
) -> None:
    path = tmp_path / "graph.json"
    save_graph(graph, path)
    before = path.read_bytes()
    broken = graph.copy()
    broken.graph["prompt"] = float("nan")
    with pytest.raises(InputError, match=r"the graph holds what \.json cannot"):
        save_graph(broken, path)
    assert path.read_bytes() == before
    save_graph(prune(graph), path)
    assert path.read_bytes() != before
    with pytest.raises(OutputError, match="cannot be written"):
        save_graph(graph, path / "graph.json")
    assert [p.name for p in tmp_path.iterdir()] == ["graph.json"]


def test_refused(graph: nx.DiGraph, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neither \.json nor \.graphml"):
        save_graph(graph, tmp_path / "graph.txt")
    with pytest.raises(InputError, match="the graph lacks 'model'"):
        save_graph(nx.DiGraph(), tmp_path / "graph.json")
    with pytest.raises(InputError, match=r"absent\.json cannot be read"):
        load_graph(tmp_path / "absent.json")
    for name, text in {
        "list.json": "[]",
        "broken.json": "{",
        "other.json": '{"nodes": [], "links": []}',
        "broken.graphml": "<graphml",
        "other.graphml": "\n".join(nx.generate_graphml(nx.DiGraph([("a", "b")]))),
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match="holds no graph"):
            load_graph(tmp_path / name)
    save_graph(graph, tmp_path / "graph.json")
    data = json.loads((tmp_path / "graph.json").read_text())
    data["lch"]["format"] = 99
    (tmp_path / "graph.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="format 99"):
        load_graph(tmp_path / "graph.json")


@pytest.mark.parametrize("suffix", [".json", ".graphml"])
def test_what_was_changed_is_not_believed(graph: nx.DiGraph, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"graph{suffix}"
    save_graph(graph, path)
    text = path.read_text()
    head = next(name for name, kind in graph.nodes(data="kind") if kind == "head")
    number = repr(graph.nodes[head]["contribution"])
    assert number in text
    for other in (number.replace("0.", "1.", 1) + "1", '"much"', "NaN", "1e999"):
        path.write_text(text.replace(number, other, 1))
        with pytest.raises(InputError, match="holds no graph that save_graph wrote"):
            load_graph(path)
    path.write_text(text)
    assert graphs_equal(load_graph(path), graph)


def test_pipes_and_names_that_are_there_twice_are_refused(
    graph: nx.DiGraph, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(InputError, match="no plain file"):
        load_graph(tmp_path / "pipe.json")
    path = tmp_path / "graph.json"
    save_graph(graph, path)
    text = path.read_text()
    data = json.loads(text)
    data["nodes"].append(data["nodes"][0])
    for damaged in (json.dumps(data), text.replace('"nodes":', '"nodes": [], "nodes":', 1)):
        path.write_text(damaged)
        with pytest.raises(InputError, match="twice"):
            load_graph(path)

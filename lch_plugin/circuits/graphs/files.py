"""Graphs as files, without loss: JSON for circuit-tracer's viewer and Neuronpedia, and GraphML.

The JSON has the schema of attribution graphs that both read (metadata, qParams, nodes, links).
Viewers know transcoder features, their errors, tokens and logits. Heads, neurons and features of
ours are nodes with types of their own and what they are for a label (``clerp``); rests are errors;
the metric is the one logit, of probability 1. ``influence`` is cumulative there, as both expect:
their sliders hide the nodes above a threshold. Our own names and attributes stand under ``lch`` in
each node and at the top, for `load_graph` to read back to the last bit. Supernodes stand where
viewers have theirs, so those that were made in a viewer are read back as well.

GraphML carries numbers and printable text; what it cannot carry, the graph's attributes among it,
is in one attribute of the graph called ``lch``, as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import networkx as nx
import xxhash
from pydantic import BaseModel, ConfigDict

from lch_plugin.circuits.graphs.supernodes import check_groups, grouped
from lch_plugin.circuits.kinds import KINDS, METRIC
from lch_plugin.errors import InputError
from lch_plugin.files import write_file
from lch_plugin.records import check_plain, check_record, parse_json

_FORMAT = 2
_LAYERS_OF_TOKENS = "E"


def save_graph(graph: nx.DiGraph, path: str | Path) -> None:
    """Write a graph of `attribution_graph`, pruned or not; what was there is replaced.

    Args:
        graph: the graph.
        path: a file that ends in ``.json`` or ``.graphml``.

    Raises:
        InputError: another ending, or a graph that is none of `attribution_graph`.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".json", ".graphml"):
        raise InputError(f"{path} ends in neither .json nor .graphml.")
    data = to_json(graph, slug=path.stem)
    try:
        if path.suffix == ".json":
            text = json.dumps(data, allow_nan=False)
        else:
            text = "\n".join(nx.generate_graphml(_carried(graph)))
    except (TypeError, ValueError) as error:
        raise InputError(f"the graph holds what {path.suffix} cannot: {error}") from error
    write_file(path, text)


def load_graph(path: str | Path) -> nx.DiGraph:
    """Read a graph that `save_graph` wrote.

    Raises:
        InputError: there is no such file, it holds no such graph, or another than was written.
    """
    path = Path(path)
    cure = "Write it again with save_graph."
    check_plain(path, cure)
    try:
        if path.suffix == ".graphml":
            return _restored(nx.read_graphml(path))
        return from_json(parse_json(path.read_text(encoding="utf-8")))
    except Exception as error:  # Of any type, and all of them about the file.
        said = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        raise InputError(
            f"{path} holds no graph that save_graph wrote: {' '.join(said.split())[:400]} {cure}"
        ) from error


def to_json(graph: nx.DiGraph, slug: str = "graph") -> dict[str, Any]:
    """The graph in the schema of attribution graphs, as JSON.

    Args:
        graph: of `attribution_graph`.
        slug: name of the graph in a viewer.

    Raises:
        InputError: the graph is none of `attribution_graph`.
    """
    facts = {key: value for key, value in graph.graph.items() if key != "supernodes"}
    groups = graph.graph.get("supernodes", {})
    check_groups(graph, groups)
    try:
        ids = {name: _identifier(node) for name, node in graph.nodes(data=True)}
        pruning = facts.get("pruning")
        metadata = {
            "slug": slug,
            "scan": facts["model"],
            "transcoder_list": [],
            "prompt_tokens": facts["tokens"],
            "prompt": facts["prompt"],
            "schema_version": 1,
            "info": {"generator": {"name": "lch-plugin", "version": version("lch-plugin")}},
            # The graph is pruned as it should be: show all of it.
            **({} if pruning is None else {"node_threshold": 1.0, "pruning_settings": pruning}),
        }
        nodes = [_node(name, ids[name], graph) for name in graph]
        pinned = [member for members in groups.values() for member in members]
        pinned += [name for name, node in graph.nodes(data=True) if pinned and _is_metric(node)]
    except KeyError as error:
        raise InputError(
            f"the graph lacks {error}: pass one of attribution_graph, pruned or not."
        ) from error
    return {
        "metadata": metadata,
        "qParams": {
            # Viewers draw the supernodes of pinned nodes, and where these lead.
            "pinnedIds": [ids[n] for n in pinned],
            "supernodes": [[name, *(ids[n] for n in members)] for name, members in groups.items()],
            **{"linkType": "both", "clickedId": "", "sg_pos": ""},
        },
        "nodes": nodes,
        "links": [
            {"source": ids[source], "target": ids[target], **data}
            for source, target, data in graph.edges(data=True)
        ],
        "lch": {"format": _FORMAT, "graph": facts, "xxh3": _hash(graph)},
    }


def from_json(data: Mapping[str, Any]) -> nx.DiGraph:
    """The graph that `to_json` was given.

    Raises:
        InputError: it is of another format, or not what was written.
        KeyError, TypeError: it is no such data.
    """
    _check_format(data["lch"])
    graph = nx.DiGraph()
    graph.graph.update(data["lch"]["graph"])
    names = {}
    for node in data["nodes"]:
        if node["node_id"] in names:
            raise InputError(f"node {node['node_id']!r} is there twice.")
        names[node["node_id"]] = node["lch"]["name"]
        graph.add_node(node["lch"]["name"], **node["lch"]["attributes"])
    for link in data["links"]:
        rest = {key: value for key, value in link.items() if key not in ("source", "target")}
        graph.add_edge(names[link["source"]], names[link["target"]], **rest)
    _check(graph, data["lch"])
    groups: dict[str, list[str]] = {}
    for name, *ids in _supernodes(data["qParams"]):
        label = name
        while label in groups:  # A viewer may give several the same label.
            label += "'"
        groups[label] = [names[i] for i in ids]
    return grouped(graph, groups) if groups else graph


def _supernodes(parameters: Mapping[str, Any]) -> list[list[str]]:
    """Name and members of each; circuit-tracer saves them as text, or not at all."""
    found = parameters.get("supernodes") or []
    return parse_json(found) if isinstance(found, str) else found


def _is_metric(node: Mapping[str, Any]) -> bool:
    return bool(node["kind"] == METRIC)


def _node(name: str, identifier: str, graph: nx.DiGraph) -> dict[str, Any]:
    """A node as viewers read it."""
    node = graph.nodes[name]
    kind, metric = node["kind"], graph.graph["metric"]
    is_metric, number = _is_metric(node), list(KINDS).index(kind)
    label = f"{name} {node['token']!r}, contributes {node['contribution']:+.3g}"
    if is_metric:  # Viewers look for a token in quotes and a probability in this very form.
        label = f'Output "{metric["name"]} = {metric["value"]:.3g}" (p=1.000)'
    return {
        "node_id": identifier,
        # One number for each thing at a place: viewers know things by it, not by their type.
        "feature": -1 if KINDS[kind].is_rest else node["index"] * len(KINDS) + number,
        "layer": _LAYERS_OF_TOKENS if node["layer"] < 0 else str(node["layer"]),
        "ctx_idx": node["position"],
        "feature_type": KINDS[kind].viewer,
        "token_prob": float(is_metric),
        "is_target_logit": is_metric,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": identifier,
        "clerp": label,
        "influence": node.get("cumulative_influence"),
        "activation": node["activation"],
        "lch": {"name": name, "attributes": node},
    }


def _identifier(node: Mapping[str, Any]) -> str:
    """Layer, what it is there, and position, as viewers take node ids apart."""
    layer = _LAYERS_OF_TOKENS if node["layer"] < 0 else node["layer"]
    return f"{layer}_{node['kind'].replace('_', '-')}{node['index']}_{node['position']}"


def _carried(graph: nx.DiGraph) -> nx.DiGraph:
    """The graph as far as GraphML carries it, and the rest in an attribute."""
    carried = nx.DiGraph()
    exact: dict[str, dict[str, Any]] = {}
    for name, data in graph.nodes(data=True):
        carried.add_node(name, **{key: v for key, v in data.items() if _is_carried(v)})
        exact[name] = {key: v for key, v in data.items() if not _is_carried(v)}
    carried.add_edges_from(graph.edges(data=True))
    carried.graph["lch"] = json.dumps(
        {
            "format": _FORMAT,
            "graph": graph.graph,
            "xxh3": _hash(graph),
            "nodes": {name: values for name, values in exact.items() if values},
        },
        allow_nan=False,
    )
    return carried


def _restored(carried: nx.DiGraph) -> nx.DiGraph:
    """What `_carried` was given."""
    data = parse_json(carried.graph["lch"])
    _check_format(data)
    graph = nx.DiGraph()
    graph.graph.update(data["graph"])
    graph.add_nodes_from(carried.nodes(data=True))
    graph.add_edges_from(carried.edges(data=True))
    for name, values in data["nodes"].items():
        graph.nodes[name].update(values)
    _check(graph, data)
    return graph


class _Node(BaseModel):
    """Attributes that every node has; some have more."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    kind: Literal[tuple(KINDS)]  # type: ignore[valid-type]
    layer: int
    position: int
    index: int
    token: str
    contribution: float


class _Edge(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")

    weight: float
    pattern: float = 0.0


def _check(graph: nx.DiGraph, recorded: Mapping[str, Any]) -> None:
    """Nodes and edges are what they have to be, and what they were when they were written."""
    cure = "Write the graph again."
    for name, node in graph.nodes(data=True):
        check_record(node, _Node, f"node {name!r}", cure)
    for source, target, edge in graph.edges(data=True):
        check_record(edge, _Edge, f"edge {source!r} -> {target!r}", cure)
    if recorded.get("xxh3") != _hash(graph):
        raise InputError("nodes, edges or attributes are others than were written.")


def _hash(graph: nx.DiGraph) -> str:
    """xxh3 of nodes, edges and facts, but not of supernodes, which viewers add."""
    content = {
        "graph": {key: value for key, value in graph.graph.items() if key != "supernodes"},
        "nodes": dict(graph.nodes(data=True)),
        "edges": sorted(
            ([s, t, data] for s, t, data in graph.edges(data=True)), key=lambda e: e[:2]
        ),
    }
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_format(data: Mapping[str, Any]) -> None:
    found = data["format"]
    if found != _FORMAT:
        raise InputError(f"the graph is of format {found}, and this version reads {_FORMAT}.")


def _is_carried(value: Any) -> bool:
    # XML has no control characters, and an empty text reads as none.
    return isinstance(value, int | float) or (
        isinstance(value, str) and value.isprintable() and bool(value.strip())
    )

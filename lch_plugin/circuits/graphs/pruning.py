"""The part of a graph through which most of the metric comes about.

As in circuit tracing (Ameisen et al., "Circuit Tracing", Transformer Circuits 2025; the library
circuit-tracer): the edges into a node are taken as shares of their total size, whatever their sign.
An edge through an attention pattern counts as much as one of the flow of the same size.
A node's influence is the sum over all paths to the metric of the products of shares along them, the
metric's row of ``(I - A)^-1 - I`` with ``A[t, s]`` the share of edge ``s -> t``; an edge's is its
share times the influence of its target.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import TypeVar

import networkx as nx

from lch_plugin.circuits.kinds import METRIC
from lch_plugin.errors import InputError

_Key = TypeVar("_Key", str, tuple[str, str])


def prune(
    graph: nx.DiGraph, node_threshold: float = 0.8, edge_threshold: float = 0.98
) -> nx.DiGraph:
    """Keep the fewest nodes, and between them the fewest edges, that carry most of the influence.

    Then nodes that no path joins to the metric any more go as well, and their edges. Embeddings and
    the metric always stay. Weights stay as they are, so what enters a node is no longer its whole
    contribution. Supernodes keep the members that stay.

    Args:
        graph: of `attribution_graph`.
        node_threshold: share of the influence of all nodes that the chosen ones have at least. What
            goes for want of a path is taken from it afterwards.
        edge_threshold: share of the influence of the edges between them, likewise.

    Returns:
        A new graph. Its nodes have an ``influence``, and a ``cumulative_influence``: the share of
        all influence that this node and those of larger influence have together. The graph's
        attribute ``pruning`` holds the thresholds, the shares that are left in the end, and the
        numbers of nodes and edges before.

    Raises:
        InputError: a threshold outside 0 to 1, or a graph that is no attribution graph: without
            metric, or with cycles.
    """
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 <= value <= 1:
            raise InputError(f"{name}={value} must be between 0 and 1.")
    if METRIC not in graph or not nx.is_directed_acyclic_graph(graph):
        raise InputError(
            f"this graph has no node {METRIC!r}, or cycles: pass one of attribution_graph, before "
            "its supernodes are merged."
        )
    influence = node_influence(graph)
    cumulative = _cumulative(influence)
    nodes = _top(influence, node_threshold)
    always = {METRIC, *(n for n, kind in graph.nodes(data="kind") if kind == "embedding")}
    candidates = graph.subgraph(nodes | always)
    by_edge = edge_influence(candidates)
    edges = _top(by_edge, edge_threshold)
    pruned = nx.DiGraph()
    pruned.graph.update(graph.graph)
    pruned.add_nodes_from((n, dict(graph.nodes[n])) for n in candidates)
    pruned.add_edges_from((s, t, dict(graph.edges[s, t])) for s, t in by_edge if (s, t) in edges)
    joined = nx.ancestors(pruned, METRIC) | always
    pruned.remove_nodes_from([n for n in pruned if n not in joined])
    staying = {
        name: [member for member in members if member in pruned]
        for name, members in pruned.graph.pop("supernodes", {}).items()
    }
    if any(staying.values()):
        pruned.graph["supernodes"] = {name: kept for name, kept in staying.items() if kept}
    for node in pruned:
        pruned.nodes[node]["influence"] = influence[node]
        pruned.nodes[node]["cumulative_influence"] = cumulative[node]
    pruned.graph["pruning"] = {
        "node_threshold": node_threshold,
        "edge_threshold": edge_threshold,
        "node_share": _share(influence, pruned),
        "edge_share": _share(by_edge, pruned.edges),
        "n_nodes": graph.number_of_nodes(),
        "n_edges": graph.number_of_edges(),
    }
    return pruned


def node_influence(graph: nx.DiGraph) -> dict[str, float]:
    """Of every node on the metric; 0 of the metric itself."""
    influence = dict.fromkeys(graph, 0.0)
    influence[METRIC] = 1.0
    for target in reversed(list(nx.topological_sort(graph))):
        for source, share in _shares(graph, target).items():
            influence[source] += influence[target] * share
    return {**influence, METRIC: 0.0}


def edge_influence(graph: nx.DiGraph) -> dict[tuple[str, str], float]:
    """Of every edge on the metric."""
    influence = {**node_influence(graph), METRIC: 1.0}
    return {
        (source, target): influence[target] * share
        for target in graph
        for source, share in _shares(graph, target).items()
    }


def _shares(graph: nx.DiGraph, target: str) -> dict[str, float]:
    """The edges into a node as shares of their total size."""
    sizes = {source: _size(graph.edges[source, target]) for source in graph.pred[target]}
    total = sum(sizes.values())
    return {source: size / total for source, size in sizes.items()} if total else sizes


def _size(edge: Mapping[str, float]) -> float:
    """Of all that goes through an edge: what is read, and where it is read from."""
    return abs(edge["weight"]) + abs(edge.get("pattern", 0.0))


def _top(influence: Mapping[_Key, float], threshold: float) -> set[_Key]:
    """The fewest keys that have a share of all influence together."""
    if threshold == 1:  # However small, and whatever rounding makes of the sum.
        return {key for key, value in influence.items() if value > 0}
    order: list[_Key] = _ordered(influence)
    before = [0.0, *accumulate(influence[key] for key in order)]
    n = sum(reached < threshold * before[-1] for reached in before)
    return {key for key in order[:n] if influence[key] > 0}


def _cumulative(influence: Mapping[_Key, float]) -> dict[_Key, float]:
    """Of each key, the share that it and those of larger influence have together."""
    order: list[_Key] = _ordered(influence)
    reached = list(accumulate(influence[key] for key in order))
    return {key: part / (reached[-1] or 1.0) for key, part in zip(order, reached, strict=True)}


def _share(influence: Mapping[_Key, float], kept: Iterable[_Key]) -> float:
    return sum(influence[key] for key in kept) / (sum(influence.values()) or 1.0)


def _ordered(influence: Mapping[_Key, float]) -> list[_Key]:
    return sorted(influence, key=lambda key: -influence[key])

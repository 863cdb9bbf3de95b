"""An attribution graph as one interactive HTML file: no request, no script from elsewhere."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import networkx as nx

from lch_plugin.circuits.graphs.supernodes import merge
from lch_plugin.circuits.kinds import KINDS
from lch_plugin.circuits.nodes import ScoredNode
from lch_plugin.circuits.reports.graph_layout import layout
from lch_plugin.files import write_file
from lch_plugin.report import render

#: What a metric is measured in, as far as its name tells.
UNITS = {
    "logit_difference": "logits",
    "log_odds": "nats",
    "log_probability": "nats",
    "kl_divergence": "nats",
}


@dataclass(frozen=True)
class NodeDetail:
    """What there is to say of a node beside what the graph holds.

    Attributes:
        promoted: tokens it writes towards, and by how many logits, the strongest first.
        suppressed: tokens it writes away from, likewise.
        attention: of a head, its pattern from this position to each one up to it.
        scored: its score on a task, with rank and percentile among all nodes of its kind.
    """

    promoted: Sequence[tuple[str, float]] = ()
    suppressed: Sequence[tuple[str, float]] = ()
    attention: Sequence[float] = ()
    scored: ScoredNode | None = None


def write_graph_page(
    graph: nx.DiGraph, path: str | Path, details: Mapping[str, NodeDetail] | None = None
) -> None:
    """Write a graph as a page to look around in: hover, click, search, or use the keyboard.

    Supernodes (`lch_plugin.circuits.grouped`) are folded into one box each, which a click unfolds.
    A file that is there already is replaced.

    Args:
        graph: of `lch_plugin.circuits.graphs`, pruned to some 500 nodes at most.
        path: of the HTML file.
        details: by node, what to say beside (`lch_plugin.circuits.node_details`).

    Raises:
        InputError: nodes lack what `attribution_graph` gives them, or there are none.
        OutputError: the file cannot be written.
    """
    page = render("graph.html", {"graph": page_data(graph, details)})
    write_file(path, page)


def page_data(graph: nx.DiGraph, details: Mapping[str, NodeDetail] | None = None) -> dict[str, Any]:
    """What the page is made of, in terms of JSON: nodes with their places, and edges.

    Edges are ``[source, target, weight]``, ends as places in the list of nodes, the largest weight
    first; those through patterns alone are not drawn, and nodes of attention say their sum.
    Rank and percentile are among the nodes of one kind in this graph. Supernodes come after
    the nodes, with their members as places in the list.

    Raises:
        InputError: as `write_graph_page`.
    """
    placed, details = layout(graph), details or {}
    index = {key: i for i, key in enumerate(graph)}
    supernodes = _supernodes(graph)
    described = [*graph.nodes(data=True), *supernodes.items()]
    # A folded supernode is drawn where its largest member is.
    drawn_at = {key: data.get("largest", key) for key, data in described}
    peers: dict[str, list[float]] = defaultdict(list)
    for _, data in described:
        peers[data["kind"]].append(data["contribution"])
    for contributions in peers.values():
        contributions.sort()
    nodes = [
        {
            "key": key,
            **_described(data),
            **_place(data["contribution"], peers[data["kind"]]),
            **_detail(details.get(key, NodeDetail())),
            "x": placed.nodes[drawn_at[key]][0],
            "y": placed.nodes[drawn_at[key]][1],
            "room": placed.room[drawn_at[key]],
            "members": [index[m] for m in data["members"]] if key in supernodes else None,
            "internal": data.get("internal"),
        }
        for key, data in described
    ]
    edges = [
        [index[s], index[t], float(data["weight"])]
        for s, t, data in graph.edges(data=True)
        if data["weight"] or "pattern" not in data
    ]
    about = graph.graph
    return {
        **{name: about[name] for name in ("prompt", "corrupt", "model", "linearization")},
        "tokens": list(about["tokens"]),
        "metric": about["metric"]["name"],
        "units": UNITS.get(about["metric"]["name"], "units of the metric"),
        "value": about["metric"]["value"],
        "nodes": nodes,
        "edges": sorted(edges, key=lambda edge: -abs(edge[2])),
        "rows": [{"layer": n, "part": part, "y": y} for n, part, y in placed.rows],
        "columns": [{"x": x, "width": width} for x, width in placed.columns],
        "width": placed.width,
        "height": placed.height,
        "version": version("lch-plugin"),
    }


def _supernodes(graph: nx.DiGraph) -> dict[str, dict[str, Any]]:
    """Attributes of the graph's supernodes, with the name of each one's largest member."""
    merged = merge(graph)
    found = {}
    for name, members in graph.graph.get("supernodes", {}).items():
        own = {member: graph.nodes[member] for member in members}
        influence = [data.get("influence") for data in own.values()]
        found[name] = {
            **merged.nodes[name],
            "influence": None if None in influence else sum(influence),
            "largest": max(own, key=lambda member: abs(own[member]["contribution"])),
        }
    return found


def _described(data: Mapping[str, Any]) -> dict[str, Any]:
    kind = data["kind"]
    optional = ("offset", "activation", "influence", "pattern", "pattern_rest")
    return {
        "kind": kind,
        "title": KINDS[kind].title.format(index=data.get("index"), layer=data["layer"]),
        "layer": data["layer"],
        "position": data["position"],
        "token": data["token"],
        "contribution": float(data["contribution"]),
        **{name: None if data.get(name) is None else float(data[name]) for name in optional},
    }


def _place(contribution: float, peers: Sequence[float]) -> dict[str, Any]:
    """Rank and percentile as `ScoredNode` has them, among sorted contributions."""
    below = bisect_left(peers, contribution)
    above = sum(1 for other in peers[below:] if other > contribution)
    return {"rank": above + 1, "of": len(peers), "percentile": 100 * below / len(peers)}


def _detail(detail: NodeDetail) -> dict[str, Any]:
    scored = detail.scored
    return {
        "promoted": [list(pair) for pair in detail.promoted],
        "suppressed": [list(pair) for pair in detail.suppressed],
        "attention": list(detail.attention),
        "scored": None
        if scored is None
        else {"score": scored.score, "rank": scored.rank, "percentile": scored.percentile},
    }

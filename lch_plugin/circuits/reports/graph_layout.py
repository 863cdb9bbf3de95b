"""Where the nodes of an attribution graph are drawn: layers upward, positions across.

A row holds the attention or the MLP of one layer, a column one position. The nodes of a cell stand
side by side, the largest contribution first; columns and rows are as wide and as high as their
fullest cell, so that no node hides another.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import networkx as nx

from lch_plugin.errors import InputError

#: Of a node, which part of its layer it is drawn in.
PARTS = {
    "embedding": "embedding",
    "position": "embedding",
    "head": "attention",
    "attn_rest": "attention",
    "neuron": "MLP",
    "mlp": "MLP",
    "feature": "MLP",
    "mlp_rest": "MLP",
    "metric": "metric",
}
# What is said of nodes, and of the graph.
_NEEDED = ("kind", "layer", "position", "token", "contribution")
_ABOUT = ("tokens", "prompt", "corrupt", "metric", "model", "linearization")
# In CSS pixels: from node to node, between rows, and of a column at least.
_STEP, _GAP, _COLUMN = 17.0, 28.0, 30.0
# Cells of many nodes are somewhat wider than high.
_ASPECT = 1.6
_ORDER = ("embedding", "attention", "MLP", "metric")

Row = tuple[int, str]


@dataclass(frozen=True)
class Layout:
    """In CSS pixels, from the top left corner.

    Attributes:
        nodes: centre ``(x, y)`` of each node.
        rows: layer, part of it, and the height ``y`` of the middle, of each row from the bottom.
        columns: left edge and width of each position's column.
        width, height: of everything.
    """

    nodes: dict[str, tuple[float, float]]
    rows: list[tuple[int, str, float]]
    columns: list[tuple[float, float]]
    width: float
    height: float


def layout(graph: nx.DiGraph) -> Layout:
    """Place every node.

    Raises:
        InputError: nodes lack what `attribution_graph` gives them, or there are none.
    """
    _check(graph)
    cells: dict[tuple[Row, int], list[str]] = defaultdict(list)
    size = {key: abs(data["contribution"]) for key, data in graph.nodes(data=True)}
    for key in sorted(graph, key=lambda key: (-size[key], key)):
        data = graph.nodes[key]
        cells[(data["layer"], PARTS[data["kind"]]), data["position"]].append(key)
    # Sideways first: how many nodes stand side by side decides how high the rows are.
    across = [1] * len(graph.graph["tokens"])
    for (_, position), keys in cells.items():
        across[position] = max(across[position], int(math.sqrt(_ASPECT * len(keys))))
    columns = list(_spans(max(_COLUMN, n * _STEP + _STEP / 2) for n in across))
    rows = sorted({row for row, _ in cells}, key=lambda row: (row[0], _ORDER.index(row[1])))
    deep = dict.fromkeys(rows, 1)
    for (row, position), keys in cells.items():
        deep[row] = max(deep[row], math.ceil(len(keys) / across[position]))
    spans = list(_spans(deep[row] * _STEP + _GAP for row in reversed(rows)))
    middle = {row: y + h / 2 for row, (y, h) in zip(reversed(rows), spans, strict=True)}
    nodes = {}
    for (row, position), keys in cells.items():
        left, width = columns[position]
        lines = [keys[i : i + across[position]] for i in range(0, len(keys), across[position])]
        for line, chosen in enumerate(lines):
            y = middle[row] + _STEP * (line - (len(lines) - 1) / 2)
            for place, key in enumerate(chosen):
                x = left + width / 2 + _STEP * (place - (len(chosen) - 1) / 2)
                nodes[key] = (x, y)
    return Layout(
        nodes=nodes,
        rows=[(*row, middle[row]) for row in rows],
        columns=columns,
        width=sum(columns[-1]),
        height=sum(spans[-1]),
    )


def _spans(sizes: Iterable[float]) -> Iterator[tuple[float, float]]:
    start = 0.0
    for size in sizes:
        yield start, size
        start += size


def _check(graph: nx.DiGraph) -> None:
    absent = [name for name in _ABOUT if name not in graph.graph]
    if absent or not len(graph):
        raise InputError(
            f"a graph of {len(graph)} nodes, without the attributes {absent}, cannot be drawn. "
            "Draw what attribution_graph, prune or load gave."
        )
    n_tokens = len(graph.graph["tokens"])
    for key, data in graph.nodes(data=True):
        missing = [name for name in _NEEDED if name not in data]
        known = not missing and data["kind"] in PARTS and 0 <= data["position"] < n_tokens
        if not known:
            raise InputError(
                f"node {key!r} cannot be drawn: it has {dict(data)}, and needs "
                f"{', '.join(_NEEDED)}, a kind among {tuple(PARTS)} and one of the {n_tokens} "
                "positions. Draw what attribution_graph, prune or load gave."
            )

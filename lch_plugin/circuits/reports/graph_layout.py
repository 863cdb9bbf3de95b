"""Where the nodes of an attribution graph are drawn: layers upward, positions across.

A row holds the attention or the MLP of one layer, a column one position. The nodes of a cell stand
side by side, the largest contribution first, in lines as long as the column is wide. Columns get
width, and rows height, by their fullest cell, so that no node hides another, and positions where
little happens leave the room to those where much does. So do rows: one that holds rests alone, as
most do in a model of many layers, is thin, and has no name.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import networkx as nx

from lch_plugin.circuits.kinds import KINDS
from lch_plugin.errors import InputError

# What is said of nodes, and of the graph.
_NEEDED = ("kind", "layer", "position", "token", "contribution")
_ABOUT = ("tokens", "prompt", "corrupt", "metric", "model", "linearization")
# In CSS pixels: from node to node where they are many, and of a column at least.
_STEP, _COLUMN = 17.0, 18.0
# Between rows, at most and at least, and of all rows together: many stand closer.
_GAP, _LEAST_GAP, _GAPS = 28.0, 6.0, 560.0
# Height of a row that holds rests alone.
_THIN = 9.0
# From node to node where there is room to name them, at least and at most, and from line to line.
_NAMED, _APART, _NAMED_LINE = 34.0, 48.0, 28.0
# Lines that nodes with names may take; more nodes stand close together.
_NAMED_LINES = 3
# What few nodes are spread over.
_WIDTH = 580.0
# Cells of many nodes are somewhat wider than high.
_ASPECT = 1.6
_ORDER = ("embedding", "attention", "MLP", "supernode", "metric")

Row = tuple[int, str]


@dataclass(frozen=True)
class Layout:
    """In CSS pixels, from the top left corner.

    Attributes:
        nodes: centre ``(x, y)`` of each node.
        room: of each node, the width it has for itself.
        rows: layer, part of it, and the height ``y`` of the middle, of each row with a name, from
            the bottom.
        columns: left edge and width of each position's column.
        width, height: of everything.
    """

    nodes: dict[str, tuple[float, float]]
    room: dict[str, float]
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
        cells[(data["layer"], KINDS[data["kind"]].row), data["position"]].append(key)

    # Sideways first: how many nodes stand side by side decides how high the rows are.
    fullest = [0] * len(graph.graph["tokens"])
    for (_, position), keys in cells.items():
        fullest[position] = max(fullest[position], len(keys))
    columns = list(_spans(_widths(fullest)))
    lines = {cell: _lines(len(keys), columns[cell[1]][1]) for cell, keys in cells.items()}
    rows = sorted({row for row, _ in cells}, key=lambda row: (row[0], _ORDER.index(row[1])))
    deep = dict.fromkeys(rows, 0.0)
    for (row, position), keys in cells.items():
        of_cell = lines[row, position]
        deep[row] = max(deep[row], of_cell.height * math.ceil(len(keys) / of_cell.n_nodes))
    named = {
        row
        for (row, _), keys in cells.items()
        for k in keys
        if not KINDS[graph.nodes[k]["kind"]].is_rest
    }
    gap = max(_LEAST_GAP, min(_GAP, _GAPS / max(1, len(named))))
    tall = [deep[row] + gap if row in named else _THIN for row in reversed(rows)]
    spans = list(_spans(tall))
    middle = {row: y + h / 2 for row, (y, h) in zip(reversed(rows), spans, strict=True)}
    nodes, room = {}, {}
    for (row, position), keys in cells.items():
        (left, width), (n, step, height) = columns[position], lines[row, position]
        chosen = [keys[i : i + n] for i in range(0, len(keys), n)]
        for line, of_line in enumerate(chosen):
            y = middle[row] + height * (line - (len(chosen) - 1) / 2)
            for place, key in enumerate(of_line):
                nodes[key] = (left + width / 2 + step * (place - (len(of_line) - 1) / 2), y)
                room[key] = step
    return Layout(
        nodes=nodes,
        room=room,
        rows=[(*row, middle[row]) for row in rows if row in named],
        columns=columns,
        width=sum(columns[-1]),
        height=sum(spans[-1]),
    )


class _Lines(NamedTuple):
    """How the nodes of a cell stand: how many in a line, and how far apart both ways."""

    n_nodes: int
    step: float
    height: float


def _widths(fullest: Sequence[int]) -> list[float]:
    """Of columns, by how many nodes their fullest cell has."""
    across = [max(1, int(math.sqrt(_ASPECT * n))) for n in fullest]
    least = [_COLUMN + _STEP * (n - 1) for n in across]
    spare = max(0.0, _WIDTH - sum(least))
    wanted = [max(0, n - 1) for n in fullest]
    if not any(wanted):
        wanted = [1] * len(fullest)
    return [w + spare * n / sum(wanted) for w, n in zip(least, wanted, strict=True)]


def _lines(n_nodes: int, width: float) -> _Lines:
    """Apart, with room for names, if that takes few lines; else close together."""
    apart = max(1, int(width / _NAMED))
    n_lines = math.ceil(n_nodes / apart)
    if n_lines <= _NAMED_LINES:
        in_line = math.ceil(n_nodes / n_lines)
        return _Lines(in_line, min(_APART, width / in_line), _NAMED_LINE)
    return _Lines(int(width / _STEP), _STEP, _STEP)


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
        known = not missing and data["kind"] in KINDS and 0 <= data["position"] < n_tokens
        if not known:
            raise InputError(
                f"node {key!r} cannot be drawn: it has {dict(data)}, and needs "
                f"{', '.join(_NEEDED)}, a kind among {tuple(KINDS)} and one of the {n_tokens} "
                "positions. Draw what attribution_graph, prune or load gave."
            )

"""Nodes of a model, what they score, and circuits: sets of them.

A node is a head, a neuron or a whole MLP, at every position. Scores and circuits hold one value for
each node of the model, in the order of `lch_plugin.adapters.transformer_lens.node_points`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lch_plugin.adapters.transformer_lens import LensModel, NodeKind, NodePoint, node_points
from lch_plugin.circuits.kinds import KINDS
from lch_plugin.circuits.ranking import highest, ordered, ranked
from lch_plugin.errors import InputError, SiteError
from lch_plugin.sites import integers

# Columns that make up a node, and how many nodes a notebook shows.
_PLACE, _N_SHOWN = ("kind", "layer", "index"), 20


@dataclass(frozen=True, order=True, repr=False)
class Node:
    """A node: head or neuron ``index`` of a layer, or its MLP (index 0)."""

    kind: NodeKind
    layer: int
    index: int = 0

    def __str__(self) -> str:
        if self.kind not in KINDS:  # Of a file: the error names it.
            return f"{self.kind} {self.layer}.{self.index}"
        return KINDS[self.kind].node(self.layer, self.index)

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True, repr=False)
class ScoredNode:
    """A node, its score, and its place among those of its kind.

    Attributes:
        node: which.
        score: signed, in units of the metric; positive if removing the node lowers it.
        rank: 1 for the highest score among all nodes of its kind.
        percentile: share of the nodes of its kind that score lower, in percent.
    """

    node: Node
    score: float
    rank: int
    percentile: float

    def __repr__(self) -> str:
        return f"{self.node} {self.score:+.3g} (rank {self.rank})"


@dataclass(frozen=True, eq=False, repr=False)
class NodeScores:
    """A score for every node.

    Attributes:
        points: where the nodes are.
        values: the scores, nodes in the order of ``points``; in units of the metric, positive if
            removing the node lowers it.
    """

    points: tuple[NodePoint, ...]
    values: Float[Tensor, " node"]

    def of(self, kind: NodeKind, layer: int) -> Float[Tensor, " node"]:
        """Scores of the nodes of one kind and layer.

        Raises:
            SiteError: no such nodes were scored.
        """
        for point, part in _parts(self.points, self.values):
            if (point.kind, point.layer) == (kind, layer):
                return part
        raise SiteError(f"there are no scores of kind {kind!r} at layer {layer}.")

    def node(self, node: Node) -> ScoredNode:
        """One node, with rank and percentile among those of its kind.

        Raises:
            SiteError: it was not scored.
        """
        start = 0
        for point in self.points:
            if (point.kind, point.layer) == (node.kind, node.layer):
                if not 0 <= node.index < point.n_nodes:
                    raise SiteError(f"{node}: indices are 0 to {point.n_nodes - 1}.")
                return self._scored(start + node.index)
            start += point.n_nodes
        raise SiteError(f"there are no scores of kind {node.kind!r} at layer {node.layer}.")

    def top(
        self, n: int, *, kind: NodeKind | None = None, by: Literal["score", "magnitude"] = "score"
    ) -> list[ScoredNode]:
        """The ``n`` nodes that score highest, or of largest magnitude, highest first.

        Raises:
            InputError: another ``by``.
        """
        order = ordered(self.values, by).numpy()
        if kind is not None:
            order = order[self._table["kind"].to_numpy()[order] == kind]
        return [self._scored(place) for place in order[:n].tolist()]

    def to_dataframe(self) -> pd.DataFrame:
        """All nodes, highest first: node, kind, layer, index, score, rank and percentile.

        Rank and percentile, in percent, are among the nodes of a kind, as in `ScoredNode`.
        """
        table = self._table.iloc[ordered(self.values, "score").numpy()].reset_index(drop=True)
        names = [str(Node(*row)) for row in zip(*(table[c] for c in _PLACE), strict=True)]
        table.insert(0, "node", names)
        return table

    def __repr__(self) -> str:
        named = ", ".join(f"{one.node} {one.score:+.3g}" for one in self.top(3))
        return f"NodeScores({_counted(self.points)}; highest {named})"

    def _repr_html_(self) -> str:
        table = (
            self.to_dataframe().head(_N_SHOWN).to_html(index=False, float_format="{:+.4g}".format)
        )
        return f"<p>The highest of {escape(_counted(self.points))}:</p>{table}"

    def _scored(self, place: int) -> ScoredNode:
        row = self._table.iloc[place]
        node = Node(row["kind"], int(row["layer"]), int(row["index"]))
        return ScoredNode(node, float(row["score"]), int(row["rank"]), float(row["percentile"]))

    @cached_property
    def _table(self) -> pd.DataFrame:
        """All nodes in their order, each among the nodes of its kind."""
        kinds = [p.kind for p in self.points for _ in range(p.n_nodes)]
        nodes = {
            "kind": kinds,
            "layer": [p.layer for p in self.points for _ in range(p.n_nodes)],
            "index": [i for p in self.points for i in range(p.n_nodes)],
        }
        return pd.DataFrame(nodes).join(ranked(self.values, kinds))

    def circuit(self, size: int, *, by: Literal["score", "magnitude"] = "score") -> Circuit:
        """The circuit of the ``size`` nodes that score highest, or of largest magnitude.

        Raises:
            InputError: the size is below 1 or above the number of nodes, or another ``by``.
        """
        return Circuit(self.points, highest(self.values, size, by, "nodes"))


@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """Some of the nodes of a model.

    Attributes:
        points: where the model's nodes are.
        keep: which of them are in the circuit, in the order of ``points``.
    """

    points: tuple[NodePoint, ...]
    keep: Bool[Tensor, " node"]

    def __repr__(self) -> str:
        return f"Circuit({len(self):,} of {_counted(self.points)}, {self.share:.2%})"

    def _repr_html_(self) -> str:
        layers = pd.DataFrame(
            [(p.layer, p.kind, int(kept.sum())) for p, kept in _parts(self.points, self.keep)],
            columns=["layer", "kind", "kept"],
        ).pivot(index="layer", columns="kind", values="kept")
        return f"<p>{escape(repr(self))}, by layer:</p>{layers.to_html()}"

    @classmethod
    def of(cls, points: tuple[NodePoint, ...], nodes: Iterable[Node]) -> Circuit:
        """The circuit of these nodes.

        Raises:
            SiteError: the model has no such node.
            InputError: none are given.
        """
        listed = list(nodes)
        if not listed:
            raise InputError("an empty circuit: name at least one node.")
        return cls(points, _mask(points, listed))

    def __len__(self) -> int:
        return int(self.keep.sum())

    def __invert__(self) -> Circuit:
        """Everything else."""
        return Circuit(self.points, ~self.keep)

    @property
    def share(self) -> float:
        """Of the model's nodes, between 0 and 1."""
        return len(self) / len(self.keep)

    @property
    def nodes(self) -> list[Node]:
        """The nodes it is made of."""
        return [node for node, kept in zip(all_nodes(self.points), self.keep, strict=True) if kept]

    def without(self, *nodes: Node) -> Circuit:
        """The circuit with some nodes less.

        Raises:
            SiteError: the model has no such node.
        """
        return Circuit(self.points, self.keep & ~_mask(self.points, nodes))

    def masks(self) -> dict[str, Bool[Tensor, " node"]]:
        """By name of the hook point, which of its nodes are kept."""
        return {point.name: part for point, part in _parts(self.points, self.keep)}

    def random(self, generator: torch.Generator | None = None) -> Circuit:
        """A random circuit with as many nodes of each kind in each layer."""
        drawn = []
        for _, part in _parts(self.points, self.keep):
            drawn.append(part[torch.randperm(len(part), generator=generator)])
        return Circuit(self.points, torch.cat(drawn))

    def to_dict(self) -> dict[str, Any]:
        """As JSON: by kind and layer, the indices of its nodes."""
        found: dict[str, dict[str, list[int]]] = {}
        for node in self.nodes:
            found.setdefault(node.kind, {}).setdefault(str(node.layer), []).append(node.index)
        return found

    @classmethod
    def from_dict(
        cls, points: tuple[NodePoint, ...], found: Mapping[str, Mapping[str, Sequence[int]]]
    ) -> Circuit:
        """What `to_dict` gave, on a model with these nodes.

        Raises:
            SiteError, InputError: as `of`, or what is given has another form.
        """
        nodes = []
        for kind, layers in found.items():
            for layer, indices in layers.items() if isinstance(layers, Mapping) else [("", layers)]:
                listed = integers(indices)
                if listed is None or not layer.isdecimal():
                    raise InputError(
                        f"{kind!r}, layer {layer!r}: {indices!r} should be indices of nodes, as "
                        'in {"head": {"0": [1, 3]}}.'
                    )
                nodes += [Node(kind, int(layer), index) for index in listed]  # type: ignore[arg-type]
        return cls.of(points, nodes)


def whole_mlps(model: LensModel, scores: NodeScores) -> NodeScores:
    """Scores of heads and whole MLPs, from those of heads and neurons.

    At any place, what an MLP is worth is the sum of what its neurons are.
    """
    points = node_points(model, ("head", "mlp"))
    parts = [
        scores.of("head", point.layer)
        if point.kind == "head"
        else scores.of("neuron", point.layer).sum(0, keepdim=True)
        for point in points
    ]
    return NodeScores(points, torch.cat(parts))


def _counted(points: Sequence[NodePoint]) -> str:
    """How many nodes of which kinds."""
    n_nodes = sum(point.n_nodes for point in points)
    kinds = dict.fromkeys(point.kind for point in points)
    return f"{n_nodes:,} nodes: {', '.join(f'{kind}s' for kind in kinds)}"


def all_nodes(points: Iterable[NodePoint]) -> Iterator[Node]:
    """Every node, in order."""
    return (Node(p.kind, p.layer, i) for p in points for i in range(p.n_nodes))


def _mask(points: tuple[NodePoint, ...], nodes: Sequence[Node]) -> Bool[Tensor, " node"]:
    index = {node: i for i, node in enumerate(all_nodes(points))}
    unknown = [str(node) for node in nodes if node not in index]
    if unknown:
        raise SiteError(f"the model has no nodes {unknown}, or they are of another kind.")
    mask = torch.zeros(len(index), dtype=torch.bool)
    mask[[index[node] for node in nodes]] = True
    return mask


def _parts(points: Sequence[NodePoint], values: Tensor) -> Iterator[tuple[NodePoint, Tensor]]:
    return zip(points, values.split([point.n_nodes for point in points]), strict=True)

"""Edges of a model, what they score, and circuits: sets of them.

The writers of a model are its embeddings (``input``), its heads (``a3.h2``) and its MLPs (``m3``).
Its readers are the queries, keys and values of each head (``a7.h1.q``, ``a7.h1.k``, ``a7.h1.v``),
its MLPs (``m7``) and the ``logits``, that is, the final norm. An edge leads from a writer to any
reader behind it, at all positions: ``a3.h2->a7.h1.q``.

Scores and circuits hold one value for each edge, in one order: group of readers by group (the
queries of a layer, its keys, its values, its MLP; at the end the logits), in a group reader by
reader, and of a reader the writers before it in the order they are computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from html import escape
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lch_plugin.adapters.transformer_lens.residual import SLOTS
from lch_plugin.circuits.nodes import Circuit
from lch_plugin.circuits.ranking import highest, ordered, ranked
from lch_plugin.errors import InputError, SiteError

ReaderKind = Literal["q", "k", "v", "mlp", "logits"]
#: Name of the writer that stands for the embeddings, and of the reader that stands for the logits.
INPUT, LOGITS = "input", "logits"
# How many edges a notebook shows.
_N_SHOWN = 20


@dataclass(frozen=True, repr=False)
class Edge:
    """What ``writer`` writes, as ``reader`` reads it; both by name."""

    writer: str
    reader: str

    def __str__(self) -> str:
        return f"{self.writer}->{self.reader}"

    def __repr__(self) -> str:
        return str(self)

    @classmethod
    def named(cls, name: str) -> Edge:
        """The edge of a name such as ``"a3.h2->a7.h1.q"``.

        Raises:
            InputError: it is no name of an edge.
        """
        writer, arrow, reader = name.partition("->")
        if not arrow:
            raise InputError(f"{name!r} names no edge; write it as 'a3.h2->a7.h1.q'.")
        return cls(writer.strip(), reader.strip())


@dataclass(frozen=True, repr=False)
class ScoredEdge:
    """An edge, its score, and its place among all edges.

    Attributes:
        edge: which.
        score: signed, in units of the metric; positive if removing the edge lowers it.
        rank: 1 for the highest score.
        percentile: share of the edges that score lower, in percent.
    """

    edge: Edge
    score: float
    rank: int
    percentile: float

    def __repr__(self) -> str:
        return f"{self.edge} {self.score:+.3g} (rank {self.rank})"


@dataclass(frozen=True)
class Readers:
    """Readers of one kind and layer: they read the same writers, the first ``n_writers``.

    Attributes:
        kind, layer: of them all; the logits are at the layer behind the last.
        n_readers: how many: the heads of a layer, or 1.
        n_writers: writers before them.
    """

    kind: ReaderKind
    layer: int
    n_readers: int
    n_writers: int

    @property
    def n_edges(self) -> int:
        """From each of the writers to each of the readers."""
        return self.n_readers * self.n_writers

    @property
    def names(self) -> list[str]:
        """Of the readers."""
        if self.kind in SLOTS:
            return [f"a{self.layer}.h{head}.{self.kind}" for head in range(self.n_readers)]
        return [LOGITS if self.kind == "logits" else f"m{self.layer}"]


@dataclass(frozen=True)
class Wiring:
    """Which edges a model has.

    Attributes:
        n_layers: blocks, each with attention and an MLP.
        n_heads: in each of them.
        parallel: whether the MLP reads what attention reads, and not what its heads wrote as well
            (GPT-NeoX, GPT-J, Phi).
    """

    n_layers: int
    n_heads: int
    parallel: bool = False

    @property
    def writers(self) -> list[str]:
        """Names, in the order they are computed."""
        names = [INPUT]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.n_heads)]
            names.append(f"m{layer}")
        return names

    @property
    def readers(self) -> tuple[Readers, ...]:
        """Groups of readers, in the order of their edges."""
        return _readers(self)

    @property
    def n_edges(self) -> int:
        """Of the model."""
        return sum(group.n_edges for group in self.readers)

    def first_writer(self, layer: int) -> int:
        """Place of the first head of a layer among the writers; the MLP comes after the last."""
        return 1 + layer * (self.n_heads + 1)

    def split(self, values: Tensor) -> Iterator[tuple[Readers, Tensor]]:
        """Values of all edges, by group as ``(reader, writer)``."""
        parts = values.split([group.n_edges for group in self.readers])
        for group, part in zip(self.readers, parts, strict=True):
            yield group, part.reshape(group.n_readers, group.n_writers)

    @property
    def edges(self) -> list[Edge]:
        """All edges, in order."""
        writers = self.writers
        return [
            Edge(writer, reader)
            for group in self.readers
            for reader in group.names
            for writer in writers[: group.n_writers]
        ]

    def mask(self, edges: Iterable[Edge | str]) -> Bool[Tensor, " edge"]:
        """Which edges are among these.

        Raises:
            SiteError: the model has no such edge.
            InputError: a name that is none of an edge.
        """
        chosen = [Edge.named(one) if isinstance(one, str) else one for one in edges]
        index = _index(self)
        unknown = [str(edge) for edge in chosen if edge not in index]
        if unknown:
            raise SiteError(
                f"the model has no edges {unknown[:5]}: from input, a0.h0 or m0, to a1.h0.q, .k "
                "or .v, m1 or logits, as long as the reader comes after the writer."
            )
        mask = torch.zeros(self.n_edges, dtype=torch.bool)
        mask[[index[edge] for edge in chosen]] = True
        return mask


@cache
def _readers(wiring: Wiring) -> tuple[Readers, ...]:
    found: list[Readers] = []
    for layer in range(wiring.n_layers):
        before = wiring.first_writer(layer)
        found += [Readers(slot, layer, wiring.n_heads, before) for slot in SLOTS]
        before += 0 if wiring.parallel else wiring.n_heads
        found.append(Readers("mlp", layer, 1, before))
    last = wiring.first_writer(wiring.n_layers)
    return (*found, Readers("logits", wiring.n_layers, 1, last))


@cache
def _index(wiring: Wiring) -> dict[Edge, int]:
    return {edge: i for i, edge in enumerate(wiring.edges)}


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores:
    """A score for every edge.

    Attributes:
        wiring: which edges there are.
        values: the scores, in units of the metric, positive if removing the edge lowers it.
    """

    wiring: Wiring
    values: Float[Tensor, " edge"]

    def edge(self, edge: Edge | str) -> ScoredEdge:
        """One edge, with its rank and percentile.

        Raises:
            SiteError, InputError: as `Wiring.mask`.
        """
        return self._scored(int(self.wiring.mask([edge]).nonzero()))

    def top(self, n: int, *, by: Literal["score", "magnitude"] = "score") -> list[ScoredEdge]:
        """The ``n`` edges that score highest, or of largest magnitude, highest first.

        Raises:
            InputError: another ``by``.
        """
        return [self._scored(place) for place in ordered(self.values, by)[:n].tolist()]

    def to_dataframe(self) -> pd.DataFrame:
        """All edges, highest first: edge, writer, reader, score, rank and percentile."""
        order = ordered(self.values, "score").numpy()
        table = self._table.iloc[order].reset_index(drop=True)
        edges = [self._edges[i] for i in order]
        names = ([str(e) for e in edges], [e.writer for e in edges], [e.reader for e in edges])
        for i, column in enumerate(("edge", "writer", "reader")):
            table.insert(i, column, names[i])
        return table

    def circuit(self, size: int, *, by: Literal["score", "magnitude"] = "score") -> EdgeCircuit:
        """The circuit of the ``size`` edges that score highest, or of largest magnitude.

        Raises:
            InputError: the size is below 1 or above the number of edges, or another ``by``.
        """
        return EdgeCircuit(self.wiring, highest(self.values, size, by, "edges"))

    def __repr__(self) -> str:
        named = ", ".join(f"{one.edge} {one.score:+.3g}" for one in self.top(3))
        return f"EdgeScores({len(self.values):,} edges; highest {named})"

    def _repr_html_(self) -> str:
        table = pd.DataFrame([vars(one) for one in self.top(_N_SHOWN)])
        shown = table.to_html(index=False, float_format="{:+.4g}".format)
        return f"<p>The highest of {len(self.values):,} edges:</p>{shown}"

    @cached_property
    def _edges(self) -> list[Edge]:
        return self.wiring.edges

    @cached_property
    def _table(self) -> pd.DataFrame:
        """Score, rank and percentile of all edges, in their order."""
        return ranked(self.values)

    def _scored(self, place: int) -> ScoredEdge:
        row = self._table.iloc[place]
        edge = self._edges[place]
        return ScoredEdge(edge, float(row["score"]), int(row["rank"]), float(row["percentile"]))


@dataclass(frozen=True, eq=False, repr=False)
class EdgeCircuit:
    """Some of the edges of a model.

    Attributes:
        wiring: which edges there are.
        keep: which of them are in the circuit.
    """

    wiring: Wiring
    keep: Bool[Tensor, " edge"]

    @classmethod
    def of(cls, wiring: Wiring, edges: Iterable[Edge | str]) -> EdgeCircuit:
        """The circuit of these edges.

        Raises:
            SiteError, InputError: as `Wiring.mask`; or none are given.
        """
        listed = list(edges)
        if not listed:
            raise InputError("an empty circuit: name at least one edge.")
        return cls(wiring, wiring.mask(listed))

    @classmethod
    def of_nodes(cls, wiring: Wiring, circuit: Circuit) -> EdgeCircuit:
        """A circuit of heads and MLPs: every edge but those out of the nodes that it leaves out.

        Nodes that ``circuit`` does not know, such as the MLPs of a circuit of heads, are kept.

        Raises:
            InputError: a circuit of neurons, which have no edges here.
        """
        if any(point.kind == "neuron" for point in circuit.points):
            raise InputError("neurons have no edges of their own: give a circuit of heads or MLPs.")
        removed = {str(node) for node in (~circuit).nodes}
        kept = torch.tensor([name not in removed for name in wiring.writers])
        parts = [kept[: g.n_writers].repeat(g.n_readers) for g in wiring.readers]
        return cls(wiring, torch.cat(parts))

    def __len__(self) -> int:
        return int(self.keep.sum())

    def __invert__(self) -> EdgeCircuit:
        """Everything else."""
        return EdgeCircuit(self.wiring, ~self.keep)

    def __repr__(self) -> str:
        return f"EdgeCircuit({len(self):,} of {len(self.keep):,} edges, {self.share:.2%})"

    def _repr_html_(self) -> str:
        counts = [(g.layer, g.kind, int(kept.sum())) for g, kept in self.wiring.split(self.keep)]
        table = pd.DataFrame(counts, columns=["layer", "into", "kept"])
        wide = table.pivot(index="layer", columns="into", values="kept")
        return f"<p>{escape(repr(self))}, by layer of the reader:</p>{wide.to_html(na_rep='')}"

    @property
    def share(self) -> float:
        """Of the model's edges, between 0 and 1."""
        return len(self) / len(self.keep)

    @property
    def edges(self) -> list[Edge]:
        """The edges it is made of."""
        every = self.wiring.edges
        return [every[i] for i in self.keep.nonzero().flatten().tolist()]

    def without(self, *edges: Edge | str) -> EdgeCircuit:
        """The circuit with some edges less.

        Raises:
            SiteError, InputError: as `Wiring.mask`.
        """
        return EdgeCircuit(self.wiring, self.keep & ~self.wiring.mask(edges))

    def random(self, generator: torch.Generator | None = None) -> EdgeCircuit:
        """A random circuit with as many edges into the readers of each kind and layer."""
        drawn = []
        for group, part in self.wiring.split(self.keep):
            order = torch.randperm(group.n_edges, generator=generator)
            drawn.append(part.flatten()[order])
        return EdgeCircuit(self.wiring, torch.cat(drawn))

    def to_dict(self) -> dict[str, list[str]]:
        """As JSON: by reader, its writers."""
        found: dict[str, list[str]] = {}
        for edge in self.edges:
            found.setdefault(edge.reader, []).append(edge.writer)
        return found

    @classmethod
    def from_dict(cls, wiring: Wiring, found: Mapping[str, Sequence[str]]) -> EdgeCircuit:
        """What `to_dict` gave, on a model with this wiring.

        Raises:
            SiteError, InputError: as `of`.
        """
        return cls.of(
            wiring, [Edge(w, reader) for reader, writers in found.items() for w in writers]
        )

    def to_dataframe(self) -> pd.DataFrame:
        """Its edges: edge, writer and reader."""
        rows: list[dict[str, Any]] = [
            {"edge": str(edge), "writer": edge.writer, "reader": edge.reader} for edge in self.edges
        ]
        return pd.DataFrame(rows, columns=["edge", "writer", "reader"])

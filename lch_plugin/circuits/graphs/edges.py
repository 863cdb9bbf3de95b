r"""What flows from node to node, in units of the metric.

With components frozen (`frozen_components`), let ``w_s`` be what node s writes to the residual
stream at its position, and ``mu_t`` the centroid of node t in the residual stream that it reads,
through its norm and with its own targeted cotangent: the gradient of the metric in what t is made
of. Then::

    edge(s -> t)    = w_s . mu_t          at the position of s
    contribution(t) = sum_s edge(s -> t) + offset(t)
    contribution(s) = sum_t edge(s -> t)

the first because what t reads is the sum of the writes before it, with the expert's own biases for
an offset; the second because the gradient at a write is the sum of the centroids it reaches. So it
is a flow: what enters a node leaves it, and all offsets together are the metric. Relative to a
corrupt prompt every value stands for its difference, and an offset is what an expert makes of the
other patterns, gates and norm scales.

Of a metric that is not linear in the logits the edges are those of its tangent at the clean prompt.
What the metric differs by from its tangent is in the offset of the node of the metric.

What a node does through *where* a later head looks is not in these: a frozen pattern is a constant.
It has edges of its own, to first order. With ``nu_t`` the centroid of a head, or of a rest of
attention, in a model whose patterns follow what attention reads::

    pattern(s -> t) = w_s . (nu_t - mu_t)

what s makes of the pattern of t, in units of the metric, the patterns of later heads held again.
They are beside the flow, and no part of its sums.

The sweep goes from the metric back to the embeddings, a component at a time: from the gradient at
its write to the centroids of its nodes, which together take the gradient one component back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lch_plugin.circuits.graphs.frozen_components import FrozenComponent, FrozenModel
from lch_plugin.circuits.graphs.node_slices import NodeSlices


@dataclass(frozen=True, eq=False)
class Group:
    """Nodes of one kind and layer, side by side in the order of a `Flow`.

    Attributes:
        kind: ``"embedding"``, ``"position"``, a kind of `NodeSlices`, ``"attn_rest"``,
            ``"mlp_rest"`` or ``"metric"``.
        layer: block; -1 of embeddings.
        positions, indices: of each node.
        activations: as in `NodeSlices`.
    """

    kind: str
    layer: int
    positions: Int[Tensor, " node"]
    indices: Int[Tensor, " node"]
    activations: Sequence[float] | None = None

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True, eq=False)
class Flow:
    """Everything that flows. Nodes are in the order of ``groups``, the metric last.

    Attributes:
        groups: of nodes.
        edges: ``[t, s]`` from node s to node t.
        contributions: what each node does for the metric; of the metric itself its value.
        offsets: of the contributions, what no edge brings.
        patterns: ``[t, s]`` as ``edges``, through the patterns of heads; None if not asked for.
    """

    groups: tuple[Group, ...]
    edges: Float[Tensor, "node node"]
    contributions: Float[Tensor, " node"]
    offsets: Float[Tensor, " node"]
    patterns: Float[Tensor, "node node"] | None = None


def flow(
    frozen: FrozenModel, slices: Sequence[NodeSlices | None], looking: FrozenModel | None = None
) -> Flow:
    """All edges between nodes.

    Args:
        frozen: the model.
        slices: of each expert, the nodes to tell apart; None if all of it is rest.
        looking: the model with patterns that follow what attention reads; None for no such edges.
    """
    sources = _Sources(frozen, slices)
    sweep = _Sweep(sources, frozen.cotangent)
    sweep.metric(frozen)
    last = len(frozen.experts)
    for stage in reversed(frozen.stages):
        last -= len(stage)
        here = slice(last, last + len(stage))
        free = [] if looking is None else looking.experts[here]
        sweep.stage(stage, slices[here], sources.starts[last], free)
    sweep.embeddings(sources.starts[0])
    patterns = None if looking is None else sweep.patterns
    return Flow(sources.groups, sweep.edges, sweep.contributions, sweep.offsets, patterns)


class _Sources:
    """What every node writes to the residual stream, in the order of the nodes.

    Attributes:
        groups: of nodes.
        writes: of each node but the metric, at its position.
        positions: of each node.
        starts: index of each expert's first node.
    """

    def __init__(self, frozen: FrozenModel, slices: Sequence[NodeSlices | None]) -> None:
        everywhere = torch.arange(len(frozen.final), device=frozen.final.device)
        groups = [Group("embedding", -1, everywhere, everywhere)]
        writes = [frozen.embeddings]
        if frozen.positions is not None:
            groups.append(Group("position", -1, everywhere, everywhere))
            writes.append(frozen.positions)
        self.starts = []
        for expert, nodes in zip(frozen.experts, slices, strict=True):
            self.starts.append(sum(map(len, groups)))
            rest = expert.values.write
            if nodes is not None:
                own = expert.written(nodes.of(expert.values.held), nodes.positions)
                rest = rest.index_add(0, nodes.positions, own, alpha=-1)
                groups.append(
                    Group(
                        *(nodes.kind, expert.layer, nodes.positions, nodes.indices),
                        nodes.activations,
                    )
                )
                writes.append(own)
            groups.append(Group(f"{expert.kind}_rest", expert.layer, everywhere, everywhere))
            writes.append(rest)
        groups.append(Group("metric", frozen.n_layers, everywhere[-1:], everywhere[:1]))
        self.groups = tuple(groups)
        self.writes = torch.cat(writes)
        self.positions = torch.cat([group.positions for group in groups])


class _Sweep:
    """The way back from the metric."""

    def __init__(self, sources: _Sources, cotangent: Float[Tensor, "pos d_model"]) -> None:
        n = len(sources.positions)
        self._sources = sources
        self._gradient = cotangent
        self.edges = cotangent.new_zeros(n, n)
        self.patterns = cotangent.new_zeros(n, n)
        self.contributions = cotangent.new_zeros(n)
        self.offsets = cotangent.new_zeros(n)

    def metric(self, frozen: FrozenModel) -> None:
        """The last node: its centroid is the gradient in the final residual stream."""
        self._receive(self.edges, -1, self._gradient[None], before=len(self._sources.writes))
        self.contributions[-1] = frozen.metric - frozen.reference
        self.offsets[-1] = self.contributions[-1] - (self._gradient * frozen.final).sum()

    def stage(
        self,
        experts: Sequence[FrozenComponent],
        slices: Sequence[NodeSlices | None],
        before: int,
        free: Sequence[FrozenComponent],
    ) -> None:
        """The nodes of experts that read the same, from sources ``before`` them.

        Args:
            experts, slices: theirs.
            before: how many.
            free: the same experts with patterns that follow what they read; none if not wanted.
        """
        start, total = before, torch.zeros_like(self._gradient)
        for i, (expert, nodes) in enumerate(zip(experts, slices, strict=True)):
            held, at, contributions = self._cotangents(expert, nodes)
            centroids = expert.to_read(held, at)
            rows = slice(start, start + len(centroids))
            self._receive(self.edges, rows, centroids, before)
            if free and expert.kind == "attn":
                by_pattern = free[i].to_read(held, at) - centroids
                self._receive(self.patterns, rows, by_pattern, before)
            self.contributions[rows] = contributions
            brought = (centroids * expert.values.read).sum((1, 2))
            self.offsets[rows] = contributions - brought
            total = total + centroids.sum(0)
            start += len(centroids)
        self._gradient = self._gradient + total

    def embeddings(self, n: int) -> None:
        """The first nodes, which nothing flows into."""
        writes, positions = self._sources.writes[:n], self._sources.positions[:n]
        self.contributions[:n] = (writes * self._gradient[positions]).sum(-1)
        self.offsets[:n] = self.contributions[:n]

    def _cotangents(
        self, expert: FrozenComponent, nodes: NodeSlices | None
    ) -> tuple[Float[Tensor, "node width"], Int[Tensor, " node"], Float[Tensor, " node"]]:
        """Of an expert's nodes and then of its rest: their cotangents in what the expert holds,
        their positions, and what they contribute."""
        held = expert.to_held(self._gradient)
        everywhere = torch.arange(len(held), device=held.device)
        remaining = (self._gradient * expert.values.write).sum(-1)
        if nodes is None:
            return held, everywhere, remaining
        own, at = nodes.of(held), nodes.positions
        contributions = (own * nodes.of(expert.values.held)).sum(-1)
        rest = held.index_add(0, at, own, alpha=-1)
        remaining = remaining.index_add(0, at, contributions, alpha=-1)
        positions = torch.cat([at, everywhere])
        return torch.cat([own, rest]), positions, torch.cat([contributions, remaining])

    def _receive(
        self,
        edges: Float[Tensor, "target source"],
        rows: int | slice,
        centroids: Float[Tensor, "node pos d_model"],
        before: int,
    ) -> None:
        """Edges into some nodes from all sources before them, written to their place."""
        positions = self._sources.positions[:before]
        for position in range(centroids.shape[1]):
            at = (positions == position).nonzero().flatten()
            reached = centroids[:, position] @ self._sources.writes[at].T
            edges[rows, at] = reached if isinstance(rows, slice) else reached[0]

"""Nodes as orthogonal projections of what a component holds at one position.

A head or a neuron is some coordinates of a row, a whole MLP all of them, a feature of an SAE the
direction of its decoder row in what the MLP reads. What of a component is no node of its own is
the rest: of each row, what the projections leave over, and the biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SliceKind = Literal["head", "neuron", "mlp", "feature"]


@dataclass(frozen=True, eq=False)
class NodeSlices:
    """The nodes of one component.

    Attributes:
        kind: of them all.
        positions, indices: of each node.
        slices: which coordinates each is made of; or
        directions: the unit vector that each is along.
        activations: one number for each node, where it is one.
    """

    kind: SliceKind
    positions: Int[Tensor, " node"]
    indices: Int[Tensor, " node"]
    slices: Bool[Tensor, "node width"] | None = None
    directions: Float[Tensor, "node width"] | None = None
    activations: Sequence[float] | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def of(self, values: Float[Tensor, "pos width"]) -> Float[Tensor, "node width"]:
        """Each node's part of some values, at its position."""
        rows = values[self.positions]
        if self.slices is not None:
            rows = rows * self.slices
        if self.directions is not None:
            along = self.directions.to(rows)
            rows = (rows * along).sum(-1, keepdim=True) * along
        return rows


def sliced(
    kind: SliceKind,
    width: int,
    nodes: Sequence[tuple[int, int]],
    held: Float[Tensor, "pos d_held"],
) -> NodeSlices:
    """Nodes that are stretches of ``width`` coordinates.

    Args:
        kind: of the nodes.
        width: numbers of each.
        nodes: position and index of each.
        held: what they are parts of.
    """
    positions, indices = torch.tensor(nodes, device=held.device).reshape(-1, 2).unbind(-1)
    owners = torch.arange(held.shape[-1], device=held.device) // width
    activations = held[positions, indices].tolist() if width == 1 else None
    return NodeSlices(
        kind, positions, indices, slices=owners == indices[:, None], activations=activations
    )

"""Which nodes of a model a graph tells apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lch_plugin.adapters.transformer_lens import NodePoint
from lch_plugin.circuits.graphs.frozen_components import FrozenComponent
from lch_plugin.circuits.graphs.node_slices import NodeSlices, sliced
from lch_plugin.circuits.kinds import KINDS
from lch_plugin.circuits.nodes import Circuit
from lch_plugin.circuits.scores.attribution import Contributions
from lch_plugin.circuits.scores.features import ActiveFeatures

#: Position and index of the nodes to keep, by kind and layer.
Kept: TypeAlias = dict[tuple[str, int], list[tuple[int, int]]]


def top_nodes(
    scored: Contributions,
    points: Sequence[NodePoint],
    features: ActiveFeatures | None,
    circuit: Circuit | None,
    n: int,
) -> Kept:
    """The ``n`` nodes of largest contribution, in size.

    Args:
        scored: contributions of heads, neurons and MLPs to the metric of one prompt.
        points: where they are.
        features: active features, in competition with them; none if None.
        circuit: of heads, neurons and MLPs only those in here; any if None.
        n: how many, at most: what contributes nothing is not among them.
    """
    sizes: list[Tensor] = []
    places: list[tuple[str, int]] = []
    allowed = {} if circuit is None else circuit.masks()
    for point in points:
        size = scored.nodes[point.name][0].abs()
        if point.name in allowed:
            size = torch.where(allowed[point.name].to(size.device), size, 0)
        sizes.append(size)
        places.append((point.kind, point.layer))
    if features is not None:
        sizes.append(features.contributions[0].abs())
        places.append(("feature", features.layer))
    values = torch.cat([size.flatten().double() for size in sizes])
    order = values.argsort(descending=True, stable=True)[:n]
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen[order] = values[order] > 0
    kept: Kept = {}
    for place, mask in zip(places, chosen.split([s.numel() for s in sizes]), strict=True):
        pairs = mask.reshape(len(sizes[0]), -1).nonzero().tolist()
        if pairs:
            kept[place] = [(position, index) for position, index in pairs]
    return kept


def slices_of(
    expert: FrozenComponent,
    points: Sequence[NodePoint],
    features: ActiveFeatures | None,
    kept: Kept,
) -> NodeSlices | None:
    """The nodes to tell apart in an expert; None if there are none."""
    if expert.kind == "mlp" and features is not None and expert.layer == features.layer:
        nodes = kept.get(("feature", expert.layer))
        return None if nodes is None else _feature_slices(features, nodes)
    for point in points:
        nodes = kept.get((point.kind, point.layer))
        if nodes and (KINDS[point.kind].component, point.layer) == (expert.kind, expert.layer):
            return sliced(point.kind, point.width, nodes, expert.clean.held)
    return None


def _feature_slices(features: ActiveFeatures, nodes: Sequence[tuple[int, int]]) -> NodeSlices:
    positions, indices = torch.tensor(nodes, device=features.feature_acts.device).unbind(-1)
    return NodeSlices(
        "feature",
        positions,
        indices,
        directions=features.directions[indices],
        activations=features.feature_acts[0, positions, indices].tolist(),
    )

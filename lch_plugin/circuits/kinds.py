"""The kinds of nodes that circuits and graphs are made of: all that differs from one to another.

A new kind of graph node is one more record here, with its colours in ``templates/graph.css`` and
``graph.html``. One that circuits can hold is a `lch_plugin.adapters.transformer_lens.NodeKind` too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

#: What of a block a node is a part of.
ComponentKind: TypeAlias = Literal["attn", "mlp"]


@dataclass(frozen=True)
class Kind:
    """What is to be known of a kind of node.

    Attributes:
        name: of a node, from its layer and index; in a graph its position comes behind.
        title: what it is called on a page, likewise.
        row: the part of its layer that it is drawn in.
        viewer: what other viewers are told that it is.
        component: that it is a part of; None of what is none.
        is_rest: whether it is what other nodes leave of a component.
        marker, size: of its dots in a plot of scores.
        across: where in the column of its layer these are, from and to.
    """

    name: str
    title: str
    row: str
    viewer: str
    component: ComponentKind | None = None
    is_rest: bool = False
    marker: str = "o"
    size: int = 12
    across: tuple[float, float] = (0.0, 0.1)

    def node(self, layer: int, index: int, position: int | None = None) -> str:
        """Name of a node, in a graph if there is a position."""
        name = self.name.format(layer=layer, index=index)
        return name if position is None or self is KINDS[METRIC] else f"{name}@{position}"


#: The kind, and the name, of the node that everything flows to.
METRIC = "metric"
#: By name. Files count on the order: add new ones at the end.
KINDS: Mapping[str, Kind] = {
    "embedding": Kind("embedding", "Token embedding", "embedding", "embedding"),
    "position": Kind("position", "Position embedding", "embedding", "position embedding"),
    # Heads are few: they take the first quarter of a layer's column.
    "head": Kind("a{layer}.h{index}", "Head {index} of layer {layer}", "attention",
                 "attention head", "attn", marker="^", size=28, across=(-0.42, -0.22)),
    "neuron": Kind("m{layer}.n{index}", "Neuron {index} of layer {layer}", "MLP", "neuron", "mlp",
                   across=(-0.15, 0.42)),
    "mlp": Kind("m{layer}", "MLP of layer {layer}", "MLP", "mlp", "mlp", marker="s"),
    "feature": Kind("m{layer}.f{index}", "Feature {index} of layer {layer}", "MLP",
                    "sae feature", "mlp"),
    "attn_rest": Kind("rest a{layer}", "Rest of the attention of layer {layer}", "attention",
                      "lorsa error", "attn", is_rest=True),
    "mlp_rest": Kind("rest m{layer}", "Rest of the MLP of layer {layer}", "MLP",
                     "mlp reconstruction error", "mlp", is_rest=True),
    "supernode": Kind("supernode", "Supernode", "supernode", "supernode"),
    METRIC: Kind(METRIC, "Metric", "metric", "logit"),
}  # fmt: skip

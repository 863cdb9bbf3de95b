"""What the nodes of a graph write to the residual stream."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import networkx as nx
from jaxtyping import Float
from torch import Tensor

from lch_plugin.adapters.transformer_lens import LensModel, node_points
from lch_plugin.circuits.graphs.frozen_components import freeze_components
from lch_plugin.circuits.graphs.node_slices import sliced
from lch_plugin.circuits.kinds import KINDS
from lch_plugin.circuits.prompt_batches import Prompts


@dataclass(frozen=True, eq=False)
class Writes:
    """What nodes write at their positions, on the clean prompt.

    Attributes:
        writes: of heads, neurons, MLPs and token embeddings, by name; biases left out.
        final: the residual stream that the final norm reads, which they are parts of.
    """

    writes: dict[str, Float[Tensor, " d_model"]]
    final: Float[Tensor, "pos d_model"]


def node_writes(model: LensModel, prompts: Prompts, graph: nx.DiGraph) -> Writes:
    """What the heads, neurons, MLPs and token embeddings of a graph write.

    Args:
        model: that the graph is of.
        prompts: the prompt that the graph is of.
        graph: of `attribution_graph`, pruned or not.

    Raises:
        InputError, SiteError: as `attribution_graph`.
    """
    points = node_points(model, graph.graph["kinds"])
    frozen = freeze_components(model, Prompts(prompts.clean, prompts.metric), points)
    writes: dict[str, Float[Tensor, " d_model"]] = {}
    owned: dict[tuple[str, int], list[str]] = defaultdict(list)
    for key, data in graph.nodes(data=True):
        if data["kind"] == "embedding":
            writes[key] = frozen.embeddings[data["position"]]
        owned[data["kind"], data["layer"]].append(key)
    for expert in frozen.experts:
        for point in points:
            keys = owned[point.kind, point.layer]
            if keys and (KINDS[point.kind].component, point.layer) == (expert.kind, expert.layer):
                places = [(graph.nodes[k]["position"], graph.nodes[k]["index"]) for k in keys]
                nodes = sliced(point.kind, point.width, places, expert.clean.held)
                own = expert.written(nodes.of(expert.clean.held), nodes.positions)
                writes.update(zip(keys, own, strict=True))
    return Writes(writes, frozen.final)

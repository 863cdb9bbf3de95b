"""From a graph back to the model: what scaling a node does, as the graph predicts and as it is.

A graph is of the frozen experts at one prompt. Here the model runs as it is, with what a node
writes scaled from its value on the corrupt prompt (zero without one)::

    value = twin + scale * (clean - twin)

so that 0 removes the node, 1 leaves it and 2 doubles it. The *predicted* change of the metric is
``(scale - 1) * contribution``: what flows out of the node, along all paths of the graph. The
predicted change of another node is that of its contribution ``g . a``, with ``a`` what it holds and
``g`` the gradient of the metric there: the same perturbation, pushed forward through the frozen
experts along all paths. The *measured* change is ``g . (a' - a)``, with ``a'`` what the node holds
in the model that was intervened on. So both are in units of the metric, and differ by what the
graph holds fixed: attention patterns, gates and norm scales, or with the Jacobian all that is not
linear.

Several nodes are scaled at once. Each is set to its value above, so that what one of them would do
to another does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import networkx as nx
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lch_plugin.adapters.states import evaluating, without_autocast
from lch_plugin.adapters.transformer_lens import LensModel, node_points
from lch_plugin.adapters.transformer_lens.reads import position_embedding_name
from lch_plugin.circuits.metrics import COMPARISONS
from lch_plugin.circuits.prompts import Prompts, measured
from lch_plugin.circuits.scores.attribution import activations, embedding_name, metric_gradients
from lch_plugin.errors import InputError
from lch_plugin.linearization import DetachedMode
from lch_plugin.mlp import at_least_float32
from lch_plugin.sites import Linearization

_ENTERING = ("embedding", "position")
# How far the metric may be from that of the graph, relatively: other threads, another device.
_TOLERANCE = 1e-3


class Change(NamedTuple):
    """What became of a node's contribution, in units of the metric.

    Attributes:
        node, kind, layer, position: of the graph.
        contribution: before.
        predicted: change, by the frozen experts.
        measured: change, in the model.
    """

    node: str
    kind: str
    layer: int
    position: int
    contribution: float
    predicted: float
    measured: float


@dataclass(frozen=True, repr=False)
class Intervention:
    """What a graph predicts of scaling some of its nodes, beside what the model does.

    Attributes:
        nodes: those scaled.
        scale: of what they write.
        metric: before.
        metric_predicted: change of the metric, by the frozen experts, in units of the metric.
        metric_measured: change of the metric, in the model.
        changes: of every head, neuron and MLP of the graph that comes after the first of the
            scaled nodes, and of those is none.
    """

    nodes: tuple[str, ...]
    scale: float
    metric: float
    metric_predicted: float
    metric_measured: float
    changes: tuple[Change, ...]

    @property
    def r2(self) -> dict[str, float]:
        """By kind of node, the share of the variance of measured changes that is predicted.

        ``1 - sum (measured - predicted)^2 / sum (measured - mean)^2``: 1 is perfect, 0 no better
        than the mean of all, below that worse. NaN where all measured changes are the same.
        """
        found = {}
        for kind, group in self.to_dataframe().groupby("kind"):
            spread = float(((group.measured - group.measured.mean()) ** 2).sum())
            error = float(((group.measured - group.predicted) ** 2).sum())
            found[str(kind)] = 1 - error / spread if spread else math.nan
        return found

    def to_dataframe(self) -> pd.DataFrame:
        """One row a node, columns as in `Change`."""
        return pd.DataFrame(self.changes, columns=list(Change._fields))

    def __repr__(self) -> str:
        names = ", ".join(self.nodes[:3]) + (", ..." if len(self.nodes) > 3 else "")
        r2 = ", ".join(f"{kind} {value:.2f}" for kind, value in self.r2.items())
        return (
            f"Intervention({names} x {self.scale:g}: metric {self.metric_predicted:+.3g} "
            f"predicted, {self.metric_measured:+.3g} measured; R2 {r2 or 'of no node'})"
        )


@without_autocast()
def intervene(
    model: LensModel,
    graph: nx.DiGraph,
    node: str | Sequence[str],
    scale: float,
    *,
    prompts: Prompts | None = None,
) -> Intervention:
    """Scale what some nodes of a graph write, in the model, and compare with what the graph says.

    Args:
        model: that the graph is of.
        graph: of `attribution_graph`, whole or pruned, or loaded from a file.
        node: name of a head, neuron, MLP or embedding, or of several; of a supernode, which stands
            for its members. Each is scaled at its own position.
        scale: of its difference to the corrupt prompt, or to zero: 0 removes, 2 doubles.
        prompts: the prompt of the graph. The graph knows it, if its metric is a comparison of
            answers with foils (`lch_plugin.circuits.metrics.COMPARISONS`).

    Returns:
        Changes of the metric and of the nodes that come after, predicted and measured.

    Raises:
        InputError: the graph is of another model or prompt, or does not know its metric; a node
            that is not in it, or is none of those above; or a scale that is not finite.
        SiteError: as `lch_plugin.circuits.node_attribution`.

    Example:
        >>> import lch_plugin as lch
        >>> from lch_plugin import circuits
        >>> model = lch.load_demo_model()
        >>> graph = circuits.attribution_graph(model, circuits.task(model, "ioi", 1)[0])
        >>> heads = [n for n, kind in graph.nodes(data="kind") if kind == "head"]
        >>> found = circuits.intervene(model, graph, heads[-1], 0)
        >>> abs(found.metric_predicted + graph.nodes[heads[-1]]["contribution"]) < 1e-4
        True
    """
    scale = float(scale)
    if not math.isfinite(scale):
        raise InputError(f"scale={scale} must be finite: 0 removes a node, 1 leaves it.")
    names = _members(graph, [node] if isinstance(node, str) else list(node))
    prompt = _prompt(graph) if prompts is None else prompts
    before = _check_model(model, graph, prompt)
    places = _Places(model, graph)
    hooks = places.names(names)
    with evaluating(model):
        clean = activations(model, prompt.clean, hooks)
        twin = (
            {name: torch.zeros_like(value) for name, value in clean.items()}
            if prompt.corrupt is None
            else activations(model, prompt.corrupt, hooks)
        )
        masks = places.masks(names, clean)
        linearization = graph.graph["linearization"]
        read = places.points
        gradients = metric_gradients(
            model, prompt, read, linearization=linearization
        ).gradients
        steps = {name: clean[name] - twin[name] for name in masks}
        slope, slopes = _pushed(model, prompt, linearization, masks, clean, steps, read)
        new = {name: twin[name] + scale * step for name, step in steps.items()}
        after, held = _run(model, prompt, masks, new, read)
    changes = tuple(
        Change(
            *(name, data["kind"], data["layer"], data["position"], data["contribution"]),
            predicted=(scale - 1) * places.along(name, gradients, slopes),
            measured=places.along(name, gradients, held) - places.along(name, gradients, clean),
        )
        for name, data in places.after(names)
    )
    return Intervention(
        nodes=tuple(names),
        scale=scale,
        metric=before,
        metric_predicted=(scale - 1) * slope,
        metric_measured=after - before,
        changes=changes,
    )

r"""From the graph to the model: what a node's change does to all others, predicted and measured.

A graph holds attention patterns, norm scales and gates at their values on its prompt. Change what a
node writes, and the frozen model it describes says by how much the metric and every node after it
change. The model itself, where nothing is held, says what they do. The closer the two, the more the
graph is true of the model, and not of its linearisation alone (as Ameisen et al., "Circuit
Tracing", 2025, validate theirs).

With ``a_ref`` what the node holds on the corrupt twin, or zero without one, it is made to hold::

    a_ref + scale * (a - a_ref)

0 removes it, 1 changes nothing, 2 doubles it. The change of a node ``t`` is in units of the metric:
``g_t . (change of what t holds)``, with ``g_t`` its targeted centroid at the prompt. The prediction
of it is by all paths from the changed nodes to ``t``; that of the metric is ``(scale - 1)`` times
the contribution of the one node that was changed. Of several, each holds what it is made to hold,
whatever the others would do to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import networkx as nx
import pandas as pd
import torch
from jaxtyping import Float
from sklearn.metrics import r2_score
from torch import Tensor
from torch.autograd import forward_ad

from lch_plugin.adapters.states import evaluating, without_autocast
from lch_plugin.adapters.transformer_lens import LensModel, NodeKind, NodePoint, node_points
from lch_plugin.circuits.prompt_batches import Prompts
from lch_plugin.circuits.scores.attribution import (
    activations,
    embedding_name,
    metric_gradients,
)
from lch_plugin.errors import InputError
from lch_plugin.linearization import DetachedMode
from lch_plugin.metrics import COMPARISONS

# Relative difference up to which the metric of the graph and that of the model are the same.
_SAME = 1e-3
_KINDS = get_args(NodeKind)
_CHANGED = (*_KINDS, "embedding")


@dataclass(frozen=True, eq=False, repr=False)
class Intervention:
    """What changing some nodes did, in units of the metric.

    Attributes:
        changed: names of the nodes that were changed.
        scale: of what they hold, relative to the corrupt twin, or to zero.
        metric: of the prompt, nothing changed.
        metric_predicted, metric_measured: by how much it changes.
        nodes: names of the heads, neurons and MLPs of the graph that it reaches.
        kinds: of each.
        predicted, measured: by how much each of them changes.
    """

    changed: tuple[str, ...]
    scale: float
    metric: float
    metric_predicted: float
    metric_measured: float
    nodes: tuple[str, ...]
    kinds: tuple[str, ...]
    predicted: Float[Tensor, " node"]
    measured: Float[Tensor, " node"]

    @property
    def r2(self) -> dict[str, float]:
        """R² of the predicted changes, by kind of node; of kinds with two nodes at least."""
        table = self.to_dataframe()
        return {
            str(kind): float(r2_score(of["measured"], of["predicted"]))
            for kind, of in table.groupby("kind", sort=False)
            if len(of) > 1
        }

    def to_dataframe(self) -> pd.DataFrame:
        """The nodes, with predicted and measured change, the largest measured first."""
        table = pd.DataFrame(
            {
                "node": self.nodes,
                "kind": self.kinds,
                "predicted": self.predicted.tolist(),
                "measured": self.measured.tolist(),
            }
        )
        order = table["measured"].abs().sort_values(ascending=False, kind="stable").index
        return table.loc[order].reset_index(drop=True)

    def __repr__(self) -> str:
        r2 = ", ".join(f"{kind}s {value:.2f}" for kind, value in self.r2.items())
        return (
            f"Intervention({', '.join(self.changed)} x {self.scale:g}: metric {self.metric:+.3g}, "
            f"changes by {self.metric_measured:+.3g}, predicted {self.metric_predicted:+.3g}; "
            f"R² of {r2 or 'too few nodes'})"
        )


@torch.inference_mode(False)
@without_autocast()
def intervene(
    model: LensModel,
    graph: nx.DiGraph,
    node: str | Sequence[str],
    scale: float,
    *,
    prompts: Prompts | None = None,
) -> Intervention:
    """Change what nodes hold, and compare what the graph predicts with what the model does.

    Args:
        model: that the graph is of.
        graph: of `lch_plugin.circuits.attribution_graph`, pruned or not, from a file or not.
        node: name of a head, neuron, MLP or token embedding of the graph, or of a supernode
            (`lch_plugin.circuits.grouped`), which stands for its members; or several, changed
            together. Each is changed at its own position.
        scale: 0 puts the twin's value in place of the node's, or zero; 2 doubles the difference.
        prompts: the prompt of the graph, needed if its metric is none that compares answers with
            foils: a graph cannot hold a function.

    Raises:
        InputError: the graph is of another model or prompt, or has no such node, or one that holds
            nothing to scale; its metric is needed; or a scale that is not finite.
        SiteError: as `lch_plugin.circuits.node_attribution`.

    Example:
        >>> import lch_plugin as lch
        >>> from lch_plugin import circuits
        >>> model = lch.load_demo_model()
        >>> prompt = circuits.task(model, "an", 1)[0]
        >>> graph = circuits.attribution_graph(model, prompt, max_nodes=50)
        >>> head = next(n for n, d in graph.nodes(data=True) if d["kind"] == "head")
        >>> found = circuits.intervene(model, graph, head, 0)
        >>> sorted(found.r2)
        ['head', 'neuron']
    """
    if not math.isfinite(scale):
        raise InputError(f"scale={scale} must be finite: 0 removes a node, 1 leaves it.")
    changed = _members(graph, (node,) if isinstance(node, str) else tuple(node))
    batch = _prompt_of(graph, prompts)
    points, embed = node_points(model, tuple(graph.graph["kinds"])), embedding_name(model)
    names = [embed, *(point.name for point in points)]
    linearization = graph.graph["linearization"]
    found = metric_gradients(model, batch, names, linearization=linearization)
    metric = float(found.metric[0])
    if not abs(metric - graph.graph["metric"]["value"]) <= _SAME * (1 + abs(metric)):
        raise InputError(
            f"the metric is {metric:.6g} here and {graph.graph['metric']['value']:.6g} in the "
            f"graph, which is of {graph.graph['model']} on {graph.graph['prompt']!r}. Give the "
            "model and prompt that it was made with."
        )
    clean = found.activations
    at = {(point.kind, point.layer): point for point in points}
    # An embedding is all that a position holds, as a whole MLP is.
    whole = NodePoint("mlp", -1, embed, 1, clean[embed].shape[-1])

    def place(data: Mapping[str, Any]) -> tuple[NodePoint, tuple[int, int, int]]:
        """Where a node is: its hook point, and batch, position and index there."""
        if data["kind"] == "embedding":
            return whole, (0, data["position"], 0)
        return at[data["kind"], data["layer"]], (0, data["position"], data["index"])

    twin = {} if batch.corrupt is None else activations(model, batch.corrupt, names)
    steps = {name: torch.zeros_like(value) for name, value in clean.items()}
    for name in changed:
        point, where = place(graph.nodes[name])
        own = clean[point.name] - twin.get(point.name, torch.zeros(()))
        point.split(steps[point.name])[where] = (scale - 1) * point.split(own)[where]
    steps = {name: step for name, step in steps.items() if bool(step.any())}
    run = _frozen if linearization == "detached" else _to_first_order
    predicted, after = run(model, batch, names, steps), _as_it_is(model, batch, clean, steps)
    kept = [(n, d) for n, d in graph.nodes(data=True) if d["kind"] in _KINDS and n not in changed]

    def changes(run: _Run) -> Float[Tensor, " node"]:
        values = torch.zeros(len(kept), dtype=torch.float64)
        for i, (_, data) in enumerate(kept):
            point, where = place(data)
            slope, change = (
                point.split(of[point.name])[where] for of in (found.gradients, run.changes)
            )
            values[i] = (slope * change).sum()
        return values

    both = torch.stack([changes(predicted), changes(after)])
    # What comes before a node does not change, and is no prediction that came true.
    reached = both.any(0).nonzero().flatten().tolist()
    return Intervention(
        changed=changed,
        scale=float(scale),
        metric=metric,
        metric_predicted=predicted.metric,
        metric_measured=after.metric,
        nodes=tuple(kept[i][0] for i in reached),
        kinds=tuple(kept[i][1]["kind"] for i in reached),
        predicted=both[0, reached],
        measured=both[1, reached],
    )


@dataclass(frozen=True, eq=False)
class _Run:
    """By how much the metric and what passes hook points change."""

    metric: float
    changes: Mapping[str, Tensor]


_Edits = dict[str, Callable[[Tensor], Tensor | None]]


def _as_it_is(
    model: LensModel, batch: Prompts, clean: Mapping[str, Tensor], steps: Mapping[str, Tensor]
) -> _Run:
    """The model with nothing held, the nodes made to hold what they are to."""
    names = list(clean)
    wanted = {name: (clean[name], clean[name] + step) for name, step in steps.items()}

    def put(name: str, value: Tensor) -> Tensor:
        # Only the nodes that are changed: others of the layer hold what they come to.
        before, after = (one.to(value) for one in wanted[name])
        return torch.where(before == after, value, after)

    seen: dict[str, Tensor] = {}

    def see(name: str, value: Tensor) -> Tensor:
        seen[name] = put(name, value) if name in wanted else value
        return seen[name]

    edits: _Edits = {name: partial(see, name) for name in names}
    with evaluating(model), torch.no_grad():
        before = batch.measure(batch.run(model, {}))
        after = batch.measure(batch.run(model, edits))
    return _Run(float((after - before)[0]), {name: seen[name] - clean[name] for name in names})


def _frozen(
    model: LensModel, batch: Prompts, names: Sequence[str], steps: Mapping[str, Tensor]
) -> _Run:
    """The model with all that the detached linearisation holds fixed at the prompt."""
    embed = embedding_name(model)

    def run(mode: DetachedMode, changed: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        seen: dict[str, Tensor] = {}

        def start(value: Tensor) -> Tensor:
            return mode.follow(add(embed, value).detach().requires_grad_())

        def add(name: str, value: Tensor) -> Tensor:
            if name in changed:  # What the nodes hold, whatever comes to them.
                kept = changed[name] == 0
                fixed = reference[name] + changed[name].to(value)
                value = torch.where(kept, value, fixed)
            seen[name] = value.detach()
            return value

        edits: _Edits = {name: partial(add, name) for name in names}
        edits[embed] = start
        with evaluating(model), torch.enable_grad(), mode:
            logits = batch.run(model, edits)
        return batch.measure(logits.detach()), seen

    reference: dict[str, Tensor] = {}
    at_clean = DetachedMode()
    before, reference = run(at_clean, {})
    after, seen = run(DetachedMode(replay=at_clean.recorded), steps)
    return _Run(float((after - before)[0]), {name: seen[name] - reference[name] for name in names})


def _to_first_order(
    model: LensModel, batch: Prompts, names: Sequence[str], steps: Mapping[str, Tensor]
) -> _Run:
    """The Jacobian times the steps, by forward differentiation."""
    changes: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> Tensor:
        _, tangent = forward_ad.unpack_dual(value)
        tangent = torch.zeros_like(value) if tangent is None else tangent
        if name in steps:
            # A node that is changed holds what it is made to, whatever comes to it.
            step = steps[name].to(value)
            tangent = torch.where(step == 0, tangent, step)
        changes[name] = tangent
        return forward_ad.make_dual(forward_ad.unpack_dual(value).primal, tangent)

    edits: _Edits = {name: partial(add, name) for name in names}
    with evaluating(model), torch.no_grad(), forward_ad.dual_level():
        logits = batch.run(model, edits)
        _, tangent = forward_ad.unpack_dual(batch.measure(logits))
    return _Run(0.0 if tangent is None else float(tangent[0]), changes)


def _members(graph: nx.DiGraph, names: Sequence[str]) -> tuple[str, ...]:
    """The nodes to change, members in place of supernodes.

    Raises:
        InputError: none, one twice, one that is not there, or that holds nothing to scale.
    """
    groups = graph.graph.get("supernodes", {})
    found = tuple(member for name in names for member in groups.get(name, [name]))
    if not found or len(set(found)) < len(found):
        raise InputError(f"nodes {list(found)}: name at least one, and each once.")
    for name in found:
        if name not in graph:
            raise InputError(
                f"the graph has no node {name!r}; its nodes are called as in list(graph)[:3], "
                f"{list(graph)[:3]}."
            )
        kind = graph.nodes[name]["kind"]
        if kind not in _CHANGED:
            raise InputError(
                f"{name!r} is of kind {kind!r}, which holds nothing that can be scaled. Take a "
                f"node of kind {', '.join(_CHANGED)}, of a graph that is not merged."
            )
    return found


def _prompt_of(graph: nx.DiGraph, given: Prompts | None) -> Prompts:
    """The prompt of a graph: as it is given, or as the graph holds it.

    Raises:
        InputError: the graph holds another, or a metric of which it has no more than the name.
    """
    about = graph.graph
    metric, ids = about["metric"], (about.get("clean_ids"), about.get("corrupt_ids"))
    if given is not None:
        rows = tuple(
            None if side is None else side.tolist() for side in (given.clean, given.corrupt)
        )
        if rows != tuple(None if side is None else [side] for side in ids):
            raise InputError(
                f"prompts={given!r} are others than the graph's, {about['prompt']!r} with its "
                "twin. Give the prompt that it was made with, as prompts[0]."
            )
        return given
    if metric["name"] not in COMPARISONS or "answers" not in metric:
        raise InputError(
            f"the graph is of the metric {metric['name']!r}, a function that it does not hold. "
            "Give its prompt as prompts=."
        )
    compared = COMPARISONS[metric["name"]]
    clean, corrupt = ids
    return Prompts(
        torch.tensor([clean]),
        compared([metric["answers"]], [metric["foils"]], metric["position"]),
        None if corrupt is None else torch.tensor([corrupt]),
    )

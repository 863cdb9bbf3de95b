"""The attribution graph of one prompt, as networkx."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import networkx as nx
import torch
from jaxtyping import Float
from torch import Tensor

from lch_plugin.adapters.states import without_autocast
from lch_plugin.adapters.transformer_lens import LensModel, NodeKind, NodePoint, node_points
from lch_plugin.circuits.graphs.edges import Flow, flow
from lch_plugin.circuits.graphs.frozen_components import FrozenModel, freeze_components
from lch_plugin.circuits.graphs.patterns import pattern_worth
from lch_plugin.circuits.graphs.top_nodes import slices_of, top_nodes
from lch_plugin.circuits.kinds import KINDS
from lch_plugin.circuits.nodes import Circuit
from lch_plugin.circuits.prompt_batches import Prompts
from lch_plugin.circuits.scores.attribution import Contributions, contributions
from lch_plugin.circuits.scores.features import active_features
from lch_plugin.cotangents import Metric
from lch_plugin.errors import InputError, SiteError
from lch_plugin.files import portable
from lch_plugin.metrics import Compared
from lch_plugin.sites import Linearization


@torch.inference_mode(False)  # Experts are differentiated until the last edge is known.
@without_autocast()
def attribution_graph(
    model: LensModel,
    prompts: Prompts,
    *,
    kinds: Sequence[NodeKind] = ("head", "neuron"),
    circuit: Circuit | None = None,
    max_nodes: int = 500,
    linearization: Linearization = "detached",
    sae: Any = None,
    patterns: bool = False,
) -> nx.DiGraph:
    """What flows between the nodes of a model on one prompt, and from there to the metric.

    Edges are in units of the metric (`lch_plugin.circuits.graphs.edges`): what enters a node
    through its edges, and its offset, is its contribution, and leaves through its edges. Nodes are
    at one position each. What of attention and MLPs is not kept as a node of its own is in one
    ``rest`` node a component and position, with the biases, so that nothing is lost.

    Nodes are called ``"a2.h1@13"`` (head), ``"m2.n261@13"`` (neuron), ``"m2@13"`` (MLP),
    ``"m2.f17@13"`` (feature), ``"embedding@5"``, ``"position@5"``, ``"rest a2@13"``,
    ``"rest m2@13"`` and ``"metric"``. Their attributes: ``kind``, ``layer`` (-1 of embeddings, the
    number of layers of the metric), ``position``, ``index``, ``token`` (the text there),
    ``contribution`` and ``offset`` (units of the metric), ``activation`` (None where it is not one
    number). Edges have a ``weight``. The graph's attributes say where it comes from, as JSON.

    With ``patterns=True`` edges into heads have a ``pattern`` as well: what the source does through
    *where* the head looks, to first order, beside what it does through what is read there. It is
    no part of the flow. Nodes of attention have a ``pattern``, what looking as on the prompt and
    not as on its twin is worth (the score of `lch_plugin.circuits.pattern_attribution`, at their
    position), and a ``pattern_rest``, what of it the edges do not say: ``pattern`` is the sum of
    the patterns of the edges into a node, and ``pattern_rest``.

    Args:
        model: TransformerBridge or HookedTransformer.
        prompts: one prompt; with a corrupt twin, everything is the difference to the twin.
        kinds: of nodes: heads, and neurons or whole MLPs.
        circuit: of heads, neurons and MLPs keep only those of this circuit; any if None.
        max_nodes: how many heads, neurons, MLPs and features are kept, by size of contribution.
        linearization: of every component: ``"detached"`` or ``"jacobian"``, which counts what
            flows through attention patterns as well.
        sae: of SAELens, on the centroids of an MLP; the features active there take the place of its
            neurons.
        patterns: whether to tell what flows through attention patterns; needs a corrupt twin, and
            ``"detached"``, since a Jacobian has it in the weights already.

    Raises:
        InputError: not one prompt; max_nodes below 1; a circuit of other nodes than ``kinds``; an
            SAE that is on no MLP's centroid; or as `lch_plugin.circuits.node_attribution`.
        SiteError: the residual stream is not a sum of what components write, or as `node_points`.
    """
    if len(prompts) != 1:
        raise InputError(f"{len(prompts)} prompts: a graph is of one. Take one, as prompts[0].")
    if max_nodes < 1:
        raise InputError(f"max_nodes={max_nodes} must be at least 1.")
    if patterns and (prompts.corrupt is None or linearization != "detached"):
        raise InputError(
            f"patterns=True with linearization={linearization!r}"
            f"{' and no corrupt twin' if prompts.corrupt is None else ''}: it tells what the "
            "detached model makes of looking elsewhere than on the twin. Give corrupt twins, and "
            "linearization='detached'."
        )
    points = node_points(model, kinds)
    if circuit is not None and circuit.points != points:
        raise InputError(
            f"the circuit is made of other nodes than kinds={tuple(kinds)} of this model. Give the "
            "kinds it was found with."
        )
    features = None
    if sae is not None:  # Features take the place of their MLP's own nodes.
        features = active_features(model, prompts, sae, linearization=linearization)
        points = tuple(
            p for p in points if KINDS[p.kind].component == "attn" or p.layer != features.layer
        )
    scored = contributions(model, prompts, points, linearization=linearization)
    cut_off = partial(
        freeze_components,
        model,
        prompts,
        points,
        inputs=frozenset() if features is None else frozenset({features.layer}),
        linearization=linearization,
    )
    frozen = cut_off()
    kept = top_nodes(scored, points, features, circuit, max_nodes)
    found = flow(
        frozen,
        [slices_of(expert, points, features, kept) for expert in frozen.experts],
        cut_off(through_patterns=True) if patterns else None,
    )
    _check_gradients(found, scored, points, frozen)
    tokens = [model.to_string([i]) for i in prompts.clean[0].tolist()]
    graph = _assemble(found, tokens)
    if patterns:
        _add_patterns(graph, pattern_worth(model, prompts))
    graph.graph.update(
        tokens=tokens,
        prompt=model.to_string(prompts.clean[0]),
        corrupt=None if prompts.corrupt is None else model.to_string(prompts.corrupt[0]),
        clean_ids=prompts.clean[0].tolist(),
        corrupt_ids=None if prompts.corrupt is None else prompts.corrupt[0].tolist(),
        metric={
            "name": prompts.metric.name,
            "value": frozen.metric,
            "reference": frozen.reference,
            **_tokens_of(prompts.metric),
        },
        model=portable(model.cfg.model_name),
        n_layers=frozen.n_layers,
        kinds=list(kinds),
        max_nodes=max_nodes,
        linearization=linearization,
        sae=None if features is None else features.hook_name,
        versions={name: version(name) for name in ("lch-plugin", "torch", "transformer-lens")},
    )
    return graph


def _tokens_of(metric: Metric) -> dict[str, Any]:
    """What a metric of the one prompt compares, if that is what it does."""
    if not isinstance(metric, Compared):
        return {}
    return {
        "position": metric.position,
        "answers": list(metric.answers[0]),
        "foils": list(metric.foils[0]),
    }


def _check_gradients(
    found: Flow, scored: Contributions, points: Sequence[NodePoint], frozen: FrozenModel
) -> None:
    """Hold the contributions that the sweep found to those by the gradient of the whole model.

    Raises:
        SiteError: they differ, so there are paths that the graph does not have.
    """
    names: dict[tuple[str, int], str] = {(p.kind, p.layer): p.name for p in points}
    swept, whole = [], []
    for group, values in zip(
        found.groups, found.contributions.split([len(g) for g in found.groups]), strict=True
    ):
        if (group.kind, group.layer) in names:
            swept.append(values)
            nodes = scored.nodes[names[group.kind, group.layer]][0]
            whole.append(nodes[group.positions, group.indices])
        elif group.kind == "embedding" and frozen.is_embedded_as_is:
            swept.append(values)
            whole.append(scored.embeddings[0])
    if not swept:
        return
    got, expected = torch.cat(swept).double(), torch.cat(whole).double()
    error = float((got - expected).abs().max())
    if not error <= frozen.tolerance * float(expected.abs().max()):
        raise SiteError(
            "contributions along the paths of the graph differ from those by the gradient of the "
            f"whole model by up to {error:.1e}: something other than the residual stream joins "
            "this model's components. Score nodes without a graph: "
            "lch_plugin.circuits.node_attribution."
        )


def _assemble(found: Flow, tokens: Sequence[str]) -> nx.DiGraph:
    """The flow as a graph, edges of exactly zero left out."""
    graph = nx.DiGraph()
    names: list[str] = []
    contributions_, offsets = found.contributions.tolist(), found.offsets.tolist()
    for group in found.groups:
        pairs = zip(group.positions.tolist(), group.indices.tolist(), strict=True)
        for i, (position, index) in enumerate(pairs):
            name = KINDS[group.kind].node(group.layer, index, position)
            graph.add_node(
                name,
                kind=group.kind,
                layer=group.layer,
                position=position,
                index=index,
                token=tokens[position],
                contribution=contributions_[len(names)],
                offset=offsets[len(names)],
                activation=None if group.activations is None else group.activations[i],
            )
            names.append(name)
    targets, sources = found.edges.nonzero().unbind(-1)
    weights = found.edges[targets, sources].tolist()
    for t, s, weight in zip(targets.tolist(), sources.tolist(), weights, strict=True):
        graph.add_edge(names[s], names[t], weight=weight)
    if found.patterns is not None:
        targets, sources = found.patterns.nonzero().unbind(-1)
        by_pattern = found.patterns[targets, sources].tolist()
        for t, s, value in zip(targets.tolist(), sources.tolist(), by_pattern, strict=True):
            # Where the head reads nothing of a source, it may look elsewhere because of it.
            weight = graph.edges.get((names[s], names[t]), {"weight": 0.0})["weight"]
            graph.add_edge(names[s], names[t], weight=weight, pattern=value)
    return graph


def _add_patterns(graph: nx.DiGraph, worth: Sequence[Float[Tensor, "head pos"]]) -> None:
    """To nodes of attention, what their patterns are worth, and what of it no edge says."""
    remaining = [layer.sum(0).tolist() for layer in worth]
    # A layer's rest comes behind its heads, and has what they leave.
    for name, node in graph.nodes(data=True):
        layer, position = node["layer"], node["position"]
        if node["kind"] == "head":
            node["pattern"] = float(worth[layer][node["index"], position])
            remaining[layer][position] -= node["pattern"]
        elif node["kind"] == "attn_rest":
            node["pattern"] = remaining[layer][position]
        else:
            continue
        said = sum(edge.get("pattern", 0.0) for _, _, edge in graph.in_edges(name, data=True))
        node["pattern_rest"] = node["pattern"] - said

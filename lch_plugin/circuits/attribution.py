r"""What every head, neuron, MLP and token embedding does for a metric: targeted centroids.

The span from a node to the metric has a centroid ``g``, the gradient of the metric in what the node
holds; it is the cotangent that the node's own centroid is read through (`lch_plugin.Site` with a
`Metric`). Removing the node takes its activations away, or puts those of a corrupt prompt in their
place, and to the span's affine expert that is worth exactly::

    score = g . (activation - reference)

in units of the metric: positive if removing the node lowers it. One forward and one backward pass
give it for every node.

Which expert the span is, is the choice of ``linearization``: ``"detached"`` holds attention
patterns, norm scales and the gates of activations at their values (`lch_plugin.linearization`), so
the scores of all sources add up to the metric, and nothing is lost where activations saturate;
``"jacobian"`` is the gradient. With the Jacobian, and the corrupt prompt for reference, this is
attribution patching (Nanda 2023; Syed et al., arXiv 2310.10348); the detached gradient is close to
relevance patching (Jafari et al., arXiv 2508.21258).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lch_plugin.adapters.states import evaluating
from lch_plugin.adapters.transformer_lens import (
    LensModel,
    NodeKind,
    NodePoint,
    node_points,
    run_edited,
)
from lch_plugin.circuits.nodes import NodeScores
from lch_plugin.circuits.prompts import Prompts
from lch_plugin.errors import InputError
from lch_plugin.linearization import DetachedMode
from lch_plugin.mlp import at_least_float32
from lch_plugin.sites import Linearization


@dataclass(frozen=True, eq=False)
class Gradients:
    """Activations at some hook points, and the gradient of a metric in each.

    Attributes:
        metric: of each prompt.
        activations, gradients: by hook name, each as the hook point has it.
    """

    metric: Float[Tensor, " batch"]
    activations: dict[str, Float[Tensor, "batch pos *rest"]]
    gradients: dict[str, Float[Tensor, "batch pos *rest"]]


@dataclass(frozen=True, eq=False)
class Contributions:
    """What each node does for the metric, at each position of each prompt.

    Attributes:
        metric: of each prompt.
        nodes: by hook name; nodes in the order they have there.
        embeddings: of the token embedding at each position.
    """

    metric: Float[Tensor, " batch"]
    nodes: dict[str, Float[Tensor, "batch pos node"]]
    embeddings: Float[Tensor, "batch pos"]


def node_attribution(
    model: LensModel,
    prompts: Prompts | Iterable[Prompts],
    kinds: Sequence[NodeKind] = ("head", "neuron"),
    *,
    linearization: Linearization = "detached",
    through_patterns: bool = False,
) -> NodeScores:
    """Score every node: what removing it at all positions takes from the metric.

    One forward and one backward pass a batch, and a forward pass of its corrupt twin.

    Args:
        model: TransformerBridge or HookedTransformer.
        prompts: with corrupt twins, a node's activations are compared with those of the twin;
            without, with zero.
        kinds: heads, and neurons or whole MLPs.
        linearization: of everything between a node and the metric: ``"detached"`` or
            ``"jacobian"``.
        through_patterns: count what a node does through the attention patterns of later heads
            (their QK paths), and not through their OV paths alone. The Jacobian always does.

    Returns:
        Scores, averaged over prompts and summed over positions, in units of the metric.

    Raises:
        InputError: no prompts, a metric that gives anything but one finite number a prompt, or one
            that is constant.
        SiteError: as `node_points`.
    """
    points = node_points(model, kinds)
    total, n_prompts = torch.zeros(sum(p.n_nodes for p in points), dtype=torch.float64), 0
    for batch in [prompts] if isinstance(prompts, Prompts) else prompts:
        found = contributions(
            model,
            batch,
            points,
            linearization=linearization,
            through_patterns=through_patterns,
        )
        total += torch.cat([found.nodes[p.name].double().sum((0, 1)) for p in points]).cpu()
        n_prompts += len(batch)
    if not n_prompts:
        raise InputError("there are no prompts to score nodes on.")
    return NodeScores(points, (total / n_prompts).float())


def contributions(
    model: LensModel,
    batch: Prompts,
    points: Sequence[NodePoint],
    *,
    linearization: Linearization = "detached",
    through_patterns: bool = False,
) -> Contributions:
    """What each node does for the metric, position by position; arguments as `node_attribution`."""
    embed = embedding_name(model)
    names = [embed, *(point.name for point in points)]
    found = metric_gradients(
        model, batch, names, linearization=linearization, through_patterns=through_patterns
    )
    reference = {} if batch.corrupt is None else activations(model, batch.corrupt, names)

    def worth(name: str) -> Tensor:
        a = found.activations[name]
        return (a - reference[name] if reference else a) * found.gradients[name]

    return Contributions(
        metric=found.metric,
        nodes={point.name: point.split(worth(point.name)).sum(-1) for point in points},
        embeddings=worth(embed).sum(-1),
    )


def metric_gradients(
    model: LensModel,
    batch: Prompts,
    names: Sequence[str],
    *,
    linearization: Linearization = "jacobian",
    through_patterns: bool = False,
) -> Gradients:
    """The targeted cotangents: gradients of the metric in what passes some hook points.

    Args:
        model, batch: as `node_attribution`.
        names: of the hook points.
        linearization, through_patterns: as `node_attribution`.

    Raises:
        InputError: as `node_attribution`.
        SiteError: a hook point did not fire.
    """
    embed = embedding_name(model)
    mode = DetachedMode(through_patterns=through_patterns) if linearization == "detached" else None
    seen: dict[str, Tensor] = {}

    def start(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        seen[embed] = x if mode is None else mode.follow(x)
        return x

    def capture(name: str, value: Tensor) -> Tensor:
        seen[name] = value
        return value  # A bridge may have shown us a view: what we return is what goes on.

    edits: dict[str, Callable[[Tensor], Tensor | None]] = {
        name: partial(capture, name) for name in names
    }
    edits[embed] = start
    with evaluating(model), torch.enable_grad():
        with nullcontext() if mode is None else mode:
            metric = batch.measure(run_edited(model, batch.clean, edits))
        if not metric.requires_grad:
            raise _constant(batch)
        values = [seen[name] for name in names]
        gradients = torch.autograd.grad(metric.sum(), values, materialize_grads=True)
    if not any(bool(g.any()) for g in gradients):
        raise _constant(batch)
    return Gradients(
        metric=metric.detach(),
        activations={n: _wide(v.detach()) for n, v in zip(names, values, strict=True)},
        gradients={n: _wide(g) for n, g in zip(names, gradients, strict=True)},
    )


def activations(
    model: LensModel, tokens: Int[Tensor, "batch pos"], names: Sequence[str]
) -> dict[str, Float[Tensor, "batch pos *rest"]]:
    """What passes some hook points on these tokens, by name."""
    seen: dict[str, Tensor] = {}
    with evaluating(model), torch.no_grad():
        run_edited(model, tokens, {name: partial(seen.__setitem__, name) for name in names})
    return {name: _wide(value) for name, value in seen.items()}


def embedding_name(model: LensModel) -> str:
    """Hook point of the token embeddings."""
    return "hook_embed" if isinstance(model, HookedTransformer) else "embed.hook_out"


def _wide(value: Tensor) -> Tensor:
    return value.to(at_least_float32(value))


def _constant(batch: Prompts) -> InputError:
    return InputError(
        f"metric {batch.metric.name!r} is constant here: no node changes it to first order, so "
        "there is nothing to attribute. A KL divergence is, where the model gives the reference: "
        "take the logits of another prompt."
    )

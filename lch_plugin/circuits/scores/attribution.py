r"""What every head, neuron, MLP and token embedding does for a metric: targeted centroids.

The span from a node to the metric has a centroid ``g``, the gradient of the metric in what the node
holds; it is the cotangent that the node's own centroid is read through (`lch_plugin.Site` with a
`Metric`). Removing the node takes its activations away, or puts those of a corrupt prompt in their
place, and to the span's affine expert that is worth exactly::

    score = g . (activation - reference)

in units of the metric: positive if removing the node lowers it. One forward and one backward pass
give it for every node.

Exactly, where the metric is linear in the logits, as `lch_plugin.circuits.logit_difference` is: the
score is then what removing the node takes from the metric of the frozen model. Of any other metric
``g`` is the gradient at the logits of the clean prompt, and the score its change to first order.

Which expert the span is, is the choice of ``linearization``: ``"detached"`` holds attention
patterns, norm scales and the gates of activations at their values (`lch_plugin.linearization`), so
the scores of all sources add up to a linear metric, and nothing is lost where activations saturate;
``"jacobian"`` is the gradient. With the Jacobian, and the corrupt prompt for reference, this is
attribution patching (Nanda 2023; Syed et al., arXiv 2310.10348); the detached gradient is close to
relevance patching (Jafari et al., arXiv 2508.21258).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lch_plugin.adapters.states import evaluating, without_autocast
from lch_plugin.adapters.transformer_lens import (
    LensModel,
    NodeKind,
    NodePoint,
    node_points,
    pattern_names,
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
    activations: dict[str, Float[Tensor, "batch _ *rest"]]
    gradients: dict[str, Float[Tensor, "batch _ *rest"]]


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


@without_autocast()
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
        Scores, averaged over prompts and summed over positions, in units of the metric: exact for
        the frozen model where the metric is linear in the logits, else to first order.

    Raises:
        InputError: no prompts, tokens the model cannot read, an unknown linearization, a metric
            that gives anything but one finite number a prompt, or one that is constant or has a
            gradient that is not finite.
        SiteError: as `node_points`.
    """
    points = node_points(model, kinds)

    def score(batch: Prompts) -> Tensor:
        found = contributions(
            model,
            batch,
            points,
            linearization=linearization,
            through_patterns=through_patterns,
        )
        return torch.cat([found.nodes[p.name].double().sum((0, 1)) for p in points])

    return _mean_scores(points, prompts, score)


@without_autocast()
def pattern_attribution(
    model: LensModel,
    prompts: Prompts | Iterable[Prompts],
    *,
    linearization: Linearization = "detached",
) -> NodeScores:
    """Score every head's attention pattern: where it looks, apart from what it reads there.

    With ``A`` the pattern, ``A_ref`` that of the corrupt twin and ``g`` the gradient of the metric
    in ``A`` with the values of the clean prompt, the score is ``g . (A - A_ref)``. It is the part
    of the head's score in `node_attribution` that its QK path accounts for; the rest, its values
    under the twin's pattern, is its OV path's. Without twins the reference is zero, and the score
    is that of the head.

    Args:
        model, prompts: as `node_attribution`.
        linearization: of everything between a pattern and the metric; ``"detached"`` holds the
            patterns of later heads at their values.

    Returns:
        Scores of the heads, averaged over prompts, in units of the metric.

    Raises:
        InputError, SiteError: as `node_attribution`.
    """
    names = pattern_names(model)
    # As leaves of the graph they are both constants to whatever lies before them and something to
    # differentiate in. The Jacobian needs no leaves: it goes through them.
    leaves = names if linearization == "detached" else []

    def score(batch: Prompts) -> Tensor:
        found = metric_gradients(
            model, batch, names, linearization=linearization, through_patterns=True, leaves=leaves
        )
        worth = _worth(model, batch, found)
        return torch.cat([worth[name].double().sum((0, 2, 3)) for name in names])

    return _mean_scores(node_points(model, ("head",)), prompts, score)


@without_autocast()
def contributions(
    model: LensModel,
    batch: Prompts,
    points: Sequence[NodePoint] | None = None,
    *,
    linearization: Linearization = "detached",
    through_patterns: bool = False,
) -> Contributions:
    """What each node does for the metric, position by position, and each token embedding.

    Args:
        model, linearization, through_patterns: as `node_attribution`.
        batch: prompts of one length.
        points: where the nodes are; all heads and neurons if None.

    Raises:
        InputError, SiteError: as `node_attribution`.
    """
    points = node_points(model) if points is None else points
    embed = embedding_name(model)
    names = [embed, *(point.name for point in points)]
    found = metric_gradients(
        model, batch, names, linearization=linearization, through_patterns=through_patterns
    )
    worth = _worth(model, batch, found)
    return Contributions(
        metric=found.metric,
        nodes={point.name: point.split(worth[point.name]).sum(-1) for point in points},
        embeddings=worth[embed].sum(-1),
    )


@without_autocast()
def metric_gradients(
    model: LensModel,
    batch: Prompts,
    names: Sequence[str],
    *,
    linearization: Linearization = "jacobian",
    through_patterns: bool = False,
    leaves: Sequence[str] = (),
) -> Gradients:
    """The targeted cotangents: gradients of the metric in what passes some hook points.

    Args:
        model, batch: as `node_attribution`.
        names: of the hook points.
        linearization, through_patterns: as `node_attribution`.
        leaves: hook points, some of ``names``, that no gradient passes on its way back.

    Raises:
        InputError: as `node_attribution`.
        SiteError: a hook point did not fire.
    """
    if linearization not in get_args(Linearization):
        raise InputError(
            f"linearization={linearization!r} is not known; use one of {get_args(Linearization)}."
        )
    embed = embedding_name(model)
    mode = DetachedMode(through_patterns=through_patterns) if linearization == "detached" else None
    seen: dict[str, Tensor] = {}

    def start(name: str, value: Tensor) -> Tensor:
        value = value.detach().requires_grad_()
        seen[name] = value if mode is None else mode.follow(value)
        return value

    def capture(name: str, value: Tensor) -> Tensor:
        seen[name] = value
        return value  # A bridge may have shown us a view: what we return is what goes on.

    edits: dict[str, Callable[[Tensor], Tensor | None]] = {
        name: partial(start if name in leaves else capture, name) for name in names
    }
    edits[embed] = partial(start, embed)
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        with nullcontext() if mode is None else mode:
            logits = run_edited(model, batch.clean, edits)
        # Outside: the metric is differentiated as it is, and not a part of the model to detach.
        metric = batch.measure(logits)
        if not metric.requires_grad:
            raise _constant(batch)
        values = [seen[name] for name in names]
        of_logits, *gradients = torch.autograd.grad(
            metric.sum(), [logits, *values], materialize_grads=True
        )
    slope = float(of_logits.abs().max())
    if not math.isfinite(slope):
        raise InputError(
            f"the gradient of metric {batch.metric.name!r} in the logits is not finite, as that of "
            "a root is at zero, so there is nothing to attribute by."
        )
    # Where a metric is stationary, as a KL divergence to itself, rounding leaves that much.
    if slope < 4 * torch.finfo(metric.dtype).eps:
        raise _constant(batch)
    return Gradients(
        metric=metric.detach(),
        activations={n: _wide(v.detach()) for n, v in zip(names, values, strict=True)},
        gradients={n: _wide(g) for n, g in zip(names, gradients, strict=True)},
    )


@without_autocast()
def activations(
    model: LensModel, tokens: Int[Tensor, "batch pos"], names: Sequence[str]
) -> dict[str, Float[Tensor, "batch _ *rest"]]:
    """What passes some hook points on these tokens, by name."""
    seen: dict[str, Tensor] = {}
    with evaluating(model), torch.no_grad():
        run_edited(model, tokens, {name: partial(seen.__setitem__, name) for name in names})
    return {name: _wide(value) for name, value in seen.items()}


def embedding_name(model: LensModel) -> str:
    """Hook point of the token embeddings."""
    return "hook_embed" if isinstance(model, HookedTransformer) else "embed.hook_out"


def _mean_scores(
    points: tuple[NodePoint, ...],
    prompts: Prompts | Iterable[Prompts],
    score: Callable[[Prompts], Float[Tensor, " node"]],
) -> NodeScores:
    """Scores of batches, each summed over its prompts, as the mean over all prompts."""
    total, n_prompts = torch.zeros(sum(p.n_nodes for p in points), dtype=torch.float64), 0
    for batch in [prompts] if isinstance(prompts, Prompts) else prompts:
        total += score(batch).cpu()
        n_prompts += len(batch)
    if not n_prompts:
        raise InputError("there are no prompts to score nodes on.")
    return NodeScores(points, (total / n_prompts).float())


def _worth(
    model: LensModel, batch: Prompts, found: Gradients
) -> dict[str, Float[Tensor, "batch _ *rest"]]:
    """By hook name, gradient times the difference to the corrupt twin, or to zero without one."""
    difference = found.activations
    if batch.corrupt is not None:
        reference = activations(model, batch.corrupt, list(difference))
        difference = {name: a - reference[name] for name, a in difference.items()}
    return {name: a * found.gradients[name] for name, a in difference.items()}


def _wide(value: Tensor) -> Tensor:
    return value.to(at_least_float32(value))


def _constant(batch: Prompts) -> InputError:
    return InputError(
        f"metric {batch.metric.name!r} is constant here but for rounding: no node changes it to "
        "first order, so there is nothing to attribute. A KL divergence is, where the model gives "
        "the reference: take the logits of another prompt. So is a very small probability: take "
        "its logarithm."
    )

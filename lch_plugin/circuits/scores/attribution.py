r"""What every head, neuron, MLP and token embedding does for a metric: targeted centroids.

The span from a node to the metric has a centroid ``g``, the gradient of the metric in what the node
holds; it is the cotangent that the node's own centroid is read through (`lch_plugin.Site` with a
`Metric`). Removing the node takes its activations away, or puts those of a corrupt prompt in their
place, and to the span's affine expert that is worth exactly::

    score = g . (activation - reference)

in units of the metric: positive if removing the node lowers it. One backward pass gives it for
every node.

An expert is that of one place. A circuit leaves nearly all nodes at their values on the corrupt
prompt, far from the clean prompt, where the metric is saturated and attention looks elsewhere. So
the scores that find circuits (`Method`) are means over places on two ways from corrupt to clean:

- of the *prompt*: the token embeddings are moved, and what follows is what the model makes of them
  (integrated gradients; at nodes, Hanna et al., arXiv 2403.17806);
- of the *nodes*: the prompt is clean, and every node holds a share ``t`` of what it computes and
  ``1 - t`` of what it held on the corrupt prompt. That is the model in which a circuit is judged,
  with all nodes kept in part. The score is the derivative of the metric in the share of the node,
  ``g . (computed - reference)``; their integral over ``t`` is what all nodes together recover.

Which expert the span is, is the choice of ``linearization``: ``"detached"`` holds attention
patterns, norm scales and the gates of activations at their values (`lch_plugin.linearization`), so
the scores of all sources add up to a linear metric, and nothing is lost where activations saturate;
``"jacobian"`` is the gradient. At the clean prompt, with the Jacobian and a corrupt prompt for
reference, this is attribution patching (Nanda 2023; Syed et al., arXiv 2310.10348); the detached
gradient is close to relevance patching (Jafari et al., arXiv 2508.21258).

At one place, and of a metric that is linear in the logits, as
`lch_plugin.circuits.logit_difference` is, a detached score is exactly what removing the node takes
from the metric of the frozen model. Of any other metric ``g`` is the gradient at the logits there,
and the score its change to first order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lch_plugin.adapters.states import evaluating, without_autocast
from lch_plugin.adapters.transformer_lens import (
    HookedTransformer,
    LensModel,
    NodeKind,
    NodePoint,
    node_points,
    pattern_names,
    run_edited,
)
from lch_plugin.circuits.nodes import NodeScores
from lch_plugin.circuits.prompt_batches import Prompts, batches_of
from lch_plugin.errors import InputError
from lch_plugin.linearization import DetachedMode
from lch_plugin.mlp import at_least_float32
from lch_plugin.names import check_known
from lch_plugin.progress import track
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


def _check(linearization: str) -> None:
    check_known("linearization", linearization, get_args(Linearization))


@dataclass(frozen=True)
class Method:
    """Where the experts are taken whose mean a score is, and what they hold fixed.

    Attributes:
        prompt: shares of the way from the corrupt to the clean prompt, in the token embeddings;
            1 is the clean prompt as it is.
        nodes: shares of the way of all nodes, from their values on the corrupt prompt to those that
            they compute, above 0 and below 1, on the clean prompt.
        linearization: of everything between a node and the metric: ``"detached"`` or
            ``"jacobian"``.
        through_patterns: count what a node does through the attention patterns of later heads
            (their QK paths), and not through their OV paths alone. The Jacobian always does.

    Raises:
        InputError: no place at all, a share out of range, or an unknown linearization.
    """

    prompt: tuple[float, ...] = ()
    nodes: tuple[float, ...] = ()
    linearization: Linearization = "jacobian"
    through_patterns: bool = False

    def __post_init__(self) -> None:
        if not (
            self.prompt + self.nodes
            and all(0 <= t <= 1 for t in self.prompt)
            and all(0 < t < 1 for t in self.nodes)
        ):
            raise InputError(
                f"{self}: give at least one share of the way from corrupt to clean, of the prompt "
                "between 0 and 1, or of the nodes between 0 and 1, both ends left out."
            )
        _check(self.linearization)

    @property
    def needs_twins(self) -> bool:
        """Whether it walks from a corrupt prompt, and does not stay at the clean one."""
        return bool(self.nodes) or self.prompt != CLEAN


#: The clean prompt alone.
CLEAN = (1.0,)
#: Ways to score nodes, by name.
METHODS: Mapping[str, Method] = {
    "integrated": Method(prompt=(0.3, 0.5, 0.7), nodes=(0.75,)),
    "blended": Method(nodes=(0.75,)),
    "jacobian": Method(prompt=CLEAN),
    "detached": Method(prompt=CLEAN, linearization="detached"),
    "patterns": Method(prompt=CLEAN, linearization="detached", through_patterns=True),
}


@without_autocast()
def node_attribution(
    model: LensModel,
    prompts: Prompts | Iterable[Prompts],
    kinds: Sequence[NodeKind] = ("head", "neuron"),
    *,
    method: str | Method = "integrated",
) -> NodeScores:
    """Score every node: what removing it at all positions takes from the metric.

    Args:
        model: TransformerBridge or HookedTransformer.
        prompts: with corrupt twins, a node's activations are compared with those of the twin;
            without, with zero, and only a method that stays at the clean prompt can be used.
        kinds: heads, and neurons or whole MLPs.
        method: one of `METHODS`, or a `Method` of your own. One forward and one backward pass a
            batch for each of its places, and a forward pass of the corrupt twin, and of the clean
            prompt where none of the places is that:

            - ``"integrated"``: four places; the circuits that are truest of real models.
            - ``"blended"``: the one place of the four that does best by itself.
            - ``"jacobian"``: attribution patching at the clean prompt.
            - ``"detached"``: with everything but the residual stream held fixed; what adds up to
              the metric, and what `lch_plugin.circuits.attribution_graph` draws.
            - ``"patterns"``: the same, with attention patterns free.

    Returns:
        Scores, averaged over prompts and summed over positions, in units of the metric.

    Raises:
        InputError: no prompts, tokens the model cannot read, an unknown method, one that walks from
            a corrupt prompt where there is none, a metric that gives anything but one finite number
            a prompt, or one that is constant or has a gradient that is not finite.
        SiteError: as `node_points`.

    Example:
        >>> import lch_plugin as lch
        >>> from lch_plugin import circuits
        >>> model = lch.load_demo_model()
        >>> prompts = circuits.task(model, "an", 8)
        >>> scores = circuits.node_attribution(model, prompts, method="detached")
        >>> len(scores.top(3))
        3
    """
    points = node_points(model, kinds)
    chosen = _method(method)

    def score(batch: Prompts) -> Tensor:
        worth = _worth_of_nodes(model, batch, points, chosen)
        return torch.cat([worth[p.name].double().sum((0, 1)) for p in points])

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
    of the head's score at the clean prompt (`contributions`) that its QK path accounts for; the
    rest, its values under the twin's pattern, is its OV path's. Without twins the reference is
    zero, and the score is that of the head.

    Args:
        model, prompts: as `node_attribution`.
        linearization: of everything between a pattern and the metric, at the clean prompt;
            ``"detached"`` holds the patterns of later heads at their values.

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
    """What each node does for the metric at the clean prompt, by position, and each embedding.

    Summed over positions and averaged over prompts, these are the scores of `node_attribution` by
    the methods of one place: ``"detached"``, ``"patterns"`` and ``"jacobian"``.

    Args:
        model: TransformerBridge or HookedTransformer.
        batch: prompts of one length.
        points: where the nodes are; all heads and neurons if None.
        linearization, through_patterns: as `Method`, at the clean prompt.

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
    moved: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> Gradients:
    """The targeted cotangents: gradients of the metric in what passes some hook points.

    Args:
        model, batch: as `node_attribution`.
        names: of the hook points.
        linearization, through_patterns: as `Method`.
        leaves: hook points, some of ``names``, that no gradient passes on its way back.
        moved: by hook name, linear functions of the value there, whose result takes its place; the
            activations and gradients of these points are those of the result.

    Raises:
        InputError: as `node_attribution`.
        SiteError: a hook point did not fire.
    """
    _check(linearization)
    embed, moved = embedding_name(model), moved or {}
    mode = DetachedMode(through_patterns=through_patterns) if linearization == "detached" else None
    seen: dict[str, Tensor] = {}

    def move(name: str, value: Tensor) -> Tensor:
        if name not in moved:
            return value
        with nullcontext() if mode is None else mode.paused():
            value = moved[name](value)
        return value if mode is None else mode.follow(value)

    def start(name: str, value: Tensor) -> Tensor:
        value = move(name, value).detach().requires_grad_()
        seen[name] = value if mode is None else mode.follow(value)
        return value

    def capture(name: str, value: Tensor) -> Tensor:
        seen[name] = value = move(name, value)
        return value  # A bridge may have shown us a view: what we return is what goes on.

    edits: dict[str, Callable[[Tensor], Tensor | None]] = {
        name: partial(start if name in leaves else capture, name) for name in names
    }
    edits[embed] = partial(start, embed)
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        with nullcontext() if mode is None else mode:
            logits = batch.run(model, edits)
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
    batches = batches_of(prompts)
    for batch in track(batches, "scores"):
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


def _worth_of_nodes(
    model: LensModel, batch: Prompts, points: Sequence[NodePoint], method: Method
) -> dict[str, Float[Tensor, "batch pos node"]]:
    """By hook name, what the nodes are worth: the mean over the places of a method."""
    if not method.needs_twins:
        found = contributions(
            model,
            batch,
            points,
            linearization=method.linearization,
            through_patterns=method.through_patterns,
        )
        return found.nodes
    if batch.corrupt is None:
        raise InputError(
            "the scores are means over the way from corrupt prompts to clean ones, and there are "
            "no corrupt ones. Give twins, or method='detached'."
        )
    embed, names = embedding_name(model), [point.name for point in points]
    reference = activations(model, batch.corrupt, [embed, *names])
    worths = [
        kept_gradients(model, batch, points, reference, dict.fromkeys(names, share), method).nodes
        for share in method.nodes
    ]
    clean = activations(model, batch.clean, names) if method.prompt else {}
    for share in method.prompt:
        moved = metric_gradients(
            model,
            batch,
            names,
            linearization=method.linearization,
            through_patterns=method.through_patterns,
            moved={embed: partial(between, reference[embed], share)},
        )
        worth = {}
        for point in points:
            step = clean[point.name] - reference[point.name]
            worth[point.name] = point.split(step * moved.gradients[point.name]).sum(-1)
        worths.append(worth)
    return {name: torch.stack([worth[name] for worth in worths]).mean(0) for name in names}


@dataclass(frozen=True, eq=False)
class KeptGradients:
    """A model in which nodes are kept in part, and what keeping more of each would do.

    Attributes:
        metric: of each prompt.
        nodes: by hook name, the derivative of the metric in the share of each node that is kept,
            by position.
    """

    metric: Float[Tensor, " batch"]
    nodes: dict[str, Float[Tensor, "batch pos node"]]


def kept_gradients(
    model: LensModel,
    batch: Prompts,
    points: Sequence[NodePoint],
    reference: Mapping[str, Float[Tensor, "#batch #pos *rest"]],
    shares: Mapping[str, float | Float[Tensor, " node"]],
    method: Method,
) -> KeptGradients:
    """The metric with nodes kept in part, and its derivatives in the shares.

    A node holds ``reference + share * (computed - reference)``.

    Args:
        model, batch: as `node_attribution`.
        points: where the nodes are.
        reference: by hook name, what a node holds of which nothing is kept; zero if not given.
        shares: by hook name, of each node, between 0 and 1, both included.
        method: whose linearization it is.

    Raises:
        InputError, SiteError: as `node_attribution`.
    """
    steps: dict[str, Tensor] = {}

    def blend(point: NodePoint, value: Tensor) -> Tensor:
        own = point.split(value)
        found = reference.get(point.name)
        other = own.new_zeros(()) if found is None else point.split(found.to(own))
        share = torch.as_tensor(shares[point.name]).to(own).expand(point.n_nodes)
        steps[point.name] = _wide((own - other).detach())
        return (other + share[:, None] * (own - other)).reshape(value.shape)

    moved = metric_gradients(
        model,
        batch,
        [point.name for point in points],
        linearization=method.linearization,
        through_patterns=method.through_patterns,
        moved={point.name: partial(blend, point) for point in points},
    )
    nodes = {
        point.name: (steps[point.name] * point.split(moved.gradients[point.name])).sum(-1)
        for point in points
    }
    return KeptGradients(moved.metric, nodes)


def between(start: Tensor, share: float, end: Tensor) -> Tensor:
    """A share of the way from one value to another."""
    start = start.to(end)
    return start + share * (end - start)


def _method(method: str | Method) -> Method:
    if isinstance(method, Method):
        return method
    check_known("method", method, METHODS)
    return METHODS[method]


def _wide(value: Tensor) -> Tensor:
    return value.to(at_least_float32(value))


def _constant(batch: Prompts) -> InputError:
    return InputError(
        f"metric {batch.metric.name!r} is constant here but for rounding: no node changes it to "
        "first order, so there is nothing to attribute. A KL divergence is, where the model gives "
        "the reference: take the logits of another prompt. So is a very small probability: take "
        "its logarithm."
    )

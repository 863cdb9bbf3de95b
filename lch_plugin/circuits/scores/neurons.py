"""Neuron scores: what removing each neuron takes from the local expert of its MLP.

The paper (arXiv 2604.11962) finds the neurons of a circuit by how far removing each, one at a time,
moves the centroids of its MLP at the points of a neighbourhood: the mean over points and dimensions
of the squared move, over the Frobenius norm of all these centroids. In closed form
(`lch_plugin.mlp.neuron_scores`) one forward pass of the model and one matrix product a layer give
every neuron's score: a magnitude, without sign.

*Targeted* at a metric of the logits, the MLP is read through the gradient ``g`` of the metric in
what it writes. In the activation ``a`` of a neuron that writes ``w_out`` the gradient is then
``s = w_out . g``. Removing the neuron takes its own term from the centroid and from the offset of
the expert that drives the metric, which at a point ``x`` is worth ``s a(x)``; on average::

    score = mean_x s a(x)

in units of the metric; positive if removing the neuron lowers it, and to first order where the
metric is not linear in the logits. One forward and one backward pass give ``s`` for every neuron of
the model. At radius zero this is the neuron's score in `lch_plugin.circuits.scores.attribution`
with zero for reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lch_plugin.adapters.states import evaluating, without_autocast
from lch_plugin.adapters.transformer_lens import (
    LensModel,
    MLPParts,
    as_tokens,
    disagreements,
    locate_mlps,
    mlp_inputs,
    recorded_mlp_inputs,
)
from lch_plugin.centroids import sample_neighbourhood
from lch_plugin.circuits.prompt_batches import Prompts
from lch_plugin.circuits.ranking import place
from lch_plugin.circuits.scores.attribution import metric_gradients
from lch_plugin.cotangents import Metric, Vector, evaluate
from lch_plugin.errors import InputError, SiteError
from lch_plugin.mlp import neuron_scores
from lch_plugin.sites import Linearization, integers

# Points of neighbourhoods that are in memory at once.
_MOST_POINTS = 4096


@dataclass(frozen=True)
class Neuron:
    """One neuron's score and its place among the neurons of its layer.

    Attributes:
        layer: block of its MLP.
        index: which of the layer's ``d_mlp`` neurons.
        score: see `NeuronAttribution`.
        rank: 1 for the layer's highest score.
        percentile: share of the layer's neurons that score lower, in percent.
    """

    layer: int
    index: int
    score: float
    rank: int
    percentile: float


@dataclass(frozen=True)
class NeuronAttribution:
    """Scores of all neurons of some layers.

    Attributes:
        scores: by layer, a float tensor of shape ``(d_mlp,)``. Targeted, in units of the metric and
            positive if removing the neuron lowers it; otherwise a magnitude, zero or more.
        positions: sequence positions at which neurons were removed.
        radius: of the ball around the MLP's input.
        n_samples: points of the ball.
        metric: name of the metric they are targeted at, None if they are not.
    """

    scores: dict[int, Float[Tensor, " d_mlp"]]
    positions: tuple[int, ...]
    radius: float
    n_samples: int
    metric: str | None = None

    def neuron(self, layer: int, index: int) -> Neuron:
        """One neuron, with its rank and percentile.

        Raises:
            SiteError: the layer was not scored or has no such neuron.
        """
        scores = self._of(layer)
        if not 0 <= index < len(scores):
            raise SiteError(f"layer {layer} has neurons 0 to {len(scores) - 1}, not {index}.")
        score = scores[index]
        return Neuron(layer, index, float(score), *place(score, scores))

    def top(
        self,
        n: int,
        layer: int | None = None,
        *,
        by: Literal["score", "magnitude"] = "score",
    ) -> list[Neuron]:
        """The ``n`` neurons that score highest, or of largest magnitude, highest first.

        Args:
            n: how many.
            layer: of which layer; of all if None.
            by: magnitudes differ from scores where these have a sign.
        """
        layers = self.scores if layer is None else {layer: self._of(layer)}
        keys = {i: scores if by == "score" else scores.abs() for i, scores in layers.items()}
        candidates = [
            (float(key[i]), layer, int(i))
            for layer, key in keys.items()
            for i in key.topk(min(n, len(key))).indices
        ]
        return [self.neuron(layer, i) for _, layer, i in sorted(candidates, reverse=True)[:n]]

    def _of(self, layer: int) -> Tensor:
        if layer not in self.scores:
            raise SiteError(f"layer {layer} was not scored; scored were {sorted(self.scores)}.")
        return self.scores[layer]


@without_autocast()
def neuron_attribution(
    model: LensModel,
    tokens: str | Int[Tensor, "*batch pos"],
    layers: int | Sequence[int] | None = None,
    position: int | Sequence[int] | None = -1,
    radius: float = 0.25,
    n_samples: int = 256,
    *,
    centre: bool = False,
    cotangent: Float[Tensor, " d_model"] | None = None,
    metric: Metric | None = None,
    linearization: Linearization = "detached",
    generator: torch.Generator | None = None,
) -> NeuronAttribution:
    """Score every neuron by what removing it takes from the local expert of its MLP.

    Without a metric the score is the paper's: how far the centroids of a neighbourhood move, a
    magnitude, averaged over positions. With one it is signed, in units of the metric, and summed
    over positions (see the head of this module). Over a batch of prompts both are averaged. The
    neighbourhood is uniform in a ball around what the MLP reads (after the layer norm). Radius and
    number of samples are by default the paper's for GPT-2 Large; its code makes one of the samples
    the centre. Hooks that the user has on the model act as in any forward pass.

    Args:
        model: TransformerBridge or HookedTransformer; attached or not makes no difference.
        tokens: a prompt, ``(pos,)`` or ``(batch, pos)`` token ids.
        layers: which blocks, negative counting from the end; all if None.
        position: sequence position or several, negative counting from the end; all if None.
        radius: of the ball, in the norm of the MLP's input space; 0 for the point itself.
        n_samples: points of the ball, for each prompt and position. Untargeted scores are over the
            norm of all ``n_samples`` centroids, so they fall with its square root.
        centre: as `lch_plugin.sample_neighbourhood`; the paper's code has it.
        cotangent: ``v``, shape ``(d_model,)``; all ones if None (the paper's score).
        metric: of the logits, one number a prompt, in the place of a cotangent.
        linearization: of everything between an MLP and the metric, as `node_attribution`.
        generator: source of the randomness, on the model's device.

    Raises:
        InputError: tokens, position, radius, n_samples or cotangent cannot be used; both a
            cotangent and a metric; a metric that gives anything but one finite number a prompt, or
            one that is constant.
        SiteError, VanishingCentroidError: as `lch_plugin.attach`.
    """
    reading = read_neurons(
        model,
        tokens,
        layers,
        position,
        cotangent=cotangent,
        metric=metric,
        linearization=linearization,
        point_alone=radius == 0,
    )
    return reading.attribution(radius, n_samples, generator, centre=centre)


def read_neurons(
    model: LensModel,
    tokens: str | Int[Tensor, "*batch pos"],
    layers: int | Sequence[int] | None,
    position: int | Sequence[int] | None,
    *,
    cotangent: Float[Tensor, " d_model"] | None,
    metric: Metric | None,
    linearization: Linearization,
    point_alone: bool = False,
) -> Reading:
    """Run a model once, for scores at any radius.

    Args:
        model, tokens, layers, position, cotangent, metric, linearization: as `neuron_attribution`.
        point_alone: no radius but zero will be asked for.

    Raises:
        InputError, SiteError, VanishingCentroidError: as `neuron_attribution`.
    """
    mlps = locate_mlps(model, layers)
    if metric is not None and cotangent is not None:
        raise InputError(
            "cotangent and metric are both given, but the gradient of the metric is the cotangent. "
            "Leave one out."
        )
    if cotangent is not None:
        cotangent = evaluate(Vector(cotangent), cotangent.new_empty(1, model.cfg.d_model))
    tokens = as_tokens(model, tokens)
    positions = _positions(position, tokens.shape[-1])
    if metric is None:
        for parts in mlps:
            parts.check_cotangent(cotangent)
    # At the point itself a targeted score takes the model's own activations, and no closed form.
    if metric is None or not point_alone:
        for problem in disagreements(model, mlps).values():
            if problem is not None:
                raise problem
    if metric is None:
        with evaluating(model):
            inputs = [x[:, positions] for x in mlp_inputs(model, tokens, mlps)]
        return Reading(mlps, positions, inputs, cotangent)
    names = [parts.post_activation_name for parts in mlps]
    with recorded_mlp_inputs(mlps) as seen:
        found = metric_gradients(model, Prompts(tokens, metric), names, linearization=linearization)

    def at_positions(value: Tensor) -> Tensor:
        return value.reshape(*tokens.shape, -1)[:, positions]

    return TargetedReading(
        mlps=mlps,
        positions=positions,
        inputs=[at_positions(seen[parts.layer]) for parts in mlps],
        activations=[at_positions(found.activations[name]) for name in names],
        directions=[at_positions(found.gradients[name]) for name in names],
        metric=metric.name,
    )


@dataclass(frozen=True, eq=False)
class Reading:
    """What a pass showed of some MLPs.

    Attributes:
        mlps: which.
        positions: which of the sequence.
        inputs: what each reads there.
        cotangent: as `neuron_attribution`.
        metric: name of the metric that scores are targeted at; None if they are not.
    """

    mlps: list[MLPParts]
    positions: list[int]
    inputs: list[Float[Tensor, "batch pos d_model"]]
    cotangent: Float[Tensor, " d_model"] | None = None
    metric: str | None = None

    def attribution(
        self,
        radius: float,
        n_samples: int,
        generator: torch.Generator | None = None,
        *,
        centre: bool = False,
    ) -> NeuronAttribution:
        """Scores of the neurons; arguments as `neuron_attribution`."""
        n_samples = n_samples if radius else 1
        draw = partial(
            sample_neighbourhood,
            radius=radius,
            n_samples=n_samples,
            centre=centre,
            generator=generator,
        )
        scores = {}
        for i, (parts, x) in enumerate(zip(self.mlps, self.inputs, strict=True)):
            # Points around each row, some rows at a time.
            points = map(draw, x.flatten(0, 1).split(max(1, _MOST_POINTS // max(1, n_samples))))
            scores[parts.layer] = self._scores(i, points, is_point=radius == 0)
        return NeuronAttribution(scores, tuple(self.positions), radius, n_samples, self.metric)

    def _scores(
        self, i: int, points: Iterator[Float[Tensor, "n_samples row d_model"]], *, is_point: bool
    ) -> Float[Tensor, " d_mlp"]:
        """The paper's, of MLP ``i``."""
        weights = self.mlps[i].weights
        return torch.cat([neuron_scores(weights, some, self.cotangent) for some in points]).mean(0)


@dataclass(frozen=True, eq=False, kw_only=True)
class TargetedReading(Reading):
    """What a forward and a backward pass showed of some MLPs.

    Attributes:
        activations: of the neurons of each.
        directions: gradient of the metric in each activation, ``s = w_out . g``.
    """

    activations: list[Float[Tensor, "batch pos d_mlp"]]
    directions: list[Float[Tensor, "batch pos d_mlp"]]

    def _scores(
        self, i: int, points: Iterator[Float[Tensor, "n_samples row d_model"]], *, is_point: bool
    ) -> Float[Tensor, " d_mlp"]:
        """Targeted ones: with the activations' mean over the neighbourhood."""
        held, mlp = self.activations[i], self.mlps[i].weights
        if not is_point:
            with torch.no_grad():
                means = [mlp.activations(mlp.pre_activations(some)).mean(0) for some in points]
            held = torch.cat(means).view_as(held)
        return (self.directions[i] * held).sum(1).mean(0)


def _positions(position: int | Sequence[int] | None, n_pos: int) -> list[int]:
    """As indices from zero, sorted and without repetition."""
    if position is None:
        return list(range(n_pos))
    listed = integers(position)
    if not listed or not all(-n_pos <= i < n_pos for i in listed):
        raise InputError(
            f"position={position!r}: integers from {-n_pos} to {n_pos - 1} are needed for a prompt "
            f"of {n_pos} tokens, at least one; or None for all."
        )
    return sorted({i % n_pos for i in listed})

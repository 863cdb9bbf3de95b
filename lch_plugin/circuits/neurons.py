"""Neuron scores: how far removing each neuron moves the local centroid of its MLP.

The paper (arXiv 2604.11962) finds the neurons of a circuit so, one removal at a time. In closed
form (`lch_plugin.mlp.neuron_scores`) one forward pass of the model and one matrix product a
layer give every neuron's score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lch_plugin.adapters.transformer_lens import (
    LensModel,
    as_tokens,
    disagreements,
    locate_mlps,
    mlp_inputs,
)
from lch_plugin.centroids import sample_neighbourhood
from lch_plugin.cotangents import Vector, evaluate
from lch_plugin.errors import InputError, SiteError
from lch_plugin.mlp import neuron_scores


@dataclass(frozen=True)
class Neuron:
    """One neuron's score and its place among the neurons of its layer.

    Attributes:
        layer: block of its MLP.
        index: which of the layer's ``d_mlp`` neurons.
        score: see `lch_plugin.mlp.neuron_scores`; zero or more.
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
        scores: by layer, a float tensor of shape ``(d_mlp,)``.
        position: sequence position whose centroid the neurons were removed from.
        radius: of the ball around the MLP's input.
        n_samples: points drawn from the ball.
    """

    scores: dict[int, Float[Tensor, " d_mlp"]]
    position: int
    radius: float
    n_samples: int

    def neuron(self, layer: int, index: int) -> Neuron:
        """One neuron, with its rank and percentile.

        Raises:
            SiteError: the layer was not scored or has no such neuron.
        """
        scores = self._of(layer)
        if not 0 <= index < len(scores):
            raise SiteError(f"layer {layer} has neurons 0 to {len(scores) - 1}, not {index}.")
        score = scores[index]
        return Neuron(
            layer=layer,
            index=index,
            score=float(score),
            rank=int((scores > score).sum()) + 1,
            percentile=100 * float((scores < score).double().mean()),
        )

    def top(self, n: int, layer: int | None = None) -> list[Neuron]:
        """The ``n`` neurons of highest score, of one layer or of all, highest first."""
        layers = self.scores if layer is None else {layer: self._of(layer)}
        candidates = [
            (float(scores[i]), layer, int(i))
            for layer, scores in layers.items()
            for i in scores.topk(min(n, len(scores))).indices
        ]
        return [self.neuron(layer, i) for _, layer, i in sorted(candidates, reverse=True)[:n]]

    def _of(self, layer: int) -> Tensor:
        if layer not in self.scores:
            raise SiteError(f"layer {layer} was not scored; scored were {sorted(self.scores)}.")
        return self.scores[layer]


def neuron_attribution(
    model: LensModel,
    tokens: str | Int[Tensor, "*batch pos"],
    layers: int | Sequence[int] | None = None,
    position: int = -1,
    radius: float = 0.25,
    n_samples: int = 256,
    *,
    cotangent: Float[Tensor, " d_model"] | None = None,
    generator: torch.Generator | None = None,
) -> NeuronAttribution:
    """Score every neuron by how far removing it moves the local centroid of its MLP.

    The neighbourhood is uniform in a ball around what the MLP reads at ``position`` (after the
    layer norm). Defaults are the paper's for GPT-2 Large. Over a batch of prompts the scores
    are averaged. Hooks that the user has on the model act as in any forward pass.

    Args:
        model: TransformerBridge or HookedTransformer; attached or not makes no difference.
        tokens: a prompt, ``(pos,)`` or ``(batch, pos)`` token ids.
        layers: which blocks, negative counting from the end; all if None.
        position: sequence position, negative counting from the end.
        radius: of the ball, in the norm of the MLP's input space.
        n_samples: points drawn from the ball, for each prompt.
        cotangent: ``v``, shape ``(d_model,)``; all ones if None (the paper's score).
        generator: source of the randomness, on the model's device.

    Raises:
        InputError: tokens, position, radius, n_samples or cotangent cannot be used.
        SiteError, VanishingCentroidError: as `lch_plugin.attach`.
    """
    mlps = locate_mlps(model, layers)
    if cotangent is not None:
        cotangent = evaluate(Vector(cotangent), cotangent.new_empty(1, model.cfg.d_model))
    tokens = as_tokens(model, tokens)
    n_pos = tokens.shape[-1]
    if not -n_pos <= position < n_pos:
        raise InputError(f"position={position} is outside the prompt's {n_pos} tokens.")
    for parts in mlps:
        parts.check_cotangent(cotangent)
    for problem in disagreements(model, mlps).values():
        if problem is not None:
            raise problem
    scores = {}
    for parts, x in zip(mlps, mlp_inputs(model, tokens, mlps), strict=True):
        samples = sample_neighbourhood(
            x[:, position], radius=radius, n_samples=n_samples, generator=generator
        )
        mlp = parts.weights
        per_prompt = [neuron_scores(mlp, samples[:, i], cotangent) for i in range(len(tokens))]
        scores[parts.layer] = torch.stack(per_prompt).mean(0)
    return NeuronAttribution(scores, position % n_pos, radius, n_samples)

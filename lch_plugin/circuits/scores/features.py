r"""What the features of an SAE on the centroids of an MLP do for a metric.

A decoder row of such an SAE is a direction ``d`` (of unit norm here) of what the MLP reads, past
the norm. Where the feature is active on the MLP's centroid, it stands for the MLP's response to the
component of its input ``x`` along ``d``. With ``mu`` the MLP's targeted centroid, the gradient of
the metric in ``x``, removing it is worth, to the span's affine expert::

    contribution = (mu . d) (d . (x - reference))

in units of the metric: that is what the metric loses when the MLP reads ``x`` without its component
along ``d``, or with that of a corrupt prompt. Directions overlap, so features' contributions do not
add up to the MLP's. The choice of expert is as in `lch_plugin.circuits.scores.attribution`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from lch_plugin.adapters.states import evaluating, without_autocast
from lch_plugin.adapters.transformer_lens import (
    LensModel,
    MLPParts,
    locate_mlps,
    mlp_inputs,
    run_edited,
)
from lch_plugin.circuits.prompt_batches import Prompts, batches_of
from lch_plugin.circuits.ranking import place
from lch_plugin.errors import InputError
from lch_plugin.linearization import DetachedMode
from lch_plugin.mlp import at_least_float32
from lch_plugin.sites import Linearization


@dataclass(frozen=True)
class ScoredFeature:
    """A feature, its score, and its place among the features of its SAE.

    Attributes:
        index: which.
        score: signed, in units of the metric; positive if removing the feature lowers it.
        rank: 1 for the highest score.
        percentile: share of the features that score lower, in percent.
        n_active: tokens that it was active at.
    """

    index: int
    score: float
    rank: int
    percentile: float
    n_active: int


@dataclass(frozen=True, eq=False)
class FeatureScores:
    """A score for every feature of an SAE.

    Attributes:
        hook_name: of the centroids that the SAE reads.
        values: in units of the metric, positive if removing the feature lowers it; 0 of features
            that were never active.
        n_active: tokens each was active at.
    """

    hook_name: str
    values: Float[Tensor, " d_sae"]
    n_active: Int[Tensor, " d_sae"]

    def feature(self, index: int) -> ScoredFeature:
        """One feature, with rank and percentile.

        Raises:
            InputError: there is no such feature.
        """
        if not 0 <= index < len(self.values):
            raise InputError(f"feature {index}: the SAE has features 0 to {len(self.values) - 1}.")
        score = self.values[index]
        n_active = int(self.n_active[index])
        return ScoredFeature(index, float(score), *place(score, self.values), n_active)

    def top(self, n: int, *, by: Literal["score", "magnitude"] = "score") -> list[ScoredFeature]:
        """The ``n`` features that score highest, or of largest magnitude, highest first."""
        key = self.values if by == "score" else self.values.abs()
        return [self.feature(i) for i in key.argsort(descending=True, stable=True)[:n].tolist()]


@dataclass(frozen=True, eq=False)
class ActiveFeatures:
    """What features do on some prompts, position by position.

    Attributes:
        hook_name: of the centroids.
        layer: of the MLP.
        directions: of the features in what the MLP reads, unit vectors.
        feature_acts: activations of the features on the centroids.
        contributions: in units of the metric; 0 where a feature is not active.
    """

    hook_name: str
    layer: int
    directions: Float[Tensor, "d_sae d_in"]
    feature_acts: Float[Tensor, "batch pos d_sae"]
    contributions: Float[Tensor, "batch pos d_sae"]


@without_autocast()
def feature_attribution(
    model: LensModel,
    prompts: Prompts | Iterable[Prompts],
    sae: Any,
    *,
    linearization: Linearization = "detached",
) -> FeatureScores:
    """Score every feature: what removing it, wherever it is active, takes from the metric.

    Three forward passes and one backward pass a batch, and one forward pass of its corrupt twin.

    Args:
        model: TransformerBridge or HookedTransformer. Centroids that nobody has attached are
            attached with the all-ones cotangent for the time being.
        prompts: with corrupt twins, what the MLP reads is compared with the twin's; without, with
            zero.
        sae: of SAELens, on ``blocks.L.mlp.hook_centroid`` by its metadata.
        linearization: of everything between the MLP's input and the metric: ``"detached"`` or
            ``"jacobian"``.

    Returns:
        Scores, averaged over prompts and summed over positions, in units of the metric; on the CPU.

    Raises:
        InputError: no prompts, an SAE that is on no MLP's centroid or of another width, or a
            metric that gives anything but one finite number a prompt or that the MLP does not
            change.
        SiteError, VanishingCentroidError: as `lch_plugin.attach`.
    """
    hook_name, _ = _site(model, sae)
    total = torch.zeros(sae.cfg.d_sae, dtype=torch.float64)
    n_active = torch.zeros(sae.cfg.d_sae, dtype=torch.int64)
    n_prompts = 0
    for batch in batches_of(prompts):
        found = active_features(model, batch, sae, linearization=linearization)
        total += found.contributions.double().sum((0, 1)).cpu()
        n_active += (found.feature_acts != 0).sum((0, 1)).cpu()
        n_prompts += len(batch)
    if not n_prompts:
        raise InputError("there are no prompts to score features on.")
    return FeatureScores(hook_name, (total / n_prompts).float(), n_active)


@without_autocast()
def active_features(
    model: LensModel, batch: Prompts, sae: Any, *, linearization: Linearization = "detached"
) -> ActiveFeatures:
    """What each feature does, position by position; arguments as `feature_attribution`."""
    hook_name, parts = _site(model, sae)
    feature_acts = _feature_acts(model, batch.clean, sae, hook_name)
    x, mu = _targeted_centroid(model, batch, parts, linearization)
    if batch.corrupt is not None:
        with evaluating(model):
            x = x - mlp_inputs(model, batch.corrupt, [parts])[0]
    directions = normalize(sae.W_dec.detach().to(x), dim=-1)
    worth = (mu @ directions.T) * (x @ directions.T)
    return ActiveFeatures(
        hook_name=hook_name,
        layer=parts.layer,
        directions=directions,
        feature_acts=feature_acts.to(x),
        contributions=torch.where(feature_acts.to(x.device) != 0, worth, 0),
    )


def _site(model: LensModel, sae: Any) -> tuple[str, MLPParts]:
    """The centroids that an SAE reads, and the MLP that they are of."""
    from lch_plugin.saes.evaluation.sae_inputs import check_dictionary
    from lch_plugin.saes.sources.hook_points import site_of

    check_dictionary(sae)
    hook_name = str(sae.cfg.metadata.hook_name)
    site = site_of(hook_name)
    if site is None or site.kind != "mlp":
        raise InputError(
            f"the SAE reads {hook_name!r}. Its features are directions of an MLP's input only if "
            "it reads that MLP's centroids, as 'blocks.2.mlp.hook_centroid'."
        )
    (parts,) = locate_mlps(model, site.layers)
    d_in = parts.weights.W_in.shape[0]
    if sae.cfg.d_in != d_in:
        raise InputError(
            f"the SAE reads {sae.cfg.d_in} numbers and the MLP at layer {parts.layer} of this model"
            f" {d_in}: it was trained on another model."
        )
    return hook_name, parts


def _feature_acts(
    model: LensModel, tokens: Int[Tensor, "batch pos"], sae: Any, hook_name: str
) -> Float[Tensor, "batch pos d_sae"]:
    """Activations of the features on the centroids."""
    from lch_plugin.saes.sources.hook_points import attached

    seen: dict[str, Tensor] = {}
    with evaluating(model), attached(model, [hook_name]), torch.no_grad():
        run_edited(model, tokens, {hook_name: partial(seen.__setitem__, hook_name)})
        feature_acts: Tensor = sae.encode(seen[hook_name].to(sae.device, sae.dtype))
    return feature_acts


def _targeted_centroid(
    model: LensModel, batch: Prompts, parts: MLPParts, linearization: Linearization
) -> tuple[Float[Tensor, "batch pos d_in"], Float[Tensor, "batch pos d_in"]]:
    """What an MLP reads, and the gradient of the metric there."""
    mode = DetachedMode() if linearization == "detached" else None
    seen: list[Tensor] = []

    def start(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        seen.append(leaf)
        return leaf if mode is None else mode.follow(leaf)

    gate = parts.input_gate
    gate.install(lambda: True, start)
    try:
        with evaluating(model), torch.inference_mode(False), torch.enable_grad():
            with nullcontext() if mode is None else mode:
                logits = run_edited(model, batch.clean, {})
            # Outside: the metric is differentiated as it is.
            metric = batch.measure(logits)
            if not metric.requires_grad:
                raise InputError(
                    f"metric {batch.metric.name!r} is constant in what the MLP at layer "
                    f"{parts.layer} does."
                )
            (leaf,) = seen
            (mu,) = torch.autograd.grad(metric.sum(), leaf, materialize_grads=True)
    finally:
        gate.remove()
    shape = (*batch.clean.shape, -1)
    wide = at_least_float32(mu)
    return leaf.detach().to(wide).reshape(shape), mu.to(wide).reshape(shape)

"""Figures of one SAE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from lch_plugin.errors import InputError
from lch_plugin.figures import CENTROIDS, GREY, new_figure
from lch_plugin.saes.evaluation.evaluate import DENSE, Evaluation
from lch_plugin.saes.evaluation.functional import EXACT, MEAN, ResponseFit
from lch_plugin.steering import SteeringEffects

_BASELINES: dict[str, Any] = {
    EXACT: {"color": "black", "marker": "s"},
    MEAN: {"color": GREY, "marker": "^"},
}
_SOLID = ListedColormap([CENTROIDS])


def density_histogram(evaluation: Evaluation) -> Figure:
    """Features of an SAE by the share of rows they fire on."""
    figure, (axis,) = new_figure(6.0, 2.8)
    counts, edges = evaluation.density_histogram
    axis.stairs(counts, 10**edges, fill=True, color=CENTROIDS)
    axis.axvline(DENSE, color="black", linewidth=0.8, linestyle="--")
    axis.set(xscale="log", xlabel="share of rows a feature fires on", ylabel="features")
    axis.set_title(
        f"{evaluation.n_fired} of {len(evaluation.density)} features fire, "
        f"{evaluation.n_dense} of them on more than {DENSE:.0%} of rows",
        fontsize=10,
    )
    return figure


def response_fits(fits: Sequence[ResponseFit]) -> Figure:
    """R² of predicted responses by size of the perturbation, one panel a kind of perturbation.

    Predictions worse than the mean response are shown at the lower edge.
    """
    kinds = list(dict.fromkeys(fit.perturbation for fit in fits))
    titles = {"isotropic": "Random directions", "data": "Towards other tokens' inputs"}
    figure, axes = new_figure(7.5, 3.0, columns=len(kinds))
    for axis, kind in zip(axes, kinds, strict=True):
        chosen = [fit for fit in fits if fit.perturbation == kind]
        ticks = ["first order" if fit.size is None else f"{fit.size:g}" for fit in chosen]
        for name in chosen[0].r_squared:
            values = [max(fit.r_squared[name], -0.1) for fit in chosen]
            style = _BASELINES.get(name, {"color": CENTROIDS, "marker": "o"})
            axis.plot(range(len(chosen)), values, label=name, markersize=4, **style)
        axis.set_xticks(range(len(chosen)), ticks)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xlabel="perturbation / norm of the input", ylim=(-0.12, 1.03))
        axis.set_title(titles[kind], fontsize=10)
    axes[0].set_ylabel("R² of predicted responses")
    axes[-1].legend(frameon=False, fontsize=8, loc="center left")
    return figure


def steering(effects: SteeringEffects) -> Figure:
    """KL divergence by strength: a line for each direction, and the range of the random ones."""
    figure, (axis,) = new_figure(6.0, 3.2)
    order = sorted(range(len(effects.strengths)), key=effects.strengths.__getitem__)
    x = [effects.strengths[i] for i in order]
    random = effects.random_kl.mean(-1)[:, order]
    label = f"{len(random)} random directions: range and median"
    axis.fill_between(x, random.amin(0), random.amax(0), color=GREY, alpha=0.4, linewidth=0)
    axis.plot(x, random.quantile(0.5, dim=0), color="#4b5563", linewidth=1.2, label=label)
    for i, kl in enumerate(effects.kl.mean(-1)[:, order]):
        label = "" if i else f"{len(effects.kl)} features"
        axis.plot(x, kl, color=CENTROIDS, marker="o", markersize=3, lw=0.8, alpha=0.8, label=label)
    # Strengths may be negative or zero; effects at zero are zero.
    axis.set(xscale="log" if min(x) > 0 else "linear", yscale="log")
    axis.set(xlabel="norm of what is added / mean norm of the input")
    axis.set_ylabel("KL(clean || steered), nats")
    axis.legend(frameon=False, fontsize=8)
    return figure


def patches_by_feature(
    images: Float[Tensor, "n channel height width"],
    activations: Float[Tensor, "n_patches_of_all d_sae"],
    features: Sequence[int] | None = None,
    *,
    n_features: int = 10,
    n_images: int = 8,
) -> Figure:
    """The images, and the patches in them, in which features of a vision SAE are most active.

    One row a feature, strongest image first.

    Args:
        images: as the model reads them.
        activations: of each feature at each patch of each image, patches in reading order.
        features: which; those that are active at most in the most images if None.
        n_features: how many, if they are to be chosen.
        n_images: shown for each.

    Raises:
        InputError: activations that are no square grid of patches for each image.
    """
    side = math.isqrt(len(activations) // len(images))
    if side * side * len(images) != len(activations):
        raise InputError(
            f"{len(activations)} rows of activations are no square grid of patches for each of "
            f"{len(images)} images. Leave the CLS token out: positions=slice(1, None)."
        )
    images, activations = (t.detach().float().cpu() for t in (images, activations))
    maps = activations.unflatten(0, (len(images), side, side)).movedim(-1, 0)
    peaks = maps.amax((-1, -2))
    if features is None:
        features = (peaks > 0).sum(1).topk(min(n_features, len(maps))).indices.tolist()
    # Pixels to [0, 1], whatever they were normalised to; colour as the mean of channels, so that
    # the overlay can be told from it.
    grey = images.mean(1)
    grey = (grey - grey.amin((1, 2), True)) / (
        grey.amax((1, 2), True) - grey.amin((1, 2), True)
    ).clamp_min(1e-6)
    figure, axes = new_figure(0.9 * n_images, 0.95 * len(features), n_images, len(features))
    for row, feature in enumerate(features):
        strongest = peaks[feature].topk(min(n_images, len(images))).indices.tolist()
        for column in range(n_images):
            axis = axes[row * n_images + column]
            axis.set_axis_off()
            if column >= len(strongest):
                continue
            image = strongest[column]
            size = grey.shape[-2:]
            # Ink on paper where there is one channel, photographs as they are.
            if images.shape[1] == 1:
                axis.imshow(grey[image], cmap="Greys", vmin=0, vmax=1.5)
            else:
                axis.imshow(grey[image], cmap="gray", vmin=-0.5, vmax=1)
            heat = (maps[feature, image] / peaks[feature].amax().clamp_min(1e-12)).clamp(0, 1)
            heat = heat.repeat_interleave(size[0] // side, 0).repeat_interleave(size[1] // side, 1)
            axis.imshow(heat.new_ones(*heat.shape), cmap=_SOLID, alpha=0.75 * heat.numpy())
            if column == 0:
                axis.set_title(f"{feature}", fontsize=7, loc="left", pad=2)
    return figure

"""Figures of the reports. Each function returns a matplotlib figure and writes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from lch_plugin.circuits import AblationCheck, NeuronAttribution

CENTROIDS, ACTIVATIONS, GREY = "#c2410c", "#1d4ed8", "#9ca3af"


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Any]]:
    # Figure, not pyplot: nothing global, no display, and no figure kept open.
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def centroids_by_layer(norms: Sequence[float], alignments: Sequence[float]) -> Figure:
    """Mean centroid norm, and mean cosine with the MLP's input, by layer."""
    figure, (left, right) = _figure(7.5, 2.6, columns=2)
    layers = range(len(norms))
    left.bar(layers, norms, color=CENTROIDS, width=0.6)
    left.set(xlabel="layer", ylabel="mean norm", title="Centroid norm", xticks=layers)
    right.bar(layers, alignments, color=CENTROIDS, width=0.6)
    right.axhline(0, color="black", linewidth=0.8)
    right.set(xlabel="layer", ylabel="mean cosine", title="Alignment with the MLP's input")
    right.set_xticks(layers)
    return figure


def firing_frequencies(
    densities: Mapping[str, Float[Tensor, " d_sae"]], colours: Mapping[str, str]
) -> Figure:
    """Share of tokens each feature fires on, features sorted, one curve an SAE."""
    figure, (axis,) = _figure(6.0, 3.0)
    for name, density in densities.items():
        alive = density[density > 0].sort(descending=True).values
        label = f"{name}: {len(alive)} of {len(density)} features fire"
        axis.plot(range(1, len(alive) + 1), alive, color=colours[name], label=label)
    axis.set(yscale="log", xlabel="feature, by frequency", ylabel="share of tokens", title="Firing")
    axis.legend(frameon=False, fontsize=8)
    return figure


def neuron_scores(attribution: NeuronAttribution, n_named: int = 3) -> Figure:
    """Every neuron's score by layer, the highest of each layer named."""
    figure, (axis,) = _figure(7.5, 3.4)
    for x, (layer, scores) in enumerate(attribution.scores.items()):
        # Neurons spread across the column in the order of their index.
        positions = [x - 0.35 + 0.7 * j / len(scores) for j in range(len(scores))]
        axis.scatter(positions, scores, s=4, color=GREY, linewidths=0)
        top = attribution.top(n_named, layer=layer)
        axis.scatter(
            [positions[n.index] for n in top], [n.score for n in top], s=14, color=CENTROIDS
        )
        for neuron in top:
            axis.annotate(
                str(neuron.index),
                (positions[neuron.index], neuron.score),
                xytext=(3, 3),
                textcoords="offset points",
                fontsize=7,
            )
    highest = max(float(scores.max()) for scores in attribution.scores.values())
    axis.set(
        yscale="log",
        # Neurons that hardly take part reach down to rounding; they need no room.
        ylim=(highest * 1e-7, highest * 4),
        xlabel="layer (neurons by index within)",
        ylabel="score",
        title="How far removing each neuron moves the local centroid of its MLP",
    )
    axis.set_xticks(range(len(attribution.scores)), [str(i) for i in attribution.scores])
    return figure


def ablation_effects(checks: Mapping[str, AblationCheck]) -> Figure:
    """Effect of removing the top neurons beside that of each random set."""
    figure, (axis,) = _figure(7.5, 0.9 + 0.28 * len(checks))
    for y, check in enumerate(checks.values()):
        effects = check.random_effects
        axis.scatter(effects, [y] * len(effects), s=12, color=GREY, alpha=0.6, linewidths=0)
        axis.scatter([check.effect], [y], s=42, color=CENTROIDS, marker="D", zorder=3)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(checks)), list(checks))
    axis.invert_yaxis()
    axis.set(
        xlabel="fall of the logit difference when removed (logits)",
        title="Top neurons (diamonds), random sets (dots)",
    )
    return figure

"""Figures of the demonstration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from lch_plugin.figures import CENTROIDS, new_figure


def centroids_by_layer(norms: Sequence[float], alignments: Sequence[float]) -> Figure:
    """Mean centroid norm, and mean cosine with the MLP's input, by layer."""
    figure, (left, right) = new_figure(7.5, 2.6, columns=2)
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
    figure, (axis,) = new_figure(6.0, 3.0)
    for name, density in densities.items():
        alive = density[density > 0].sort(descending=True).values
        label = f"{name}: {len(alive)} of {len(density)} features fire"
        axis.plot(range(1, len(alive) + 1), alive, color=colours[name], label=label)
    axis.set(yscale="log", xlabel="feature, by frequency", ylabel="share of tokens", title="Firing")
    axis.legend(frameon=False, fontsize=8)
    return figure

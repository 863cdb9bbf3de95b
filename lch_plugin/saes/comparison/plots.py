"""Figures of SAEs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from lch_plugin.figures import ACTIVATIONS, CENTROIDS, new_figure

#: Colour of what SAEs are trained on: centroids of a component, what it reads, what it writes.
VALUES = {"centroid": CENTROIDS, "input": ACTIVATIONS, "output": "#047857"}
_PANELS_A_ROW = 3


def firing_by_k(
    densities: Mapping[int, Mapping[str, Sequence[Float[Tensor, " d_sae"]]]],
) -> Figure:
    """Share of rows each feature fires on, features sorted, one curve an SAE and one panel a k.

    Args:
        densities: by k, then by a key of `VALUES`, of SAEs of several seeds.
    """
    figure, axes = new_figure(10.4, 2.8, columns=len(densities))
    lowest = 1.0
    for axis, (k, by_site) in zip(axes, densities.items(), strict=True):
        for site, seeds in by_site.items():
            for i, density in enumerate(seeds):
                fired = density[density > 0].sort(descending=True).values
                lowest = min([lowest, *fired[-1:].tolist()])
                label = site if i == 0 else None
                axis.plot(range(1, len(fired) + 1), fired, color=VALUES[site], lw=1, label=label)
        axis.set(yscale="log", xlabel="feature, by frequency", title=f"k = {k}")
    for axis in axes:
        axis.set_ylim(lowest / 2, 1.2)
    axes[0].set_ylabel("share of held-out rows")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def scores_by_k(
    panels: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]],
    levels: Mapping[str, Mapping[str, float]] | None = None,
) -> Figure:
    """Scores of SAEs by k: a dot a seed, a line through the means.

    Args:
        panels: by title, then by a key of `VALUES`, then by k.
        levels: by title and key of `VALUES`, the score of the values themselves (dashed).
    """
    columns = min(_PANELS_A_ROW, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(3.4 * columns, 2.9 * rows, columns, rows)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, by_site) in zip(axes, panels.items(), strict=False):
        for i, (site, by_k) in enumerate(by_site.items()):
            shift = 1 + 0.03 * (i - (len(by_site) - 1) / 2)  # So that no site hides another.
            xs = [k * shift for k in by_k]
            means = [sum(values) / len(values) for values in by_k.values()]
            axis.plot(xs, means, color=VALUES[site], marker="o", ms=4, label=site)
            for x, values in zip(xs, by_k.values(), strict=True):
                axis.scatter([x] * len(values), values, s=9, color=VALUES[site], alpha=0.45, lw=0)
        for site, level in (levels or {}).get(title, {}).items():
            axis.axhline(level, color=VALUES[site], linestyle="--", linewidth=1)
        ks = list(next(iter(by_site.values())))
        axis.set_xscale("log", base=2)
        axis.set_xticks(ks, map(str, ks))
        axis.set(xlabel="k", title=title)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return figure

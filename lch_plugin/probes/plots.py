"""Figures of a report on probes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lch_plugin.figures import ACTIVATIONS, CENTROIDS, GREY, new_figure

# Colour and line by part: outputs are activations too.
_LOOKS = {"centroid": (CENTROIDS, "-"), "input": (ACTIVATIONS, "-"), "output": (ACTIVATIONS, "--")}


#: What a measure is called, by its name in `MEASURES`.
NAMES = {"accuracy": "accuracy", "auroc": "area under the ROC curve"}


def by_layer(results: Sequence[dict[str, Any]], measure: str) -> Figure:
    """One probe on the sets' own tests and on others, by layer and part, with the controls."""
    return _curves(results, measure, "layer", log=False)


def by_k(results: Sequence[dict[str, Any]], measure: str) -> Figure:
    """The same against the number of coordinates: by part, a row of panels for each layer."""
    return _curves(results, measure, "k", log=True)


def matrices(
    results: Sequence[dict[str, Any]], measure: str, train: Sequence[str], test: Sequence[str]
) -> Figure:
    """Generalisation matrices, mean over seeds: a panel for each layer, component and part."""
    n_train, n_test = len(train), len(test)
    rows = len(results) // 3
    width, height = 3 * (0.42 * n_test + 0.4) + 2.4, rows * (0.42 * n_train + 0.5) + 1.8
    figure, axes = new_figure(width, height, columns=3, rows=rows)
    for i, (axis, one) in enumerate(zip(axes, results, strict=True)):
        values = 100 * np.array(one[measure]["probe"]).mean(0)
        axis.imshow(values, vmin=0, vmax=100, cmap="PuOr")
        axis.grid(False)
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if abs(value - 50) > 35 else "black"
            axis.text(
                column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour
            )
        axis.set_title(f"{one['component']} {one['part']}, layer {one['layer']}", fontsize=9)
        axis.set_yticks(range(n_train), train if i % 3 == 0 else [""] * n_train, fontsize=7)
        is_lowest = i >= len(results) - 3
        axis.set_xticks(
            range(n_test), test if is_lowest else [""] * n_test, rotation=90, fontsize=7
        )
    figure.supylabel("trained on", fontsize=9)
    figure.supxlabel(f"tested on ({NAMES[measure]}, %; on itself: its held-out fifth)", fontsize=9)
    return figure


def _curves(results: Sequence[dict[str, Any]], measure: str, axis: str, *, log: bool) -> Figure:
    wheres = [w for w in ("own", "others") if results[0]["summary"][w] is not None]
    # A figure of layers has a row of panels a component; one of k has one a layer, too.
    groups = sorted({(r["component"], r["layer"] if log else -1) for r in results})
    figure, axes = new_figure(4.4 * len(wheres), 2.9 * len(groups) + 0.4, len(wheres), len(groups))
    for i, (component, layer) in enumerate(groups):
        for j, where in enumerate(wheres):
            panel = axes[i * len(wheres) + j]
            for part, (colour, line) in _LOOKS.items():
                chosen = [
                    r
                    for r in results
                    if (r["component"], r["part"]) == (component, part)
                    and layer in (r["layer"], -1)
                ]
                x = [r[axis] for r in chosen]
                summaries = [r["summary"][where][measure] for r in chosen]
                found = [summary["probe"] for summary in summaries]
                mean, low, high = (np.array([100 * f[n] for f in found]) for n in found[0])
                panel.plot(x, mean, line, color=colour, marker="o", markersize=3, label=part)
                panel.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
                control = [100 * summary["control"]["mean"] for summary in summaries]
                label = "shuffled labels" if part == "output" else None
                panel.plot(x, control, line, color=GREY, linewidth=1, label=label)
            at = f", layer {layer}" if log else ""
            tested = "own held-out fifth" if where == "own" else "other sets"
            panel.set_title(f"{component}{at}: {tested}", fontsize=9)
            panel.set_xlabel("coordinates k" if log else "layer")
            panel.set_ylabel(f"{NAMES[measure]}, %")
            if log:
                panel.set_xscale("log", base=2)
            else:
                panel.set_xticks(sorted({r["layer"] for r in results}))
    axes[0].legend(fontsize=7, frameon=False)
    figure.suptitle(results[0]["probe"], fontsize=10)
    return figure

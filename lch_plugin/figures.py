"""How every figure of the reports looks. Functions that make one write nothing."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

CENTROIDS, ACTIVATIONS, GREY = "#c2410c", "#1d4ed8", "#9ca3af"


def new_figure(
    width: float, height: float, columns: int = 1, rows: int = 1
) -> tuple[Figure, list[Any]]:
    # Figure, not pyplot: nothing global, no display, and no figure kept open.
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axes

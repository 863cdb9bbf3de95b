"""Coloured tokens and pixels, and curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from lch_plugin.figures import ACTIVATIONS, CENTROIDS, GREY, new_figure
from lch_plugin.saliency.image_maps import clipped

_FOR, _AGAINST = (194, 65, 12), (29, 78, 216)
# Ours are warm and filled, others cold and hollow; each has a marker of its own.
_WARM = (CENTROIDS, "#f59e0b", "#7c2d12")
_COLD = (ACTIVATIONS, "#0891b2", "#6d28d9", "#111827", GREY)
_MARKERS = "os^DvPX<>"


def coloured(tokens: Sequence[str], scores: Sequence[float]) -> str:
    """Tokens as HTML: orange speaks for the answer, blue against it, each with its score."""
    top = max(map(abs, scores), default=0.0) or 1.0
    spans = []
    for token, score in zip(tokens, scores, strict=True):
        red, green, blue = _FOR if score >= 0 else _AGAINST
        colour = f"rgba({red},{green},{blue},{0.6 * abs(score) / top:.3f})"
        text = escape(token).replace("\n", "↵")
        spans.append(
            f'<span title="{score:.4g}" style="background:{colour};padding:.1em 0;'
            f'white-space:pre-wrap">{text}</span>'
        )
    return f'<p class="tokens" style="font-family:ui-monospace,monospace">{"".join(spans)}</p>'


def token_bars(tokens: Sequence[str], scores: Mapping[str, Sequence[float]]) -> Figure:
    """One panel a method: a bar a token, in shares of the largest magnitude."""
    columns, rows = _grid(len(scores), 4)
    height = rows * (0.7 + 0.25 * len(tokens))
    figure, axes = new_figure(2.6 * columns, height, columns=columns, rows=rows)
    places = range(len(tokens))
    for axis in axes[len(scores) :]:
        axis.set_axis_off()
    for i, (axis, (name, values)) in enumerate(zip(axes, scores.items(), strict=False)):
        top = max(map(abs, values)) or 1.0
        shares = [value / top for value in values]
        axis.barh(places, shares, color=[CENTROIDS if v >= 0 else ACTIVATIONS for v in values])
        # A dollar sign would begin mathematics.
        shown = [repr(token)[1:-1].replace("$", r"\$") for token in tokens]
        axis.set_yticks(places, shown if i % columns == 0 else [])
        axis.invert_yaxis()
        axis.set_title(name, fontsize=9)
    return figure


def pixel_maps(
    image: Float[Tensor, "channel height width"], maps: Mapping[str, Float[Tensor, "height width"]]
) -> Figure:
    """The image, and one panel a map over it: orange speaks for the class, blue against it.

    Colour is in units of the 99th percentile of the magnitudes of each map.
    """
    low, high = image.min(), image.max()
    shown = ((image - low) / (high - low)).float().cpu()
    shown = shown[:3] if len(shown) >= 3 else shown[:1].expand(3, -1, -1)
    shown = shown.permute(1, 2, 0)
    pale = shown.mean(-1, keepdim=True).expand(-1, -1, 3) * 0.35 + 0.65
    colours = [torch.tensor(to_rgb(colour)) for colour in (ACTIVATIONS, CENTROIDS)]
    columns, rows = _grid(1 + len(maps), 3)
    figure, axes = new_figure(2.4 * columns, 2.6 * rows, columns=columns, rows=rows)
    for axis in axes:
        axis.set_axis_off()
    axes[0].imshow(shown.numpy())
    axes[0].set_title("image", fontsize=9)
    for axis, (name, scores) in zip(axes[1:], maps.items(), strict=False):
        strength = clipped(scores[None].float().cpu(), 99.0)[0, :, :, None]
        colour = torch.where(strength >= 0, colours[1], colours[0])
        axis.imshow(torch.lerp(pale, colour, strength.abs()).numpy())
        axis.set_title(name, fontsize=9)
    return figure


def curve_figure(judged: Mapping[str, Mapping[str, Any]], unit: str, what: str) -> Figure:
    """Deletion and insertion, a line a method, its area in the legend and the best one first.

    Methods that give the same curve are one line with all their names.
    """
    kinds = {"deletion": 1.0, "insertion": -1.0}  # Low is good, and high.
    warm, cold = iter(_WARM), iter(_COLD)
    styles = {
        name: (next(warm if "centroid" in name else cold, GREY), marker)
        for name, marker in zip(judged, _MARKERS, strict=False)
    }
    figure, axes = new_figure(10.0, 4.2 + 0.16 * len(judged), columns=2)
    for axis, (kind, sign) in zip(axes, kinds.items(), strict=True):
        lines: dict[tuple[float, ...], list[str]] = {}
        for name, found in judged.items():
            lines.setdefault(tuple(found[kind]), []).append(name)
        best = sorted(lines.items(), key=lambda line: sign * judged[line[1][0]][f"{kind}_area"])
        for curve, names in best:
            found, (colour, marker) = judged[names[0]], styles[names[0]]
            label = f"{found[f'{kind}_area']:.3g}  {' = '.join(names)}"
            ours = "centroid" in names[0]
            axis.plot(
                found["counts"],
                curve,
                "-" if ours else "--",
                color=colour,
                marker=marker,
                markersize=4.5,
                markevery=max(1, len(curve) // 10),
                markerfacecolor=colour if ours else "white",
                linewidth=1.8 if ours else 1.2,
                label=label,
            )
        axis.set_xlabel(f"{what} replaced" if kind == "deletion" else f"{what} put back")
        axis.set_title(f"{kind}: {'low' if sign > 0 else 'high'} is good", fontsize=10)
        axis.legend(
            fontsize=8,
            frameon=False,
            loc="upper left",
            bbox_to_anchor=(0.0, -0.16),
            title=f"area in {unit}, the best first",
            title_fontsize=8,
            alignment="left",
        )
    axes[0].set_ylabel(unit)
    return figure


def _grid(n: int, columns: int) -> tuple[int, int]:
    columns = min(n, columns)
    return columns, math.ceil(n / columns)

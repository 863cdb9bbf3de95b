"""Coloured tokens and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from lch_plugin.figures import ACTIVATIONS, CENTROIDS, GREY, new_figure

_FOR, _AGAINST = (194, 65, 12), (29, 78, 216)


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
    figure, axes = new_figure(2.2 * len(scores), 1.2 + 0.25 * len(tokens), columns=len(scores))
    places = range(len(tokens))
    for axis, (name, values) in zip(axes, scores.items(), strict=True):
        top = max(map(abs, values)) or 1.0
        shares = [value / top for value in values]
        axis.barh(places, shares, color=[CENTROIDS if v >= 0 else ACTIVATIONS for v in values])
        # A dollar sign would begin mathematics.
        shown = [repr(token)[1:-1].replace("$", r"\$") for token in tokens]
        axis.set_yticks(places, shown if axis is axes[0] else [])
        axis.invert_yaxis()
        axis.set_title(name, fontsize=9)
    return figure


def curve_figure(judged: Mapping[str, Mapping[str, Any]], unit: str) -> Figure:
    """Deletion and insertion, a line a method."""
    figure, axes = new_figure(10.0, 3.8, columns=2)
    styles = ("-", "--", "-.", ":")
    for axis, kind in zip(axes, ("deletion", "insertion"), strict=True):
        for i, (name, found) in enumerate(judged.items()):
            colour = CENTROIDS if "centroid" in name else GREY
            axis.plot(found[kind], styles[i % 4], color=colour, label=name)
        axis.set_xlabel("tokens replaced" if kind == "deletion" else "tokens put back")
        axis.set_title(kind)
    axes[0].set_ylabel(unit)
    axes[1].legend(fontsize=7)
    return figure

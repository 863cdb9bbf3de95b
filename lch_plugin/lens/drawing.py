"""Readings as pictures: a heat map of one token, and the same as a table for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import torch
from jaxtyping import Float
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from lch_plugin.figures import ACTIVATIONS, CENTROIDS, new_figure

_RAISES, _LOWERS = "194, 65, 12", "29, 78, 216"  # As `lch_plugin.figures` has them.


def heat_map(
    parts: Float[Tensor, "layer pos"],
    rest: Float[Tensor, " layer"],
    layers: Sequence[int],
    prompt: Sequence[str],
    title: str,
) -> Figure:
    """What each cell adds to a token's logit; layers upwards, positions from left to right.

    The last column is the rest: of the frozen model, what biases add.
    """
    parts = torch.cat([parts, rest[:, None]], 1)
    width = min(16.0, 2.5 + 0.42 * len(prompt))
    figure, (axis,) = new_figure(width, min(12.0, 2 + 0.16 * len(layers)))
    most = float(parts.abs().max()) or 1.0
    colours = LinearSegmentedColormap.from_list("signed", [ACTIVATIONS, "white", CENTROIDS])
    image = axis.imshow(
        parts.numpy(), origin="lower", aspect="auto", cmap=colours, vmin=-most, vmax=most
    )
    # A dollar begins mathematics.
    names = [*(_shown(t).replace("$", r"\$") for t in prompt), "[rest]"]
    axis.axvline(len(prompt) - 0.5, color="black", linewidth=0.6)
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right")
    step = 1 + len(layers) // 16
    axis.set_yticks(range(0, len(layers), step), [str(i) for i in layers[::step]])
    axis.set_ylabel("layer")
    axis.set_title(title, fontsize=10, loc="left")
    axis.grid(visible=False)
    figure.colorbar(image, ax=axis, label="adds to the logit")
    return figure


def heat_table(
    parts: Float[Tensor, "layer pos"],
    offset: Float[Tensor, " layer"],
    layers: Sequence[int],
    prompt: Sequence[str],
    caption: str,
) -> str:
    """The same as an HTML table that needs no script; the last layer on top."""
    most = float(parts.abs().max()) or 1.0

    def cell(value: float) -> str:
        rgb = _RAISES if value > 0 else _LOWERS
        return (
            f'<td style="background:rgba({rgb},{0.7 * min(1.0, abs(value) / most):.2f});'
            f'text-align:right">{value:.2f}</td>'
        )

    head = "".join(f"<th>{escape(_shown(t))}</th>" for t in prompt)
    rows = [
        f"<tr><th>{layers[i]}</th>{''.join(map(cell, parts[i].tolist()))}"
        f"<td>{float(offset[i]):.2f}</td></tr>"
        for i in reversed(range(len(layers)))
    ]
    return (
        f"<table><caption>{escape(caption)}</caption><thead><tr><th>layer</th>{head}"
        f"<th>offset</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _shown(token: str) -> str:
    """A token's text on one line."""
    text = token.replace("\n", "\\n").replace("\t", "\\t")
    return text if text.strip() else "␣" * max(1, len(text))

"""Readings and flows as pictures: heat maps of one token, and the same as tables for notebooks."""

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
_COLOURS = LinearSegmentedColormap.from_list("signed", [ACTIVATIONS, "white", CENTROIDS])


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
    image = axis.imshow(
        parts.numpy(), origin="lower", aspect="auto", cmap=_COLOURS, vmin=-most, vmax=most
    )
    names = [*map(_plain, prompt), "[rest]"]
    axis.axvline(len(prompt) - 0.5, color="black", linewidth=0.6)
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right")
    step = 1 + len(layers) // 16
    axis.set_yticks(range(0, len(layers), step), [str(i) for i in layers[::step]])
    axis.set_ylabel("layer")
    axis.set_title(title, fontsize=10, loc="left")
    axis.grid(visible=False)
    figure.colorbar(image, ax=axis, label="adds to the logit")
    return figure


def flow_map(
    parts: Float[Tensor, "layer pos"],
    biases: Float[Tensor, " layer"],
    layers: Sequence[str],
    prompt: Sequence[str],
    title: str,
) -> Figure:
    """What each layer writes of each prompt token; tokens downwards, layers from left to right.

    The last row is the biases. Bars are the sums over layers: what each token is in the logit.
    """
    parts = torch.cat([parts.T, biases[None]])
    names = [*map(_plain, prompt), "[biases]"]
    height, width = min(40.0, 1.6 + 0.24 * len(names)), 6.4 + 0.2 * len(layers)
    figure, (axis, bars) = new_figure(min(16.0, width), height, 2)
    axis.get_gridspec().set_width_ratios([3, 1])
    most = float(parts.abs().max()) or 1.0
    image = axis.imshow(parts.numpy(), aspect="auto", cmap=_COLOURS, vmin=-most, vmax=most)
    axis.axhline(len(prompt) - 0.5, color="black", linewidth=0.6)
    step = 1 + len(names) // 160
    axis.set_yticks(range(0, len(names), step), names[::step])
    at = [0, *range(1, len(layers) - 1, 1 + len(layers) // 16), len(layers) - 1]
    axis.set_xticks(at, [layers[i] for i in at], rotation=60, ha="right", rotation_mode="anchor")
    axis.set_xlabel("written by")
    axis.set_title(title, fontsize=10, loc="left")
    axis.grid(visible=False)
    figure.colorbar(image, ax=axis, label="in the logit")
    sums = parts.sum(1).tolist()
    bars.barh(range(len(names)), sums, color=[CENTROIDS if x > 0 else ACTIVATIONS for x in sums])
    bars.set_ylim(axis.get_ylim())
    bars.set_yticks([])
    bars.axvline(0, color="black", linewidth=0.6)
    bars.set_xlabel("all layers")
    return figure


def heat_table(
    parts: Float[Tensor, "layer pos"],
    offset: Float[Tensor, " layer"],
    layers: Sequence[int],
    prompt: Sequence[str],
    caption: str,
) -> str:
    """The same as `heat_map` as an HTML table that needs no script; the last layer on top."""
    most = float(parts.abs().max()) or 1.0
    rows = [
        _row(str(layers[i]), parts[i].tolist(), most, [float(offset[i])])
        for i in reversed(range(len(layers)))
    ]
    return _table(caption, ["layer", *map(_shown, prompt), "offset"], rows)


def flow_table(
    parts: Float[Tensor, "layer pos"],
    biases: Float[Tensor, " layer"],
    layers: Sequence[str],
    prompt: Sequence[str],
    caption: str,
) -> str:
    """The same as `flow_map` as an HTML table that needs no script, with the sums."""
    parts = torch.cat([parts.T, biases[None]])
    most = float(parts.abs().max()) or 1.0
    names = [*map(_shown, prompt), "[biases]"]
    rows = [
        _row(name, row.tolist(), most, [float(row.sum())])
        for name, row in zip(names, parts, strict=True)
    ]
    sums = [*parts.sum(0).tolist(), float(parts.sum())]
    return _table(caption, ["", *layers, "sum"], [*rows, _row("sum", [], most, sums)])


def _table(caption: str, head: Sequence[str], rows: Sequence[str]) -> str:
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    return (
        f"<table><caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _row(name: str, values: Sequence[float], most: float, plain: Sequence[float]) -> str:
    """A row with colours by value, and some numbers without."""

    def cell(value: float) -> str:
        rgb = _RAISES if value > 0 else _LOWERS
        return (
            f'<td style="background:rgba({rgb},{0.7 * min(1.0, abs(value) / most):.2f});'
            f'text-align:right">{value:.2f}</td>'
        )

    rest = "".join(f"<td>{value:.2f}</td>" for value in plain)
    return f"<tr><th>{escape(name)}</th>{''.join(map(cell, values))}{rest}</tr>"


def _plain(token: str) -> str:
    """A token's text in a figure, where a dollar begins mathematics."""
    return _shown(token).replace("$", r"\$")


def _shown(token: str) -> str:
    """A token's text on one line."""
    text = token.replace("\n", "\\n").replace("\t", "\\t")
    return text if text.strip() else "␣" * max(1, len(text))

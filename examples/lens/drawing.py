"""The comparison as a figure, and as tables in Markdown."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from scores import TARGETS

from lch_plugin.figures import ACTIVATIONS, CENTROIDS, GREY, new_figure

_COLOURS = {"exact": CENTROIDS, "Jacobian of the prompt": "#0f766e", "logit lens": GREY}
_OTHERS = (ACTIVATIONS, "#7c3aed", "#60a5fa", "#c084fc", "#1e3a8a", "#4c1d95", "#a16207")
_GROUPS = [(place, replaced) for place in ("last", "earlier") for replaced in ("twin", "mean")]


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Spearman's correlation by layer, a panel for each place and replacement."""
    drawn, axes = new_figure(11, 7, columns=2, rows=2)
    lenses = list(dict.fromkeys(row["lens"] for row in rows))
    spare = iter(_OTHERS)
    colours = {lens: _COLOURS.get(lens) or next(spare) for lens in lenses}
    for axis, (place, replaced) in zip(axes, _GROUPS, strict=True):
        for lens in lenses:
            some = _rows(rows, place, replaced, lens)
            x, y = [row["layer"] for row in some], [row["spearman"] for row in some]
            axis.plot(x, y, "o-", color=colours[lens], label=lens, linewidth=1.4, markersize=3)
            if lens in _COLOURS:  # More than these bands nobody can tell apart.
                low, high = zip(*(row["spearman_interval"] for row in some), strict=True)
                axis.fill_between(x, low, high, color=colours[lens], alpha=0.1, linewidth=0)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set(title=f"{place} position, {replaced} in its place", ylim=(-1.05, 1.05))
        axis.set(xlabel="layer", ylabel="Spearman, predicted and measured", xticks=x)
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return drawn


def _rows(
    rows: list[dict[str, Any]], place: str, replaced: str, lens: str, target: str = TARGETS[0]
) -> list[dict[str, Any]]:
    wanted = {"place": place, "replaced": replaced, "lens": lens, "target": target}
    return [row for row in rows if wanted.items() <= row.items()]


def tables(results: dict[str, Any], layers: list[int]) -> str:
    rows, parts = results["cells"], []
    lenses = list(dict.fromkeys(row["lens"] for row in rows))
    for place, replaced in _GROUPS:
        n = _rows(rows, place, replaced, lenses[0])[0]["n"]
        parts.append(f"**{place} position, {replaced} in its place** ({n} cells a layer)\n")
        for target, name in zip(TARGETS, ("the answer's logit", "less the foil's"), strict=True):
            body = []
            for lens in lenses:
                some = _rows(rows, place, replaced, lens, target)
                control = sum(row["shuffled"] for row in some) / len(some)
                body.append([lens, *map(_cell, some), f"{control:.2f}"])
            parts.append(_table([name, *map(str, layers), "control, mean"], body))
    parts.append("**Each kind of prompt, Spearman of all layers, the answer's logit**\n")
    head = ["kind, place", *lenses]
    kinds = results["kinds"]
    body = [[f"{k['kind']}, {k['place']}", *(f"{k[one]:.2f}" for one in lenses)] for k in kinds]
    parts.append(_table(head, body))
    found = results["reads"]
    solved = ", ".join(f"{kind} {a} of {b}" for kind, (a, b) in found["solved"].items())
    moves = ", ".join(f"{n}: {v:.2f}" for n, v in zip(layers, found["moves"], strict=True))
    parts.append(f"**Read first** (solved: {solved}; the last position moves, by layer: {moves})\n")
    keys = ("first_layer", "moves_before", "moves", "earlier", "same_layer", "later")
    body = []
    for lens, one in found["lenses"].items():
        values = [f"{one[key]:.2f}" if key in one else "" for key in keys]
        body.append([lens, f"{one['read']} of {one['of']}", *values])
    head = ["lens", "read", "first layer", "moved the layer before", "moved there"]
    parts.append(_table([*head, "read too early", "at the layer", "too late"], body))
    parts.append("**The same tokens** (first, five in common)\n")
    body = [
        [f"{name}: {pair}", *(f"{c['first']:.2f}, {c['five']:.2f}" for c in cells)]
        for name, by_pair in results["corpora"].items()
        for pair, cells in by_pair.items()
    ]
    parts.append(_table(["lenses", *map(str, layers)], body))
    parts += [f"Not run: {name}: {why}.\n" for name, why in results["not run"].items()]
    return "\n".join(parts)


def _cell(row: dict[str, Any]) -> str:
    """Spearman's correlation, its interval if there is one, and R²."""
    interval = row.get("spearman_interval")
    shown = "" if interval is None else " [{:.2f}, {:.2f}]".format(*interval)
    return f"{row['spearman']:.2f}{shown}; {row['r2']:.2f}"


def _table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

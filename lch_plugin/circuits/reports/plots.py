"""Figures of circuits."""

from __future__ import annotations

import math
from collections.abc import Mapping

from matplotlib.figure import Figure

from lch_plugin.circuits.evaluation.ablation import AblationCheck
from lch_plugin.circuits.evaluation.faithfulness import Faithfulness
from lch_plugin.circuits.kinds import KINDS
from lch_plugin.circuits.nodes import Circuit, Node, NodeScores
from lch_plugin.circuits.scores.neurons import NeuronAttribution
from lch_plugin.figures import CENTROIDS, GREY, new_figure


def neuron_scores(
    attribution: NeuronAttribution,
    n_named: int = 3,
    named: Mapping[tuple[int, int], str] | None = None,
) -> Figure:
    """Every neuron's score by layer, some of them named.

    Args:
        attribution: untargeted scores are magnitudes, shown on a logarithmic scale.
        n_named: of each layer, those of largest magnitude are named by their indices.
        named: what to call which neurons instead, by layer and index.
    """
    figure, (axis,) = new_figure(7.5, 3.4)
    named = _highest(attribution, n_named) if named is None else named
    columns = {layer: x for x, layer in enumerate(attribution.scores)}

    def place(layer: int, index: int) -> tuple[float, float]:
        # Neurons spread across the column of their layer in the order of their index.
        scores = attribution.scores[layer]
        return columns[layer] - 0.35 + 0.7 * index / len(scores), float(scores[index])

    for layer, scores in attribution.scores.items():
        points = [place(layer, i) for i in range(len(scores))]
        axis.scatter(*zip(*points, strict=True), s=4, color=GREY, linewidths=0)
    before = -math.inf
    for neuron, name in sorted(named.items()):
        x, y = place(*neuron)
        axis.scatter(x, y, s=14, color=CENTROIDS)
        # Below where the neighbour on the left is higher, so that neighbours do not write over each
        # other. A name is text and no formula: a dollar sign is a token like any other.
        axis.annotate(
            name,
            (x, y),
            xytext=(3, 3) if y >= before else (3, -9),
            textcoords="offset points",
            fontsize=7,
            parse_math=False,
        )
        before = y
    axis.set_xlabel("layer (neurons by index within)")
    if attribution.metric is None:
        highest = max(float(scores.max()) for scores in attribution.scores.values())
        # Neurons that hardly take part reach down to rounding; they need no room.
        axis.set(yscale="log", ylim=(highest * 1e-7, highest * 4), ylabel="score")
        axis.set_title("How far removing each neuron moves the centroids of its MLP")
    else:
        axis.axhline(0, color="black", linewidth=0.8)
        axis.margins(y=0.12)
        axis.set(ylabel=attribution.metric.replace("_", " "))
        axis.set_title("What removing each neuron takes from the metric")
    axis.set_xticks(list(columns.values()), [str(layer) for layer in columns])
    return figure


def _highest(attribution: NeuronAttribution, n: int) -> dict[tuple[int, int], str]:
    """Of each layer, names of the neurons whose scores are of largest magnitude."""
    return {
        (neuron.layer, neuron.index): str(neuron.index)
        for layer in attribution.scores
        for neuron in attribution.top(n, layer=layer, by="magnitude")
    }


def node_scores(scores: NodeScores, circuit: Circuit, n_named: int = 12) -> Figure:
    """Every node's signed score by layer, heads before neurons; a circuit's in colour.

    Args:
        scores: of heads, neurons or MLPs.
        circuit: of the same nodes.
        n_named: those of largest magnitude that are named.
    """
    figure, (axis,) = new_figure(7.5, 4.0)
    places: dict[Node, tuple[float, float]] = {}
    for point in scores.points:
        left, right = KINDS[point.kind].across
        for i, value in enumerate(scores.of(point.kind, point.layer).tolist()):
            x = point.layer + left + (right - left) * (i + 0.5) / point.n_nodes
            places[Node(point.kind, point.layer, i)] = (x, value)
    members = set(circuit.nodes)
    for kind in dict.fromkeys(point.kind for point in scores.points):
        size = KINDS[kind].size
        for inside, colour, label in (
            (False, GREY, f"other {kind}s"),
            (True, CENTROIDS, f"{kind}s in the circuit"),
        ):
            chosen = [
                place
                for node, place in places.items()
                if node.kind == kind and (node in members) == inside
            ]
            axis.scatter(
                [x for x, _ in chosen],
                [y for _, y in chosen],
                s=size if inside else size / 2,
                color=colour,
                marker=KINDS[kind].marker,
                linewidths=0,
                label=label,
            )
    for one in scores.top(n_named, by="magnitude"):
        axis.annotate(
            str(one.node), places[one.node], xytext=(4, 3), textcoords="offset points", fontsize=7
        )
    axis.axhline(0, color="black", linewidth=0.8)
    # Linear near zero, where most nodes are; logarithmic beyond, to either side.
    largest = float(scores.values.abs().max()) or 1.0
    axis.set_yscale("symlog", linthresh=10.0 ** math.floor(math.log10(largest) - 2))
    axis.set(xlabel="layer (heads, then neurons, by index)", ylabel="score, units of the metric")
    axis.set_xticks(sorted({point.layer for point in scores.points}))
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="lower right")
    return figure


def ablation_effects(checks: Mapping[str, AblationCheck]) -> Figure:
    """Effect of removing the top neurons beside that of each random set."""
    figure, (axis,) = new_figure(7.5, 0.9 + 0.28 * len(checks))
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


def faithfulness_curves(curves: Mapping[str, Faithfulness]) -> Figure:
    """Share of the metric that circuits recover, by the share of nodes they keep.

    Bands are the bootstrap intervals; grey, the range and median of the random circuits.

    Args:
        curves: by name, of one model and the same prompts.
    """
    figure, (axis,) = new_figure(6.0, 3.4)
    for i, (name, curve) in enumerate(curves.items()):
        shares, colour = [100 * share for share in curve.shares], f"C{i}"
        low, high = curve.interval.T
        label = f"{name}: CPR {curve.cpr:.2f}, CMD {curve.cmd:.2f}"
        axis.fill_between(shares, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.plot(shares, curve.recovered, color=colour, marker="o", markersize=3, label=label)
        low, high = curve.random.amin(1), curve.random.amax(1)
        axis.fill_between(shares, low, high, color=GREY, alpha=0.3, linewidth=0)
        label = "" if i else "random circuits: range and median"
        axis.plot(shares, curve.random.quantile(0.5, dim=1), color=GREY, lw=1.2, label=label)
    for level in (0, 1):
        axis.axhline(level, color="black", linewidth=0.8, linestyle="--", zorder=1)
    axis.set(xscale="log", xlabel="nodes kept (%)", ylabel="share of the metric recovered")
    axis.xaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure

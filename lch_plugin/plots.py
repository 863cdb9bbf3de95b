"""Figures of the reports. Each function returns a matplotlib figure and writes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from lch_plugin.circuits.evaluation.ablation import AblationCheck
from lch_plugin.circuits.evaluation.faithfulness import Faithfulness
from lch_plugin.circuits.nodes import Circuit, Node, NodeScores
from lch_plugin.circuits.scores.neurons import NeuronAttribution
from lch_plugin.errors import InputError
from lch_plugin.saes.evaluation.evaluate import DENSE, Evaluation
from lch_plugin.saes.evaluation.functional import EXACT, MEAN, ResponseFit
from lch_plugin.saes.evaluation.steering import SteeringEffects

CENTROIDS, ACTIVATIONS, GREY = "#c2410c", "#1d4ed8", "#9ca3af"
#: Colour of what SAEs are trained on: centroids of a component, what it reads, what it writes.
VALUES = {"centroid": CENTROIDS, "input": ACTIVATIONS, "output": "#047857"}

_BASELINES: dict[str, Any] = {
    EXACT: {"color": "black", "marker": "s"},
    MEAN: {"color": GREY, "marker": "^"},
}
_PANELS_A_ROW = 3
_SOLID = ListedColormap([CENTROIDS])
# Colour and marker of each kind of site; the colours of Okabe & Ito, told apart by anyone.
SITES = {
    "mlp": ("#d55e00", "o"),
    "attn": ("#0072b2", "s"),
    "block": ("#009e73", "D"),
    "span": ("#cc79a7", "^"),
    "model": ("#000000", "v"),
}


@dataclass(frozen=True)
class SiteStatistics:
    """The centroids of one component, over many tokens.

    Attributes:
        kind: of the site: mlp, attn, block, span (to the last block) or model.
        layer: the block; of a span the first; of the model None.
        norms: norm of each centroid over that of the cotangent.
        alignments: cosine of each centroid and the activation it belongs to.
        dimensions: effective dimension of the centroids, and of the activations.
        errors: linearity error at each radius.
    """

    kind: str
    layer: int | None
    norms: Float[Tensor, " n"]
    alignments: Float[Tensor, " n"]
    dimensions: tuple[float, float]
    errors: Float[Tensor, " n_radii"]


def _figure(
    width: float, height: float, columns: int = 1, rows: int = 1
) -> tuple[Figure, list[Any]]:
    # Figure, not pyplot: nothing global, no display, and no figure kept open.
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def centroids_by_layer(norms: Sequence[float], alignments: Sequence[float]) -> Figure:
    """Mean centroid norm, and mean cosine with the MLP's input, by layer."""
    figure, (left, right) = _figure(7.5, 2.6, columns=2)
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
    figure, (axis,) = _figure(6.0, 3.0)
    for name, density in densities.items():
        alive = density[density > 0].sort(descending=True).values
        label = f"{name}: {len(alive)} of {len(density)} features fire"
        axis.plot(range(1, len(alive) + 1), alive, color=colours[name], label=label)
    axis.set(yscale="log", xlabel="feature, by frequency", ylabel="share of tokens", title="Firing")
    axis.legend(frameon=False, fontsize=8)
    return figure


def density_histogram(evaluation: Evaluation) -> Figure:
    """Features of an SAE by the share of rows they fire on."""
    figure, (axis,) = _figure(6.0, 2.8)
    counts, edges = evaluation.density_histogram
    axis.stairs(counts, 10**edges, fill=True, color=CENTROIDS)
    axis.axvline(DENSE, color="black", linewidth=0.8, linestyle="--")
    axis.set(xscale="log", xlabel="share of rows a feature fires on", ylabel="features")
    axis.set_title(
        f"{evaluation.n_fired} of {len(evaluation.density)} features fire, "
        f"{evaluation.n_dense} of them on more than {DENSE:.0%} of rows",
        fontsize=10,
    )
    return figure


def response_fits(fits: Sequence[ResponseFit]) -> Figure:
    """R² of predicted responses by size of the perturbation, one panel a kind of perturbation.

    Predictions worse than the mean response are shown at the lower edge.
    """
    kinds = list(dict.fromkeys(fit.perturbation for fit in fits))
    titles = {"isotropic": "Random directions", "data": "Towards other tokens' inputs"}
    figure, axes = _figure(7.5, 3.0, columns=len(kinds))
    for axis, kind in zip(axes, kinds, strict=True):
        chosen = [fit for fit in fits if fit.perturbation == kind]
        ticks = ["first order" if fit.size is None else f"{fit.size:g}" for fit in chosen]
        for name in chosen[0].r_squared:
            values = [max(fit.r_squared[name], -0.1) for fit in chosen]
            style = _BASELINES.get(name, {"color": CENTROIDS, "marker": "o"})
            axis.plot(range(len(chosen)), values, label=name, markersize=4, **style)
        axis.set_xticks(range(len(chosen)), ticks)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xlabel="perturbation / norm of the input", ylim=(-0.12, 1.03))
        axis.set_title(titles[kind], fontsize=10)
    axes[0].set_ylabel("R² of predicted responses")
    axes[-1].legend(frameon=False, fontsize=8, loc="center left")
    return figure


def steering(effects: SteeringEffects) -> Figure:
    """KL divergence by strength: a line for each direction, and the range of the random ones."""
    figure, (axis,) = _figure(6.0, 3.2)
    order = sorted(range(len(effects.strengths)), key=effects.strengths.__getitem__)
    x = [effects.strengths[i] for i in order]
    random = effects.random_kl.mean(-1)[:, order]
    label = f"{len(random)} random directions: range and median"
    axis.fill_between(x, random.amin(0), random.amax(0), color=GREY, alpha=0.4, linewidth=0)
    axis.plot(x, random.quantile(0.5, dim=0), color="#4b5563", linewidth=1.2, label=label)
    for i, kl in enumerate(effects.kl.mean(-1)[:, order]):
        label = "" if i else f"{len(effects.kl)} features"
        axis.plot(x, kl, color=CENTROIDS, marker="o", markersize=3, lw=0.8, alpha=0.8, label=label)
    # Strengths may be negative or zero; effects at zero are zero.
    axis.set(xscale="log" if min(x) > 0 else "linear", yscale="log")
    axis.set(xlabel="norm of what is added / mean norm of the input")
    axis.set_ylabel("KL(clean || steered), nats")
    axis.legend(frameon=False, fontsize=8)
    return figure


def firing_by_k(
    densities: Mapping[int, Mapping[str, Sequence[Float[Tensor, " d_sae"]]]],
) -> Figure:
    """Share of rows each feature fires on, features sorted, one curve an SAE and one panel a k.

    Args:
        densities: by k, then by a key of `VALUES`, of SAEs of several seeds.
    """
    figure, axes = _figure(10.4, 2.8, columns=len(densities))
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
    figure, axes = _figure(3.4 * columns, 2.9 * rows, columns, rows)
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
    figure, (axis,) = _figure(7.5, 3.4)
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
    figure, (axis,) = _figure(7.5, 4.0)
    # Heads are few: they take the first quarter of a layer's column.
    styles = {"head": ("^", -0.42, -0.22), "neuron": ("o", -0.15, 0.42), "mlp": ("s", 0.0, 0.1)}
    places: dict[Node, tuple[float, float]] = {}
    for point in scores.points:
        _, left, right = styles[point.kind]
        for i, value in enumerate(scores.of(point.kind, point.layer).tolist()):
            x = point.layer + left + (right - left) * (i + 0.5) / point.n_nodes
            places[Node(point.kind, point.layer, i)] = (x, value)
    members = set(circuit.nodes)
    for kind in dict.fromkeys(point.kind for point in scores.points):
        size = 28 if kind == "head" else 12
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
                marker=styles[kind][0],
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
    figure, (axis,) = _figure(7.5, 0.9 + 0.28 * len(checks))
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
    figure, (axis,) = _figure(6.0, 3.4)
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


def centroids_by_site(statistics: Sequence[SiteStatistics], radii: Sequence[float]) -> Figure:
    """Norm, alignment and effective dimension by layer, and linearity error by radius.

    Args:
        statistics: one a component; the model, if among them, gets a column of its own.
        radii: of the linearity errors, relative to the norm of the inputs.
    """
    kinds = [kind for kind in SITES if any(s.kind == kind for s in statistics)]
    layers = sorted({s.layer for s in statistics if s.layer is not None})
    columns = [*map(str, layers), *(["model"] if "model" in kinds else [])]
    in_blocks = [kind for kind in kinds if kind != "model"]
    figure, axes = _figure(9.0, 7.4, columns=2, rows=2)
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
    norm, cosine, dimension, linearity = axes

    for s in statistics:
        beside = 0.0 if s.layer is None else _beside(s.kind, in_blocks)
        x = beside + (len(layers) if s.layer is None else layers.index(s.layer))
        _interval(norm, s.kind, x, s.norms, (0.25, 0.5, 0.75))
        _interval(cosine, s.kind, x, s.alignments, (0.25, 0.5, 0.75))
        _pair(dimension, s.kind, x, s.dimensions)
    for kind in kinds:
        errors = torch.stack([s.errors for s in statistics if s.kind == kind])
        for column in range(len(radii)):
            x = column + _beside(kind, kinds)
            _interval(linearity, kind, x, errors[:, column], (0.0, 0.5, 1.0))

    for axis in (norm, cosine, dimension):
        _columns(axis, columns)
        axis.set_xlabel("layer (of a span: its first)")
    _columns(linearity, [f"{radius:g}" for radius in radii])
    for axis, level in ((norm, 1), (cosine, 0), (linearity, 1)):
        axis.axhline(level, color="black", linewidth=0.8, zorder=1)
    norm.set(yscale="log", ylabel="norm of centroid / norm of cotangent")
    cosine.set(ylabel="cosine of centroid and input")
    dimension.set(ylabel="effective dimension", ylim=(0, None))
    linearity.set(yscale="log", ylabel="relative error of the predicted change")
    linearity.set_ylim(top=max(2.5, 1.5 * max(float(s.errors.max()) for s in statistics)))
    linearity.set(xlabel="size of the displacement / norm of the input")
    note: Any = {"fontsize": 8, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}}
    linearity.text(-0.35, 1.15, "no better than predicting no change", va="bottom", **note)
    norm.text(len(columns) - 0.6, 0.88, "identity", ha="right", va="top", **note)
    titles = (
        "(a) Norm: median and quartiles over tokens",
        "(b) Alignment: median and quartiles over tokens",
        "(c) Effective dimension: centroids (filled), inputs (open)",
        "(d) Linearity error: median and range over layers",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10, loc="left")
    handles = []
    for kind in kinds:
        colour, marker = SITES[kind]
        label = "span (to the last block)" if kind == "span" else kind
        handles.append(Line2D([], [], color=colour, marker=marker, linewidth=2, label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(kinds), frameon=False)
    return figure


def patches_by_feature(
    images: Float[Tensor, "n channel height width"],
    activations: Float[Tensor, "n_patches_of_all d_sae"],
    features: Sequence[int] | None = None,
    *,
    n_features: int = 10,
    n_images: int = 8,
) -> Figure:
    """The images, and the patches in them, in which features of a vision SAE are most active.

    One row a feature, strongest image first.

    Args:
        images: as the model reads them.
        activations: of each feature at each patch of each image, patches in reading order.
        features: which; those that are active at most in the most images if None.
        n_features: how many, if they are to be chosen.
        n_images: shown for each.

    Raises:
        InputError: activations that are no square grid of patches for each image.
    """
    side = math.isqrt(len(activations) // len(images))
    if side * side * len(images) != len(activations):
        raise InputError(
            f"{len(activations)} rows of activations are no square grid of patches for each of "
            f"{len(images)} images. Leave the CLS token out: positions=slice(1, None)."
        )
    images, activations = (t.detach().float().cpu() for t in (images, activations))
    maps = activations.unflatten(0, (len(images), side, side)).movedim(-1, 0)
    peaks = maps.amax((-1, -2))
    if features is None:
        features = (peaks > 0).sum(1).topk(min(n_features, len(maps))).indices.tolist()
    # Pixels to [0, 1], whatever they were normalised to; colour as the mean of channels, so that
    # the overlay can be told from it.
    grey = images.mean(1)
    grey = (grey - grey.amin((1, 2), True)) / (
        grey.amax((1, 2), True) - grey.amin((1, 2), True)
    ).clamp_min(1e-6)
    figure, axes = _figure(0.9 * n_images, 0.95 * len(features), n_images, len(features))
    for row, feature in enumerate(features):
        strongest = peaks[feature].topk(min(n_images, len(images))).indices.tolist()
        for column in range(n_images):
            axis = axes[row * n_images + column]
            axis.set_axis_off()
            if column >= len(strongest):
                continue
            image = strongest[column]
            size = grey.shape[-2:]
            # Ink on paper where there is one channel, photographs as they are.
            if images.shape[1] == 1:
                axis.imshow(grey[image], cmap="Greys", vmin=0, vmax=1.5)
            else:
                axis.imshow(grey[image], cmap="gray", vmin=-0.5, vmax=1)
            heat = (maps[feature, image] / peaks[feature].amax().clamp_min(1e-12)).clamp(0, 1)
            heat = heat.repeat_interleave(size[0] // side, 0).repeat_interleave(size[1] // side, 1)
            axis.imshow(heat.new_ones(*heat.shape), cmap=_SOLID, alpha=0.75 * heat.numpy())
            if column == 0:
                axis.set_title(f"{feature}", fontsize=7, loc="left", pad=2)
    return figure


def _columns(axis: Any, labels: Sequence[str]) -> None:
    """Named columns, with lines between them."""
    axis.set_xticks(range(len(labels)), labels)
    axis.set_xlim(-0.5, len(labels) - 0.5)
    axis.tick_params(axis="x", length=0)
    axis.grid(visible=False, axis="x")
    for boundary in range(len(labels) - 1):
        axis.axvline(boundary + 0.5, color=GREY, linewidth=0.6, alpha=0.5)


def _beside(kind: str, kinds: Sequence[str]) -> float:
    """Offset of a kind within a column that several kinds share."""
    return 0.8 * ((kinds.index(kind) + 0.5) / len(kinds) - 0.5)


def _interval(
    axis: Any, kind: str, x: float, values: Tensor, quantiles: tuple[float, float, float]
) -> None:
    colour, marker = SITES[kind]
    low, middle, high = torch.quantile(values, values.new_tensor(quantiles)).tolist()
    axis.plot([x, x], [low, high], color=colour, linewidth=2, solid_capstyle="butt")
    axis.plot([x], [middle], color=colour, marker=marker, markersize=5)


def _pair(axis: Any, kind: str, x: float, dimensions: tuple[float, float]) -> None:
    colour, marker = SITES[kind]
    centroids, inputs = dimensions
    axis.plot([x, x], dimensions, color=colour, linewidth=1, alpha=0.6, zorder=1)
    # The open marker is the larger, so that both are seen where they coincide.
    axis.plot([x], [inputs], color=colour, marker=marker, markersize=7, markerfacecolor="white")
    axis.plot([x], [centroids], color=colour, marker=marker, markersize=4)

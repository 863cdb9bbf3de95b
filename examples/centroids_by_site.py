"""Centroids of every kind of site in the embedded model: size, direction, spread, and reach.

python examples/centroids_by_site.py [--out centroids_by_site.png]
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

import lch_plugin as lch
from lch_plugin.demo.corpus import stories
from lch_plugin.diagnostics import PointCloud, linearity_error
from lch_plugin.figures import GREY, new_figure

N_TOKENS, BATCH = 32, 50
N_LINEARITY = 8  # stories
RADII = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
# Colour and marker of each kind of site; the colours of Okabe & Ito, told apart by anyone.
SITES = {
    "mlp": ("#d55e00", "o"),
    "attn": ("#0072b2", "s"),
    "block": ("#009e73", "D"),
    "span": ("#cc79a7", "^"),
    "model": ("#000000", "v"),
}


class Component(NamedTuple):
    kind: str
    layer: int | None
    name: str  # of its centroid's hook point
    reads: str  # hook point of its input
    modules: Sequence[Callable[[Tensor], Any]]  # one after the other

    def __call__(self, x: Tensor) -> Tensor:
        for module in self.modules:
            y = module(x)
            x = y[0] if isinstance(y, tuple) else y
        return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="centroids_by_site.png")
    out = parser.parse_args().out

    # Small radii need double precision.
    model = lch.load_demo_model(dtype=torch.float64)
    texts = (model.to_tokens(text) for text in stories(600, split="test"))
    # Beginnings of the same length, so that there is no padding.
    tokens = torch.cat([t[:, :N_TOKENS] for t in texts if t.shape[1] >= N_TOKENS])[:200]

    def logits(embeddings: Tensor) -> Tensor:
        return model.original_model(inputs_embeds=embeddings).logits

    last = model.cfg.n_layers - 1
    components = []
    for layer, block in enumerate(model.blocks):
        at = f"blocks.{layer}"
        for kind, part in (("mlp", block.mlp), ("attn", block.attn)):
            name, reads = f"{at}.{kind}.hook_centroid", f"{at}.{kind}.hook_in"
            components.append(Component(kind, layer, name, reads, [part]))
        components.append(
            Component("block", layer, f"{at}.hook_centroid", f"{at}.hook_in", [block])
        )
    for layer in range(last):
        name, reads = f"blocks.{last}.hook_centroid_from_{layer}", f"blocks.{layer}.hook_in"
        components.append(Component("span", layer, name, reads, model.blocks[layer:]))
    components.append(Component("model", None, "hook_centroid", "embed.hook_out", [logits]))

    sites = [lch.Site(kind, expert=True) for kind in ("mlp", "attn", "block", "model")]
    sites += [lch.Site("span", layers=(layer, last), expert=True) for layer in range(last)]
    names = {n for c in components for n in (c.name, f"{c.name}_alignment", c.reads)}
    norms, alignments = ({c.name: [] for c in components} for _ in range(2))
    centroids, activations = ({c.name: PointCloud() for c in components} for _ in range(2))
    with lch.attach(model, site=sites), torch.no_grad():
        for batch in tokens.split(BATCH):
            _, cache = model.run_with_cache(batch, names_filter=list(names))
            for c in components:
                # Not the first token, which is the same in every story.
                mu, x = cache[c.name][:, 1:], cache[c.reads][:, 1:]
                d_out = model.cfg.d_vocab if c.kind == "model" else model.cfg.d_model
                norms[c.name].append(mu.norm(dim=-1).flatten() / d_out**0.5)
                alignments[c.name].append(cache[f"{c.name}_alignment"][:, 1:].flatten())
                centroids[c.name].update(mu)
                activations[c.name].update(x)

    _, cache = model.run_with_cache(tokens[:N_LINEARITY], names_filter=list(names))
    statistics = [
        SiteStatistics(
            kind=c.kind,
            layer=c.layer,
            norms=torch.cat(norms[c.name]),
            alignments=torch.cat(alignments[c.name]),
            dimensions=(
                centroids[c.name].effective_dimension,
                activations[c.name].effective_dimension,
            ),
            errors=linearity(c, cache[c.reads].detach()),
        )
        for c in components
    ]
    centroids_by_site(statistics, RADII).savefig(out)

    print(f"{len(tokens)} stories of {N_TOKENS} tokens; medians over all but the first token")
    print(
        "site    layer  |mu|/|v|  cos(mu, x)  dim mu  dim x  linearity error at radius 0.01, 0.1, 1"
    )
    for s in sorted(statistics, key=lambda s: list(SITES).index(s.kind)):
        of_centroids, of_inputs = s.dimensions
        errors = "  ".join(f"{e:.3f}" for e in s.errors[2::2].tolist())
        print(
            f"{s.kind:6}  {'-' if s.layer is None else s.layer!s:>5}  {s.norms.median():8.3f}  "
            f"{s.alignments.median():10.3f}  {of_centroids:6.1f}  {of_inputs:5.1f}  {errors}"
        )
    print("wrote", out)


def linearity(c: Component, x: Tensor) -> Tensor:
    """Median error at each radius, which is relative to the typical norm of a token's input."""

    def stories_as_rows(rows: Tensor) -> Tensor:
        return c(rows.reshape(-1, *x.shape[1:])).reshape(*rows.shape[:-1], -1)

    # An MLP treats each token on its own. All others read whole stories: a row is a story.
    one_by_one = c.kind == "mlp"
    typical = x.norm(dim=-1).median().item() * (1 if one_by_one else N_TOKENS**0.5)
    errors = linearity_error(
        c if one_by_one else stories_as_rows,
        x[:, 1:] if one_by_one else x.flatten(1),
        [radius * typical for radius in RADII],
        n_directions=4,
        generator=torch.Generator().manual_seed(0),
    )
    return errors.flatten(1).median(dim=1).values


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
    figure, axes = new_figure(9.0, 7.4, columns=2, rows=2)
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


if __name__ == "__main__":
    main()

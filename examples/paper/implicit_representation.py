"""Centroids of a ReLU network that represents a polygon in the plane (arXiv 2604.11962).

Published: a network of 3 x 64 ReLUs on a polygon; t-SNE of the centroids of its tail, and maps of
its neurons; figures only.

    python examples/paper/implicit_representation.py --out implicit            # 400 x 400 points
    python examples/paper/implicit_representation.py --small --out implicit    # 120 x 120

The network learns whether a point lies in a star. Its tail is all after the first layer: its
centroids lie in the space of the first layer's 64 activations. The network is piecewise affine, so
all points with the same pattern of active neurons have one and the same centroid; this is checked.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from common import parse, parser, save
from matplotlib.path import Path as Polygon
from sklearn.manifold import TSNE
from torch import Tensor, nn

import lch_plugin as lch
from lch_plugin.figures import ACTIVATIONS, CENTROIDS, GREY, new_figure

N_SHOWN = 1500


def star() -> Tensor:
    angles = torch.arange(10) * torch.pi / 5 + torch.pi / 2
    radii = torch.tensor([0.8, 0.35] * 5)
    return torch.stack([radii * angles.cos(), radii * angles.sin()], -1)


def inside(points: Tensor) -> Tensor:
    return torch.tensor(Polygon(star().numpy()).contains_points(points.numpy())).double()


def trained(seed: int, steps: int) -> nn.Sequential:
    torch.manual_seed(seed)
    widths = [2, 64, 64, 64]
    layers = [f for a, b in pairwise(widths) for f in (nn.Linear(a, b), nn.ReLU())]
    network = nn.Sequential(*layers, nn.Linear(64, 1)).double()
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(steps):
        points = torch.rand(1024, 2, dtype=torch.float64) * 2 - 1
        loss = nn.functional.binary_cross_entropy_with_logits(network(points)[:, 0], inside(points))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.requires_grad_(False)


def main() -> None:
    args = parse(parser(__doc__, None))
    args.model = "3 x 64 ReLU network"
    side, steps = (120, 2000) if args.small else (400, 10_000)
    network = trained(args.seed, steps)
    line = torch.linspace(-1, 1, side, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)
    head, tail = network[:2], network[2:]
    mu = lch.centroid(tail, head(points))
    whole = lch.centroid(network, points)

    layers = [network[: i + 1](points) for i in (0, 2, 4)]  # Pre-activations.
    pattern = torch.cat([z > 0 for z in layers], 1)
    regions, region = pattern.unique(dim=0, return_inverse=True)
    first = torch.full((len(regions),), len(points)).scatter_reduce(
        0, region, torch.arange(len(points)), "amin"
    )
    apart = max(float((m - m[first][region]).abs().max()) for m in (mu, whole))
    accuracy = float(((network(points)[:, 0] > 0) == (inside(points) > 0)).double().mean())
    print(f"accuracy on the grid {accuracy:.2%}; {len(regions)} patterns of active neurons,")
    print(f"within which centroids differ by at most {apart:.1e}")
    assert apart < 1e-10, "points of one pattern must have one centroid"

    generator = torch.Generator().manual_seed(args.seed)
    shown = first[torch.randperm(len(first), generator=generator)[:N_SHOWN]]
    flat = TSNE(random_state=args.seed, init="pca").fit_transform(mu[shown].numpy())

    # Three leading directions of the centroids are red, green and blue.
    _, _, axes3 = torch.pca_lowrank(mu - mu.mean(0), q=3)
    colour = (mu - mu.mean(0)) @ axes3
    low, high = colour.quantile(0.02, dim=0), colour.quantile(0.98, dim=0)
    colour = ((colour - low) / (high - low)).clamp(0, 1)

    def image(values: Tensor) -> Tensor:  # Rows are y, from below.
        return values.unflatten(0, (side, side)).transpose(0, 1)

    figure, axes = new_figure(9.5, 8, columns=2, rows=2)
    extent, edge = (-1, 1, -1, 1), torch.cat([star(), star()[:1]])
    axes[0].imshow(image(colour), origin="lower", extent=extent, interpolation="nearest")
    axes[0].set_title("centroids of the tail, as colours")
    axes[1].imshow(image(whole.norm(dim=1)), origin="lower", extent=extent, cmap="magma")
    axes[1].set_title("norm of the whole network's centroids")
    for z, line_colour, name in zip(layers, (GREY, ACTIVATIONS, CENTROIDS), (1, 2, 3), strict=True):
        for j in range(64):
            values = image(z[:, j])
            if values.min() < 0 < values.max():
                axes[2].contour(line, line, values, [0], colors=[line_colour], linewidths=0.5)
        axes[2].plot([], [], color=line_colour, label=f"layer {name}")
    axes[2].set_title("where each neuron turns on")
    axes[2].legend(frameon=True, fontsize=8, loc="lower right")
    for axis in axes[:3]:
        axis.plot(*edge.T, color="black", linewidth=1)
        axis.set(aspect="equal", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
        axis.grid(False)
    within = inside(points[shown]) > 0
    for chosen, c, name in ((within, CENTROIDS, "inside"), (~within, ACTIVATIONS, "outside")):
        axes[3].scatter(*flat[chosen].T, s=6, color=c, label=name)
    axes[3].set_title("t-SNE of the tail's centroids, one a region")
    axes[3].legend(frameon=False)
    results = {"accuracy": accuracy, "patterns": len(regions)}
    results["largest_difference_within_a_pattern"] = apart
    save(args, results, figure, steps=steps, side=side, site="tail: all after the first layer")


if __name__ == "__main__":
    main()

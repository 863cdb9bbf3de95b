"""How alike are the dictionaries of two models? (arXiv 2604.11962)

Published: SAEs on DINOv2 and on CLIP, on centroids and on activations; a figure only.

    python examples/paper/dictionary_similarity.py --device cuda --out similarity     # published
    python examples/paper/dictionary_similarity.py --small --out similarity

Two models have no space in common, so features are matched by what they fire on: each live feature
of the one with the feature of the other whose codes, averaged over an image's patches, correlate
with its own most, over test images. Chance is the same with one side's images shuffled. `--small`
has one model: two seeds of SAEs on centroids, two on what the MLP writes, and one beside the other.
Two seeds share a space, so their decoders' cosines are given too. High similarity says that the
dictionaries agree, not that they are right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from common import EMBEDDED, Vision, load_vision, parse, parser, save
from torch import Tensor

from lch_plugin.figures import ACTIVATIONS, CENTROIDS, GREY, new_figure

PATCHES = slice(1, None)


@dataclass
class Dictionary:
    """Live features of an SAE: codes of test images, and directions."""

    codes: Tensor
    decoder: Tensor


def dictionary(vision: Vision, of: str, k: int, epochs: int, seed: int) -> Dictionary:
    sae = vision.sae(of, k, PATCHES, epochs=epochs, lr=5e-4, seed=seed)
    codes = vision.codes(sae, "test", of, PATCHES)
    # Fires on at least five images: a correlation over fewer is chance.
    live = (codes > 0).sum(0) >= 5
    return Dictionary(codes[:, live], sae.W_dec.detach().cpu()[live])


def best_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Of each column of ``a`` with the column of ``b`` that is most like it."""
    a, b = (torch.nn.functional.normalize(x - x.mean(0), dim=0) for x in (a, b))
    return (a.T @ b).amax(1)


def best_cosine(a: Tensor, b: Tensor) -> Tensor:
    a, b = (torch.nn.functional.normalize(x, dim=1) for x in (a, b))
    return (a @ b.T).amax(1)


def main() -> None:
    options = parser(__doc__, "facebook/dinov2-base")
    options.add_argument("--other", help="published: openai/clip-vit-base-patch16")
    options.add_argument("--images", default="frgfm/imagenette:320px")
    options.add_argument("--k", type=int, default=32)
    options.add_argument("--epochs", type=int)
    args = parse(options)
    args.epochs = args.epochs or (3 if args.small else 40)
    first = load_vision(args.model, None, args.images, args.device)
    if args.model == EMBEDDED:
        args.other = EMBEDDED
        second = first
    else:
        args.other = args.other or "openai/clip-vit-base-patch16"
        second = load_vision(args.other, None, args.images, args.device)

    def made(vision: Vision, of: str, seed: int) -> Dictionary:
        return dictionary(vision, of, args.k, args.epochs, seed)

    centroids = [made(first, "centroid", args.seed), made(second, "centroid", args.seed + 1)]
    outputs = [made(first, "output", args.seed), made(second, "output", args.seed + 1)]
    pairs = {
        "centroids": (*centroids, CENTROIDS),
        "outputs": (*outputs, ACTIVATIONS),
        "centroids to outputs": (centroids[0], outputs[1], GREY),
    }
    generator = torch.Generator().manual_seed(args.seed)
    results: dict[str, dict[str, float]] = {}
    figure, (axis,) = new_figure(6, 3.6)
    print(f"{'':24} features  correlation  by chance  cosine of decoders")
    for name, (a, b, colour) in pairs.items():
        matched = best_correlation(a.codes, b.codes)
        order = torch.randperm(len(b.codes), generator=generator)
        chance = best_correlation(a.codes, b.codes[order])
        results[name] = {
            "features": len(matched),
            "other_features": b.codes.shape[1],
            "correlation": float(matched.mean()),
            "by_chance": float(chance.mean()),
        }
        cosine = ""
        if name != "centroids to outputs" and first is second:
            results[name]["cosine"] = float(best_cosine(a.decoder, b.decoder).mean())
            cosine = f"{results[name]['cosine']:.3f}"
        r = results[name]
        print(
            f"{name:24} {r['features']:8} {r['correlation']:12.3f} {r['by_chance']:10.3f}  {cosine}"
        )
        for values, style, label in ((matched, "-", name), (chance, ":", None)):
            share = torch.linspace(0, 1, len(values))
            axis.plot(values.sort().values, share, style, color=colour, label=label)
    axis.set(
        xlabel="correlation with the best match (dotted: shuffled)", ylabel="share of features"
    )
    axis.legend(frameon=False)
    save(args, results, figure, lr=5e-4, factor=10, modules=[first.module, second.module])


if __name__ == "__main__":
    main()

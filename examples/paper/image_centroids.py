"""Local centroids of images (the paper's image experiment), and whether they order pixels well.

The paper's setting: the local centroid from the image to ``features.3`` of a ConvNeXt-L, Gaussian
noise of .15 of the image's range, 30 samples; the map is its sum over channels. The default model
here is a ConvNeXt of the hub, whose second stage is the one that torchvision calls ``features.3``:
not the robust weights of the paper, which RobustBench has. It draws one map.

With ``--small`` maps of held-out digits are judged: of the log-probability of the predicted digit
by the embedded classifier, with deletion and insertion areas beside Captum's methods.

    python examples/paper/image_centroids.py --image FILE.png --out maps
    python examples/paper/image_centroids.py --small --out maps
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from common import EMBEDDED, parse, parser, save
from language_saliency import KINDS, REFERENCE, interval
from matplotlib.figure import Figure
from PIL import Image

import lch_plugin as lch
from lch_plugin.demo.vision import digits
from lch_plugin.demo.vision.classifier import load_demo_classifier
from lch_plugin.saliency import ClassMetric, image_by_method, image_curves, images


def draw(pictures: list[tuple[str, Any]], columns: int) -> Figure:
    rows = len(pictures) // columns
    figure = Figure(figsize=(1.8 * columns, 2 * rows), dpi=150, layout="constrained")
    for i, (title, picture) in enumerate(pictures):
        axis = figure.add_subplot(rows, columns, i + 1)
        axis.imshow(picture.cpu().numpy(), cmap="gray" if title == "image" else "magma")
        axis.set_axis_off()
        axis.set_title(title, fontsize=8)
    return figure


def judge(args: Namespace) -> tuple[dict[str, Any], Figure]:
    """Areas of every method: images by seeds, averaged over seeds."""
    loaded, pixels = load_demo_classifier(device=args.device), digits("test")[0][: args.images]
    neighbourhoods = {"": {}, ", ball": {"radius": args.radius}}
    areas: dict[str, dict[str, np.ndarray]] = {}
    pictures = []
    for i, image in enumerate(pixels):
        metric = ClassMetric(loaded, image)
        for j, seed in enumerate(range(args.seed, args.seed + args.seeds)):
            maps = {
                name + kind: scores
                for kind, around in neighbourhoods.items()
                for name, scores in image_by_method(metric, seed=seed, **around).items()
                if not kind or "local centroid" in name
            }
            for name, scores in maps.items():
                found, shape = image_curves(metric, scores), (len(pixels), args.seeds)
                row = areas.setdefault(name, {kind: np.zeros(shape) for kind in KINDS})
                for kind in KINDS:
                    row[kind][i, j] = getattr(found, f"{kind}_area")
        if i < 3:
            maps = {"image": metric.image[0], **maps}
            pictures += list(maps.items())
    results = {}
    for name, row in areas.items():
        print(f"{name:22}", end="")
        results[name] = {}
        for kind, every in row.items():
            values = every.mean(1)
            less = interval(values - areas[REFERENCE][kind].mean(1))
            spread = float(every.mean(0).std(ddof=1)) if args.seeds > 1 else 0.0
            results[name][kind] = {"mean": fmean(values), "less_reference": less, "seeds": spread}
            print(f" {kind} {fmean(values):7.3f} [{less[0]:+.3f}, {less[1]:+.3f}]", end="")
        print()
    return results, draw(pictures, len(pictures) // min(3, len(pixels)))


def main() -> None:
    options = parser(__doc__, "facebook/convnext-large-224")
    options.add_argument("--image", type=Path, help="of the published setting")
    options.add_argument("--module", default="convnext.encoder.stages.1")
    options.add_argument("--images", type=int, default=30, help="digits that are judged")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--radius", type=float, default=4.8, help="of the ball: .15 * sqrt(1024)")
    args = parse(options)
    if args.model == EMBEDDED:
        results, figure = judge(args)
    else:
        if args.image is None:
            options.error("--image FILE, or --small")
        loaded = lch.load(args.model, device=args.device)
        picture = Image.open(args.image).convert("RGB")
        pixels = loaded.processor(picture, return_tensors="pt")["pixel_values"].to(args.device)
        found = images(loaded.model, pixels, module=args.module, seed=args.seed)
        results = {"norm": float(found.centroids.norm())}
        figure = draw([("local centroid", found.maps[0])], 1)
    save(args, results, figure)


if __name__ == "__main__":
    main()

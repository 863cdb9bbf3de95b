"""Local centroids of images (the paper's image experiment).

The paper's setting: the local centroid from the image to ``features.3`` of a ConvNeXt-L, Gaussian
noise of .15 of the image's range, 30 samples; the map is its sum over channels. The default model
here is a ConvNeXt of the hub, whose second stage is the one that torchvision calls ``features.3``:
not the robust weights of the paper, which RobustBench has.

    python examples/paper/image_centroids.py --image FILE.png --out maps
    python examples/paper/image_centroids.py --small --out maps   # the embedded model, offline
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

import lch_plugin as lch
from lch_plugin.demo.vision import digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--model", default="facebook/convnext-large-224")
    parser.add_argument("--module", default="convnext.encoder.stages.1")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.small:
        model, module = lch.load_demo_vision_model(), None
        pixels = digits("test")[0][:1]
    else:
        if args.image is None:
            parser.error("--image FILE, or --small")
        loaded, module = lch.load(args.model), args.module
        model = loaded.model
        image = Image.open(args.image).convert("RGB")
        pixels = loaded.processor(image, return_tensors="pt")["pixel_values"]
    found = lch.saliency.images(model, pixels, module=module, sigma=0.15, n_samples=30)
    args.out.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(4, 4), dpi=150, layout="constrained")
    axis = figure.add_subplot()
    axis.imshow(found.maps[0].numpy(), cmap="magma")
    axis.set_axis_off()
    figure.savefig(args.out / "map.png")
    norm = float(found.centroids.norm())
    settings = {"model": "embedded" if args.small else args.model, "module": module}
    results = {**settings, "sigma": 0.15, "n_samples": 30, "seed": 0, "norm": norm}
    (args.out / "results.json").write_text(json.dumps(results, indent=2))
    print(results)


if __name__ == "__main__":
    main()

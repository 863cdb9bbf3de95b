"""SAEs on the centroids of a vision transformer's last MLP (arXiv 2604.11962).

Published: DINOv2-B and DINOv3-B, Imagenette; TopK with 10 x 768 features, k = 8, 16, 32, 64,
40 epochs, learning rate 5e-4, seed 0. Linear probes of the codes of DINOv2: activations 88.9, 90.8,
92.4, 93.7 %, centroids 90.2, 92.1, 93.7, 94.7 %; live features at k = 32: 5,885 and 7,453.

    python examples/paper/dino_saes.py --device cuda --out dino_saes    # published: DINOv2-B
    python examples/paper/dino_saes.py --model facebook/dinov3-vitb16-pretrain-lvd1689m ...
    python examples/paper/dino_saes.py --small --out dino_saes          # digits, 2 epochs

Activations are what the MLP writes, as published, and what it reads, which lies in the same space
as its centroids. The published script de-normalises its images; here the model's own processor
prepares them, so the numbers need not agree. A live feature is one that fires on a test image.
"""

from __future__ import annotations

from common import load_vision, parse, parser, save
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler

from lch_plugin.figures import ACTIVATIONS, CENTROIDS, GREY, new_figure
from lch_plugin.saes import evaluate

KINDS = {"centroid": CENTROIDS, "input": GREY, "output": ACTIVATIONS}
PATCHES = slice(1, None)


def main() -> None:
    options = parser(__doc__, "facebook/dinov2-base")
    options.add_argument("--images", default="frgfm/imagenette:320px")
    options.add_argument("--module", help="the last MLP if left out")
    options.add_argument("--k", type=int, nargs="+", default=[8, 16, 32, 64])
    options.add_argument("--epochs", type=int)
    args = parse(options)
    args.epochs = args.epochs or (2 if args.small else 40)
    lr = 5e-4
    vision = load_vision(args.model, args.module, args.images, args.device)
    results: dict[str, list[dict[str, float]]] = {of: [] for of in KINDS}
    print(f"{vision.module:>24}   k  variance explained  live features  label probed")
    for k in args.k:
        for of in KINDS:
            sae = vision.sae(of, k, PATCHES, epochs=args.epochs, lr=lr, seed=args.seed)
            scores = evaluate(sae, vision.rows("test", of, PATCHES))
            probe = make_pipeline(MaxAbsScaler(), LogisticRegression(max_iter=1000))
            probe.fit(vision.codes(sae, "train", of, PATCHES), vision.train_labels)
            accuracy = probe.score(vision.codes(sae, "test", of, PATCHES), vision.test_labels)
            found = {
                "k": k,
                "accuracy": float(accuracy),
                "live": int(scores.n_fired),
                "variance_explained": float(scores.explained_variance),
            }
            results[of].append(found)
            print(
                f"{of:>24} {k:3} {found['variance_explained']:19.3f} {found['live']:14} "
                f"{accuracy:13.1%}"
            )

    figure, axes = new_figure(9, 3.4, columns=3)
    for axis, what in zip(axes, ("accuracy", "live", "variance_explained"), strict=True):
        for of, colour in KINDS.items():
            axis.plot(args.k, [r[what] for r in results[of]], "o-", color=colour, label=of)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="k", title=what.replace("_", " "))
    axes[0].legend(frameon=False)
    save(args, results, figure, lr=lr, factor=10, module=vision.module, cotangent="ones")


if __name__ == "__main__":
    main()

"""Does the ranking of neurons depend on radius, samples and seed? (arXiv 2604.11962)

Published: GPT-2 Large, layer 31, radius .05 to 2, 16 to 512 samples, 5 seeds; rank correlations
above about .9998.

    python examples/paper/robustness.py --out robustness            # published
    python examples/paper/robustness.py --small --out robustness    # the embedded model, all layers

Each ranking is compared with one at radius .25 with as many samples and a draw of its own.
"""

from __future__ import annotations

from circuit_discovery import PROMPT
from common import EMBEDDED, parse, parser, save

import lch_plugin as lch
from lch_plugin import circuits
from lch_plugin.figures import ACTIVATIONS, CENTROIDS, GREY, new_figure

RADII = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
SAMPLES = (16, 64, 512)


def main() -> None:
    options = parser(__doc__, "gpt2-large")
    options.add_argument("--layer", type=int)
    args = parse(options)
    if args.model == "gpt2-large" and args.layer is None:
        args.layer = 31
    model = (
        lch.load_demo_model(device=args.device)
        if args.model == EMBEDDED
        else lch.load(args.model, dtype="float32", device=args.device).bridge()
    )
    ids = model.to_tokens(PROMPT, prepend_bos=False)
    seeds = tuple(range(args.seed, args.seed + 5))
    lowest: dict[str, list[float]] = {}
    overlap: dict[str, list[float]] = {}
    print("lowest rank correlation of layers and seeds")
    print("samples " + "".join(f"  r={radius:<6}" for radius in RADII))
    for n in SAMPLES:
        found = circuits.stability(model, ids, args.layer, n_samples=n, radii=RADII, seeds=seeds)
        of = found.spearman.values()
        lowest[str(n)] = [min(float(s[i].min()) for s in of) for i in range(len(RADII))]
        of = found.overlap.values()
        overlap[str(n)] = [min(float(o[i].min()) for o in of) for i in range(len(RADII))]
        print(f"{n:7} " + "".join(f"  {value:.5f} " for value in lowest[str(n)]))

    figure, (axis,) = new_figure(6, 3.6)
    for n, colour in zip(SAMPLES, (GREY, ACTIVATIONS, CENTROIDS), strict=True):
        unlike = [max(1 - value, 1e-9) for value in lowest[str(n)]]
        axis.plot(RADII, unlike, "o-", color=colour, label=f"{n} samples")
    axis.set(xscale="log", yscale="log", xlabel="radius", ylabel="1 - rank correlation (worst)")
    axis.axhline(2e-4, color="black", linewidth=0.8, linestyle=":", label="published: .9998")
    axis.legend(frameon=False)
    results = {"radii": RADII, "spearman_lowest": lowest, "top_10_overlap_lowest": overlap}
    settings = {"seeds": seeds, "samples": SAMPLES, "reference_radius": 0.25, "site": "mlp"}
    save(args, results, figure, **settings, cotangent="ones")


if __name__ == "__main__":
    main()

"""Truth probes: does the direction of truth found in one set of statements hold in the others?

The paper (arXiv 2604.11962) trains a mass-mean probe on 80 % of `likely`, on the last token at
layer 12 of Llama-3.1-8B in bfloat16, with one seed, and tests it on the other sets. Mean accuracy:
0.721 on centroids, 0.596 on "latents". Its script compares the MLP's centroid with the *block's*
output; here both components are read, so that the matched places stand beside it.

    python examples/paper/truth_probes.py --data DIR --out truth                      # published
    python examples/paper/truth_probes.py --data DIR --small --model DIR --out truth

--data is a directory of CSV files with the columns statement and label, `likely.csv` among them.
--small takes 100 statements of each; the embedded model knows nothing of them, so name a model.
Areas under the ROC curve, which do not depend on the threshold, stand beside accuracies. --centre
centres each set at its own mean, as Marks and Tegmark do (arXiv 2310.06824). The whole report is in
OUT/report.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import EMBEDDED, parse, parser, save

import lch_plugin as lch
from lch_plugin.figures import ACTIVATIONS, CENTROIDS, GREY, new_figure

NAMES = {"accuracy": "accuracy", "auroc": "area under the ROC curve"}


def main() -> None:
    options = parser(__doc__, "meta-llama/Llama-3.1-8B")
    options.add_argument("--data", type=Path, required=True, help="directory of .csv files")
    options.add_argument("--layer", type=int, default=12)
    options.add_argument("--centre", action="store_true", help="each set at its own mean")
    args = parse(options)
    if args.model == EMBEDDED:
        options.error("the embedded model knows nothing of statements: name one with --model")

    sets = {path.stem: lch.probes.read_statements(path) for path in args.data.glob("*.csv")}
    if "likely" not in sets:
        options.error(f"{args.data} has no likely.csv, which the probe is trained on")
    if args.small:
        sets = {name: lch.probes.sample(one, 100, args.seed) for name, one in sets.items()}
    trained_on = sets.pop("likely")
    test = [sets[name] for name in sorted(sets)]
    lch.probes.check([trained_on], test)
    dtype = "float32" if args.small else "bfloat16"
    loaded = lch.load(args.model, dtype=dtype, device=args.device)
    found = lch.probes.run(
        loaded.bridge(),
        [trained_on],
        args.out / "report",
        test=test,
        layers=[args.layer],
        components=["mlp", "block"],
        centre=args.centre,
        seed=args.seed,
        revision=loaded.revision,
    )

    results: dict[str, Any] = {}
    print("other sets        accuracy  shuffled   AUROC  shuffled")
    for one in found["results"]:
        site, others = f"{one['component']} {one['part']}", one["summary"]["others"]
        results[site] = others
        means = [others[m][kind]["mean"] for m in others for kind in ("probe", "control")]
        print(f"{site:16}" + "".join(f"{mean:10.3f}" for mean in means))

    figure, axes = new_figure(9, 3.2, columns=2)
    colours = [CENTROIDS, ACTIVATIONS, ACTIVATIONS] * 2
    for axis, (measure, name) in zip(axes, NAMES.items(), strict=True):
        scores = [others[measure]["probe"] for others in results.values()]
        means = [score["mean"] for score in scores]
        axis.barh(
            list(results),
            means,
            xerr=[score["high"] - score["mean"] for score in scores],
            color=colours,
            ecolor=GREY,
        )
        axis.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
        axis.invert_yaxis()
        axis.set(xlim=(0, 1), title=f"{name}, mean over the other sets")
    save(args, results, figure, **{k: v for k, v in found["run"].items() if k != "model"})


if __name__ == "__main__":
    main()

"""Truth probes: does the direction of truth found in one set of statements hold in the others?

The paper (arXiv 2604.11962) trains a mass-mean probe on 80 % of `likely`, on the last token at
layer 12 of Llama-3.1-8B in bfloat16, with one seed, and tests it on the other sets. Mean accuracy:
0.721 on centroids, 0.596 on "latents". Its script compares the MLP's centroid with the *block's*
output; here both components are read, so that the matched places stand beside it.

    python examples/paper/truth_probes.py --data DIR                      # as published; a GPU
    python examples/paper/truth_probes.py --data DIR --small --model DIR  # a small model

--data is a directory of CSV files with the columns statement and label, `likely.csv` among them.
"""

import argparse
from pathlib import Path

import lch_plugin as lch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="meta-llama/Llama-3.1-8B")
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--small", action="store_true", help="100 statements of each set")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="truth-probes")
    options = parser.parse_args()

    sets = {path.stem: lch.probes.read_statements(path) for path in options.data.glob("*.csv")}
    if options.small:
        sets = {name: lch.probes.sample(one, 100, seed=0) for name, one in sets.items()}
    trained_on = sets.pop("likely")
    test = [sets[name] for name in sorted(sets)]
    lch.probes.check([trained_on], test)
    dtype = "float32" if options.small else "bfloat16"
    loaded = lch.load(options.model, dtype=dtype, device=options.device)
    found = lch.probes.run(
        loaded.bridge(),
        [trained_on],
        options.out,
        test=test,
        layers=[options.layer],
        components=["mlp", "block"],
        revision=loaded.revision,
    )
    print("site            others   control")
    for result in found["results"]:
        others = result["summary"]["others"]
        means = [f"{others[name]['mean']:.3f}" for name in ("accuracy", "control")]
        print(f"{result['component']:5} {result['part']:9} {means[0]:>6}   {means[1]:>6}")


if __name__ == "__main__":
    main()

"""Language saliency (the paper's text experiment), and whether its maps are any good.

The paper's setting: GPT-2, eight questions, the local centroid of the answer's log-probability at
the token embeddings, 24 samples, Gaussian noise of .05 of the embeddings' standard deviation. Its
figures show coloured tokens. Here the maps are judged too: deletion and insertion areas beside
Captum's methods, as differences from InputXGradient with bootstrap intervals over prompts.

    python examples/paper/language_saliency.py --out saliency           # gpt2, from the hub
    python examples/paper/language_saliency.py --small --out saliency   # the embedded model
    python examples/paper/language_saliency.py --model DIR --out saliency
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import bootstrap

import lch_plugin as lch
from lch_plugin.demo import DEMO_MODEL_DIR

CAPITALS = {
    "France": " Paris",
    "Italy": " Rome",
    "Germany": " Berlin",
    "Spain": " Madrid",
    "Japan": " Tokyo",
    "Russia": " Moscow",
    "Egypt": " Cairo",
    "Greece": " Athens",
}
SMALL = {
    "Tom saw an apple and picked an": " apple",
    "I climbed up the pear tree and picked a": " pear",
}


def interval(values: np.ndarray) -> list[float]:
    """Bootstrap interval of a mean, 95 %; the mean alone where values do not differ."""
    if np.ptp(values) == 0:
        return [float(values.mean())] * 2
    found = bootstrap((values,), np.mean, rng=np.random.default_rng(0), method="percentile")
    return [float(found.confidence_interval.low), float(found.confidence_interval.high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = DEMO_MODEL_DIR if args.small else args.model
    loaded = lch.load(source, dtype="float32")
    capitals = {f"The capital of {c} is": city for c, city in CAPITALS.items()}
    prompts = SMALL if args.small else capitals
    areas: dict[str, dict[str, list[float]]] = {}
    for prompt, answer in prompts.items():
        metric = lch.saliency.AnswerMetric(loaded, prompt, answer)
        by_seed = [lch.saliency.by_method(metric, seed=seed) for seed in range(args.seeds)]
        by_seed[0]["position, last first"] = torch.arange(len(metric.ids)).to(metric.embeddings)
        for name in by_seed[0]:
            # Only two methods draw noise; prompts are what the intervals are over.
            judged = [
                lch.saliency.curves(metric, metric.embeddings, s[name], metric.baseline)
                for s in by_seed
                if name in s
            ]
            kinds = areas.setdefault(name, {"deletion": [], "insertion": []})
            kinds["deletion"].append(float(np.mean([j.deletion_area for j in judged])))
            kinds["insertion"].append(float(np.mean([j.insertion_area for j in judged])))
    results = {"model": loaded.path.name, "seeds": args.seeds, "prompts": prompts, "methods": {}}
    for name, kinds in areas.items():
        print(f"{name:28}", end="")
        row = {}
        for kind, values in kinds.items():
            less = np.array(values) - np.array(areas["InputXGradient"][kind])
            row[kind] = {"areas": values, "mean": float(np.mean(values)), "less": interval(less)}
            low, high = row[kind]["less"]
            print(f"{kind} {np.mean(values):8.3f} [{low:+.2f}, {high:+.2f}]  ", end="")
        results["methods"][name] = row
        print()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=2))
    figure = Figure(figsize=(9, 3.5), dpi=150, layout="constrained")
    for column, kind in enumerate(("deletion", "insertion")):
        axis = figure.add_subplot(1, 2, column + 1)
        axis.barh(list(areas), [np.mean(kinds[kind]) for kinds in areas.values()])
        axis.invert_yaxis()
        axis.set_title(f"{kind} area, nats")
    figure.savefig(args.out / "areas.png")


if __name__ == "__main__":
    main()

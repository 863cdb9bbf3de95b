"""Language saliency (the paper's text experiment), and whether its maps are any good.

The paper's setting: GPT-2, eight questions, the local centroid of the answer's log-probability at
the token embeddings, 24 samples, Gaussian noise of .05 of the embeddings' standard deviation. Its
figures show coloured tokens. Here the maps are judged too: deletion and insertion areas beside
Captum's methods, as differences from Captum's Saliency, one plain gradient, with bootstrap
intervals over prompts; and how far input times detached centroid is from adding up to the logit.

    python examples/paper/language_saliency.py --out saliency           # gpt2, from the hub
    python examples/paper/language_saliency.py --small --out saliency   # the embedded model
    python examples/paper/language_saliency.py --model DIR --out saliency
"""

from __future__ import annotations

from statistics import fmean

import numpy as np
import torch
from common import EMBEDDED, parse, parser, save
from matplotlib.figure import Figure
from scipy.stats import bootstrap, spearmanr

import lch_plugin as lch
from lch_plugin.demo import DEMO_MODEL_DIR
from lch_plugin.saliency import AnswerMetric, Curves, by_method, completeness, curves

CAPITALS = {
    **{"France": " Paris", "Italy": " Rome", "Germany": " Berlin", "Spain": " Madrid"},
    **{"Japan": " Tokyo", "Russia": " Moscow", "Egypt": " Cairo", "Greece": " Athens"},
}
FACTS = {
    "The Eiffel Tower stands in the city of": " Paris",
    "Every water molecule has two atoms of hydrogen and one of": " oxygen",
    "The sun rises in the east and sets in the": " west",
    "The first president of the United States was George": " Washington",
    "Romeo and Juliet is a tragedy by William": " Shakespeare",
    "A week has seven days, and a year has twelve": " months",
    "The opposite of hot is": " cold",
    "Then Mary and John went to the store, and John gave a drink to": " Mary",
}
SMALL = {
    "Tom saw an apple and picked an": " apple",
    "I climbed up the pear tree and picked a": " pear",
}
REFERENCE = "Saliency"
DRAWN = ("local centroid, norm", "local centroid x input", "SmoothGrad")
KINDS = ("deletion", "insertion")


def prompts(model: str, chosen: str) -> dict[str, str]:
    """Answers by prompt: eight of one template, or eight unlike each other."""
    capitals = {f"The capital of {c} is": city for c, city in CAPITALS.items()}
    return SMALL if model == EMBEDDED else {"capitals": capitals, "facts": FACTS}[chosen]


def interval(values: np.ndarray) -> list[float]:
    """Bootstrap interval of a mean, 95 %; the mean alone where values do not differ."""
    if np.ptp(values) == 0:
        return [float(values.mean())] * 2
    found = bootstrap((values,), np.mean, rng=np.random.default_rng(0), method="percentile")
    return [float(found.confidence_interval.low), float(found.confidence_interval.high)]


def main() -> None:
    options = parser(__doc__, "gpt2")
    options.add_argument("--seeds", type=int, default=3, help="of the noise and of random orders")
    options.add_argument("--prompts", choices=("capitals", "facts"), default="facts")
    args = parse(options)
    source = DEMO_MODEL_DIR if args.model == EMBEDDED else args.model
    loaded = lch.load(source, dtype="float32", device=args.device)
    areas: dict[str, dict[str, list[float]]] = {}
    records = []
    for prompt, answer in prompts(args.model, args.prompts).items():
        metric = AnswerMetric(loaded, prompt, answer)
        scores = by_method(metric, seed=args.seed)
        every = [scores | {"position, last first": torch.arange(len(metric.ids)) + 0.0}]
        for seed in range(args.seed + 1, args.seed + args.seeds):
            every.append(by_method(metric, methods=DRAWN, seed=seed))
        for seed, one in enumerate(every, start=args.seed):
            draw = torch.Generator().manual_seed(seed)
            one["random order"] = torch.rand(len(metric.ids), generator=draw)
        found: dict[str, list[Curves]] = {}
        for name, values in [pair for one in every for pair in one.items()]:
            judged = curves(metric, metric.embeddings, values.to(args.device), metric.baseline)
            found.setdefault(name, []).append(judged)
        for name, judged in found.items():
            kinds = areas.setdefault(name, {kind: [] for kind in KINDS})
            for kind in KINDS:
                kinds[kind].append(fmean(getattr(one, f"{kind}_area") for one in judged))
        same = spearmanr(scores["local centroid, norm"].cpu(), scores[REFERENCE].cpu()).statistic
        logit = AnswerMetric(loaded, prompt, answer, quantity="logit")
        error = completeness(logit, logit.embeddings).error
        intact = float(found[REFERENCE][0].deletion[0])
        records.append(
            {"prompt": prompt, "tokens": len(metric.ids), "log_probability": intact}
            | {"rank_correlation_with_reference": float(same), "completeness_error": error}
        )
        print(records[-1])
    results: dict[str, dict[str, dict[str, object]]] = {}
    for name, kinds in areas.items():
        print(f"{name:28}", end="")
        for kind, values in kinds.items():
            less = interval(np.array(values) - np.array(areas[REFERENCE][kind]))
            row = {"areas": values, "mean": fmean(values), "less_reference": less}
            results.setdefault(name, {})[kind] = row
            print(f"{kind} {fmean(values):8.3f} [{less[0]:+.2f}, {less[1]:+.2f}]  ", end="")
        print()
    figure = Figure(figsize=(9, 3.5), dpi=150, layout="constrained")
    for column, kind in enumerate(KINDS):
        axis = figure.add_subplot(1, 2, column + 1)
        axis.barh(list(areas), [fmean(kinds[kind]) for kinds in areas.values()])
        axis.invert_yaxis()
        axis.set_title(f"{kind} area, nats")
    save(args, {"prompts": records, "methods": results}, figure, reference=REFERENCE)


if __name__ == "__main__":
    main()

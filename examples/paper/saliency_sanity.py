"""Are saliency maps of the model at all? (Adebayo et al., "Sanity Checks", arXiv 1810.03292)

Not in the paper. Weights are shuffled block by block from the top, and the scores of the tokens of
several prompts are compared by rank with those of the intact model. Scores of a method that looks
at the model become unrelated. Ranks are within each prompt, and pooled.

    python examples/paper/saliency_sanity.py --out sanity           # gpt2, from the hub
    python examples/paper/saliency_sanity.py --small --out sanity   # the embedded model
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

import torch
from common import EMBEDDED, parse, parser, save
from language_saliency import prompts
from matplotlib.figure import Figure
from scipy.stats import spearmanr

import lch_plugin as lch
from lch_plugin.demo import DEMO_MODEL_DIR
from lch_plugin.saliency import AnswerMetric, randomisation, text


def ranks(scores: torch.Tensor) -> torch.Tensor:
    """From 0, the lowest, to 1."""
    return scores.argsort().argsort().to(torch.float64) / max(1, len(scores) - 1)


def detached(metric: AnswerMetric) -> torch.Tensor:
    mu = lch.centroid(lch.detached(metric), metric.embeddings[None])[0]
    return (mu * metric.embeddings).sum(-1)


def main() -> None:
    options = parser(__doc__, "gpt2")
    options.add_argument("--seeds", type=int, default=3, help="of the shuffling")
    options.add_argument("--samples", type=int, default=4, help="of the local centroid")
    options.add_argument("--prompts", choices=("capitals", "facts"), default="facts")
    args = parse(options)
    source = DEMO_MODEL_DIR if args.model == EMBEDDED else args.model
    loaded = lch.load(source, dtype="float32", device=args.device)
    asked = prompts(args.model, args.prompts)
    metrics = [AnswerMetric(loaded, prompt, answer) for prompt, answer in asked.items()]
    methods: dict[str, Callable[[AnswerMetric], torch.Tensor]] = {
        "local centroid, norm": lambda metric: text(metric, n_samples=args.samples).norm,
        "detached centroid x input": detached,
    }
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axis = figure.add_subplot()
    results = {}
    for (name, method), style in zip(methods.items(), ("o-", "s--"), strict=True):
        runs = [
            randomisation(
                loaded.model,
                lambda method=method: torch.cat([ranks(method(m)) for m in metrics]),
                seed=seed,
            )
            for seed in range(args.seed, args.seed + args.seeds)
        ]
        scores = torch.cat([ranks(method(m)) for m in metrics])
        known = {
            "position": [torch.arange(len(m.ids)) + 0.0 for m in metrics],
            "length of the embedding": [m.embeddings.norm(dim=-1) for m in metrics],
        }
        with_known = {
            of: float(spearmanr(scores.cpu(), torch.cat(list(map(ranks, values))).cpu()).statistic)
            for of, values in known.items()
        }
        stages = list(runs[0])
        mean = [fmean(run[stage] for run in runs) for stage in stages]
        print(name, {of: round(value, 2) for of, value in with_known.items()})
        for stage, value in zip(stages, mean, strict=True):
            every = " ".join(f"{run[stage]:+.2f}" for run in runs)
            print(f"  {stage:28} {value:+.3f}   {every}")
        axis.plot(mean, style, label=name, markersize=4)
        by_stage = {stage: [run[stage] for run in runs] for stage in stages}
        results[name] = {"correlation": with_known, "stages": by_stage}
    axis.set_xticks(range(len(stages)), stages, rotation=90, fontsize=7)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set_ylabel("rank correlation with the intact model")
    axis.legend()
    save(args, results, figure, asked=asked)


if __name__ == "__main__":
    main()

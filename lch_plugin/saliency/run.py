"""What ``lch saliency`` does: an answer's token scores by method, judged, as a report."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch

from lch_plugin.files import claimed, portable, write_directory
from lch_plugin.loading import LoadedModel
from lch_plugin.report import write_report
from lch_plugin.saliency.answers import AnswerMetric
from lch_plugin.saliency.drawing import coloured, curve_figure, token_bars
from lch_plugin.saliency.judging import curves
from lch_plugin.saliency.scores import by_method


def run(
    loaded: LoadedModel,
    prompt: str,
    answer: str,
    out: str | Path,
    *,
    foil: str | None = None,
    n_samples: int = 24,
    sigma: float = 0.05,
    seed: int = 0,
) -> None:
    """Score the tokens of a prompt by every method, judge the scores, and write a report.

    Args:
        loaded: a language model with its tokenizer.
        prompt, answer, foil: as `AnswerMetric`.
        out: directory to make.
        n_samples, sigma, seed: as `lch_plugin.saliency.text`.

    Raises:
        InputError: as `AnswerMetric` and `lch_plugin.saliency.text`.
        ToolkitError: Captum is not installed.
        OutputError: ``out`` holds other content or cannot be written.
    """
    metric = AnswerMetric(loaded, prompt, answer, foil)
    with claimed(out) as out:
        x = metric.embeddings
        scores = by_method(metric, n_samples=n_samples, sigma=sigma, seed=seed)
        judged = {}
        for name, values in scores.items():
            found = curves(metric, x, values, metric.baseline)
            judged[name] = {
                "scores": values.tolist(),
                "deletion": found.deletion.tolist(),
                "insertion": found.insertion.tolist(),
                "deletion_area": found.deletion_area,
                "insertion_area": found.insertion_area,
            }
        with torch.no_grad():
            value = float(metric(x[None]))
        results = {
            "run": {
                "model": portable(loaded.name),
                "revision": loaded.revision,
                "dtype": str(loaded.model.dtype),
                "site": "token embeddings",
                "n_samples": n_samples,
                "sigma": sigma,
                "noise": sigma * float(x.std()),
                "seed": seed,
                "versions": {
                    name: version(name)
                    for name in ("lch-plugin", "torch", "transformers", "captum")
                },
            },
            "prompt": prompt,
            "tokens": metric.tokens,
            "answer": answer,
            "foil": foil,
            "value": value,
            "methods": judged,
        }
        figures = {
            "tokens": token_bars(metric.tokens, {k: v.tolist() for k, v in scores.items()}),
            "curves": curve_figure(judged, "nats"),
        }
        html = {name: coloured(metric.tokens, v.tolist()) for name, v in scores.items()}
        write_directory(
            out, lambda it: write_report(it, "saliency.html", results, figures, {"html": html})
        )

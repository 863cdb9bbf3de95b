"""What ``lch saliency`` does: scores of an answer or a class by method, judged, as a report."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from lch_plugin.errors import InputError
from lch_plugin.files import claimed, portable, write_directory
from lch_plugin.loading import LoadedModel
from lch_plugin.report import write_report
from lch_plugin.saliency.answers import AnswerMetric
from lch_plugin.saliency.checks import captum_attr
from lch_plugin.saliency.classes import ClassMetric, image_curves
from lch_plugin.saliency.drawing import coloured, curve_figure, pixel_maps, token_bars
from lch_plugin.saliency.image_files import as_model_takes_it
from lch_plugin.saliency.image_maps import Neighbourhood
from lch_plugin.saliency.image_methods import image_by_method
from lch_plugin.saliency.judging import Curves, curves
from lch_plugin.saliency.scores import by_method

MAPS = "maps.safetensors"


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
    captum_attr()
    if loaded.model.main_input_name != "input_ids":
        raise InputError(
            f"{loaded.name} reads {loaded.model.main_input_name}, no prompt: give a language "
            "model, or --image in place of the prompt."
        )
    metric = AnswerMetric(loaded, prompt, answer, foil)
    with claimed(out) as out:
        x = metric.embeddings
        scores = by_method(metric, n_samples=n_samples, sigma=sigma, seed=seed)
        judged = {n: _row(curves(metric, x, s, metric.baseline)) for n, s in scores.items()}
        for name, values in scores.items():
            judged[name]["scores"] = values.tolist()
        special = set(getattr(loaded.processor, "all_special_ids", ()))
        results = {
            "run": {
                **_about(loaded),
                "site": "token embeddings",
                "n_samples": n_samples,
                "sigma": sigma,
                "noise": sigma * float(x.std()),
                "seed": seed,
            },
            "prompt": prompt,
            "tokens": metric.tokens,
            "special": [i for i, token in enumerate(metric.ids.tolist()) if token in special],
            "answer": answer,
            "foil": foil,
            "value": float(judged["Saliency"]["deletion"][0]),
            "integrated_gradients_error": _missed(judged, scores),
            "methods": judged,
        }
        figures = {
            "tokens": token_bars(metric.tokens, {k: v.tolist() for k, v in scores.items()}),
            "curves": curve_figure(judged, "nats", "tokens"),
        }
        html = {name: coloured(metric.tokens, v.tolist()) for name, v in scores.items()}
        write_directory(
            out, lambda it: write_report(it, "saliency.html", results, figures, {"html": html})
        )


def run_image(
    loaded: LoadedModel,
    picture: Image.Image,
    out: str | Path,
    *,
    name: str,
    target: int | None = None,
    sigma: float | None = None,
    radius: float | None = None,
    n_samples: int = 30,
    seed: int = 0,
) -> None:
    """Score the pixels of a picture by every method, judge the scores, and write a report.

    Args:
        loaded: a model for image classification with its image processor.
        picture: from `read_picture`.
        out: directory to make.
        name: of the picture.
        target: a class; the predicted one if None.
        sigma, radius, n_samples, seed: as `lch_plugin.saliency.images`.

    Raises:
        InputError: as `ClassMetric` and `image_by_method`, or the model reads no images.
        ToolkitError: Captum is not installed.
        OutputError: ``out`` holds other content or cannot be written.
    """
    captum_attr()
    around = Neighbourhood(sigma, radius)
    metric = ClassMetric(loaded, as_model_takes_it(picture, loaded), target)
    with claimed(out) as out:
        maps = image_by_method(metric, sigma=sigma, radius=radius, n_samples=n_samples, seed=seed)
        judged = {n: _row(image_curves(metric, scores)) for n, scores in maps.items()}
        image = metric.image
        results = {
            "run": {
                **_about(loaded),
                "site": "pixels",
                "neighbourhood": str(around),
                "n_samples": n_samples,
                "sigma": around.sigma,
                "radius": around.radius,
                "range": float(image.max() - image.min()),
                "noise": around.deviation(image),
                "seed": seed,
            },
            "image": name,
            "shape": list(image.shape),
            "target": metric.target,
            "label": metric.label,
            "predicted": metric.predicted,
            "predicted_label": metric.name(metric.predicted),
            "value": float(judged["Saliency"]["deletion"][0]),
            "integrated_gradients_error": _missed(judged, maps),
            "methods": judged,
        }
        figures = {
            "maps": pixel_maps(image, maps),
            "curves": curve_figure(judged, "nats", "pixels"),
        }

        def write(it: Path) -> None:
            write_report(it, "saliency_image.html", results, figures)
            tensors = {"image": image, **maps}
            save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, it / MAPS)

        write_directory(out, write)


def _about(loaded: LoadedModel) -> dict[str, Any]:
    toolkits = ("lch-plugin", "torch", "transformers", "captum")
    return {
        "model": portable(loaded.name),
        "revision": loaded.revision,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "versions": {toolkit: version(toolkit) for toolkit in toolkits},
    }


def _row(found: Curves) -> dict[str, Any]:
    return {
        "counts": found.counts.tolist(),
        "deletion": found.deletion.tolist(),
        "insertion": found.insertion.tolist(),
        "deletion_area": found.deletion_area,
        "insertion_area": found.insertion_area,
    }


def _missed(judged: Mapping[str, Mapping[str, Any]], scores: Mapping[str, Tensor]) -> float:
    """How far IntegratedGradients are from adding up to what replacing everything changes."""
    name = "IntegratedGradients"
    change = judged[name]["deletion"][0] - judged[name]["deletion"][-1]
    return abs(float(scores[name].sum()) - change)

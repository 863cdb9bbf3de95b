"""Measure the vision model on held-out digits: ``python -m lch_plugin.demo.vision.evaluate``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Generator, Tensor
from transformers import Dinov2Model

from lch_plugin.demo.vision import DEMO_VISION_MODEL_DIR, load_demo_vision_model
from lch_plugin.demo.vision.augment import augment
from lch_plugin.demo.vision.images import N_CLASSES, digits, normalise, pixels
from lch_plugin.demo.vision.train import Recipe
from lch_plugin.errors import InputError

_N_RANDOM = 5
_BATCH_SIZE = 256
_TEMPERATURE = 0.07
_VIEWS_SEED = 0


@dataclass(frozen=True)
class Score:
    """How well held-out digits are told apart by frozen features.

    Attributes:
        knn: Accuracy of the ten nearest training images by cosine.
        knn_views: The same of random large views of the held-out images, as in training.
        linear: Accuracy of logistic regression on standardised features.
    """

    knn: float
    knn_views: float
    linear: float


class _Images(NamedTuple):
    """What is asked (whole held-out images and views of them), and the bank to answer from."""

    bank: Float[Tensor, "train 1 32 32"]
    bank_labels: Int[Tensor, " train"]
    whole: Float[Tensor, "test 1 32 32"]
    views: Float[Tensor, "test 1 32 32"]
    labels: Int[Tensor, " test"]


def features(
    model: Dinov2Model, images: Float[Tensor, "image 1 height width"]
) -> dict[str, Float[Tensor, "image d_model"]]:
    """What ``model`` makes of ``images``: its CLS token, and the mean of its patch tokens."""
    with torch.no_grad():
        tokens = torch.cat(
            [model(batch.to(model.device)).last_hidden_state for batch in images.split(_BATCH_SIZE)]
        ).cpu()
    return {"CLS": tokens[:, 0], "mean patch": tokens[:, 1:].mean(dim=1)}


def evaluate(model: Dinov2Model) -> dict[str, Score]:
    """Score the features of ``model`` on the held-out digits, with the training digits as bank."""
    images = _images()
    banks, wholes, views = (
        features(model, some) for some in (images.bank, images.whole, images.views)
    )
    return {
        name: score(bank, images.bank_labels, wholes[name], views[name], images.labels)
        for name, bank in banks.items()
    }


def score_pixels() -> Score:
    """Score the images themselves."""
    images = _images()
    bank, whole, views = (x.flatten(1) for x in (images.bank, images.whole, images.views))
    return score(bank, images.bank_labels, whole, views, images.labels)


def score_untrained(model: Dinov2Model, n: int = _N_RANDOM) -> dict[str, Score]:
    """Average score of ``n`` networks like ``model`` with the weights that training begins with."""
    scores = []
    with torch.random.fork_rng(devices=[]):
        for seed in range(n):
            torch.manual_seed(seed)
            scores.append(evaluate(Dinov2Model(model.config).eval()))
    return {
        name: Score(
            knn=sum(each[name].knn for each in scores) / n,
            knn_views=sum(each[name].knn_views for each in scores) / n,
            linear=sum(each[name].linear for each in scores) / n,
        )
        for name in scores[0]
    }


def score(
    bank: Float[Tensor, "train feature"],
    bank_labels: Int[Tensor, " train"],
    whole: Float[Tensor, "test feature"],
    views: Float[Tensor, "test feature"],
    labels: Int[Tensor, " test"],
) -> Score:
    """Score one kind of feature, by neighbours and by a linear probe."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(bank.numpy(), bank_labels.numpy())
    return Score(
        knn=_accuracy(knn(bank, bank_labels, whole), labels),
        knn_views=_accuracy(knn(bank, bank_labels, views), labels),
        linear=float(probe.score(whole.numpy(), labels.numpy())),
    )


def knn(
    bank: Float[Tensor, "train feature"],
    labels: Int[Tensor, " train"],
    queries: Float[Tensor, "test feature"],
    k: int = 10,
) -> Int[Tensor, " test"]:
    """The label that the ``k`` nearest of ``bank`` by cosine vote for; near ones count for more.

    Raises:
        InputError: the bank has no ``k`` members.
    """
    if not 0 < k <= len(bank):
        raise InputError(f"There are no {k} neighbours in a bank of {len(bank)}. Choose another k.")
    bank, queries = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (bank, queries))
    similarity, nearest = (queries @ bank.T).topk(k, dim=-1)
    # Weights relative to the nearest: only ratios count, and none of them overflows.
    weight = ((similarity - similarity[:, :1]) / _TEMPERATURE).exp()
    votes = torch.zeros(len(queries), N_CLASSES, dtype=weight.dtype)
    return votes.scatter_add_(1, labels[nearest], weight).argmax(dim=-1)


def _images() -> _Images:
    bank, bank_labels = digits("train")
    ink, labels = pixels("test")
    views = augment(ink, Recipe().large_views, Generator().manual_seed(_VIEWS_SEED))
    return _Images(bank, bank_labels, normalise(ink), normalise(views), labels)


def _accuracy(found: Int[Tensor, " test"], labels: Int[Tensor, " test"]) -> float:
    return float((found == labels).double().mean())


def main() -> None:
    """Print the scores of a model, of untrained ones and of the pixels as a table."""
    parser = argparse.ArgumentParser(description="Measure the vision model on held-out digits.")
    parser.add_argument("--model", type=Path, default=DEMO_VISION_MODEL_DIR)
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    arguments = parser.parse_args()
    model = load_demo_vision_model(arguments.model)
    scores = {f"trained, {name}": each for name, each in evaluate(model).items()}
    scores |= {f"untrained, {name}": each for name, each in score_untrained(model).items()}
    scores["pixels"] = score_pixels()
    table = Table("features", "kNN", "kNN of views", "linear probe")
    for name, each in scores.items():
        table.add_row(name, *(f"{value:.3f}" for value in astuple(each)))
    Console().print(table)
    if arguments.json:
        written = {name: asdict(each) for name, each in scores.items()}
        arguments.json.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()

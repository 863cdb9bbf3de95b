"""Whether scores are any good: deletion, insertion, and randomised weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor, nn

from lch_plugin.errors import InputError


@dataclass(frozen=True)
class Curves:
    """The metric as tokens go, and as they come, in the order of a score.

    Attributes:
        deletion: after 0, 1, ... all tokens are replaced, the highest scores first.
        insertion: after 0, 1, ... all tokens are put back into a prompt of replaced ones.
        deletion_area, insertion_area: mean height, by the trapezoidal rule, in units of the metric.
            Good scores have a low one of deletion and a high one of insertion.
    """

    deletion: Float[Tensor, " step"]
    insertion: Float[Tensor, " step"]

    @property
    def deletion_area(self) -> float:
        return _area(self.deletion)

    @property
    def insertion_area(self) -> float:
        return _area(self.insertion)


def curves(
    metric: Callable[[Tensor], Tensor],
    x: Float[Tensor, "pos d"],
    scores: Float[Tensor, " pos"],
    baseline: Float[Tensor, " d"],
) -> Curves:
    """Deletion and insertion (Petsiuk et al., RISE, arXiv 1806.07421) of rows of an input.

    Args:
        metric: of inputs ``(n, pos, d)``.
        x: what the scores are of.
        scores: one a row.
        baseline: what a row becomes when it is removed.

    Raises:
        InputError: not one finite score a row.

    Example:
        >>> x, weights = torch.eye(2), torch.tensor([1.0, 3.0])
        >>> found = lch.saliency.curves(lambda x: x.sum(1) @ weights, x, weights, torch.zeros(2))
        >>> found.deletion.tolist(), found.insertion.tolist()
        ([4.0, 1.0, 0.0], [0.0, 3.0, 4.0])
    """
    if scores.shape != x.shape[:1] or not bool(scores.isfinite().all()):
        raise InputError(
            f"scores of shape {tuple(scores.shape)} have to be one finite number for each of the "
            f"{len(x)} rows."
        )
    rank = scores.argsort(descending=True, stable=True).argsort()
    first = rank[None] < torch.arange(len(x) + 1, device=x.device)[:, None]
    gone = baseline.expand_as(x)
    with torch.no_grad():
        deletion = metric(torch.where(first[..., None], gone, x))
        insertion = metric(torch.where(first[..., None], x, gone))
    return Curves(deletion, insertion)


def randomisation(
    model: nn.Module, scores: Callable[[], Tensor], *, seed: int = 0
) -> dict[str, float]:
    """Rank correlation of scores with those of the intact model, as weights are randomised.

    Layers go one after the other from the output down, and stay so (cascading; Adebayo et al.,
    "Sanity Checks for Saliency Maps", arXiv 1810.03292). The entries of each weight are shuffled,
    which keeps their sizes. Scores that do not fall towards 0 are not of the model. Weights are as
    they were afterwards.

    Args:
        model: whose weights are shuffled.
        scores: computes them, with the model as it then is.
        seed: of the shuffling.

    Returns:
        Spearman's correlation after each layer, by its name, from the top.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
        >>> list(lch.saliency.randomisation(net, lambda: lch.centroid(net, torch.ones(3))))
        ['1', '0']
    """
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, list[nn.Parameter]] = {}
    for name, weight in model.named_parameters():
        layers.setdefault(_layer(name), []).append(weight)
    before, found = scores().detach().flatten().cpu(), {}
    with _restored(model), torch.no_grad():
        for layer, weights in reversed(layers.items()):
            for weight in weights:
                order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
                weight.copy_(weight.flatten()[order].view_as(weight))
            after = scores().detach().flatten().cpu()
            found[layer] = float(spearmanr(before.double(), after.double()).statistic)
    return found


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    kept = [(weight, weight.detach().clone()) for weight in model.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in kept:
                weight.copy_(value)


def _layer(name: str) -> str:
    """The block of a weight, or its module if it is in none."""
    block = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return block[0] if block else name.rpartition(".")[0]


def _area(curve: Tensor) -> float:
    return float(torch.trapezoid(curve) / (len(curve) - 1))

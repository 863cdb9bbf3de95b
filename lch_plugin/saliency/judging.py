"""Whether scores are any good: deletion, insertion, and randomised weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.stats import spearmanr
from torch import Tensor, nn

from lch_plugin.adapters.checks import check_finite
from lch_plugin.errors import InputError


@dataclass(frozen=True)
class Curves:
    """The metric as rows of an input go, and as they come, in the order of a score.

    Attributes:
        counts: how many rows are replaced, or put back, at each step: 0, ... all.
        deletion: after so many are replaced, the highest scores first.
        insertion: after so many are put back into an input of replaced ones.
        deletion_area, insertion_area: mean height, by the trapezoidal rule, in units of the metric.
            Good scores have a low one of deletion and a high one of insertion.
    """

    counts: Int[Tensor, " step"]
    deletion: Float[Tensor, " step"]
    insertion: Float[Tensor, " step"]

    @property
    def deletion_area(self) -> float:
        return self._area(self.deletion)

    @property
    def insertion_area(self) -> float:
        return self._area(self.insertion)

    def _area(self, curve: Tensor) -> float:
        return float(torch.trapezoid(curve, self.counts.to(curve)) / int(self.counts[-1]))


def curves(
    metric: Callable[[Tensor], Tensor],
    x: Float[Tensor, "pos d"],
    scores: Float[Tensor, " pos"],
    baseline: Float[Tensor, " d"],
    *,
    steps: int | None = None,
    chunk: int = 32,
) -> Curves:
    """Deletion and insertion (Petsiuk et al., RISE, arXiv 1806.07421) of rows of an input.

    Rows of equal scores go in the order in which they stand.

    Args:
        metric: of inputs ``(n, pos, d)``.
        x: what the scores are of.
        scores: one a row.
        baseline: what a row becomes when it is removed.
        steps: in how many steps, of as many rows each as can be; one row a step if None.
        chunk: inputs that run together.

    Raises:
        InputError: not one finite score a row, or ``steps`` or ``chunk`` below 1.
        NonFiniteError: the metric is not finite.

    Example:
        >>> x, weights = torch.eye(2), torch.tensor([1.0, 3.0])
        >>> found = lch.saliency.curves(lambda x: x.sum(1) @ weights, x, weights, torch.zeros(2))
        >>> found.deletion.tolist(), found.insertion.tolist()
        ([4.0, 1.0, 0.0], [0.0, 3.0, 4.0])
    """
    n = len(x)
    if scores.shape != (n,) or not bool(scores.isfinite().all()):
        raise InputError(
            f"scores of shape {tuple(scores.shape)} have to be one finite number for each of the "
            f"{n} rows."
        )
    steps = n if steps is None else min(steps, n)
    if steps < 1 or chunk < 1:
        raise InputError(f"steps={steps}, chunk={chunk}: each has to be at least 1.")
    counts = torch.linspace(0, n, steps + 1, dtype=torch.float64).round().long()
    rank = scores.argsort(descending=True, stable=True).argsort()
    gone = baseline.expand_as(x)
    found: dict[bool, list[Tensor]] = {True: [], False: []}
    with torch.no_grad():
        for part in counts.to(x.device).split(chunk):
            first = (rank < part[:, None])[..., None]
            for deleted, kept in found.items():
                kept.append(metric(torch.where(first == deleted, gone, x)))
    deletion, insertion = (torch.cat(found[deleted]) for deleted in (True, False))
    check_finite("the curve of deletion", deletion)
    check_finite("the curve of insertion", insertion)
    return Curves(counts, deletion, insertion)


def randomisation(
    model: nn.Module, scores: Callable[[], Tensor], *, seed: int = 0
) -> dict[str, float]:
    """Rank correlation of scores with those of the intact model, as weights are randomised.

    Layers go one after the other from the output down, and stay so (cascading; Adebayo et al.,
    "Sanity Checks for Saliency Maps", arXiv 1810.03292). The entries of each weight are shuffled,
    which keeps their sizes: a norm whose weights are all ones stays as it is, and so do running
    means of batch normalisation. An unembedding that shares its table with the embedding goes with
    it, at the end. Scores that do not fall towards 0 are not of the model. Weights are as they were
    afterwards.

    Args:
        model: whose weights are shuffled.
        scores: computes them, with the model as it then is.
        seed: of the shuffling.

    Returns:
        Spearman's correlation after each layer, by its name, from the top; NaN where all scores are
        equal.

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

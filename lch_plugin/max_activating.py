"""Where in a text a neuron or an SAE feature is most active."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ActivatingExample:
    """A stretch of text around one peak.

    Attributes:
        tokens: the text, token by token.
        values: activation at each token.
        peak: index of the peak among ``tokens``.
    """

    tokens: list[str]
    values: list[float]
    peak: int


def max_activating_examples(
    values: Float[Tensor, "row pos"],
    tokens: Sequence[Sequence[str]],
    n: int = 5,
    *,
    before: int = 14,
    after: int = 5,
) -> list[ActivatingExample]:
    """The ``n`` highest peaks, at most one a row, each with the text around it.

    Rows that never rise above zero have no peak, so fewer may come back.

    Args:
        values: activation of one neuron or feature at each token.
        tokens: the text of each row, token by token.
        n: how many contexts.
        before: tokens shown before the peak.
        after: tokens shown after it.
    """
    peaks, positions = values.max(-1)
    examples = []
    for row in peaks.argsort(descending=True, stable=True)[:n].tolist():
        if peaks[row] <= 0:
            break
        examples.append(
            activating_example(values[row], tokens[row], int(positions[row]), before, after)
        )
    return examples


def activating_example(
    values: Float[Tensor, " pos"],
    tokens: Sequence[str],
    position: int,
    before: int = 14,
    after: int = 5,
) -> ActivatingExample:
    """The text around one token of a row, which counts as the peak."""
    window = slice(max(0, position - before), position + after + 1)
    return ActivatingExample(
        tokens=list(tokens[window]),
        values=values[window].tolist(),
        peak=position - window.start,
    )

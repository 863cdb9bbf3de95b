"""What a circuit is about: one number a prompt, computed from the logits, in logits or nats.

Everything in this package scores nodes by such a metric, and a positive score means that removing
the node lowers it.

`logit_difference` is linear in the logits. The logits of the frozen model are an affine function of
what a node holds, so there a score is exactly what removing the node takes from the metric. The
other metrics are not linear: their scores are in nats, and of the change to first order, by the
gradient at the logits of the clean prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lch_plugin.cotangents import Metric
from lch_plugin.errors import InputError
from lch_plugin.mlp import at_least_float32
from lch_plugin.sites import integers

#: For each prompt, the ids of some tokens.
TokenLists: TypeAlias = Sequence[Sequence[int]]
#: What makes a metric of the answers and the foils of prompts, and a position.
Comparison: TypeAlias = Callable[..., Metric]


@dataclass(frozen=True, eq=False)
class Compared(Metric):
    """A metric that compares answers with foils, and knows them: it can be written to a file.

    Attributes:
        answers, foils: token ids, for each prompt.
    """

    answers: TokenLists = ()
    foils: TokenLists = ()

    def of_rows(self, rows: Sequence[int], n: int) -> Metric:
        """The metric of some of the prompts, as `Metric.of_rows`."""
        make = COMPARISONS[self.name]
        answers, foils = ([side[row] for row in rows] for side in (self.answers, self.foils))
        return make(answers, foils, self._position)

    def beside(self, other: Metric, n: int) -> Metric:
        """The metric of the prompts of both, as `Metric.beside`."""
        if not isinstance(other, Compared) or (other.name, other.position) != (
            self.name,
            self.position,
        ):
            return super().beside(other, n)
        answers, foils = [*self.answers, *other.answers], [*self.foils, *other.foils]
        return COMPARISONS[self.name](answers, foils, self._position)

    @property
    def _position(self) -> int:
        assert self.position is not None
        return self.position


def logit_difference(answers: TokenLists, foils: TokenLists, position: int = -1) -> Metric:
    """Mean logit of the answers minus mean logit of the foils, in logits. Linear in the logits.

    Args:
        answers: token ids that are right, for each prompt.
        foils: token ids to compare them with, for each prompt.
        position: whose logits count, among each prompt's own tokens.

    Raises:
        InputError: a prompt without answer or foil, a token that is both, or no lists of token ids.
    """
    right, wrong = _sides(answers, foils)

    def value(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
        at = logits[:, -1]
        return right.mean(at) - wrong.mean(at)

    return Compared(value, "logit_difference", position, right.listed, wrong.listed)


def log_odds(answers: TokenLists, foils: TokenLists, position: int = -1) -> Metric:
    """How much more likely the answers are than the foils, in nats: ``log P(answers)/P(foils)``.

    The difference of two log-sum-exps: it weighs answers and foils as the softmax does, and is not
    linear in the logits. With one answer and one foil it is their logit difference.

    Args, Raises:
        As `logit_difference`.
    """
    right, wrong = _sides(answers, foils)

    def value(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
        at = logits[:, -1]
        return right.logsumexp(at) - wrong.logsumexp(at)

    return Compared(value, "log_odds", position, right.listed, wrong.listed)


#: Metrics that compare answers with foils, by name.
COMPARISONS: Mapping[str, Comparison] = {
    "logit_difference": logit_difference,
    "log_odds": log_odds,
}


def log_probability(answers: TokenLists, position: int = -1) -> Metric:
    """Log-probability that the next token is one of the answers, in nats. Not linear.

    Args:
        answers: token ids that are right, for each prompt.
        position: whose logits count, among each prompt's own tokens.

    Raises:
        InputError: a prompt without an answer, or no lists of token ids.
    """
    right = _Tokens(answers, "answer")

    def value(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
        at = logits[:, -1]
        return right.logsumexp(at) - at.logsumexp(-1)

    return Metric(value, "log_probability", position)


def kl_divergence(reference: Float[Tensor, "batch pos d_vocab"], position: int = -1) -> Metric:
    """``KL(reference || model)`` of the next-token distributions, in nats. Not linear.

    Its gradient vanishes where the model gives the reference itself: to attribute on a prompt, take
    the logits of its corrupt twin as reference.

    Args:
        reference: logits to compare with, one row a prompt.
        position: whose logits count, among each prompt's own tokens; the reference has no padding.
    """
    # Not under inference_mode, whose tensors no gradient can be computed with.
    with torch.inference_mode(False), torch.no_grad():
        at = Metric(lambda logits: logits[:, -1], "reference", position).of(reference).clone()
        log_p = at.to(at_least_float32(at)).log_softmax(-1)

    def value(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
        log_q = logits[:, -1].log_softmax(-1)
        if log_q.shape != log_p.shape:
            raise InputError(
                f"the reference has {tuple(log_p.shape)} logits for prompts and tokens, and the "
                f"model gave {tuple(log_q.shape)}."
            )
        own = log_p.to(log_q.device)
        return (own.exp() * (own - log_q)).sum(-1)

    return Metric(value, "kl_divergence", position)


def _sides(answers: TokenLists, foils: TokenLists) -> tuple[_Tokens, _Tokens]:
    """Answers and foils of the same prompts, without a token that is both."""
    sides = _Tokens(answers, "answer"), _Tokens(foils, "foil")
    if len(answers) != len(foils):
        raise InputError(f"{len(answers)} prompts have answers and {len(foils)} have foils.")
    for right, wrong in zip(answers, foils, strict=True):
        both = sorted(set(right) & set(wrong))
        if both:
            raise InputError(f"tokens {both} are both answer and foil: they do not differ.")
    return sides


def _ids(tokens: Sequence[int], role: str) -> list[int]:
    """The tokens of one prompt, each once: twice would count it twice."""
    found = integers(tokens) if isinstance(tokens, Iterable) else None
    if found is None:
        raise InputError(
            f"each prompt has a list of token ids for its {role}s, as in [[3], [4, 5]]; got "
            f"{tokens!r} for one."
        )
    return list(dict.fromkeys(found))


class _Tokens:
    """One or several tokens for each prompt."""

    def __init__(self, tokens: TokenLists, role: str) -> None:
        self.listed = listed = (
            [_ids(one, role) for one in tokens] if isinstance(tokens, Sequence) else []
        )
        if not all(listed) or not listed:
            raise InputError(
                f"every prompt needs at least one {role}, as in [[3], [4, 5]]; got {tokens}."
            )
        longest = max(map(len, listed))
        with torch.inference_mode(False):  # Gradients are computed with them.
            self._ids: Int[Tensor, "batch n"] = torch.tensor(
                [[*one, *[one[0]] * (longest - len(one))] for one in listed]
            )
            self._real: Bool[Tensor, "batch n"] = torch.tensor(
                [[i < len(one) for i in range(longest)] for one in listed]
            )

    def mean(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
        return self._chosen(logits, 0.0).sum(-1) / self._real.to(logits.device).sum(-1)

    def logsumexp(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
        return self._chosen(logits, -torch.inf).logsumexp(-1)

    def _chosen(
        self, logits: Float[Tensor, "batch d_vocab"], padding: float
    ) -> Float[Tensor, "batch n"]:
        """Their logits, with padding where a prompt has fewer tokens than another."""
        if len(logits) != len(self._ids):
            raise InputError(
                f"the metric was made for {len(self._ids)} prompts and got {len(logits)}."
            )
        outside = self._ids[(self._ids < 0) | (self._ids >= logits.shape[-1])]
        if len(outside):
            raise InputError(
                f"tokens {sorted(set(outside.tolist()))} leave the model's vocabulary, 0 to "
                f"{logits.shape[-1] - 1}."
            )
        chosen = logits.gather(-1, self._ids.to(logits.device))
        return chosen.masked_fill(~self._real.to(logits.device), padding)

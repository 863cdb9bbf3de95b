"""What a model says, as one number a prompt, computed from the logits, in logits or nats.

Its gradient is a cotangent (`lch_plugin.cotangents`), and circuits are made of what it depends on:
a positive score of a node means that removing the node lowers it.

`logit_difference` is linear in the logits. The logits of the frozen model are an affine function of
what a node holds, so there a score is exactly what removing the node takes from the metric. The
other metrics are not linear: their scores are in nats, and of the change to first order, by the
gradient at the logits of the clean prompt.

Code travels by value to nnsight's servers, which have no jaxtyping: no shapes in nested functions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lch_plugin.errors import InputError, SiteError
from lch_plugin.mlp import at_least_float32
from lch_plugin.padding import token_index

#: For each prompt, the ids of some tokens.
TokenLists: TypeAlias = Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class Metric:
    """The gradient of a metric of the logits in the component's output: a *targeted* centroid.

    It asks what the component does for the metric through everything downstream of it.

    Attributes:
        fn: from logits, ``(batch, pos, d_vocab)`` or ``(batch, n_labels)``, to one number a
            sequence, ``(batch,)``, or one.
        name: for hook names and records.
        position: if given, ``fn`` gets the logits of this position alone, ``(batch, 1, d_vocab)``.
            It is counted among each prompt's own tokens, padding left out: -1 is the last.
    """

    fn: Callable[[Float[Tensor, "batch *pos d_vocab"]], Float[Tensor, "*batch"]]
    name: str = "metric"
    position: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise InputError(f"a Metric takes a function of the logits, not {self.fn!r}.")
        position = self.position
        if isinstance(position, bool) or not (position is None or hasattr(position, "__index__")):
            raise InputError(f"position={position!r} must be an integer, or None for all logits.")

    def of(
        self,
        logits: Float[Tensor, "batch *pos d_vocab"],
        tokens: Bool[Tensor, "batch read"] | None = None,
    ) -> Float[Tensor, "*batch"]:
        """The metric of each sequence.

        Args:
            logits: of the model.
            tokens: which of the positions that the model reads are tokens and not padding; all if
                None. The logits may be of the last of them alone.

        Raises:
            InputError: a prompt has no such position, or the logits have none at all.
        """
        if self.position is None:
            return self.fn(logits)
        if logits.ndim != 3:
            raise InputError(
                f"metric {self.name!r} is of position {self.position}, and the model gives "
                f"{tuple(logits.shape)}, which has no positions. Leave the position out."
            )
        if tokens is not None:  # A model may compute the last logits alone.
            tokens = tokens[:, -logits.shape[1] :]
        try:
            index = token_index(self.position, logits.shape[1], tokens).to(logits.device)
        except SiteError as error:
            raise InputError(f"metric {self.name!r}: {error}") from error
        return self.fn(logits[torch.arange(len(logits), device=logits.device), index][:, None])

    def value(
        self,
        logits: Float[Tensor, "batch *pos d_vocab"],
        tokens: Bool[Tensor, "batch read"] | None = None,
    ) -> Float[Tensor, ""]:
        """The metric summed over sequences, which are independent of each other.

        Raises:
            InputError: the function gives something else, or nothing differentiable, or a prompt
                has no such position.
        """
        value = self.of(logits, tokens)
        if not isinstance(value, Tensor) or value.ndim > 1 or not value.requires_grad:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"metric {self.name!r} gave {found}; it has to give one differentiable number a "
                "sequence, shape (batch,), or one for all."
            )
        return value.sum()

    def of_rows(self, rows: Sequence[int], n: int) -> Metric:
        """The metric of some sequences of a batch of ``n`` that this one was made for.

        Args:
            rows: which of them, each once, in the order in which their logits will come.
            n: sequences in the whole batch.
        """
        index = torch.tensor(rows)

        def of_some(logits: Tensor) -> Tensor:
            # The function knows the sequences by their places. Those that are not here get logits
            # of one that is, without a gradient, and their values are not looked at.
            places = index.to(logits.device)
            filled = logits.detach()[:1].expand(n, -1, -1).index_copy(0, places, logits)
            return self._each(filled, n)[places]

        return Metric(of_some, self.name, self.position)

    def beside(self, other: Metric, n: int) -> Metric:
        """The metric of ``n`` sequences by this one, and of those after them by another.

        Raises:
            InputError: the other has another name or position.
        """
        if (self.name, self.position) != (other.name, other.position):
            raise InputError(
                f"metric {self.name!r} at position {self.position} and metric {other.name!r} at "
                f"position {other.position} are not one: they cannot be measured in one batch."
            )

        def of_both(logits: Tensor) -> Tensor:
            first, rest = logits[:n], logits[n:]
            return torch.cat([self._each(first, n), other._each(rest, len(rest))])

        return Metric(of_both, self.name, self.position)

    def _each(self, logits: Tensor, n: int) -> Tensor:
        value = self.fn(logits)
        if not isinstance(value, Tensor) or value.shape != (n,):
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"metric {self.name!r} gave {found} for {n} sequences; it has to give one number "
                f"for each, shape ({n},), to be taken apart or put together."
            )
        return value


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


def logit_difference(
    answers: int | TokenLists, foils: int | TokenLists, position: int = -1
) -> Metric:
    """Mean logit of the answers minus mean logit of the foils, in logits. Linear in the logits.

    Args:
        answers: id of the token that is right after every prompt; or for each prompt, a list.
        foils: what to compare with, likewise.
        position: whose logits count, among each prompt's own tokens.

    Raises:
        InputError: a prompt without answer or foil, a token that is both, or no token ids.
    """
    if not isinstance(answers, Sequence) and not isinstance(foils, Sequence):
        answer, foil = operator.index(answers), operator.index(foils)
        check_foil(answer, foil)
        # Of as many prompts as there are.
        return Metric(
            lambda logits: logits[:, -1, answer] - logits[:, -1, foil],
            f"{answer}_minus_{foil}",
            position,
        )
    return _compared("logit_difference", _Tokens.mean, answers, foils, position)


def log_odds(answers: TokenLists, foils: TokenLists, position: int = -1) -> Metric:
    """How much more likely the answers are than the foils, in nats: ``log P(answers)/P(foils)``.

    The difference of two log-sum-exps: it weighs answers and foils as the softmax does, and is not
    linear in the logits. With one answer and one foil it is their logit difference.

    Args, Raises:
        As `logit_difference`.
    """
    return _compared("log_odds", _Tokens.logsumexp, answers, foils, position)


#: What makes a metric of the answers and the foils of prompts, and a position.
Comparison: TypeAlias = Callable[..., Metric]
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

    def value(logits: Tensor) -> Tensor:
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

    def value(logits: Tensor) -> Tensor:
        log_q = logits[:, -1].log_softmax(-1)
        if log_q.shape != log_p.shape:
            raise InputError(
                f"the reference has {tuple(log_p.shape)} logits for prompts and tokens, and the "
                f"model gave {tuple(log_q.shape)}."
            )
        own = log_p.to(log_q.device)
        return (own.exp() * (own - log_q)).sum(-1)

    return Metric(value, "kl_divergence", position)


def check_foil(token: int, foil: int | None) -> None:
    """Refuse to compare a token with itself."""
    if token == foil:
        raise InputError(f"token and foil are both {token}: their logits do not differ.")


def _compared(
    name: str, read: Callable[[_Tokens, Tensor], Tensor], answers: Any, foils: Any, position: int
) -> Compared:
    """What ``read`` finds of the answers less what it finds of the foils."""
    # One id is for all prompts.
    if isinstance(foils, Sequence) and not isinstance(answers, Sequence):
        answers = [[answers]] * len(foils)
    elif isinstance(answers, Sequence) and not isinstance(foils, Sequence):
        foils = [[foils]] * len(answers)
    right, wrong = _Tokens(answers, "answer"), _Tokens(foils, "foil")
    if len(answers) != len(foils):
        raise InputError(f"{len(answers)} prompts have answers and {len(foils)} have foils.")
    for pair in zip(right.listed, wrong.listed, strict=True):
        if both := sorted(set.intersection(*map(set, pair))):
            raise InputError(f"tokens {both} are both answer and foil: they do not differ.")

    def value(logits: Tensor) -> Tensor:
        at = logits[:, -1]
        return read(right, at) - read(wrong, at)

    return Compared(value, name, position, right.listed, wrong.listed)


def _ids(tokens: Sequence[int], role: str) -> list[int]:
    """The tokens of one prompt, each once: twice would count it twice."""
    listed = list(tokens) if isinstance(tokens, Iterable) else [tokens]
    are_ids = all(hasattr(t, "__index__") and not isinstance(t, bool) for t in listed)
    if not isinstance(tokens, Iterable) or not are_ids:
        raise InputError(
            f"each prompt has a list of token ids for its {role}s, as in [[3], [4, 5]]; got "
            f"{tokens!r} for one."
        )
    return list(dict.fromkeys(map(operator.index, listed)))


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

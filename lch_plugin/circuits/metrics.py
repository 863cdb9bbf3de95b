"""What a circuit is about: one number a prompt, computed from the logits, in logits or nats.

Everything in this package scores nodes by such a metric, and a positive score means that removing
the node lowers it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lch_plugin.cotangents import Metric
from lch_plugin.errors import InputError
from lch_plugin.mlp import at_least_float32
from lch_plugin.sites import integers


def logit_difference(
    answers: Sequence[Sequence[int]], foils: Sequence[Sequence[int]], position: int = -1
) -> Metric:
    """How much more likely the answers are than the foils, in nats: ``log P(answers)/P(foils)``.

    With one answer and one foil this is their logit difference; with several it weighs them as the
    softmax does. Where they are tokens of the same text, the difference of two log-sum-exps.

    Args:
        answers: token ids that are right, for each prompt.
        foils: token ids to compare them with, for each prompt.
        position: whose logits count.

    Raises:
        InputError: a prompt without answer or foil, a token that is both, or no lists of token ids.
    """
    of_answers, of_foils = _Tokens(answers, "answer"), _Tokens(foils, "foil")
    if len(answers) != len(foils):
        raise InputError(f"{len(answers)} prompts have answers and {len(foils)} have foils.")
    for right, wrong in zip(answers, foils, strict=True):
        both = sorted(set(right) & set(wrong))
        if both:
            raise InputError(f"tokens {both} are both answer and foil: they do not differ.")

    def value(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
        at = _at(logits, position)
        return of_answers.logsumexp(at) - of_foils.logsumexp(at)

    return Metric(value, "logit_difference")


def log_probability(answers: Sequence[Sequence[int]], position: int = -1) -> Metric:
    """Log-probability that the next token is one of the answers, in nats.

    Args:
        answers: token ids that are right, for each prompt.
        position: whose logits count.

    Raises:
        InputError: a prompt without an answer, or no lists of token ids.
    """
    right = _Tokens(answers, "answer")

    def value(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
        at = _at(logits, position)
        return right.logsumexp(at) - at.logsumexp(-1)

    return Metric(value, "log_probability")


def kl_divergence(reference: Float[Tensor, "batch pos d_vocab"], position: int = -1) -> Metric:
    """``KL(reference || model)`` of the next-token distributions, in nats.

    Its gradient vanishes where the model gives the reference itself: to attribute on a prompt, take
    the logits of its corrupt twin as reference.

    Args:
        reference: logits to compare with, one row a prompt.
        position: whose logits count.
    """
    # Not under inference_mode, whose tensors no gradient can be computed with.
    with torch.inference_mode(False), torch.no_grad():
        at = _at(reference, position).clone()
        log_p = at.to(at_least_float32(at)).log_softmax(-1)

    def value(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
        log_q = _at(logits, position).log_softmax(-1)
        if log_q.shape != log_p.shape:
            raise InputError(
                f"the reference has {tuple(log_p.shape)} logits for prompts and tokens, and the "
                f"model gave {tuple(log_q.shape)}."
            )
        own = log_p.to(log_q.device)
        return (own.exp() * (own - log_q)).sum(-1)

    return Metric(value, "kl_divergence")


def _at(
    logits: Float[Tensor, "batch pos d_vocab"], position: int
) -> Float[Tensor, "batch d_vocab"]:
    n_pos = logits.shape[1]
    if not -n_pos <= position < n_pos:
        raise InputError(f"position={position}: prompts have positions 0 to {n_pos - 1}.")
    return logits[:, position]


def _ids(tokens: Sequence[int], role: str) -> list[int]:
    """The tokens of one prompt, each once: twice would count its probability twice."""
    found = integers(tokens) if isinstance(tokens, Iterable) else None
    if found is None:
        raise InputError(
            f"each prompt has a list of token ids for its {role}s, as in [[3], [4, 5]]; got "
            f"{tokens!r} for one."
        )
    return list(dict.fromkeys(found))


class _Tokens:
    """One or several tokens for each prompt."""

    def __init__(self, tokens: Sequence[Sequence[int]], role: str) -> None:
        listed = [_ids(one, role) for one in tokens] if isinstance(tokens, Sequence) else []
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

    def logsumexp(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
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
        return chosen.masked_fill(~self._real.to(logits.device), -torch.inf).logsumexp(-1)

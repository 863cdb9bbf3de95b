"""Prompts with a metric, and where there is one a corrupt twin to take what is removed from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lch_plugin.adapters.transformer_lens import LensModel, as_tokens, run_edited
from lch_plugin.circuits.metrics import Comparison, logit_difference
from lch_plugin.cotangents import Metric
from lch_plugin.errors import InputError
from lch_plugin.mlp import at_least_float32


@dataclass(frozen=True, eq=False)
class Prompts:
    """A batch of prompts of one length, and what is measured on them.

    Attributes:
        clean: token ids.
        metric: of the logits, one number a prompt.
        corrupt: as many token ids, changed in what decides the metric; position by position they
            are the twin of ``clean``. None if there is none.

    Raises:
        InputError: clean prompts that are no batch of token ids, corrupt ones of another shape, or
            a metric that is no `Metric`.
    """

    clean: Int[Tensor, "batch pos"]
    metric: Metric
    corrupt: Int[Tensor, "batch pos"] | None = None

    def __post_init__(self) -> None:
        clean = self.clean
        if not isinstance(clean, Tensor) or clean.ndim != 2 or clean.numel() == 0:
            found = tuple(clean.shape) if isinstance(clean, Tensor) else type(clean).__name__
            raise InputError(
                f"clean prompts are token ids, shape (batch, pos) with at least one; got {found}. "
                "For texts, use lch_plugin.circuits.prompts."
            )
        if not isinstance(self.metric, Metric):
            raise InputError(
                f"metric is a {type(self.metric).__name__}; wrap a function of the logits as "
                "lch_plugin.cotangents.Metric(fn)."
            )
        if self.corrupt is not None and self.corrupt.shape != self.clean.shape:
            raise InputError(
                f"clean prompts have shape {tuple(self.clean.shape)} and corrupt ones "
                f"{tuple(self.corrupt.shape)}: a pair needs equal lengths, token by token."
            )

    def __len__(self) -> int:
        return len(self.clean)

    def run(
        self, model: LensModel, edits: Mapping[str, Callable[[Tensor], Tensor | None]]
    ) -> Float[Tensor, "batch out d_vocab"]:
        """Logits of the clean prompts that the metric needs, values edited by `run_edited`."""
        last_only = self.metric.position == -1
        return run_edited(model, self.clean, edits, last_only=last_only)

    def measure(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
        """The metric of each prompt, computed at least in float32.

        Raises:
            InputError: the metric gives anything but one number a prompt, or not a finite one.
        """
        value = self.metric.of(logits.to(at_least_float32(logits)))
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape != (len(self),):
            raise InputError(
                f"metric {self.metric.name!r} gave {shape} for {len(self)} prompts; it has to give "
                f"one number a prompt, shape ({len(self)},)."
            )
        if not bool(value.isfinite().all()):
            raise InputError(f"metric {self.metric.name!r} is not finite: {value.tolist()}.")
        return value


def prompts(
    model: LensModel,
    clean: str | Sequence[str],
    answers: str | Sequence[str | Sequence[str]],
    foils: str | Sequence[str | Sequence[str]],
    corrupt: str | Sequence[str] | None = None,
    *,
    metric: Comparison = logit_difference,
    batch_size: int = 32,
) -> list[Prompts]:
    """Prompts with a metric that compares answers with foils, in batches of one length.

    Args:
        model: whose tokenizer is used.
        clean: texts.
        answers: what is right after each: one token or several; one for all if a string.
        foils: what to compare with, likewise.
        corrupt: the twin of each text, with as many tokens.
        metric: `lch_plugin.circuits.logit_difference`, which is linear, or another function of the
            ids of answers and foils, such as `lch_plugin.circuits.log_odds`.
        batch_size: prompts in a batch, at most.

    Raises:
        InputError: batch_size below 1, lists of unequal length, pairs of unequal length in tokens,
            and answers or foils that are not single tokens of this tokenizer.
    """
    clean = [clean] if isinstance(clean, str) else list(clean)
    twins = clean if corrupt is None else [corrupt] if isinstance(corrupt, str) else list(corrupt)
    right, wrong = ([a] * len(clean) if isinstance(a, str) else list(a) for a in (answers, foils))
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} must be at least 1.")
    counts = {len(clean), len(twins), len(right), len(wrong)}
    if counts == {0} or len(counts) > 1:
        raise InputError(
            f"{len(clean)} clean prompts, {len(twins)} corrupt ones, {len(right)} answers and "
            f"{len(wrong)} foils: at least one, and as many of each, are needed."
        )
    read = cache(partial(single_token, model))
    ids = [
        [[read(text) for text in ([one] if isinstance(one, str) else one)] for one in side]
        for side in (right, wrong)
    ]
    rows: dict[int, list[tuple[Tensor, Tensor, list[int], list[int]]]] = defaultdict(list)
    for text, twin, answer, foil in zip(clean, twins, *ids, strict=True):
        tokens, other = as_tokens(model, text), as_tokens(model, twin)
        if tokens.shape != other.shape:
            raise InputError(
                f"{text!r} has {tokens.shape[-1]} tokens and its corrupt twin {twin!r} has "
                f"{other.shape[-1]}: a pair needs equal lengths, token by token."
            )
        rows[tokens.shape[-1]].append((tokens, other, answer, foil))
    batches = []
    for same in rows.values():
        for start in range(0, len(same), batch_size):
            chosen = same[start : start + batch_size]
            measured = metric([row[2] for row in chosen], [row[3] for row in chosen])
            paired = None if corrupt is None else torch.cat([row[1] for row in chosen])
            batches.append(Prompts(torch.cat([row[0] for row in chosen]), measured, paired))
    return batches


def single_token(model: LensModel, text: str) -> int:
    """Id of a text that is one token.

    Raises:
        InputError: it is several tokens, none, or unknown to the tokenizer.
    """
    ids: list[int] = model.to_tokens(text, prepend_bos=False)[0].tolist()
    if ids == [model.tokenizer.unk_token_id]:
        raise InputError(
            f"{text!r} is unknown to this tokenizer; an answer or foil has to be a token."
        )
    if len(ids) != 1:
        pieces = [model.to_string([i]) for i in ids]
        raise InputError(
            f"{text!r} is {len(ids)} tokens of this tokenizer, {pieces}; an answer or foil has to "
            "be one. Mind the leading space, as in ' an'."
        )
    return ids[0]

"""Prompts with a metric, and where there is one a corrupt twin to take what is removed from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from html import escape
from typing import TypeAlias

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lch_plugin.adapters.states import evaluating, without_autocast
from lch_plugin.adapters.transformer_lens import (
    LensModel,
    as_tokens,
    near_token,
    run_edited,
)
from lch_plugin.cotangents import Metric
from lch_plugin.errors import InputError
from lch_plugin.metrics import Comparison, logit_difference
from lch_plugin.mlp import at_least_float32
from lch_plugin.sites import integers

#: Clean and corrupt ids, ids of answers and of foils, and the two texts.
_Row: TypeAlias = tuple[Tensor, Tensor, list[int], list[int], tuple[str, str | None]]


@dataclass(frozen=True, eq=False, repr=False)
class Prompts:
    """A batch of prompts of one length, and what is measured on them.

    ``batch[3]``, ``batch[2:5]`` and ``batch[[0, 4]]`` are batches of some of its prompts, and
    ``a + b`` holds those of two batches. The metric goes with them, whatever it is.

    Attributes:
        clean: token ids.
        metric: of the logits, one number a prompt.
        corrupt: as many token ids, changed in what decides the metric; position by position they
            are the twin of ``clean``. None if there is none.
        texts: the prompts as they were given, each with its twin; none if they were given as ids.

    Raises:
        InputError: clean prompts that are no batch of token ids, corrupt ones of another shape, a
            metric that is no `Metric`, or another number of texts than of prompts.
    """

    clean: Int[Tensor, "batch pos"]
    metric: Metric
    corrupt: Int[Tensor, "batch pos"] | None = None
    texts: tuple[tuple[str, str | None], ...] = ()

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
        if len(self.texts) not in (0, len(self.clean)):
            raise InputError(
                f"{len(self.texts)} texts for {len(self.clean)} prompts: give one each, or none."
            )

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, rows: int | slice | Sequence[int] | Int[Tensor, " n"]) -> Prompts:
        """Some of the prompts, as a batch.

        Raises:
            InputError: rows that are no integers, or none.
            IndexError: there is no such row.
        """
        every = range(len(self))
        if isinstance(rows, slice):
            chosen = list(every[rows])
        else:
            listed = integers(rows)
            if listed is None:
                raise InputError(f"{rows!r} are no rows of a batch: give integers or a slice.")
            chosen = [every[row] for row in listed]
        if not chosen or len(set(chosen)) < len(chosen):
            raise InputError(
                f"{rows!r} of {len(self)} prompts: a batch has at least one, and each once."
            )
        return Prompts(
            self.clean[chosen],
            self.metric.of_rows(chosen, len(self)),
            None if self.corrupt is None else self.corrupt[chosen],
            tuple(self.texts[row] for row in chosen) if self.texts else (),
        )

    def __add__(self, other: Prompts) -> Prompts:
        """The prompts of both batches.

        Raises:
            InputError: prompts of another length, twins in one of them alone, or another metric.
        """
        if not isinstance(other, Prompts):
            return NotImplemented
        if self.clean.shape[1] != other.clean.shape[1]:
            raise InputError(
                f"prompts of {self.clean.shape[1]} and of {other.clean.shape[1]} tokens are no "
                "batch of one length. Keep them in a list: every function here takes one."
            )
        if self.corrupt is None or other.corrupt is None:
            if self.corrupt is not other.corrupt:
                raise InputError("one of the batches has corrupt twins and the other has none.")
            corrupt = None
        else:
            corrupt = torch.cat([self.corrupt, other.corrupt])
        return Prompts(
            torch.cat([self.clean, other.clean]),
            self.metric.beside(other.metric, len(self)),
            corrupt,
            self.texts + other.texts if self.texts and other.texts else (),
        )

    def __repr__(self) -> str:
        twins = "" if self.corrupt is None else ", with twins"
        n_tokens = self.clean.shape[1]
        return f"Prompts({len(self)} of {n_tokens} tokens, {self.metric.name}{twins})"

    def _repr_html_(self) -> str:
        shown = pd.DataFrame(self.texts or self.clean.tolist())
        if self.texts:
            shown.columns = pd.Index(["clean", "corrupt"])
        with pd.option_context("display.max_colwidth", None):  # Answers follow the ends of texts.
            return f"<p>{escape(repr(self))}</p>{shown.to_html()}"

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


def batches_of(prompts: Prompts | Iterable[Prompts]) -> list[Prompts]:
    """One batch or several, as a list."""
    return [prompts] if isinstance(prompts, Prompts) else list(prompts)


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
    rows: dict[int, list[_Row]] = defaultdict(list)
    for text, twin, answer, foil in zip(clean, twins, *ids, strict=True):
        tokens, other = as_tokens(model, text), as_tokens(model, twin)
        if tokens.shape != other.shape:
            raise InputError(
                f"{text!r} has {tokens.shape[-1]} tokens and its corrupt twin {twin!r} has "
                f"{other.shape[-1]}: a pair needs equal lengths, token by token."
            )
        shown = (text, None if corrupt is None else twin)
        rows[tokens.shape[-1]].append((tokens, other, answer, foil, shown))
    batches = []
    for same in rows.values():
        for start in range(0, len(same), batch_size):
            chosen = same[start : start + batch_size]
            compared = metric([row[2] for row in chosen], [row[3] for row in chosen])
            paired = None if corrupt is None else torch.cat([row[1] for row in chosen])
            given = tuple(row[4] for row in chosen)
            batches.append(Prompts(torch.cat([row[0] for row in chosen]), compared, paired, given))
    return batches


def solved(model: LensModel, prompts: Prompts | Iterable[Prompts]) -> list[Prompts]:
    """The prompts that a model gets right: there is a behaviour to explain on these alone.

    Right is a metric above zero on the clean prompt, and lower on its twin where there is one. One
    forward pass of the clean and one of the corrupt prompts.

    Args:
        model: TransformerBridge or HookedTransformer.
        prompts: of one batch or several.

    Raises:
        InputError: none is right; or as `Prompts.measure`.
    """
    batches = batches_of(prompts)
    kept: list[Prompts] = []
    values: list[float] = []
    for batch in batches:
        clean = measured(model, batch)
        right = clean > 0
        if batch.corrupt is not None:
            right &= measured(model, replace(batch, clean=batch.corrupt)) < clean
        values += clean.tolist()
        rows = right.nonzero().flatten().tolist()
        kept += [batch[rows]] if rows else []
    if not kept:
        mean = sum(values) / len(values) if values else float("nan")
        raise InputError(
            f"the model gets none of {len(values)} prompts right (mean metric {mean:+.3g}): there "
            "is no behaviour to explain. Take other prompts, or another model."
        )
    return kept


def deal(prompts: Iterable[Prompts], shares: Sequence[int]) -> list[list[Prompts]]:
    """Prompts dealt like cards: of every ``sum(shares)`` in a row, so many to each hand.

    >>> from lch_plugin.circuits import Prompts, logit_difference
    >>> ten = Prompts(torch.arange(10)[:, None], logit_difference([[1]] * 10, [[2]] * 10))
    >>> [[len(batch) for batch in hand] for hand in deal([ten], (2, 1, 2))]
    [[4], [2], [4]]
    """
    order = [hand for hand, share in enumerate(shares) for _ in range(share)]
    hands: list[list[Prompts]] = [[] for _ in shares]
    dealt = 0
    for batch in prompts:
        to = [order[(dealt + row) % len(order)] for row in range(len(batch))]
        dealt += len(batch)
        for hand, held in enumerate(hands):
            rows = [row for row, at in enumerate(to) if at == hand]
            held += [batch[rows]] if rows else []
    return hands


@without_autocast()
def measured(model: LensModel, batch: Prompts) -> Float[Tensor, " batch"]:
    """The metric of each clean prompt, by the model as it is; on the CPU."""
    with evaluating(model), torch.no_grad():
        return batch.measure(batch.run(model, {})).double().cpu()


def single_token(model: LensModel, text: str) -> int:
    """Id of a text that is one token.

    Raises:
        InputError: it is several tokens, none, or unknown to the tokenizer.
    """
    ids: list[int] = model.to_tokens(text, prepend_bos=False)[0].tolist()
    if ids == [model.tokenizer.unk_token_id]:
        raise InputError(
            f"{text!r} is unknown to this tokenizer; an answer or foil has to be a token."
            + near_token(model, text)
        )
    if len(ids) != 1:
        pieces = [model.to_string([i]) for i in ids]
        raise InputError(
            f"{text!r} is {len(ids)} tokens of this tokenizer, {pieces}; an answer or foil has to "
            "be one. Mind the leading space, as in ' an'." + near_token(model, text)
        )
    return ids[0]

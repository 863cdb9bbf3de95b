"""Which positions of a batch are tokens and which are padding, and what follows from it.

Prompts of unequal length run together when the shorter ones are filled up, on either side. What
fills them up is no part of any prompt: no output there counts, no centroid is there (it is zero),
and a position means one of the prompt's own tokens, 0 its first and -1 its last, wherever the
padding lies. So a prompt's centroids are the same whatever it is batched with.

Every adapter asks here, with what its toolkit knows: a mask, or token ids alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lch_plugin.errors import PaddingWarning, SiteError

# Masks that are added to attention have this or less (or -inf) where attention must not go; biases
# by distance, which may be added to them, are zero where a token attends to itself.
_BLOCKED = -1e4
# On token ids: which of them are tokens, and how often they had been written to by then.
_MARK = "_lch_tokens"
# What a tokenizer, or a config, may call an id that text has as well.
_SHARED = ("bos_token_id", "eos_token_id", "unk_token_id", "sep_token_id", "cls_token_id")


@dataclass(frozen=True)
class PadToken:
    """The id that fills up the shorter rows of a batch.

    Attributes:
        id: of the token; None if there is none.
        is_shared: whether text has it as well, as where a tokenizer pads with the end of a
            sequence: then ids alone do not tell padding from text.
        begins: whether it also begins what a decoder writes (T5).
    """

    id: int | None
    is_shared: bool = False
    begins: bool = False

    @classmethod
    def of(cls, *sources: Any) -> PadToken:
        """That of a tokenizer, or of a model's config, or of the first of both that has one."""

        def ids(names: Iterable[str]) -> list[int]:
            found = [getattr(source, name, None) for source in sources for name in names]
            listed = (one if isinstance(one, list) else [one] for one in found)
            return [i for one in listed for i in one if i is not None]

        pad = next(iter(ids(["pad_token_id"])), None)
        return cls(pad, pad in ids(_SHARED), pad in ids(["decoder_start_token_id"]))


def mark_tokens(
    ids: Int[Tensor, "batch pos"], tokens: Bool[Tensor, "batch pos"] | None = None
) -> Int[Tensor, "batch pos"]:
    """Say of ids which of them are tokens, all if None, until somebody changes or slices them."""
    tokens = torch.ones_like(ids, dtype=torch.bool) if tokens is None else tokens
    setattr(ids, _MARK, (tokens, _version(ids)))
    return ids


def known_tokens(ids: Any) -> Bool[Tensor, "batch pos"] | None:
    """Which of these ids are tokens, if `mark_tokens` said so and nobody changed them since."""
    tokens, version = getattr(ids, _MARK, (None, None))
    return tokens if tokens is not None and version == _version(ids) else None


def _version(ids: Tensor) -> int:
    """How often a tensor was written to; what is made under inference_mode does not count."""
    return 0 if ids.is_inference() else ids._version


def tokens_in_mask(mask: Any, n_pos: int) -> Bool[Tensor, "batch pos"] | None:
    """Which of the last ``n_pos`` positions a mask calls tokens.

    Args:
        mask: ``(batch, key)``, not zero at tokens, in any dtype, as models cast it; or by query,
            ``(batch, query, key)`` or ``(batch, head, query, key)``, true or not zero where a query
            attends, or (floating point) added to the scores. A token is a key that some query
            attends to. It may cover keys of earlier passes as well.
        n_pos: positions of this pass.

    Returns:
        The mask, or None if it says nothing of so many positions.
    """
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 3, 4) or mask.shape[-1] < n_pos:
        return None
    if mask.ndim == 2:
        return (mask != 0)[:, -n_pos:]
    is_added = mask.is_floating_point() and (mask.ndim == 4 or bool((mask < 0).any()))
    tokens = (mask > _BLOCKED if is_added else mask != 0).flatten(1, -2).any(1)
    # Keys that a static cache has yet to write come after the tokens.
    written = tokens.any(dim=0).nonzero()
    end = max(n_pos, int(written[-1]) + 1) if len(written) else tokens.shape[-1]
    return tokens[:, end - n_pos : end]


def tokens_in_ids(
    ids: Int[Tensor, "batch pos"], pad: PadToken, *, side: str = "right", is_text: bool = False
) -> Bool[Tensor, "batch pos"] | None:
    """Which positions are tokens, from ids without a mask.

    Padding is what rows begin or end with that is the pad token. If text has this token as well, it
    is what they have more of it than the row with the fewest, on one side: a batch is filled up to
    its longest row, so that what all rows share belongs to them.

    Args:
        ids: of the tokens.
        pad: what fills up.
        side: that the tokenizer fills up, should both sides look so.
        is_text: whether ids that text may have are text.

    Returns:
        The mask, or None if there is no padding.
    """
    if pad.id is None or (pad.is_shared and is_text):
        return None
    is_pad = ids == pad.id
    if pad.begins and bool(is_pad[:, 0].all()):
        is_pad[:, 0] = False
    before, after = is_pad.cumprod(1).sum(1), is_pad.flip(1).cumprod(1).sum(1)
    if pad.is_shared:
        # A row of nothing else has what all rows begin with, and is filled up on the right.
        own, is_empty = before.min(), before == ids.shape[1]
        after = torch.where(is_empty, ids.shape[1] - own, after - after.min())
        before = torch.where(is_empty, 0, before - own)
        if bool(before.any()) and bool(after.any()):
            (after if side == "left" else before).zero_()
    place = torch.arange(ids.shape[1], device=ids.device)
    tokens = (place >= before[:, None]) & (place < ids.shape[1] - after[:, None])
    return None if bool(tokens.all()) else tokens


class Finder:
    """Finds the padding of one model's inputs, and says once where that was a guess.

    Attributes:
        pad: the token that fills up.
        is_causal: whether no position reads those after it.
        is_packed: whether rows are known to be filled with text from end to end, as those that SAEs
            are trained on: then an id that text may have is text.
        is_off: whether nothing is padding, as in passes that try a model out.
    """

    def __init__(self, pad: PadToken, *, is_causal: bool) -> None:
        self.pad, self.is_causal = pad, is_causal
        self.is_packed = self.is_off = False
        self._has_warned = False

    def tokens(
        self,
        ids: Any,
        mask: Any,
        *,
        side: str = "right",
        is_continued: bool = False,
        masks_leading: bool = False,
    ) -> Bool[Tensor, "batch pos"] | None:
        """Which positions are tokens; None if all are.

        Args:
            ids: that the model was called with, if it was.
            mask: that it was called with, if it was: it has the last word.
            side: that the tokenizer fills up.
            is_continued: whether earlier tokens are in a key-value cache.
            masks_leading: whether the model masks padding that rows begin with by itself.
        """
        if self.is_off:
            return None
        if isinstance(mask, Tensor):
            has_rows = isinstance(ids, Tensor) and ids.ndim > 1
            n_rows, n_pos = ids.shape[:2] if has_rows else (len(mask), mask.shape[-1])
            tokens = tokens_in_mask(mask, n_pos)
            if tokens is None or bool(tokens.all()):
                return None
            return tokens.expand(n_rows, -1)  # One mask may be that of every row.
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            return None
        # Rows of a continued batch are equally long, and one that has ended ends in text.
        is_text = self.is_packed or is_continued
        tokens = known_tokens(ids)
        is_guess = tokens is None and self.pad.is_shared
        if tokens is None:
            tokens = tokens_in_ids(ids, self.pad, side=side, is_text=is_text)
        if tokens is None or bool(tokens.all()):
            return None
        leads = not bool(tokens[:, 0].all()) and not masks_leading
        self.warn(tokens, is_guess=is_guess, is_read=leads or not self.is_causal)
        return tokens

    def warn(self, tokens: Bool[Tensor, "batch pos"], *, is_guess: bool, is_read: bool) -> None:
        """Say once what is wrong with a batch, if anything is.

        Args:
            tokens: which positions were taken for tokens.
            is_guess: whether that is a guess.
            is_read: whether the model reads the others like text.
        """
        if self._has_warned:
            return
        rows = (~tokens).any(1).nonzero().flatten().tolist()
        reasons = []
        if is_guess:
            reasons.append(
                f"token {self.pad.id}, which rows {_few(rows)} begin or end with, fills up the "
                "rows of a batch and is in text too, so that ids alone do not tell which: it is "
                "taken for padding, and no centroid is there"
            )
        if is_read:
            reasons.append(
                f"the model reads the padding of rows {_few(rows)} like text, so that what it "
                "computes there depends on what a prompt is batched with, and so do its centroids"
            )
        if reasons:
            self._has_warned = True
            warnings.warn(
                f"{'; '.join(reasons)}. Pass attention_mask=, which says what the tokens are.",
                PaddingWarning,
                stacklevel=2,
            )


def token_index(
    position: int, n_pos: int, tokens: Bool[Tensor, "batch pos"] | None
) -> Int[Tensor, "#batch"]:
    """Where in each row a position of its prompt is, or one index if that is the same in all rows.

    Args:
        position: counted among a prompt's own tokens, negative from the last.
        n_pos: positions of a row.
        tokens: which of them are tokens; all if None.

    Raises:
        SiteError: a prompt has no such position.
    """
    if tokens is None:
        tokens = torch.ones(1, n_pos, dtype=torch.bool)
    counts = tokens.sum(1)
    nth = counts + position if position < 0 else torch.full_like(counts, position)
    missing = ((nth < 0) | (nth >= counts)).nonzero().flatten().tolist()
    if missing:
        raise SiteError(
            f"position {position} does not exist in row {missing[0]}, which has "
            f"{int(counts[missing[0]])} tokens. Padding is not counted."
        )
    return ((tokens.cumsum(1) == nth[:, None] + 1) & tokens).int().argmax(1)


def spread(
    v: Float[Tensor, ...],
    y: Float[Tensor, ...],
    tokens: Bool[Tensor, "batch pos"] | None,
    positions: Iterable[int] | None = None,
) -> Float[Tensor, ...]:
    """A cotangent spread over an output, with zeros where outputs do not count.

    Args:
        v: broadcasts to ``y``.
        y: output; padding is left out, and positions are chosen, of ``(batch, pos, d_out)``.
        tokens: which positions are tokens; all if None, or if they are not this output's positions.
        positions: those that count, as `token_index` has them; all tokens if None.

    Raises:
        SiteError: a prompt has no such position.
    """
    v = v.to(y).expand_as(y)
    if positions is None:
        return blank(v, tokens)
    n_pos = y.shape[-2]
    tokens = tokens if tokens is not None and tokens.shape == y.shape[:2] else None
    chosen = torch.zeros(
        1 if tokens is None else len(tokens), n_pos, dtype=v.dtype, device=v.device
    )
    for position in positions:
        chosen.scatter_(1, token_index(position, n_pos, tokens).to(v.device)[:, None], 1)
    return v * chosen[..., None]


def blank(
    value: Float[Tensor, ...] | Bool[Tensor, ...], tokens: Bool[Tensor, "batch pos"] | None
) -> Tensor:
    """A value ``(batch, pos, ...)``, or ``(batch * pos, ...)``, with zeros at padding."""
    if tokens is None:
        return value
    if value.ndim == 2 and len(value) == tokens.numel():
        tokens = tokens.flatten()
    elif value.ndim < 3 or value.shape[:2] != tokens.shape:
        return value
    padding = ~tokens.to(value.device)
    if not bool(padding.any()):
        return value
    return value.masked_fill(padding[(...,) + (None,) * (value.ndim - padding.ndim)], 0)


def _few(rows: list[int]) -> str:
    return f"{rows[:3]}" if len(rows) <= 3 else f"{rows[:3]} and {len(rows) - 3} more"

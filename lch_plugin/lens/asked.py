"""What is asked of a lens: a prompt, tokens, layers and positions, held to what the model has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lch_plugin.adapters.transformer_lens import (
    LensModel,
    as_tokens,
    check_token_ids,
    near_token,
)
from lch_plugin.errors import InputError
from lch_plugin.padding import PadToken, known_tokens, mark_tokens, tokens_in_ids, tokens_in_mask
from lch_plugin.sites import integers


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt as it was given, perhaps filled up, and the tokens that are its own.

    The model reads these alone, so that what a lens says of a prompt does not depend on what it was
    filled up to. Positions count in the prompt as it was given.

    Attributes:
        given: ids at all positions.
        is_token: whether a position is a token; the others are padding.
        ids: of the tokens, on the model's device.
    """

    given: Int[Tensor, " pos"]
    is_token: Bool[Tensor, " pos"]
    ids: Int[Tensor, "1 token"]

    @property
    def n_pos(self) -> int:
        """Positions, padding included."""
        return len(self.given)

    def place(self, position: int) -> int:
        """Which of the tokens stands at a position that is one."""
        return int(self.is_token[:position].sum())

    def spread(self, values: Float[Tensor, "token ..."]) -> Float[Tensor, "pos ..."]:
        """Values of the tokens at their positions, and zeros at padding."""
        whole = values.new_zeros(self.n_pos, *values.shape[1:])
        whole[self.is_token.to(values.device)] = values
        return whole

    def target(self, position: Any) -> int:
        """A position whose logits can be read, counted from 0.

        Raises:
            InputError: there is no such position, or it is padding.
        """
        (at,) = indices(position, self.n_pos, "target")
        if not self.is_token[at]:
            own = self.is_token.nonzero().flatten().tolist()
            raise InputError(
                f"target={position} is padding, after which the model says nothing. The prompt's "
                f"tokens are at {own[0]} to {own[-1]}: pass one of these."
            )
        return at

    def texts(self, model: LensModel) -> tuple[str, ...]:
        """What the tokens read, at all positions."""
        pairs = zip(self.given.tolist(), self.is_token.tolist(), strict=True)
        return tuple(text(model, i) if is_token else "[padding]" for i, is_token in pairs)


def as_prompt(model: LensModel, prompt: Any, attention_mask: Tensor | None = None) -> Prompt:
    """One prompt, which may be filled up.

    Padding is what the mask says. Without a mask it is what `lch_plugin.padding` knows of the ids,
    where an id that text may have as well is text.

    Raises:
        InputError: as `one_prompt`; a mask of another shape, without tokens, or with padding
            between them.
    """
    is_token = _tokens_of(model, prompt, attention_mask)
    if is_token is None:
        ids = one_prompt(model, prompt)
        return Prompt(ids[0], torch.ones(ids.shape[1], dtype=torch.bool), ids)
    given = prompt.flatten().cpu()
    at = is_token.nonzero().flatten().tolist()
    if not at or len(at) != at[-1] - at[0] + 1:
        raise InputError(
            f"the prompt's tokens would be at {at}: padding fills up a prompt on its left or right."
        )
    return Prompt(given, is_token, one_prompt(model, mark_tokens(given[is_token][None])))


def _tokens_of(
    model: LensModel, prompt: Any, attention_mask: Tensor | None
) -> Bool[Tensor, " pos"] | None:
    """Which positions are tokens, if some may not be."""
    is_ids = isinstance(prompt, Tensor) and not prompt.is_floating_point()
    if attention_mask is not None:
        shape = getattr(attention_mask, "shape", None)
        if not is_ids or shape != prompt.shape:
            raise InputError(
                f"attention_mask has shape {shape and tuple(shape)}: it goes with the ids of a "
                "prompt, as a tensor of their shape."
            )
    if not is_ids or not prompt.numel() or prompt.shape[:-1] not in ((), (1,)):
        return None
    rows = prompt.reshape(1, -1)
    if attention_mask is not None:
        found = tokens_in_mask(attention_mask.reshape(1, -1), rows.shape[1])
    elif (found := known_tokens(prompt)) is None:
        found = tokens_in_ids(rows, PadToken.of(model.tokenizer), is_text=True)
    return None if found is None else found.flatten().cpu()


def one_prompt(model: LensModel, prompt: Any) -> Int[Tensor, "1 pos"]:
    """Token ids of one prompt.

    Raises:
        InputError: as `as_tokens`, or there are several.
    """
    if isinstance(prompt, str) and not prompt.strip():
        raise InputError("the prompt is empty: there is no token to read.")
    ids = as_tokens(model, prompt)
    if len(ids) != 1:
        raise InputError(f"{len(ids)} prompts: a reading is of one. Read them one by one.")
    return ids.clone() if ids.is_inference() else ids


def token_ids(model: LensModel, tokens: str | int | Sequence[str | int]) -> list[int]:
    """Ids of tokens given as texts or ids.

    Raises:
        InputError: a text that is not one token, no token at all, or an id outside the vocabulary.
    """
    listed = [tokens] if isinstance(tokens, str) else tokens
    listed = listed if isinstance(listed, Sequence) else (integers(listed) or [listed])
    found = []
    for token in listed:
        if isinstance(token, str):
            ids = model.to_tokens(token, prepend_bos=False, truncate=False)[0].tolist()
            if len(ids) != 1:
                parts = [text(model, i) for i in ids]
                raise InputError(
                    f"{token!r} is not one token but {len(ids)}, {parts}: give one."
                    + near_token(model, token)
                )
            found += ids
        else:
            found += integers(token) or [_no_token(token)]
    if not found:
        raise InputError("tokens=[] names no token: leave it out for the likeliest.")
    check_token_ids(model.cfg.d_vocab, min(found), max(found))
    return found


def _no_token(token: object) -> int:
    raise InputError(f"{token!r} is no token: give its text or its id.")


def indices(values: Any, n: int, name: str) -> tuple[int, ...]:
    """Indices from 0, in the order they were given.

    Raises:
        InputError: something else than integers, none, or one that is not there.
    """
    found = integers(values)
    if not found:
        raise InputError(f"{name}={values!r} must be one integer or several.")
    unknown = [i for i in found if not -n <= i < n]
    if unknown:
        raise InputError(f"{name}={values!r}: {unknown} do not exist; there are 0 to {n - 1}.")
    return tuple(i % n for i in found)


def text(model: LensModel, token: int) -> str:
    """What a token reads."""
    if model.tokenizer is None:
        return str(token)
    return str(model.tokenizer.decode([token]))

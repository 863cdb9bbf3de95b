"""What is asked of a lens: a prompt, tokens, layers and positions, held to what the model has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from lch_plugin.adapters.transformer_lens import (
    LensModel,
    as_tokens,
    check_token_ids,
    near_token,
)
from lch_plugin.errors import InputError
from lch_plugin.sites import integers


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

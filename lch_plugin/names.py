"""Refusing a name that nobody knows: with the nearest one that is known, or with all of them."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from lch_plugin.errors import InputError

# How alike a name has to be, from 0 to 1: a part of it is often all that is given.
_NEAR = 0.5
# Beyond so many, names are counted.
_MOST = 24


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """A sentence to end the refusal of an unknown name with.

    Args:
        name: as it was given.
        known: those that there are.

    Example:
        >>> did_you_mean("atn", ["mlp", "attn"])
        'Did you mean attn?'
        >>> did_you_mean("zzz", ["mlp", "attn"])
        'There are mlp, attn.'
    """
    names = list(dict.fromkeys(map(str, known)))
    folded = {one.casefold(): one for one in reversed(names)}
    if near := difflib.get_close_matches(str(name).casefold(), folded, n=1, cutoff=_NEAR):
        return f"Did you mean {folded[near[0]]}?"
    if not names:
        return "There is none."
    more = [f"{len(names) - _MOST} more"] if len(names) > _MOST else []
    return f"There are {', '.join([*names[:_MOST], *more])}."


def check_known(name: str, value: object, known: Collection[object]) -> None:
    """Refuse the value of an argument that is none of those there are.

    Args:
        name: of the argument.
        value: as it was given.
        known: all that there are.

    Raises:
        InputError: it is none of them.

    Example:
        >>> check_known("site", "mlp", ["mlp", "attn"])
    """
    if value not in known:
        raise InputError(f"{name}={value!r} is not known. {did_you_mean(value, known)}")

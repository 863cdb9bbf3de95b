"""Hook points of several layers, by one name with ``*`` for the layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

from lch_plugin.errors import InputError

#: Numbers of layers, or all of them; None where a name has no ``*``.
Layers: TypeAlias = Sequence[int] | Literal["all"] | None


def parse_layers(text: str | None) -> Layers:
    """``5,10,15``, or ``all``.

    Raises:
        InputError: it is neither.
    """
    if text is None or text == "all":
        return text  # type: ignore[return-value]
    numbers = [part.strip() for part in text.split(",")]
    if not all(n.isdecimal() and n.isascii() and len(n) < 7 for n in numbers):
        raise InputError(f"--layers {text} is no list of layers: give such as 5,10,15 or all.")
    return list(dict.fromkeys(map(int, numbers)))


def check_layers(hook_names: Iterable[str], layers: Layers) -> None:
    """Refuse layers without a ``*`` to stand for, and a ``*`` that stands for none.

    Raises:
        InputError: there is one.
    """
    for name in hook_names:
        if layers is None and "*" in name:
            raise InputError(f"{name} has a * for the layer: say which by --layers 5,10,15 or all.")
        if layers is not None and name.count("*") != 1:
            raise InputError(
                f"--layers need one * for the layer in {name}, as in blocks.*.mlp.hook_centroid."
            )


def hooks_of_layers(hook_names: Iterable[str], layers: Layers, n_layers: int) -> list[str]:
    """The hook points, layer after layer.

    Args:
        hook_names: as `check_layers` lets pass.
        layers: which.
        n_layers: how many the model has.

    Raises:
        InputError: the model has no such layer.
    """
    if layers is None:
        return list(hook_names)
    chosen = range(n_layers) if isinstance(layers, str) else layers
    wrong = [n for n in chosen if n >= n_layers]
    if wrong:
        raise InputError(f"--layers {wrong[0]}: the model has layers 0 to {n_layers - 1}.")
    return [name.replace("*", str(n)) for n in chosen for name in hook_names]


def hooks_in(stored: Iterable[str], pattern: str, layers: Layers) -> list[str]:
    """Of the hook points of a cache, those that a name with ``*`` stands for.

    Raises:
        InputError: one is not there, or none is.
    """
    if layers is None:
        return [pattern]
    first, last = pattern.split("*")
    there = {
        int(number): name
        for name in stored
        if name.startswith(first)
        and name.endswith(last)
        and (number := name[len(first) : len(name) - len(last)]).isdecimal()
    }
    chosen = sorted(there) if isinstance(layers, str) else layers
    missing = [n for n in chosen if n not in there]
    if missing or not chosen:
        raise InputError(
            f"the cache has {pattern} of layers {sorted(there)}, and "
            f"{missing or 'none'} of them were asked for. Give others by --layers."
        )
    return [there[n] for n in chosen]

"""What stands in for methods of a model while centroids are attached to it.

Not hooks: TransformerLens calls ``forward`` itself in places, and torch calls no hook when a module
is left by an interrupt.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lch_plugin.adapters.arguments import Call
from lch_plugin.adapters.turns import Turn
from lch_plugin.padding import mark_tokens


@runtime_checkable
class Passes(Protocol):
    """Who sees the forward passes of a model, one at a time."""

    turn: Turn

    def enter(self, call: Call) -> None:
        """A pass begins."""

    def see(self, output: Any) -> None:
        """The model has computed this, and the pass is not over yet."""

    def leave(self, output: Any, error: BaseException | None) -> Any:
        """It ends, with an output or an error; what the model is to return instead."""


class StandIn:
    """In place of a method, as an attribute of the object."""

    def __init__(self, owner: Any, name: str) -> None:
        self._owner, self._name = owner, name
        self._before = vars(owner).get(name)
        setattr(owner, name, self)

    def remove(self) -> None:
        """Give the object its own back, unless somebody put theirs over ours."""
        if vars(self._owner).get(self._name) is not self:
            return
        if self._before is None:
            vars(self._owner).pop(self._name, None)
        else:
            setattr(self._owner, self._name, self._before)

    @property
    def __name__(self) -> str:
        return self._name

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        own = partial(getattr(type(self._owner), self._name), self._owner)
        return self._before or own


class Turns(StandIn):
    """A method that waits for the model's turn."""

    def __init__(self, turn: Turn, owner: Any, name: str) -> None:
        super().__init__(owner, name)
        self._turn = turn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._turn:
            return self.__wrapped__(*args, **kwargs)


class Forward(StandIn):
    """The model's ``forward``, to see every pass begin and end."""

    def __init__(self, passes: Passes, root: Any) -> None:
        super().__init__(root, "forward")
        self._passes = passes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._passes.turn:
            self._passes.enter((args, kwargs))
            try:
                output = self.__wrapped__(*args, **kwargs)
                self._passes.see(output)
            except BaseException as error:
                self._passes.leave(None, error)
                raise
            return self._passes.leave(output, None)


class ToTokens(StandIn):
    """The model's ``to_tokens``, to remember which of the ids it gives are padding.

    Ids alone do not say where a tokenizer pads with a token that text has.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model, "to_tokens")

    def __call__(self, input: Any, *args: Any, **kwargs: Any) -> Int[Tensor, "batch pos"]:
        to_tokens = self.__wrapped__
        ids: Tensor = to_tokens(input, *args, **kwargs)
        if not isinstance(input, str) and len(ids) > 1:
            alone = [to_tokens(text, *args, **kwargs)[0] for text in input]
            places = [_place(own, row) for own, row in zip(alone, ids, strict=True)]
            found = [place for place in places if place is not None]
            if len(found) == len(places):
                mark_tokens(ids, torch.stack(found))
        return ids


def _place(own: Int[Tensor, " n"], row: Int[Tensor, " pos"]) -> Bool[Tensor, " pos"] | None:
    """Where in a row the ids are that a text has alone; None if they are not there."""
    for start in range(len(row) - len(own) + 1):
        if torch.equal(row[start : start + len(own)], own):
            place = torch.arange(len(row), device=row.device)
            return (place >= start) & (place < start + len(own))
    return None

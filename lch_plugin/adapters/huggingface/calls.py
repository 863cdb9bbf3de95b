"""What happens around a module's calls.

A module is watched through its ``forward``, put before its class's own as an attribute, and not by
torch hooks: it begins after every hook that edits the input, ends before every hook that edits the
output, and closes whatever it opened when the call fails, on Ctrl-C too.

Private attributes used, for want of a public way:
    ``torch._C._current_graph_task_id``, which tells whether a backward pass is under way.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from lch_plugin.adapters.arguments import Call
from lch_plugin.adapters.structure import stand_ins
from lch_plugin.adapters.turns import Turn


@runtime_checkable
class Watcher(Protocol):
    """Sees the calls of up to three modules: a first, a last, and one that encloses both."""

    def open(self, call: Call) -> None:
        """The enclosing module is called."""

    def begin(self, call: Call) -> Call:
        """The first module is called; with what it is to be called instead."""

    def pass_on(self, output: Any) -> None:
        """The first module has returned."""

    def end(self, call: Call, output: Any) -> Any:
        """The last module has returned; what it is to return instead."""

    def close(self) -> None:
        """The enclosing module has returned, or failed."""


class WatchedForward:
    """In place of a module's ``forward`` for as long as anybody watches it.

    Attributes:
        is_asleep: whether calls go unseen, as those of `lch_plugin.adapters.structure` do.
    """

    is_asleep = False

    def __init__(self, module: nn.Module, turn: Turn) -> None:
        self.turn = turn
        self.original = module.forward
        self.was_attribute = "forward" in vars(module)
        self.enclosing: list[Watcher] = []
        self.starting: list[Watcher] = []
        self.ending: list[Watcher] = []
        # transformers asks for its signature. Not its attributes: it may wrap one of our own.
        functools.update_wrapper(self, self.original, updated=())

    def __reduce__(self) -> Any:
        # Copies of a module, pickled ones too, are not watched: whose handle would theirs be?
        return _itself, (self.original,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Gradient checkpointing runs modules again within a backward pass, perhaps in a thread of
        # autograd's own, and these runs are not the model's.
        if self.is_asleep or torch._C._current_graph_task_id() != -1:
            return self.original(*args, **kwargs)
        with self.turn:
            return self._watch_call((args, kwargs))

    def _watch_call(self, call: Call) -> Any:
        # As they are now: detaching within the call is allowed.
        enclosing, starting, ending = [*self.enclosing], [*self.starting], [*self.ending]
        try:
            for watcher in enclosing:
                watcher.open(call)
            for watcher in starting:
                call = watcher.begin(call)
            output = self.original(*call[0], **call[1])
            for watcher in starting:
                watcher.pass_on(output)
            # What began last ends first: it shares the graph of those around it.
            for watcher in reversed(ending):
                output = watcher.end(call, output)
            return output
        finally:
            for watcher in enclosing:
                watcher.close()


def watch(
    watcher: Watcher, first: nn.Module, last: nn.Module, around: nn.Module, turn: Turn
) -> None:
    """Have a watcher see the calls of modules, which wait for their model's turn."""
    _watched(around, turn).enclosing.append(watcher)
    _watched(first, turn).starting.append(watcher)
    _watched(last, turn).ending.append(watcher)


def unwatch(watcher: Watcher, first: nn.Module, last: nn.Module, around: nn.Module) -> None:
    """Take it off again; a module that nobody watches gets its own ``forward`` back."""
    for module in {first, last, around}:
        # Several, if somebody put theirs before one of ours, and we another before theirs.
        for watched in [f for f in stand_ins(module) if isinstance(f, WatchedForward)]:
            for watchers in (watched.enclosing, watched.starting, watched.ending):
                if watcher in watchers:
                    watchers.remove(watcher)
            idle = not (watched.enclosing or watched.starting or watched.ending)
            if idle and vars(module).get("forward") is watched:
                if watched.was_attribute:
                    module.forward = watched.original
                else:
                    del module.forward


def _itself(forward: Any) -> Any:
    return forward


def _watched(module: nn.Module, turn: Turn) -> WatchedForward:
    forward = module.forward
    if not isinstance(forward, WatchedForward):
        forward = WatchedForward(module, turn)
        module.forward = forward
    return forward

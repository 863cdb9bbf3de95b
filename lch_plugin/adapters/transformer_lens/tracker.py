"""What holds the readers of one model together: who meets where.

Readers that start or end at the same place share one gate.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lch_plugin.adapters.transformer_lens.gates import Gate, Watcher
from lch_plugin.adapters.transformer_lens.model_end import ModelEnd
from lch_plugin.adapters.transformer_lens.readers import Reader
from lch_plugin.adapters.transformer_lens.runs import Runs
from lch_plugin.adapters.transformer_lens.toolkit import LensModel
from lch_plugin.adapters.transformer_lens.vjps import VJPReader, close_scope, open_scope

_ATTRIBUTE = "_centroid_tracker"


@dataclass
class _Meeting:
    """A gate, and those who meet there."""

    gate: Gate
    watchers: list[Watcher] = field(default_factory=list)


class Tracker:
    """Readers of one model.

    Attributes:
        readers: by the name of their hook point.
        runs: the model's forward passes.
    """

    def __init__(self, model: LensModel) -> None:
        self.readers: dict[str, Reader] = {}
        self.runs = Runs(model)
        self._meetings: dict[Hashable, _Meeting] = {}
        self._hooks: dict[Reader, list[RemovableHandle]] = {}
        self._end = ModelEnd(self.runs)

    def add(self, reader: Reader) -> None:
        """Let a reader compute centroids for whoever listens; its hook points are in place."""
        self.runs.start()
        vars(self.runs.model)[_ATTRIBUTE] = self
        self.readers[reader.name] = reader
        for gate in reader.gates:
            self.watch(gate, reader)
        # After the gates: a component is left when what it writes has passed.
        self._hooks[reader] = reader.hooks()
        if reader.site.is_late:
            self._end.watch(reader.site.v)

    def forget(self, reader: Reader) -> None:
        """Undo `add`, also in the middle of a pass, or of `add` itself."""
        if self.readers.get(reader.name) is not reader:
            return
        del self.readers[reader.name]
        self.runs.forget(reader)
        for hook in self._hooks.pop(reader, []):
            hook.remove()
        self.unwatch(reader)
        if not self.readers:
            self.runs.stop()
            vars(self.runs.model).pop(_ATTRIBUTE, None)

    def watch(self, gate: Gate, watcher: Watcher) -> None:
        """Have somebody meet what passes a gate."""
        meeting = self._meetings.setdefault(gate.key, _Meeting(gate))
        meeting.watchers.append(watcher)
        if len(meeting.watchers) == 1:
            self.runs.install(gate, partial(_is_wanted, meeting), partial(self._at, meeting))

    def unwatch(self, watcher: Watcher) -> None:
        """Undo every `watch`."""
        for key, meeting in list(self._meetings.items()):
            meeting.watchers = [w for w in meeting.watchers if w is not watcher]
            if not meeting.watchers:
                self.runs.uninstall(meeting.gate)
                del self._meetings[key]

    def _at(self, meeting: _Meeting, tensor: Tensor) -> Tensor | None:
        """A tensor passes a gate; what the model is to go on with instead, if anything."""
        seen, key, run = tensor, meeting.gate.key, self.runs.current
        ending, starting = list[VJPReader](), list[VJPReader]()
        for watcher in meeting.watchers:
            if isinstance(watcher, VJPReader) and key == watcher.start_gate.key:
                starting.append(watcher)
            elif isinstance(watcher, VJPReader) and key == watcher.end_gate.key:
                ending.append(watcher)
            elif watcher.is_wanted():
                tensor = _or(watcher.at(meeting.gate, tensor), tensor)
        ending = [reader for reader in ending if reader in run.seen]
        if ending:
            tensor = _or(close_scope(run, ending, tensor), tensor)
        starting = [reader for reader in starting if reader.is_wanted() and reader.can_start()]
        if starting:
            tensor = open_scope(run, starting, tensor)
        return None if tensor is seen else tensor


def tracker_of(model: LensModel) -> Tracker:
    """The model's tracker, or one that the model has from its first reader on."""
    tracker: Tracker = vars(model).get(_ATTRIBUTE) or Tracker(model)
    return tracker


@contextmanager
def without_padding(model: LensModel) -> Iterator[None]:
    """Nothing that the model reads within is padding, whatever ids it is tried out with."""
    tracker = vars(model).get(_ATTRIBUTE)
    finders = [] if tracker is None else [tracker.runs.padding]
    for finder in finders:
        finder.is_off = True
    try:
        yield
    finally:
        for finder in finders:
            finder.is_off = False


def attached_readers(model: LensModel) -> dict[str, Reader]:
    """The readers a model carries now, by the name of their hook point."""
    tracker = vars(model).get(_ATTRIBUTE)
    return {} if tracker is None else dict(tracker.readers)


def _is_wanted(meeting: _Meeting) -> bool:
    return any(watcher.is_wanted() for watcher in meeting.watchers)


def _or(replacement: Tensor | None, tensor: Tensor) -> Tensor:
    return tensor if replacement is None else replacement

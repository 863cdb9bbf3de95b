"""Places in a forward pass where a tensor goes by and can be replaced.

A gate on a hook point registers its hook anew at each call, when the module around the point is
entered. So it comes after every hook of the user's on the same point (``last``, for what a
component reads: interventions are seen), or before all of them (for what it writes: edits of an
output replace what the component computes, and are not part of it).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from operator import attrgetter
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lch_plugin.adapters.arguments import input_of
from lch_plugin.adapters.transformer_lens.toolkit import HookPoint, LensHandle

Wanted = Callable[[], bool]
# Sees the tensor; returns another to go on with, or None.
Act = Callable[[Tensor], Tensor | None]


@runtime_checkable
class Watcher(Protocol):
    """Who meets tensors at a gate."""

    def is_wanted(self) -> bool:
        """Whether it wants to."""

    def at(self, gate: Gate, tensor: Tensor) -> Tensor | None:
        """See what passes; may return another tensor to go on with."""


def _never() -> bool:
    return False


def _ignore(_tensor: Tensor) -> None:
    return None


class Gate:
    """Where a tensor passes. Installed on a model, it calls ``act`` whenever it is ``wanted``."""

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []
        self._wanted: Wanted = _never
        self._act: Act = _ignore

    @property
    def key(self) -> Hashable:
        """Equal for gates at the same place."""
        raise NotImplementedError

    def install(self, wanted: Wanted, act: Act) -> None:
        """Start watching. ``wanted`` is asked before the tensor is there."""
        self._wanted, self._act = wanted, act
        self._hooks = self._register()

    def remove(self) -> None:
        """Take the gate off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def reset(self) -> None:
        """Forget calls that never ended."""

    def _register(self) -> list[RemovableHandle]:
        raise NotImplementedError


class RootGate(Gate):
    """One of the model itself, which is entered and left by who calls its ``forward``."""

    def enter(self) -> None:
        """The model is entered."""

    def see(self, output: Any) -> None:
        """It has computed this, and is not left yet."""

    def leave(self) -> None:
        """The model is left."""

    def _register(self) -> list[RemovableHandle]:
        return []


class _PointHook:
    """A hook on a hook point that TransformerLens knows of.

    Version 4 passes a point that shows a scaled value (Granite's embeddings) only if it knows of a
    hook there, and does not look for those that torch alone knows.
    """

    def __init__(self, point: nn.Module, hook: Callable[..., Any], *, last: bool) -> None:
        self._handle = LensHandle(
            point.register_forward_hook(hook, prepend=not last), is_permanent=True
        )
        # An SAE may stand in the point's place.
        self._point = point if isinstance(point, HookPoint) else None
        if self._point is not None:
            self._point.fwd_hooks.append(self._handle)

    def remove(self) -> None:
        self._handle.hook.remove()
        # Not there if all hooks were reset within the call.
        if self._point is not None and self._handle in self._point.fwd_hooks:
            self._point.fwd_hooks.remove(self._handle)


class PointGate(Gate):
    """At a hook point, found by its path from the module ``owner`` within whose call it fires."""

    def __init__(self, owner: Any, path: str, *, last: bool) -> None:
        super().__init__()
        self.owner, self._path, self._last = owner, path, last
        # One for each call under way: a user's hook may run the model again.
        self._calls: list[_PointHook | None] = []

    @property
    def key(self) -> Hashable:
        return id(self.owner), self._path, self._last

    def remove(self) -> None:
        super().remove()
        self.reset()

    def reset(self) -> None:
        while self._calls:
            self._leave(None, None, None)

    def _register(self) -> list[RemovableHandle]:
        return [
            self.owner.register_forward_pre_hook(self._enter),
            self.owner.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, _module: Any, _args: Any) -> None:
        if not self._wanted():
            self._calls.append(None)
            return
        point = attrgetter(self._path)(self.owner)
        hook = partial(self._pass, len(self._calls))
        self._calls.append(_PointHook(point, hook, last=self._last))

    def _leave(self, _module: Any, _args: Any, _output: Any) -> None:
        if self._calls:  # Not if we were removed within the call.
            hook = self._calls.pop()
            if hook is not None:
                hook.remove()

    def _pass(self, depth: int, _module: nn.Module, _args: Any, output: Any) -> Tensor | None:
        if depth != len(self._calls) - 1 or not isinstance(output, Tensor):
            return None  # A call within this one.
        return self._act(output)


class RootPointGate(RootGate, PointGate):
    """At a hook point of the model itself."""

    def enter(self) -> None:
        self._enter(None, None)

    def leave(self) -> None:
        self._leave(None, None, None)


class ModuleGate(Gate):
    """At the input or the output of a module that has no hook point there."""

    def __init__(self, module: nn.Module, side: Literal["input", "output"]) -> None:
        super().__init__()
        self._module, self._side = module, side

    @property
    def key(self) -> Hashable:
        return id(self._module), self._side

    def _register(self) -> list[RemovableHandle]:
        if self._side == "output":
            return [self._module.register_forward_hook(self._on_output)]
        return [self._module.register_forward_pre_hook(self._on_input, with_kwargs=True)]

    def _on_output(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        if not self._wanted():
            return None
        if isinstance(output, tuple | list):
            replaced = self._act(output[0])
            return None if replaced is None else type(output)((replaced, *output[1:]))
        return self._act(output)

    def _on_input(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self._wanted():
            return None
        x, instead = input_of((args, kwargs), type(module).__name__)
        replaced = self._act(x)
        return None if replaced is None else instead(replaced)


class OutputGate(Gate):
    """At what ``extract`` finds in the output of a module. What is found cannot be replaced."""

    def __init__(self, module: nn.Module, extract: Callable[[Any], Tensor | None]) -> None:
        super().__init__()
        self._module, self._extract = module, extract

    @property
    def key(self) -> Hashable:
        return id(self._module), "extract"

    def _register(self) -> list[RemovableHandle]:
        # First, so that the pass is not over yet.
        return [self._module.register_forward_hook(self._on_output, prepend=True)]

    def _on_output(self, _module: Any, _args: Any, output: Any) -> None:
        found = self._extract(output) if self._wanted() else None
        if found is not None:
            self._act(found)


class RootOutputGate(RootGate, OutputGate):
    """At the output of the model itself."""

    def see(self, output: Any) -> None:
        self._on_output(None, None, output)

"""Hook points: ours on a model, there under their full names and gone without a trace; silence."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lch_plugin.adapters.transformer_lens.toolkit import HookPoint, LensModel, TransformerBridge
from lch_plugin.errors import AttachError


class CentroidPoint:
    """A hook point called ``name``, an attribute of a component or of the model itself.

    What stands there may be our HookPoint or SAELens' SAE in its place, so it is looked up anew
    each time.
    """

    def __init__(self, owner: Any, path: str, attribute: str) -> None:
        self.owner = owner
        self.attribute = attribute
        self.name = f"{path}.{attribute}" if path else attribute
        # OPT flattens batch and position inside its blocks; its points undo that for users.
        neighbour = getattr(getattr(owner, "in", None), "hook_in", None)
        self._conversion = getattr(neighbour, "hook_conversion", None)

    @property
    def module(self) -> nn.Module:
        """What stands there now."""
        module = self.owner._modules[self.attribute]
        assert isinstance(module, nn.Module)
        return module

    @property
    def has_listener(self) -> bool:
        """Whether anybody would see a value."""
        module = self.module
        return not isinstance(module, HookPoint) or bool(module._forward_hooks)

    def fire(self, value: Tensor) -> None:
        """Show a value to whoever listens. What they make of it goes nowhere."""
        self.module(value)

    def publish(self, model: LensModel) -> None:
        """Make the point part of the model.

        Raises:
            AttachError: something of that name is there.
        """
        if self.attribute in self.owner._modules:
            raise AttachError(
                f"{self.name} is already attached, or two sites of this call have that name. "
                "Detach the earlier handle first, attach other layers, or give the site a label."
            )
        if isinstance(model, TransformerBridge) and self.owner is not model:
            _full_names(self.owner).points[self.attribute] = self
        setattr(self.owner, self.attribute, HookPoint())
        if isinstance(model, TransformerBridge):
            model._hook_registry[self.name] = self.module

    def reset_sae(self, model: LensModel) -> None:
        """Take an SAE out of the place, if one stands there."""
        if self.name in getattr(model, "acts_to_saes", {}):
            model.reset_saes(self.name)

    def withdraw(self, model: LensModel) -> None:
        """Undo `publish`."""
        self.owner._modules.pop(self.attribute, None)
        if not isinstance(model, TransformerBridge):
            return
        model._hook_registry.pop(self.name, None)
        if self.owner is model:
            return
        self.owner._hook_registry.pop(self.attribute, None)
        points = _full_names(self.owner).points
        points.pop(self.attribute, None)
        if not points:
            vars(self.owner).pop("_register_hook")

    def named(self, hook: HookPoint) -> None:
        """Give a hook point that has come to stand here what ours had."""
        hook.name = self.name
        hook.hook_conversion = self._conversion


class _FullNames:
    """Stands in for a component's ``_register_hook`` while it has points of ours.

    The component gives a hook point assigned to it its bare attribute name. SAELens assigns one
    whenever an SAE is reset, and with the full name lost ``run_with_hooks`` takes the point for an
    alias of a hook that is not there, and silently never fires.
    """

    def __init__(self, component: Any) -> None:
        self.component = component
        self.points: dict[str, CentroidPoint] = {}

    def __call__(self, attribute: str, hook: HookPoint) -> None:
        type(self.component)._register_hook(self.component, attribute, hook)
        if attribute in self.points:
            self.points[attribute].named(hook)


def _full_names(component: Any) -> _FullNames:
    present = vars(component).get("_register_hook")
    if present is None:
        present = component._register_hook = _FullNames(component)
    assert isinstance(present, _FullNames)
    return present


def hook_points(module: nn.Module) -> Iterator[HookPoint]:
    """Every hook point within."""
    return (m for m in module.modules() if isinstance(m, HookPoint))


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """No hook on any hook point within fires."""
    points = list(hook_points(module))
    saved = [(point._forward_hooks, point._backward_hooks) for point in points]
    for point in points:
        point._forward_hooks, point._backward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for point, (forward, backward) in zip(points, saved, strict=True):
            point._forward_hooks, point._backward_hooks = forward, backward

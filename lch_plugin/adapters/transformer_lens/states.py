"""States of a TransformerLens model that are not to outlive a pass."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lch_plugin.adapters.transformer_lens.anatomy import hook_points


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


def detach_attributes(module: Any) -> None:
    """A bridge's attention keeps its last pattern, which must not keep this pass's graph alive."""
    for name, value in list(vars(module).items()):
        if isinstance(value, Tensor) and value.requires_grad and value.grad_fn is not None:
            setattr(module, name, value.detach())

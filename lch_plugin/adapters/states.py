"""States of a model that are not to outlive a pass: modes and graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lch_plugin.adapters.arguments import mapped

_AUTOCASTING = ("cpu", "cuda", "xpu", "mps")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, no random numbers), each module restored to its own mode."""
    # A bridge puts the model it wraps into the same mode, which is no submodule of it.
    modules = [*module.modules(), *getattr(module, "original_model", nn.Module()).modules()]
    training = [m for m in modules if m.training]
    if training:  # Asking is quick, and setting the mode of a bridge is slow.
        module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def without_autocast() -> Iterator[None]:
    """No autocast on any device: what the model computes may be cast, what is made of it is not."""
    with ExitStack() as stack:
        for device in _AUTOCASTING:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def without_graph(output: Any) -> Any:
    """The same output without a graph. Containers that can be changed are changed in place."""
    if isinstance(output, Tensor):
        return output.detach() if output.requires_grad else output
    if isinstance(output, list):
        output[:] = map(without_graph, output)
        return output
    if isinstance(output, dict):
        for key in list(output):
            output[key] = without_graph(output[key])
        return output
    return mapped(output, without_graph)


def detach_cache(cache: Any) -> None:
    """What is kept for the next token must not keep this pass's graph alive.

    Keys and values, and the states of layers without attention, which some keep in dictionaries.
    """
    for entry in getattr(cache, "layers", getattr(cache, "entries", None)) or ():
        for name, value in list(vars(entry).items()):
            if isinstance(value, Tensor | dict | list):
                setattr(entry, name, without_graph(value))

"""One pass through what lies between two modules of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lch_plugin.adapters.arguments import Call
from lch_plugin.errors import SiteError


def through(
    name: str,
    first: nn.Module,
    last: nn.Module,
    enter: Callable[[Call], Call],
    run: Callable[[], Any],
) -> tuple[Any, Any]:
    """Run a model, with another call of one module, and see what another one returns.

    Args:
        name: of what lies between the two, for messages.
        first: where it begins.
        last: where it ends; may be the same module.
        enter: from the call of the first, as hooks that were there before leave it, to the one that
            is made.
        run: calls the model, or a module around both.

    Returns:
        What the call returned, and what the last module did.

    Raises:
        SiteError: one of the two ran not once, but never or several times.
    """
    n_calls = 0
    returned: list[Any] = []

    def start(_module: nn.Module, args: Any, kwargs: Any) -> Call:
        nonlocal n_calls
        n_calls += 1
        return enter((args, kwargs))

    hooks = [
        first.register_forward_pre_hook(start, with_kwargs=True),
        last.register_forward_hook(lambda _module, _args, output: returned.append(output)),
    ]
    try:
        output = run()
    finally:
        for hook in hooks:
            hook.remove()
    if n_calls != 1 or len(returned) != 1:
        raise SiteError(
            f"{name}: its first module ran {n_calls} times and its last {len(returned)} times in "
            "one pass, and both have to run once. Name a module that holds all of it."
        )
    return output, returned[0]

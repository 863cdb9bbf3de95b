"""Passes that begin at what is steered: the blocks before it run once for all of them.

Whatever happens at a component, the blocks before it do the same again. So of a list of blocks that
run one after another, those before the component's give in later passes what they gave in the first
one, and compute nothing. That this changes nothing is seen in a second pass, which has to give the
very same logits; where it does not, as with hooks that edit earlier blocks or blocks that run
twice, all blocks run in every pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def later_passes(root: nn.Module, entry: nn.Module, run: Callable[[], Tensor]) -> Iterator[Tensor]:
    """While open, blocks before the one that holds ``entry`` give what they give now.

    Args:
        root: the model that runs.
        entry: a module within it, before which nothing changes from one pass to the next.
        run: a pass.

    Yields:
        What the pass gives.
    """
    before = _before(root, entry)
    if not before:
        yield run()
        return
    outputs: list[Any] = []
    handle = before[-1].register_forward_hook(lambda _m, _args, output: outputs.append(output))
    try:
        clean = run()
    finally:
        handle.remove()
    if len(outputs) != 1:
        yield clean
        return
    with ExitStack() as stack:
        for block in before:
            stack.callback(vars(block).__delitem__, "forward")
            vars(block)["forward"] = lambda *_args, **_kwargs: outputs[0]
        if not torch.equal(run(), clean):
            stack.close()
        yield clean


def _before(root: nn.Module, entry: nn.Module) -> list[nn.Module]:
    """The blocks before the one that a module is in, of the longest list of blocks."""
    lists = [
        (module, i)
        for module in root.modules()
        if isinstance(module, nn.ModuleList)
        for i, block in enumerate(module)
        if any(part is entry for part in block.modules())
    ]
    if not lists:
        return []
    blocks, i = max(lists, key=lambda found: len(found[0]))
    # Of blocks that have a forward of their own already, nobody knows whose it is.
    return [] if any("forward" in vars(block) for block in blocks[:i]) else list(blocks[:i])

"""Attach, run and detach, again and again: what is left on a model, and in memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from nnsight.modeling.transformers import TransformersModel
from torch import nn

import lch_plugin as lch
from tests import models

IDS = models.tokens(1, 3)
CENTROID = "blocks.0.mlp.hook_centroid"
# Objects that Python and torch keep of their own accord.
_SLACK = 200


def see(value: Any, hook: Any) -> None:
    """Look at a value, and leave it."""
    assert value.isfinite().all(), hook.name


def bridge() -> tuple[nn.Module, Callable[[bool], None], Callable[[], Any]]:
    model = models.bridge("gpt2")

    def cycle(attached: bool) -> None:
        with lch.attach(model) if attached else nullcontext():
            # Without its cache, of which the toolkit itself keeps something each time.
            model.run_with_hooks(
                IDS, fwd_hooks=[(CENTROID if attached else "blocks.0.mlp.hook_out", see)]
            )

    return model, cycle, lambda: model(IDS)


def hooked() -> tuple[nn.Module, Callable[[bool], None], Callable[[], Any]]:
    model = models.hooked()

    def cycle(attached: bool) -> None:
        with lch.attach(model) if attached else nullcontext():
            model.run_with_hooks(IDS, fwd_hooks=[(CENTROID if attached else "hook_embed", see)])

    return model, cycle, lambda: model(IDS)


def huggingface() -> tuple[nn.Module, Callable[[bool], None], Callable[[], Any]]:
    model = models.huggingface("llama")

    def cycle(attached: bool) -> None:
        with lch.huggingface.attach(model) if attached else nullcontext():
            model(IDS)

    return model, cycle, lambda: model(IDS).logits


def nnsight() -> tuple[nn.Module, Callable[[bool], None], Callable[[], Any]]:
    inner = models.huggingface("gpt2")
    model = TransformersModel(inner, tokenizer=models.tokenizer())

    def cycle(attached: bool) -> None:
        with model.trace(IDS):
            mlp = model.transformer.h[0].mlp
            if attached:
                lch.nnsight.centroid(mlp).save()
            else:
                mlp.output.save()

    return inner, cycle, lambda: inner(IDS).logits


CYCLES = {"bridge": bridge, "hooked": hooked, "huggingface": huggingface, "nnsight": nnsight}


def repeat(adapter: str, n: int) -> str | None:
    """Run so many cycles; what is left of them, if anything."""
    model, cycle, run = CYCLES[adapter]()
    with torch.no_grad():
        for _ in range(3):  # What is made once and kept, such as compiled code, is there then.
            cycle(True)
            cycle(False)
        before, hooks = run(), _hooks(model)
        theirs, ours = (_growth(cycle, n, attached) for attached in (False, True))
        if not torch.equal(before, run()):
            return f"{adapter}: after {n} cycles the model computes something else"
        if _hooks(model) != hooks:
            return f"{adapter}: after {n} cycles {_hooks(model)} hooks are left of {hooks}"
        if ours > theirs + _SLACK:
            return f"{adapter}: after {n} cycles there are {ours} more objects, {theirs} without us"
    return None


def _growth(cycle: Callable[[bool], None], n: int, attached: bool) -> int:
    before = _objects()
    for _ in range(n):
        cycle(attached)
    return _objects() - before


def _hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


def _objects() -> int:
    gc.collect()
    return len(gc.get_objects())

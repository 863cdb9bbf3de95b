"""Copies of models, forwards that others wrap, and training."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lch_plugin.adapters.huggingface import attach
from tests import models
from tests.adapters.huggingface.common import (
    ATTN,
    BLOCK,
    F64,
    IDS,
    MLP,
    SITES,
    SPAN,
    assert_close,
    assert_untouched,
    read,
    truth,
)
from tests.models import relative_error


def test_copies_of_a_model_are_not_attached(gpt2: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        expected = gpt2(IDS).logits
    with attach(gpt2, SITES) as handle, torch.no_grad():
        gpt2(IDS)
        before = {name: value.clone() for name, value in handle.cache.items()}
        gpt2.save_pretrained(tmp_path / "model")
        copies = [
            copy.deepcopy(gpt2),
            pickle.loads(pickle.dumps(gpt2)),
            AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager"),
        ]
        for model in copies:
            model(IDS.flip(1))
            assert torch.equal(model(IDS).logits, expected)
            model.transformer.h[1].mlp.c_fc.weight.mul_(2)
            assert not torch.equal(model(IDS).logits, expected)
        for name, value in before.items():
            assert torch.equal(handle.cache[name], value)
        assert torch.equal(gpt2(IDS).logits, expected)
    for model in copies:
        for name, value in read(model, [MLP, BLOCK]).items():
            assert_close(value, truth(model, name))


def test_forwards_that_others_wrap_before_and_after(gpt2: Any) -> None:
    calls: list[str] = []

    def wrap(module: nn.Module, label: str) -> Callable[[], None]:
        """As accelerate does: an attribute, and the old forward back where it was."""
        old, was_there = module.forward, "forward" in vars(module)

        @functools.wraps(old)
        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append(label)
            return old(*args, **kwargs)

        module.forward = forward

        def unwrap() -> None:
            module.forward = old
            if not was_there:
                del module.forward

        return unwrap

    mlp = gpt2.get_submodule(MLP)
    expected = read(gpt2, MLP)[MLP]
    unwrap_first = wrap(mlp, "first")
    one = attach(gpt2, MLP)
    wrap(mlp, "second")
    two = attach(gpt2, MLP)
    calls.clear()
    with torch.no_grad():
        gpt2(IDS)
    assert calls == ["second", "first"]
    assert torch.equal(one.cache[MLP], expected)
    assert torch.equal(two.cache[MLP], expected)
    one.detach()
    one.cache.clear()
    calls.clear()
    with torch.no_grad():
        gpt2(IDS)
    assert calls == ["second", "first"]
    assert not one.cache
    two.detach()
    two.cache.clear()
    with torch.no_grad():
        gpt2(IDS)
    assert not two.cache
    unwrap_first()
    assert_untouched(gpt2)


def test_gradient_checkpointing() -> None:
    model = models.huggingface("gpt2", F64)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    names = [MLP, ATTN, BLOCK, SPAN]
    expected = read(model, names)
    model.train()
    model(IDS, use_cache=False).logits.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with attach(model, names) as handle:
        model(IDS, use_cache=False).logits.sum().backward()
        for name in names:  # Modules that ran again for a gradient do not count.
            assert_close(handle.cache[name], expected[name])
    for ours, theirs in zip([p.grad for p in model.parameters()], gradients, strict=True):
        assert relative_error(ours, theirs) < 1e-12
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with attach(model, SPAN), pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(IDS, use_cache=False)


def test_training_mode_and_dropout() -> None:
    model = models.huggingface("gpt2", F64).train()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model(IDS).logits
    torch.manual_seed(0)
    with attach(model, [MLP, BLOCK]) as handle, torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
    assert [m.training for m in model.modules()] == modes
    torch.manual_seed(0)
    assert_close(handle.cache[BLOCK], truth(model, BLOCK))

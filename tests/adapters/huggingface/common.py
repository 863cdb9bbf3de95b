"""Modules of plain models, and gradients taken outside the package."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from lch_plugin.adapters.huggingface import attach
from tests import families, models
from tests.models import relative_error

F64 = torch.float64


IDS = models.tokens(batch=2, pos=6)


MLP, ATTN, BLOCK, SPAN = (
    *("transformer.h.1.mlp", "transformer.h.1.attn", "transformer.h.1"),
    "transformer.h.0:transformer.h.2",
)


# Overlapping, nested, with common ends, the model's end included.
SITES = [
    *(MLP, ATTN, BLOCK, SPAN, "transformer.h.1:transformer.h.2", "transformer.h.1.mlp.act"),
    *("transformer.h.1.ln_1:transformer.h.1.mlp", "transformer.h.2:", "transformer.h.0.mlp"),
]


@functools.cache
def built(family: str) -> Any:
    return models.huggingface(family, F64)


def other(model_type: str, **config: Any) -> Any:
    """A model of another family, its weights far from zero."""
    torch.manual_seed(0)
    config = {**families._BASE, "num_hidden_layers": 2, **config}
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **config))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.to(F64).eval()


def noise(*shape: int, seed: int = 3, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=F64, generator=generator).to(dtype)


def read(
    model: nn.Module, modules: Any = None, *args: Any, cotangent: Any = None, **kwargs: Any
) -> dict[str, Tensor]:
    """Centroids as a user without gradients gets them."""
    with attach(model, modules, cotangent=cotangent) as handle, torch.no_grad():
        model(*(args or (() if kwargs else (IDS,))), **kwargs)
    return dict(handle.cache)


def first_float(values: Any) -> Tensor:
    while not isinstance(values, Tensor):
        values = next(v for v in values if isinstance(v, Tensor | tuple | list))
    return values


def truth(
    model: nn.Module,
    name: str,
    *args: Any,
    v: Tensor | None = None,
    call: int = 0,
    **kwargs: Any,
) -> Tensor:
    """Centroid of one component, by hooks and `torch.autograd.grad`, no code of ours involved."""
    first, _, last = name.partition(":")
    last = last if ":" in name else first
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def start(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        found = next(a for a in values if isinstance(a, Tensor) and a.is_floating_point())
        x = found.clone() if found.requires_grad else found.detach().clone().requires_grad_()
        inputs.append(x)
        copy = x.clone()  # Which the module may write to.
        swap = lambda value: copy if value is found else value  # noqa: E731
        return tuple(map(swap, args)), {key: swap(value) for key, value in kwargs.items()}

    def end(_module: nn.Module, _args: Any, output: Any) -> None:
        output = getattr(output, "logits", getattr(output, "last_hidden_state", output))
        outputs.append(first_float(output))

    hooks = [
        model.get_submodule(first).register_forward_pre_hook(start, with_kwargs=True),
        model.get_submodule(last).register_forward_hook(end, prepend=True),
    ]
    try:
        with torch.enable_grad():
            model(*(args or (() if kwargs else (IDS,))), **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    y = outputs[call]
    v = torch.ones_like(y) if v is None else v.expand_as(y)
    return torch.autograd.grad(y, inputs[call], v)[0]


def assert_close(value: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert value.shape == expected.shape
    assert not value.requires_grad
    assert relative_error(value, expected) < tolerance


def assert_untouched(model: nn.Module) -> None:
    for name, module in model.named_modules():
        assert "forward" not in vars(module), name
        assert not module._forward_pre_hooks, name
        # transformers installs its own the first time it captures hidden states.
        assert all("capturing" in h.__qualname__ for h in module._forward_hooks.values()), name
    assert torch.is_grad_enabled()


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any], *, pre: bool = False) -> Iterator[None]:
    register = module.register_forward_pre_hook if pre else module.register_forward_hook
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()

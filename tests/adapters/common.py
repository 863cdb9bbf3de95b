"""HuggingFace's models in float64 throughout, for tests that hold adapters to each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests import families, models

F64 = torch.float64
# Where HuggingFace keeps layers, attention and MLP.
NAMES = {
    "gpt2": ("transformer.h", "attn", "mlp"),
    "llama": ("model.layers", "self_attn", "mlp"),
    "gemma3_text": ("model.layers", "self_attn", "mlp"),
    "vit": ("vit.layers", "attention", "mlp"),
}


class KeepFloat64(TorchFunctionMode):
    """HuggingFace computes norms, softmaxes and rotations in float32 at best; here in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.dtype == F64:
            asked = (*args[1:], *kwargs.values())
            if func is Tensor.float or (func is Tensor.to and torch.float32 in asked):
                return first
            if kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": F64}
        return func(*args, **kwargs)


@contextmanager
def in_float64() -> Iterator[None]:
    with KeepFloat64(), torch.no_grad():
        yield


@cache
def huggingface(family: str) -> Any:
    model = (families if family == "vit" else models).huggingface(family, F64)
    for module in model.modules():
        exact_constants(module)
    return model


def exact_constants(module: Any) -> None:
    """Rotary frequencies and the scale of embeddings in float64, as HookedTransformer has them."""
    if "embed_scale" in dict(module.named_buffers(recurse=False)):
        module.embed_scale = torch.tensor(module.embedding_dim**0.5, dtype=F64)
    for name, buffer in list(module.named_buffers(recurse=False)):
        if not name.endswith("inv_freq"):
            continue
        kind = name.removesuffix("inv_freq").removesuffix("original_").rstrip("_")
        rope = module.config.rope_parameters
        base = (rope[kind] if kind else rope)["rope_theta"]
        n = 2 * len(buffer)
        setattr(module, name, 1 / base ** (torch.arange(0, n, 2, dtype=F64) / n))

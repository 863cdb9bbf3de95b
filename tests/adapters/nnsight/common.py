"""Traced models, and gradients taken outside the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from nnsight.modeling.transformers import TransformersModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import lch_plugin as lch
from tests import models

F64 = torch.float64


IDS = models.tokens(batch=2, pos=6)


centroid = lch.nnsight.centroid


# Where a family keeps its layers, and in a layer its attention and a norm.
NAMES = {
    "gpt2": ("transformer.h", "attn", "ln_1"),
    "llama": ("model.layers", "self_attn", "input_layernorm"),
    "gemma3_text": ("model.layers", "self_attn", "pre_feedforward_layernorm"),
    "phi3": ("model.layers", "self_attn", "post_attention_layernorm"),
}


@cache
def plain(family: str) -> Any:
    """HuggingFace's model, which neither nnsight nor this package has seen."""
    return models.huggingface(family, F64)


@cache
def traced(family: str) -> Any:
    return TransformersModel(models.huggingface(family, F64), tokenizer=tokenizer())


@cache
def tokenizer() -> Any:
    words = {f"w{i}": i for i in range(models.D_VOCAB)}
    splitting = Tokenizer(WordLevel(words, unk_token="w0"))
    splitting.pre_tokenizer = Whitespace()
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "w0")
    return PreTrainedTokenizerFast(tokenizer_object=splitting, **special)


def text(ids: Tensor) -> str:
    return " ".join(f"w{i}" for i in ids.tolist())


def site(family: str, kind: str, layer: int = 1) -> str:
    layers, attn, norm = NAMES[family]
    return (
        f"{layers}.{layer}"
        + {"mlp": ".mlp", "attn": f".{attn}", "block": "", "norm": f".{norm}"}[kind]
    )


@contextmanager
def gradients(
    module: nn.Module, v: Tensor | Callable[[Tensor], Tensor] | None = None
) -> Iterator[list[Tensor]]:
    """The centroid of every call of a module, by autograd and torch's own hooks alone."""
    found: list[Tensor] = []
    leaves: list[Tensor] = []

    def enter(_module: Any, args: Any, kwargs: Any) -> Any:
        key = None if args else next(k for k, v in kwargs.items() if isinstance(v, Tensor))
        leaf = (args[0] if key is None else kwargs[key]).detach().clone().requires_grad_()
        leaves.append(leaf)
        return ((leaf, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: leaf})

    def leave(_module: Any, _args: Any, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
        w = v(y.detach()) if callable(v) else torch.ones_like(y) if v is None else v
        mu = torch.autograd.grad(y, leaves.pop(), w.to(y).expand_as(y), retain_graph=True)
        found.extend(mu)

    hooks = [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave),
    ]
    try:
        # Keys and values are written in place.
        with torch.enable_grad(), torch.autograd.graph.allow_mutation_on_saved_tensors():
            yield found
    finally:
        for hook in hooks:
            hook.remove()


def truth(
    model: nn.Module, name: str, *args: Any, v: Any = None, call: int = 0, **kwargs: Any
) -> Tensor:
    """The centroid of one call of a module in a model's forward pass."""
    with gradients(model.get_submodule(name), v) as found:
        model(*args, **kwargs)
    return found[call]


def steps(hf: Any, name: str, ids: Tensor) -> list[Tensor]:
    """The centroids of greedy decoding with a cache, one forward pass each."""
    state: dict[str, Any] = {"input_ids": ids}
    with gradients(hf.get_submodule(name)) as found:
        for _ in range(4):
            out = hf(**state, use_cache=True)
            state = {
                "input_ids": out.logits[:, -1:].argmax(-1),
                "past_key_values": out.past_key_values,
            }
    return found

"""Which of a module's arguments and results a centroid is about, and which tokens are padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lch_plugin.errors import InputError

Call = tuple[tuple[Any, ...], dict[str, Any]]

# Of a model's output, what the centroid is of.
_OUTPUTS = ("logits", "last_hidden_state")
_MASKS = ("attention_mask", "encoder_attention_mask")


def input_of(call: Call, name: str) -> tuple[Tensor, Callable[[Tensor], Call]]:
    """What a module reads, its first floating-point argument, and the call with another in place.

    Raises:
        InputError: it has none.
    """
    args, kwargs = call
    place = next((i for i, value in enumerate(args) if _is_float(value)), None)
    if place is not None:
        before, after = args[:place], args[place + 1 :]
        return args[place], lambda x: ((*before, x, *after), kwargs)
    key = next((k for k, value in kwargs.items() if _is_float(value) and k not in _MASKS), None)
    if key is not None:
        return kwargs[key], lambda x: (args, {**kwargs, key: x})
    found = [type(v).__name__ for v in (*args, *kwargs.values())]
    raise InputError(
        f"{name} was called with {found}: no floating-point tensor to take a centroid with respect "
        "to. A model that reads token ids has none; name its first block, or pass inputs_embeds."
    )


def output_of(output: Any, name: str) -> Tensor:
    """What a module writes: a tensor, the first of a tuple, or a model's logits or hidden states.

    Raises:
        InputError: nothing of the kind.
    """
    for attribute in _OUTPUTS:
        output = getattr(output, attribute, output)
    if isinstance(output, dict):
        output = tuple(output.values())
    for value in output if isinstance(output, tuple | list) else (output,):
        if _is_float(value):
            tensor: Tensor = value
            return tensor
    raise InputError(
        f"{name} returned {type(output).__name__} without a floating-point tensor in it, so there "
        "is nothing to take a centroid of. Name a module within."
    )


def token_mask(call: Call, n_pos: int) -> Bool[Tensor, "batch pos"] | None:
    """Which positions are tokens and not padding, from the attention mask; None without one.

    Of a mask ``(batch, head, query, key)`` a token is a key that some query attends to. It may
    cover keys of earlier passes as well, so the last ``n_pos`` count.
    """
    args, kwargs = call
    named = [kwargs[key] for key in _MASKS if isinstance(kwargs.get(key), Tensor)]
    for mask in (*named, *(a for a in args[1:] if isinstance(a, Tensor) and a.ndim == 4)):
        if mask.ndim not in (2, 4) or mask.shape[-1] < n_pos:
            continue
        if mask.is_floating_point() and mask.ndim == 4:
            # The lowest finite number where attention must not go, or something near it.
            tokens = mask > torch.finfo(mask.dtype).min / 2
        else:
            tokens = mask != 0
        if mask.ndim == 4:
            tokens = tokens.any(dim=(1, 2))
        return tokens[:, -n_pos:]
    return None


def without_padding(
    v: Float[Tensor, ...], y: Float[Tensor, ...], mask: Bool[Tensor, "batch pos"] | None
) -> Float[Tensor, ...]:
    """A cotangent spread over an output, with zeros at padding."""
    v = v.to(y).expand_as(y)
    if mask is None or y.ndim != 3 or mask.shape[-1] < y.shape[1]:
        return v
    mask = mask[:, -y.shape[1] :].to(y.device)
    if bool(mask.all()) or mask.shape[0] != y.shape[0]:
        return v
    return v * mask[..., None].to(y.dtype)


def caches(call: Call) -> Iterator[Any]:
    """Key-value caches among the arguments."""
    args, kwargs = call
    return (value for value in (*args, *kwargs.values()) if is_cache(value))


def is_cache(value: Any) -> bool:
    """Whether it is a key-value cache of transformers."""
    return hasattr(value, "get_seq_length")


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()

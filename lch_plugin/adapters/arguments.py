"""Which of a module's arguments and results a centroid is about, and which tokens are padding."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from lch_plugin.errors import InputError, SiteError
from lch_plugin.padding import Finder, PadToken, tokens_in_mask

Call = tuple[tuple[Any, ...], dict[str, Any]]

# Of a model's output, what the centroid is of.
_OUTPUTS = ("logits", "last_hidden_state")
# A HookedTransformer's attention is given what it reads three times, as three tensors.
_THRICE = ("query_input", "key_input", "value_input")
# Of its arguments, what says which of the positions it reads are tokens. T5's attention has "mask".
_MASKS = ("attention_mask", "mask")


def input_of(call: Call, name: str) -> tuple[Tensor, Callable[[Tensor], Call]]:
    """What a module reads, its first floating-point argument, and the call with another in place.

    Wherever the same tensor is passed (attention's query, key and value) the other one goes.

    Raises:
        InputError: it has none.
        SiteError: attention reads its queries, keys and values from different tensors.
    """
    args, kwargs = call
    named = (value for key, value in kwargs.items() if not key.endswith("mask"))
    x = next((value for value in (*args, *named) if _is_float(value)), None)
    if x is None:
        found = [type(v).__name__ for v in (*args, *kwargs.values())]
        raise InputError(
            f"{name} was called with {found}: no floating-point tensor to take a centroid with "
            "respect to. A model that reads token ids has none; name its first block, or pass "
            "inputs_embeds."
        )

    thrice = {key: kwargs[key] for key in _THRICE if key in kwargs}
    if thrice and (x.ndim != 3 or not all(_is_same(x, value) for value in thrice.values())):
        raise SiteError(
            f"{name} reads {list(thrice)} apart, or one for each head, so it has no one input to "
            "take a centroid in. Turn off use_split_qkv_input and use_attn_in."
        )

    # No annotations: nnsight sends this by value, and jaxtyping is not where it arrives.
    def instead(other):  # type: ignore[no-untyped-def]
        return (
            tuple(other if value is x else value for value in args),
            {k: other if value is x or k in thrice else value for k, value in kwargs.items()},
        )

    return x, instead


def output_of(output: Any, name: str) -> Tensor:
    """What a module writes: a tensor, the first of a tuple, or a model's logits or hidden states.

    Raises:
        InputError: nothing of the kind.
    """
    named = output.get if isinstance(output, dict) else lambda key: getattr(output, key, None)
    output = next((named(key) for key in _OUTPUTS if named(key) is not None), output)
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


def with_output(output: Any, y: Tensor, other: Tensor) -> Any:
    """What a module returned, with another tensor in place of `output_of` it."""
    if output is y:
        return other
    return mapped(output, lambda value: other if value is y else value)


def mapped(output: Any, change: Callable[[Any], Any]) -> Any:
    """What a module returned, with each of its values changed; itself if none is.

    Args:
        output: a tuple, a list, a dictionary or a dataclass, of the same class afterwards.
        change: from a value to what it becomes.
    """
    if isinstance(output, dict):  # ModelOutput too, which keeps its values twice.
        changed = copy.copy(output)
        for key, value in output.items():
            changed[key] = change(value)
        return changed if any(changed[key] is not output[key] for key in output) else output
    if isinstance(output, tuple | list):
        values = [change(value) for value in output]
        if all(new is old for new, old in zip(values, output, strict=True)):
            return output
        # Tuples with names take their values apart.
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        named = {f.name: getattr(output, f.name) for f in dataclasses.fields(output) if f.init}
        new = {name: change(value) for name, value in named.items()}
        if any(new[name] is not named[name] for name in named):
            return dataclasses.replace(output, **new)
    return output


def token_mask(call: Call, n_pos: int) -> Bool[Tensor, "batch pos"] | None:
    """Which positions are tokens and not padding, from the mask among a module's arguments.

    Masks of what a module attends to besides (the encoder's tokens, in a decoder) are not meant.
    None without one.
    """
    args, kwargs = call
    others = (kwargs.get(key) for key in ("key_value_states", "encoder_hidden_states"))
    if any(_is_float(value) for value in others) and "encoder_attention_mask" not in kwargs:
        return None  # Attention to others alone.
    if any(key.startswith("decoder_") and isinstance(kwargs[key], Tensor) for key in kwargs):
        named = [kwargs.get("decoder_attention_mask")]  # A model that writes at other positions.
    else:
        named = [kwargs.get(key) for key in _MASKS]
    # The encoder's hidden states come before the encoder's mask.
    own = itertools.takewhile(lambda a: not (_is_float(a) and a.ndim == 3), args[1:])
    masks = (*named, *(a for a in own if isinstance(a, Tensor) and a.ndim == 4))
    found = (tokens_in_mask(mask, n_pos) for mask in masks)
    return next((tokens for tokens in found if tokens is not None), None)


def arguments_of(forward: Callable[..., Any], call: Call) -> dict[str, Any]:
    """The arguments of a model's call by name; only those given by name if they do not fit."""
    args, kwargs = call
    if not args:
        return kwargs
    try:
        bound = inspect.signature(forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return kwargs
    return {**bound, **kwargs}


def caches(values: Iterable[Any]) -> Iterator[Any]:
    """Key-value caches among arguments or results, those within others (encoder-decoders) too."""
    for value in values:
        if is_cache(value):
            yield value
            yield from caches(vars(value).values())


def caches_of(call: Call) -> list[Any]:
    """Key-value caches that a module is called with."""
    args, kwargs = call
    return list(caches((*args, *kwargs.values())))


def is_causal(config: Any) -> bool:
    """Whether no position of a transformers model reads those after it, by its configuration."""
    kind = getattr(config, "model_type", None)
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:  # BERT may be a decoder as well.
        return bool(getattr(config, "is_decoder", False))
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def is_cache(value: Any) -> bool:
    """Whether it is a key-value cache: of transformers, or TransformerLens' own of one layer."""
    return hasattr(value, "get_seq_length") or hasattr(value, "past_keys")


def without_caches(call: Call, others: Iterable[Any] = ()) -> Call:
    """A call with None for its caches: an empty one is filled by the model's own call alone.

    Args:
        call: as it was made.
        others: caches of the whole model, which do not look like one.
    """
    args, kwargs = call
    known = [id(value) for value in others]

    def kept(value: Any) -> Any:
        return None if is_cache(value) or id(value) in known else value

    return tuple(map(kept, args)), {name: kept(value) for name, value in kwargs.items()}


def holds_tokens(value: Any, layer: int = 0) -> bool:
    """Whether it is a key-value cache with earlier tokens in it, TransformerLens' too.

    Args:
        value: anything.
        layer: whose keys to look at: within a pass earlier layers have added theirs already.
    """
    if hasattr(value, "get_seq_length"):
        return int(value.get_seq_length(layer)) > 0
    entries: Any = [value] if hasattr(value, "past_keys") else getattr(value, "entries", None)
    return bool(entries) and entries[0].past_keys.shape[1] > 0


def padding_finder(config: Any, *sources: Any) -> Finder:
    """What finds the padding in the inputs of a model of transformers.

    Args:
        config: of the model.
        sources: asked before it for the id of the padding token, as a tokenizer.
    """
    return Finder(PadToken.of(*sources, config), is_causal=is_causal(config))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_same(x: Tensor, other: Tensor) -> bool:
    if other is x:
        return True
    return x.shape == other.shape and torch.allclose(x, other, rtol=0, atol=0, equal_nan=True)

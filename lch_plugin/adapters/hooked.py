"""What a model with hook points says of itself, whichever adapter put them there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool
from torch import Tensor, nn

from lch_plugin.adapters import huggingface
from lch_plugin.adapters.transformer_lens import (
    HookedTransformer,
    Reader,
    TransformerBridge,
    attached_readers,
)
from lch_plugin.padding import Finder, PadToken
from lch_plugin.weak_cache import WeakCache

# What finds padding in inputs that are to be counted, by model.
_finders: WeakCache[Finder] = WeakCache()


@runtime_checkable
class Wrapper(Protocol):
    """A model around another one, with hook points of its own, as `lch_plugin.saes.HookedModel`."""

    model: nn.Module
    readers: Mapping[str, huggingface.Reader]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that runs: the one inside a `Wrapper`, or the model itself."""
    return model.model if isinstance(model, Wrapper) else model


def readers(model: nn.Module) -> Mapping[str, Reader | huggingface.Reader]:
    """What computes the centroids of a model, by hook point; nothing for one without them."""
    if isinstance(model, Wrapper):
        return model.readers
    return (
        attached_readers(model) if isinstance(model, TransformerBridge | HookedTransformer) else {}
    )


def real_tokens(
    model: nn.Module, batch: Any, *, packed: bool = False
) -> Bool[Tensor, "row pos"] | None:
    """Which positions of a batch of inputs are tokens; None if all are, or nothing says.

    Args:
        model: what reads it.
        batch: token ids, the first of several tensors, or a model's arguments by name.
        packed: whether rows are text from end to end, where the token that pads is text too.
    """
    first = batch[0] if isinstance(batch, tuple | list) else batch
    named = first if isinstance(first, Mapping) else {"input_ids": first}
    ids = named.get("input_ids", named.get("input"))
    original = unwrapped(model)
    config = getattr(getattr(original, "original_model", original), "config", None)
    tokenizer = getattr(model, "tokenizer", None)
    if original not in _finders:
        # Nobody asks here whether the model masks what it does not count.
        _finders[original] = Finder(PadToken.of(tokenizer, config), is_causal=True)
    finder = _finders[original]
    finder.is_packed = packed
    side = getattr(tokenizer, "padding_side", "right")
    return finder.tokens(ids, named.get("attention_mask"), side=side, masks_leading=True)

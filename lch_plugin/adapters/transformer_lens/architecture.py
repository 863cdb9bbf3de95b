"""Where TransformerLens models keep their parts: blocks, attention, embeddings, norms and logits.

A TransformerBridge, ``hook_`` points left out, and what a HookedTransformer calls otherwise::

    embed                               (hook_embed is a point of the model)
    blocks.L
    ├── ln1, ln2                        ln1_post, ln2_post in front of the residual stream (Gemma 2)
    ├── attn  or  self_attn             q, k, v, o within; hook_q, hook_k, hook_v, hook_z
    └── mlp                             in, gate, out within (`mlps`)
    ln_final
    unembed

Everything is looked up when it is needed: weights may be processed or moved, and SAELens swaps hook
points for others. What computes centroids asks here and knows neither toolkit class.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lch_plugin.adapters.states import without_autocast
from lch_plugin.adapters.transformer_lens.gates import (
    Gate,
    ModuleGate,
    OutputGate,
    PointGate,
    RootOutputGate,
    RootPointGate,
)
from lch_plugin.adapters.transformer_lens.toolkit import (
    HookedTransformer,
    LensModel,
)
from lch_plugin.errors import InputError, SiteError
from lch_plugin.mlp import at_least_float32
from lch_plugin.names import did_you_mean
from lch_plugin.sites import integers

# Lists of blocks, by the name TransformerLens gives them; encoder-decoders have two.
_STACKS = ("blocks", "encoder_blocks", "decoder_blocks")
# Names under which blocks keep their attention.
_ATTENTION_NAMES = ("attn", "self_attn")


def check_model(model: Any) -> None:
    """Refuse what is no TransformerLens model.

    Raises:
        InputError: of any other class.
    """
    if not isinstance(model, LensModel):
        raise InputError(
            f"this takes a TransformerBridge or HookedTransformer, not {type(model).__name__}. "
            "Wrap a HuggingFace model with TransformerBridge.boot_transformers(name, "
            "hf_model=model, tokenizer=tokenizer); pass the original of a compiled module."
        )


def stacks(model: LensModel, name: str | None = None) -> dict[str, nn.ModuleList]:
    """The model's lists of blocks by name, or the one of that name.

    Raises:
        SiteError: it has none.
    """
    found = {stack: getattr(model, stack) for stack in _STACKS if hasattr(model, stack)}
    found = {stack: blocks for stack, blocks in found.items() if len(blocks)}
    if not found:
        raise SiteError(f"{type(model).__name__} has no `blocks`: no layer to attach to.")
    if name is None:
        return found
    if name not in found:
        raise SiteError(f"stack={name!r} is none of this model's. {did_you_mean(name, found)}")
    return {name: found[name]}


def layer_indices(
    blocks: nn.ModuleList, layers: int | Sequence[int] | None, *, keep_order: bool = False
) -> list[int]:
    """Layers as indices from zero, sorted and without repetition unless their order matters.

    Raises:
        SiteError: no such layer.
    """
    n_layers = len(blocks)
    if layers is None:
        return list(range(n_layers))
    wanted = integers(layers)
    if not wanted:
        raise SiteError(f"layers={layers!r} names no layer; pass integers, or None for all.")
    unknown = [layer for layer in wanted if not -n_layers <= layer < n_layers]
    if unknown:
        raise SiteError(
            f"layers {unknown} do not exist: this model has layers 0 to {n_layers - 1}."
        )
    indices = [layer % n_layers for layer in wanted]
    return indices if keep_order else sorted(set(indices))


def block_input(block: Any) -> Gate:
    """The residual stream as a block reads it."""
    return PointGate(block, "hook_resid_pre" if is_hooked(block) else "hook_in", last=True)


def block_output(block: Any, *, last: bool = False) -> Gate:
    """The residual stream as a block leaves it; with ``last`` as the user's hooks leave it."""
    return PointGate(block, "hook_resid_post" if is_hooked(block) else "hook_out", last=last)


def attention(block: Any, path: str) -> tuple[Any, str]:
    """A block's self-attention, and its name there.

    Raises:
        SiteError: it has none (recurrent and state-space blocks).
    """
    for attribute in _ATTENTION_NAMES:
        found = getattr(block, "_modules", {}).get(attribute)
        if found is not None and getattr(found, "original_component", found) is not None:
            return found, attribute
    raise SiteError(f"{path} has no attention. Pass layers=[...] without it.")


def check_heads(attn: Any, path: str) -> None:
    """Refuse attention that does not show its heads.

    Raises:
        SiteError: no readable ``W_V`` and ``W_O``, or no hook points at pattern and values.
    """
    try:
        W_V, W_O = attn.W_V, attn.W_O
        shown = hasattr(attn, "hook_pattern") and (hasattr(attn, "hook_z") or attn.o.hook_in)
        fits = W_V.ndim == W_O.ndim == 3 and W_O.shape[0] % W_V.shape[0] == 0
    except Exception as error:
        raise SiteError(
            f"{path} has a {type(attn).__name__}, whose heads cannot be read: {error}"
        ) from error
    if not (shown and fits):
        raise SiteError(f"{path} has a {type(attn).__name__}, whose heads cannot be read.")


def attention_input(attn: Any) -> Gate:
    """What attention reads, after the layer norm."""
    if is_hooked(attn):
        return ModuleGate(attn, "input")
    return PointGate(attn, "hook_in", last=True)


def attention_output(attn: Any) -> Gate:
    """What attention writes."""
    if is_hooked(attn):
        return ModuleGate(attn, "output")
    return PointGate(attn, "hook_out", last=False)


def score_points(model: LensModel) -> list[PointGate]:
    """Attention scores before the softmax, wherever a block shows them."""
    found: list[PointGate] = []
    for stack in _STACKS:
        for block in getattr(model, stack, ()):
            for name in _ATTENTION_NAMES:
                attn = block._modules.get(name)
                if attn is not None and "hook_attn_scores" in attn._modules:
                    found.append(PointGate(attn, "hook_attn_scores", last=True))
    return found


def check_members(attn: Any, path: str, heads: Sequence[int]) -> None:
    """Refuse heads that do not exist.

    Raises:
        SiteError: so it is.
    """
    n_heads = attn.W_O.shape[0]
    unknown = [h for h in heads if h >= n_heads]
    if unknown:
        raise SiteError(f"{path} has heads 0 to {n_heads - 1}, not {unknown}.")


def head_weights(attn: Any, heads: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``W_V`` and ``W_O`` of heads, ``(n, d_model, d_head)`` and ``(n, d_head, d_model)``.

    With grouped queries several heads share one ``W_V``.
    """
    W_V, W_O = attn.W_V.detach(), attn.W_O.detach()
    per_group = W_O.shape[0] // W_V.shape[0]
    return W_V[[h // per_group for h in heads]], W_O[list(heads)]


def head_outputs(
    attn: Any, heads: Sequence[int], z: Float[Tensor, "batch pos *head_and_d"]
) -> Float[Tensor, "batch pos d_model"]:
    """What heads write together, ``z W_O`` without biases, at least in float32.

    Args:
        attn: their attention.
        heads: which of its heads.
        z: mixes of values of all its heads, side by side or in a dimension of their own.
    """
    W_O = head_weights(attn, heads)[1].to(at_least_float32(z))
    z = z.reshape(*z.shape[:2], -1, W_O.shape[1])[:, :, list(heads)].to(W_O.dtype)
    with without_autocast():
        return torch.einsum("bthe,hed->btd", z, W_O)


def values_name(attn: Any) -> str:
    """Name in attention of the hook point of ``z``, the heads' mixes of values."""
    return "hook_z" if is_hooked(attn) else "o.hook_in"


def heads_values(attn: Any, *, last: bool) -> Gate:
    """The heads' mixes of values, after every hook of the user's (``last``) or before them."""
    return PointGate(attn, values_name(attn), last=last)


def heads_output(attn: Any) -> Gate:
    """What attention returns, by when its pattern has passed a hook point too."""
    return ModuleGate(attn, "output")


def embedding_name(model: LensModel) -> str:
    """Hook point of the token embeddings.

    Raises:
        SiteError: the model has no token embedding.
    """
    if isinstance(model, HookedTransformer):
        return "hook_embed"
    if model._modules.get("embed") is None:
        raise SiteError(
            f"{type(model).__name__} has no `embed`, so there are no token embeddings to "
            "differentiate with respect to. Use a span from block 0."
        )
    return "embed.hook_out"


def embedding_output(model: LensModel) -> Gate:
    """Token embeddings; raises as `embedding_name`."""
    owner, _, point = embedding_name(model).rpartition(".")
    if not owner:
        return RootPointGate(model, point, last=True)
    return PointGate(model.get_submodule(owner), point, last=True)


def final_norm(model: LensModel) -> tuple[Gate, Gate]:
    """Before and after the final norm.

    Raises:
        SiteError: the model has none.
    """
    norm = getattr(model, "ln_final", None)
    if norm is None:
        raise SiteError("this model has no `ln_final`: a Logit cotangent needs it. Use a Metric.")
    if isinstance(model, HookedTransformer):
        return ModuleGate(norm, "input"), ModuleGate(norm, "output")
    return PointGate(norm, "hook_in", last=True), PointGate(norm, "hook_out", last=False)


def norm_after(block: Any, part: str) -> Any:
    """A bridge's norm on what attention or an MLP writes to the residual stream, or None."""
    return getattr(block, "_modules", {}).get("ln1_post" if part == "attn" else "ln2_post")


def post_norm(block: Any, part: str) -> Callable[[Tensor], Tensor] | None:
    """The norm between what attention or an MLP writes and the residual stream, if there is one.

    Raises:
        SiteError: what is written reaches the residual stream in some other indirect way.
    """
    norm = norm_after(block, part)
    if norm is not None:
        return norm.original_component if not is_hooked(norm) else norm
    scale = getattr(block, "residual_contribution_scale", 1.0)
    if scale != 1.0 or getattr(block, "mlp_reads_resid_directly", False):
        raise SiteError(
            f"a {type(block).__name__} scales or normalises what its {part} writes on the way to "
            "the residual stream, so a Logit cotangent is not its own. Use a Metric, or a block."
        )
    return None


def logits_of(model: LensModel, output: Any) -> Tensor | None:
    """Logits, from what the module that computes them returned."""
    if isinstance(model, HookedTransformer):
        cap = model.cfg.output_logits_soft_cap
        if isinstance(output, Tensor) and cap is not None and cap > 0:
            return cap * torch.tanh(output / cap)
    for attribute in ("logits", "last_hidden_state"):
        output = getattr(output, attribute, output)
    output = output[0] if isinstance(output, tuple) and output else output
    return output if isinstance(output, Tensor) else None


def logits(model: LensModel) -> Gate:
    """What the model says."""
    extract = functools.partial(logits_of, model)
    if isinstance(model, HookedTransformer):
        return OutputGate(model.unembed, extract)
    return RootOutputGate(model.original_model, extract)


def is_hooked(module: nn.Module) -> bool:
    """Whether this is a component of a HookedTransformer rather than of a bridge."""
    return not hasattr(module, "original_component")

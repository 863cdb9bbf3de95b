"""Where TransformerLens models keep their parts: blocks, MLPs, attention, embeddings and logits.

Everything is looked up when it is needed: weights may be processed or moved, and SAELens swaps hook
points for others. What computes centroids asks here and knows neither toolkit class.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lch_plugin.adapters.checks import check_loaded
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
    HookedGatedMLP,
    HookedMLP,
    HookedTransformer,
    HookPoint,
    LensModel,
    MLPBridge,
    MoEBridge,
    TransformerBridge,
)
from lch_plugin.errors import InputError, SiteError, VanishingCentroidError
from lch_plugin.mlp import MLP, GatedMLP, PlainMLP, at_least_float32, is_vanishing
from lch_plugin.sites import integers

# Lists of blocks, by the name TransformerLens gives them; encoder-decoders have two.
_STACKS = ("blocks", "encoder_blocks", "decoder_blocks")
# Names under which blocks keep their attention.
_ATTENTION_NAMES = ("attn", "self_attn")
# Names under which the MLPs of HuggingFace models keep their activation function.
_ACTIVATION_NAMES = (
    *("act_fn", "act", "activation_fn", "activation", "activation_func", "gelu_impl"),
    *("intermediate_act_fn", "intermediate.intermediate_act_fn"),
)
# Hook points within an MLP: with an SAE in its place one changes what the MLP computes.
_SPLICED = ("hook_in", "hook_out", "hook_pre", "hook_pre_linear", "hook_post")


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
        raise SiteError(f"stack={name!r} is none of this model's: {list(found)}.")
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


def weight_processing(model: LensModel, layer: int) -> dict[str, bool]:
    """What is known of TransformerLens' weight processing, which changes a centroid's meaning.

    Folding the layer norm moves the MLP's input space; centering the writing weights takes the
    all-ones direction out of what it writes. SAEs and probes do not carry over. A bridge says only
    whether its weights were processed in any way, a HookedTransformer whether the norm was folded.
    """
    if isinstance(model, TransformerBridge):
        processed = bool(model._weights_processed)
    else:
        processed = str(model.cfg.normalization_type).endswith("Pre")
    try:
        centered = is_vanishing(locate_mlp(model, "blocks", layer).weights)
    except SiteError:
        centered = False
    return {"processed": processed, "writing_weights_centered": centered}


def hook_points(module: nn.Module) -> Iterator[HookPoint]:
    """Every hook point within."""
    return (m for m in module.modules() if isinstance(m, HookPoint))


# ------------------------------------------------------------------- where tensors pass


def block_input(block: Any) -> Gate:
    """The residual stream as a block reads it."""
    return PointGate(block, "hook_resid_pre" if is_hooked(block) else "hook_in", last=True)


def block_output(block: Any) -> Gate:
    """The residual stream as a block leaves it."""
    return PointGate(block, "hook_resid_post" if is_hooked(block) else "hook_out", last=False)


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
        return ModuleGate(attn, "input", ("query_input", "key_input", "value_input"))
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


def values_point(attn: Any) -> tuple[str, HookPoint]:
    """Hook point of ``z``, the heads' mixes of values: its name in attention, and itself."""
    if is_hooked(attn):
        return "hook_z", attn.hook_z
    return "o.hook_in", attn.o.hook_in


def heads_values(attn: Any) -> Gate:
    """The heads' mixes of values, before any hook of the user's edits them."""
    return PointGate(attn, values_point(attn)[0], last=False)


def heads_output(attn: Any) -> Gate:
    """What attention returns, by when its pattern has passed a hook point too."""
    return ModuleGate(attn, "output")


def embedding_output(model: LensModel) -> Gate:
    """Token embeddings.

    Raises:
        SiteError: the model has no token embedding.
    """
    if isinstance(model, HookedTransformer):
        return RootPointGate(model, "hook_embed", last=True)
    embed = model._modules.get("embed")
    if embed is None:
        raise SiteError(
            f"{type(model).__name__} has no `embed`, so there are no token embeddings to "
            "differentiate with respect to. Use a span from block 0."
        )
    return PointGate(embed, "hook_out", last=True)


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


def post_norm(block: Any, kind: str) -> Callable[[Tensor], Tensor] | None:
    """The norm between what attention or an MLP writes and the residual stream, if there is one.

    Raises:
        SiteError: what is written reaches the residual stream in some other indirect way.
    """
    norm = getattr(block, "_modules", {}).get(
        "ln1_post" if kind in ("attn", "head") else "ln2_post"
    )
    if norm is not None:
        return norm.original_component if not is_hooked(norm) else norm
    scale = getattr(block, "residual_contribution_scale", 1.0)
    if scale != 1.0 or getattr(block, "mlp_reads_resid_directly", False):
        raise SiteError(
            f"a {type(block).__name__} scales or normalises what its {kind} writes on the way to "
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


# ------------------------------------------------------------------------------- MLPs


def locate_mlps(model: LensModel, layers: int | Sequence[int] | None = None) -> list[MLPParts]:
    """The MLPs of a model that have a closed form, in layer order.

    Raises:
        InputError: the model is of no supported class.
        SiteError: no such layer, or one without a plain or gated MLP.
    """
    check_model(model)
    found = [
        locate_mlp(model, stack, layer)
        for stack, blocks in stacks(model).items()
        for layer in layer_indices(blocks, layers)
    ]
    for parts in found:
        parts.check_readable()
    return found


def locate_mlp(model: LensModel, stack: str, layer: int) -> MLPParts:
    """The MLP of one block, or a `SiteError` that says what is there instead."""
    component = getattr(getattr(model, stack)[layer], "mlp", None)
    parts: MLPParts
    if (
        isinstance(component, MLPBridge)
        and not isinstance(component, MoEBridge)
        and {"in", "out"} <= component.submodules.keys()
    ):
        parts = BridgeMLP(stack, layer, component)
    elif (
        isinstance(component, HookedMLP | HookedGatedMLP)
        # A layer norm for an activation mixes neurons: the Jacobian has no diagonal in it.
        and not component.cfg.is_layer_norm_activation()
    ):
        parts = HookedMLPParts(stack, layer, component)
    else:
        found = "no MLP" if component is None else f"a {type(component).__name__}"
        raise SiteError(
            f"block {layer} has {found} where a plain or gated MLP (an input and an output "
            "projection around an elementwise activation) is needed. Pass layers=[...] without it."
        )
    return parts


class MLPParts:
    """One MLP of a model: where its parts are. Subclasses know where a toolkit keeps them."""

    def __init__(self, stack: str, layer: int, component: Any) -> None:
        self.layer = layer
        self.name = f"{stack}.{layer}.mlp"
        self.component = component

    @property
    def entry(self) -> nn.Module:
        """The module whose first argument is what the MLP reads."""
        raise NotImplementedError

    @property
    def exit(self) -> nn.Module:
        """The module whose output is what the MLP writes."""
        raise NotImplementedError

    @property
    def pre_activation_points(self) -> tuple[nn.Module, ...]:
        """Hook points of the pre-activations, in the order `MLP.pre_activations` gives them."""
        raise NotImplementedError

    @property
    def weights(self) -> MLP:
        """The MLP's weights as they are now."""
        raise NotImplementedError

    @property
    def post_activation_name(self) -> str:
        """Name of the hook point of the neurons' activations, what ``W_out`` reads."""
        raise NotImplementedError

    @property
    def input_gate(self) -> Gate:
        """What the projections read, after every hook of the user's."""
        raise NotImplementedError

    def check_readable(self) -> None:
        """Raise for weights that are not loaded, or quantised, and for SAEs within the MLP."""
        check_loaded(self.component, self.name)
        for name, module in self.component.named_modules():
            point = name.rpartition(".")[2]
            if point in _SPLICED and not isinstance(module, HookPoint):
                raise SiteError(
                    f"an SAE stands at {name} of the MLP at layer {self.layer}, so the MLP is not "
                    "what its weights say. Call reset_saes() first, and add it again afterwards."
                )

    def check_cotangent(self, cotangent: Float[Tensor, " d_out"] | None = None) -> None:
        """Raise `VanishingCentroidError` if the cotangent reads nothing of what the MLP writes."""
        if is_vanishing(self.weights, cotangent):
            read = "the all-ones cotangent" if cotangent is None else "this cotangent"
            raise VanishingCentroidError(
                f"{read} is orthogonal to everything the MLP at layer {self.layer} writes, so its "
                "centroid would be rounding noise. TransformerLens' center_writing_weights does "
                "this to all ones. Load without weight processing: "
                "TransformerBridge.boot_transformers(...) without enable_compatibility_mode(), "
                "or with enable_compatibility_mode(center_writing_weights=False), or "
                "HookedTransformer.from_pretrained_no_processing(...); or pass another cotangent."
            )


class HookedMLPParts(MLPParts):
    """An MLP of a HookedTransformer."""

    @property
    def entry(self) -> nn.Module:
        return self.component

    exit = entry

    @property
    def input_gate(self) -> Gate:
        return ModuleGate(self.component, "input")

    @property
    def pre_activation_points(self) -> tuple[nn.Module, ...]:
        c = self.component
        return (c.hook_pre, c.hook_pre_linear) if isinstance(c, HookedGatedMLP) else (c.hook_pre,)

    @property
    def weights(self) -> MLP:
        c = self.component
        if isinstance(c, HookedGatedMLP):
            # Its b_in is added after the product, where no pre-activation sees it.
            return GatedMLP(c.W_gate, None, c.W_in, None, c.W_out, c.act_fn)
        return PlainMLP(c.W_in, c.b_in, c.W_out, c.act_fn)

    @property
    def post_activation_name(self) -> str:
        return f"{self.name}.hook_post"


class BridgeMLP(MLPParts):
    """An MLP of a TransformerBridge.

    Where a family keeps ``fc1`` and ``fc2`` on the decoder layer (OPT), the bridge's MLP is
    never called and its two projections stand for it.
    """

    @property
    def entry(self) -> nn.Module:
        return self.component if is_module(self.component) else self._part("in")

    @property
    def exit(self) -> nn.Module:
        return self.component if is_module(self.component) else self._part("out")

    @property
    def pre_activation_points(self) -> tuple[nn.Module, ...]:
        parts = ("gate", "in") if self._is_gated else ("in",)
        return tuple(self._part(name).hook_out for name in parts)

    @property
    def weights(self) -> MLP:
        c, b_in, act = self.component, self._part("in").bias, self._activation()
        if self._is_gated:
            return GatedMLP(c.W_gate, self._part("gate").bias, c.W_in, b_in, c.W_out, act)
        if c.W_in.shape[-1] != c.W_out.shape[0]:
            raise SiteError(
                f"the MLP at layer {self.layer} projects to {c.W_in.shape[-1]} dimensions and from "
                f"{c.W_out.shape[0]}: something other than an activation lies between."
            )
        return PlainMLP(c.W_in, b_in, c.W_out, act)

    @property
    def post_activation_name(self) -> str:
        # Not its alias hook_post, which SAELens' bridge does not list.
        return f"{self.name}.out.hook_in"

    @property
    def input_gate(self) -> Gate:
        if not is_module(self.component):
            return PointGate(self._part("in"), "hook_in", last=True)
        # A plain MLP's projection has an input point of its own, behind the MLP's; the two
        # projections of a gated one have one each, and share the MLP's.
        return PointGate(self.component, "hook_in" if self._is_gated else "in.hook_in", last=True)

    @property
    def _is_gated(self) -> bool:
        return "gate" in self.component.submodules

    def _part(self, name: str) -> Any:
        return getattr(self.component, name)

    def _activation(self) -> Callable[[Tensor], Tensor]:
        original = self.component.original_component
        for name in _ACTIVATION_NAMES:
            act = functools.reduce(
                lambda owner, part: getattr(owner, part, None), name.split("."), original
            )
            if isinstance(act, nn.Module):
                return act.forward  # Not the module: hooks on it belong to the model's own call.
            if callable(act):
                return act
        raise SiteError(
            f"the MLP at layer {self.layer} ({type(original).__name__}) keeps its activation "
            f"function under none of {_ACTIVATION_NAMES}, so its derivative is unknown."
        )


def mlp_gates(component: Any) -> tuple[Gate, Gate]:
    """What an MLP of any kind reads, and what it writes."""
    if not hasattr(component, "hook_out") or not hasattr(component, "hook_in"):  # HookedTransformer
        return ModuleGate(component, "input"), ModuleGate(component, "output")
    first, last = component, component
    if not is_module(component):
        first, last = getattr(component, "in"), component.out
    return PointGate(first, "hook_in", last=True), PointGate(last, "hook_out", last=False)


def is_module(component: Any) -> bool:
    """Whether an MLP is called as a module, and does not merely stand for two (OPT)."""
    return getattr(component, "name", "") is not None


def is_hooked(module: nn.Module) -> bool:
    """Whether this is a component of a HookedTransformer rather than of a bridge."""
    return not hasattr(module, "original_component")

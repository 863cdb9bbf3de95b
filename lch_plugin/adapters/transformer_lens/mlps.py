"""Where TransformerLens models keep the parts of their MLPs, and what was done to the weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lch_plugin.adapters.checks import check_loaded, check_reads
from lch_plugin.adapters.transformer_lens.architecture import check_model, layer_indices, stacks
from lch_plugin.adapters.transformer_lens.gates import Gate, ModuleGate, PointGate
from lch_plugin.adapters.transformer_lens.toolkit import (
    HookedGatedMLP,
    HookedMLP,
    HookPoint,
    LensModel,
    MLPBridge,
    MoEBridge,
    TransformerBridge,
)
from lch_plugin.errors import SiteError
from lch_plugin.mlp import MLP, GatedMLP, PlainMLP, is_vanishing

# Names under which the MLPs of HuggingFace models keep their activation function.
_ACTIVATION_NAMES = (
    *("act_fn", "act", "activation_fn", "activation", "activation_func", "gelu_impl"),
    *("intermediate_act_fn", "intermediate.intermediate_act_fn"),
)
#: What to do where a cotangent reads nothing.
UNPROCESSED = (
    "TransformerLens' center_writing_weights and center_unembed do this to all ones. Load without "
    "weight processing: TransformerBridge.boot_transformers(...) without "
    "enable_compatibility_mode(), or with enable_compatibility_mode(center_writing_weights=False), "
    "or HookedTransformer.from_pretrained_no_processing(...); or pass another cotangent."
)
# Hook points within an MLP: with an SAE in its place one changes what the MLP computes.
_SPLICED = ("hook_in", "hook_out", "hook_pre", "hook_pre_linear", "hook_post")


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
    def pre_activation_gates(self) -> tuple[Gate, ...]:
        """Where the pre-activations pass, in the order `MLP.pre_activations` gives them."""
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
        W_out = self.weights.W_out
        v = W_out.new_ones(W_out.shape[-1]) if cotangent is None else cotangent
        check_reads(self.name, "this MLP", W_out, v, cure=UNPROCESSED)


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
    def pre_activation_gates(self) -> tuple[Gate, ...]:
        gated = isinstance(self.component, HookedGatedMLP)
        names = ("hook_pre", "hook_pre_linear") if gated else ("hook_pre",)
        return tuple(PointGate(self.component, name, last=True) for name in names)

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
    def pre_activation_gates(self) -> tuple[Gate, ...]:
        if not is_module(self.component):
            return (PointGate(self._part("in"), "hook_out", last=True),)
        parts = ("gate", "in") if self._is_gated else ("in",)
        return tuple(PointGate(self.component, f"{p}.hook_out", last=True) for p in parts)

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

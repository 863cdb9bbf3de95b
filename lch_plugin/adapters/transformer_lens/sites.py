"""The MLPs of a TransformerLens model: where their parts are, and how their centroids come about.

When an MLP is entered, a hook asks whether anybody listens to its centroid. If so it puts a hook on
each pre-activation, *now*, so that it comes after every hook of the user's on the same hook point:
the centroid is that of the values the MLP goes on with, interventions included. The closed form
(`lch_plugin.mlp`) turns these into the centroid; the user's modules never run twice. When the MLP
is left, by an exception too, these hooks come off again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens import HookedTransformer
from transformer_lens.components import MLP as HookedMLP
from transformer_lens.components import GatedMLP as HookedGatedMLP
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import MLPBridge, MoEBridge

from lch_plugin.errors import InputError, SiteError, VanishingCentroidError
from lch_plugin.mlp import MLP, GatedMLP, PlainMLP, is_vanishing, mlp_centroid

LensModel: TypeAlias = TransformerBridge | HookedTransformer

# Names under which the MLPs of HuggingFace models keep their activation function.
_ACTIVATION_NAMES = ("act_fn", "act", "activation_fn", "activation", "activation_func", "gelu_impl")
# Hook points within an MLP: with an SAE in its place one changes what the MLP computes.
_SPLICED = ("hook_in", "hook_out", "hook_pre", "hook_pre_linear", "hook_post")
_READABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def locate_mlps(
    model: LensModel,
    layers: int | Sequence[int] | None = None,
    cotangent: Float[Tensor, " d_model"] | None = None,
) -> list[CentroidSite]:
    """The MLPs of a model, in layer order, attached or not.

    Raises:
        InputError, SiteError: as `attach`.
    """
    if not isinstance(model, LensModel):
        raise InputError(
            f"this takes a TransformerBridge or HookedTransformer, not {type(model).__name__}. "
            "Wrap a HuggingFace model with TransformerBridge.boot_transformers(name, "
            "hf_model=model, tokenizer=tokenizer); pass the original of a compiled module."
        )
    _check_cotangent(model, cotangent)
    return [_locate(model, layer, cotangent) for layer in _layer_indices(model, layers)]


def weight_processing(model: LensModel, site: CentroidSite) -> dict[str, bool]:
    """What is known of TransformerLens' weight processing, which changes a centroid's meaning.

    Folding the layer norm moves the MLP's input space; centering the writing weights takes the
    all-ones direction out of what it writes. SAEs and probes do not carry over. A bridge says only
    whether its weights were processed in any way, a HookedTransformer whether the norm was folded.
    """
    if isinstance(model, TransformerBridge):
        processed = bool(model._weights_processed)
    else:
        processed = str(model.cfg.normalization_type).endswith("Pre")
    return {"processed": processed, "writing_weights_centered": is_vanishing(site.weights)}


class CentroidSite:
    """One MLP of a model: where its parts are, and the hook point its centroid comes out of.

    Subclasses say where a toolkit keeps the parts. Everything is looked up when it is needed:
    weights may be processed or moved, and SAELens swaps hook points for others.
    """

    def __init__(self, layer: int, component: Any, cotangent: Tensor | None) -> None:
        self.layer = layer
        self.name = f"blocks.{layer}.mlp.hook_centroid"
        # A copy: what the caller does to theirs afterwards is their affair.
        self.cotangent = None if cotangent is None else cotangent.detach().clone()
        self.component = component
        self._hooks: list[RemovableHandle] = []
        # One for each call of the MLP that is under way: a user's hook may run the model again.
        self._calls: list[_Call] = []
        self._checked_W_out: tuple[int, int] | None = None

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
    def point(self) -> nn.Module:
        """What stands at ``hook_centroid`` now: our HookPoint, or SAELens' SAE in its place."""
        point = self.component.hook_centroid
        assert isinstance(point, nn.Module)
        return point

    @property
    def post_activation_name(self) -> str:
        """Name of the hook point of the neurons' activations, what ``W_out`` reads."""
        raise NotImplementedError

    def watch_input(self, watch: Callable[[Tensor], None]) -> RemovableHandle:
        """Call ``watch`` with what the MLP reads, after every hook of the user's so far."""
        raise NotImplementedError

    def install(self) -> None:
        """Start computing centroids for whoever listens at `point`."""
        self._hooks = [
            self.entry.register_forward_pre_hook(self._on_entry),
            self.entry.register_forward_hook(self._on_exit, always_call=True),
        ]

    def remove(self) -> None:
        """Take every hook of ours off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        while self._calls:
            self._calls.pop().remove_hooks()

    @property
    def installed(self) -> bool:
        """Whether `install` was called, and `remove` not since."""
        return bool(self._hooks)

    def check_readable(self) -> None:
        """Raise for weights that are not loaded, or quantised, and for SAEs within the MLP."""
        for name, parameter in self.component.named_parameters():
            if parameter.is_meta or parameter.dtype not in _READABLE:
                raise SiteError(
                    f"{name} of the MLP at layer {self.layer} has dtype {parameter.dtype} on "
                    f"device {parameter.device}: the closed form needs loaded floating-point "
                    "weights. Load the model with its weights, unquantised."
                )
        for name, module in self.component.named_modules():
            point = name.rpartition(".")[2]
            if point in _SPLICED and not isinstance(module, HookPoint):
                raise SiteError(
                    f"an SAE stands at {name} of the MLP at layer {self.layer}, so the MLP is not "
                    "what its weights say. Call reset_saes() first, and add it again afterwards."
                )

    def check_cotangent(self) -> None:
        """Raise `VanishingCentroidError` if the cotangent reads nothing of what the MLP writes."""
        mlp = self.weights
        if is_vanishing(mlp, self.cotangent):
            read = "the all-ones cotangent" if self.cotangent is None else "this cotangent"
            raise VanishingCentroidError(
                f"{read} is orthogonal to everything the MLP at layer {self.layer} writes, so its "
                "centroid would be rounding noise. TransformerLens' center_writing_weights does "
                "this to all ones. Load without weight processing: "
                "TransformerBridge.boot_transformers(...) without enable_compatibility_mode(), "
                "or with enable_compatibility_mode(center_writing_weights=False), or "
                "HookedTransformer.from_pretrained_no_processing(...); or pass another cotangent."
            )
        self._checked_W_out = _identity(mlp.W_out)

    def _on_entry(self, _module: nn.Module, _args: tuple[Any, ...]) -> None:
        call = _Call()
        self._calls.append(call)
        if self._has_listener():
            for i, point in enumerate(self.pre_activation_points):
                hook = partial(self._capture, call, i)
                call.hooks.append(point.register_forward_hook(hook))

    def _on_exit(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        if self._calls:  # Not if we were detached within the call.
            self._calls.pop().remove_hooks()

    def _capture(
        self, call: _Call, i: int, _module: nn.Module, _args: tuple[Any, ...], output: Tensor
    ) -> None:
        if not self._calls or call is not self._calls[-1]:
            return  # The pre-activation of a call within this one.
        call.captured[i] = output.detach()
        if len(call.captured) < len(call.hooks):
            return
        pre = tuple(call.captured[i] for i in range(len(call.hooks)))
        call.captured.clear()
        mlp = self.weights
        if _identity(mlp.W_out) != self._checked_W_out:  # Processed, trained or moved since.
            self.check_cotangent()
        self.point(mlp_centroid(mlp, pre, self.cotangent))

    def _has_listener(self) -> bool:
        point = self.point
        return not isinstance(point, HookPoint) or bool(point._forward_hooks)


class _Call:
    """The pre-activations of one call of an MLP, as far as they are there."""

    def __init__(self) -> None:
        self.hooks: list[RemovableHandle] = []
        self.captured: dict[int, Tensor] = {}

    def remove_hooks(self) -> None:
        for hook in self.hooks:
            hook.remove()


class HookedSite(CentroidSite):
    """An MLP of a HookedTransformer."""

    @property
    def entry(self) -> nn.Module:
        return self.component

    exit = entry

    def watch_input(self, watch: Callable[[Tensor], None]) -> RemovableHandle:
        return self.component.register_forward_pre_hook(lambda _module, args: watch(args[0]))

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
        return f"blocks.{self.layer}.mlp.hook_post"


class BridgeSite(CentroidSite):
    """An MLP of a TransformerBridge.

    Where a family keeps ``fc1`` and ``fc2`` on the decoder layer (OPT), the bridge's MLP is
    never called and its two projections stand for it.
    """

    def __init__(self, layer: int, component: Any, cotangent: Tensor | None) -> None:
        super().__init__(layer, component, cotangent)
        self._conversion = getattr(self._part("in").hook_in, "hook_conversion", None)

    @property
    def entry(self) -> nn.Module:
        return self.component if self._is_module else self._part("in")

    @property
    def exit(self) -> nn.Module:
        return self.component if self._is_module else self._part("out")

    @property
    def pre_activation_points(self) -> tuple[nn.Module, ...]:
        parts = ("gate", "in") if self._is_gated else ("in",)
        return tuple(self._part(name).hook_out for name in parts)

    @property
    def weights(self) -> MLP:
        c, b_in, act = self.component, self._part("in").bias, self._activation()
        if self._is_gated:
            return GatedMLP(c.W_gate, self._part("gate").bias, c.W_in, b_in, c.W_out, act)
        return PlainMLP(c.W_in, b_in, c.W_out, act)

    @property
    def post_activation_name(self) -> str:
        # Not its alias hook_post, which SAELens' bridge does not list.
        return f"blocks.{self.layer}.mlp.out.hook_in"

    def watch_input(self, watch: Callable[[Tensor], None]) -> RemovableHandle:
        # A plain MLP's projection has an input point of its own, behind the MLP's; the two
        # projections of a gated one have one each, and share the MLP's.
        owner = self.component if self._is_gated else self._part("in")
        return owner.hook_in.register_forward_hook(lambda _module, _args, output: watch(output))

    def keep_full_name(self, attribute: str, hook: HookPoint) -> None:
        """Stands in for the component's ``_register_hook`` while attached.

        The component gives a hook point assigned to it its bare attribute name. SAELens assigns
        one whenever an SAE is reset, and with the full name lost ``run_with_hooks`` takes the
        point for an alias of a hook that is not there, and silently never fires.
        """
        type(self.component)._register_hook(self.component, attribute, hook)
        if attribute == "hook_centroid":
            hook.name = self.name
            # OPT flattens batch and position inside its blocks; its points undo that for users.
            hook.hook_conversion = self._conversion

    @property
    def _is_module(self) -> bool:
        return self.component.name is not None

    @property
    def _is_gated(self) -> bool:
        return "gate" in self.component.submodules

    def _part(self, name: str) -> Any:
        return getattr(self.component, name)

    def _activation(self) -> Callable[[Tensor], Tensor]:
        original = self.component.original_component
        for name in _ACTIVATION_NAMES:
            act = getattr(original, name, None)
            if isinstance(act, nn.Module):
                return act.forward  # Not the module: hooks on it belong to the model's own call.
            if callable(act):
                return act
        raise SiteError(
            f"the MLP at layer {self.layer} ({type(original).__name__}) keeps its activation "
            f"function under none of {_ACTIVATION_NAMES}, so its derivative is unknown."
        )


def _locate(model: LensModel, layer: int, cotangent: Tensor | None) -> CentroidSite:
    """The MLP of one block, or a `SiteError` that says what is there instead."""
    component = getattr(model.blocks[layer], "mlp", None)
    site: CentroidSite
    if (
        isinstance(component, MLPBridge)
        and not isinstance(component, MoEBridge)
        and {"in", "out"} <= component.submodules.keys()
    ):
        site = BridgeSite(layer, component, cotangent)
    elif (
        isinstance(component, HookedMLP | HookedGatedMLP)
        # A layer norm for an activation mixes neurons: the Jacobian has no diagonal in it.
        and not component.cfg.is_layer_norm_activation()
    ):
        site = HookedSite(layer, component, cotangent)
    else:
        found = "no MLP" if component is None else f"a {type(component).__name__}"
        raise SiteError(
            f"block {layer} has {found} where a plain or gated MLP (an input and an output "
            "projection around an elementwise activation) is needed. Pass layers=[...] without it."
        )
    site.check_readable()
    return site


def _layer_indices(model: LensModel, layers: int | Sequence[int] | None) -> list[int]:
    n_layers = len(getattr(model, "blocks", ()))
    if n_layers == 0:
        raise SiteError(f"{type(model).__name__} has no `blocks`: no layer to attach to.")
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
    return sorted({layer % n_layers for layer in wanted})


def integers(values: Any) -> list[int] | None:
    """One integer or several, of any kind (numpy's and tensors too); None for anything else."""
    values = values.tolist() if hasattr(values, "tolist") else values
    listed = list(values) if isinstance(values, Iterable) else [values]
    if any(isinstance(v, bool) or not hasattr(v, "__index__") for v in listed):
        return None
    return [operator.index(v) for v in listed]


def _identity(W: Tensor) -> tuple[int, int]:
    """Changes when a weight is replaced or written to (but for writes to ``.data``)."""
    return W.data_ptr(), W._version


def _check_cotangent(model: LensModel, cotangent: Tensor | None) -> None:
    if cotangent is None:
        return
    d_model = model.cfg.d_model
    if not isinstance(cotangent, Tensor) or cotangent.shape != (d_model,):
        shape = getattr(cotangent, "shape", type(cotangent).__name__)
        raise InputError(f"cotangent must be a tensor of shape ({d_model},), d_model; got {shape}.")
    if not (
        cotangent.is_floating_point() and bool(cotangent.isfinite().all()) and bool(cotangent.any())
    ):
        raise InputError("cotangent must be floating point, finite and not all zeros.")

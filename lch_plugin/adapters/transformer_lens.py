"""Centroids as ordinary TransformerLens hook points.

`attach` adds a `HookPoint` called ``hook_centroid`` to each MLP of a TransformerBridge or
HookedTransformer (SAELens' subclasses of both included). It is a read-out that nothing
downstream consumes: ``run_with_cache``, ``run_with_hooks`` and SAELens see a centroid under a
hook name like any other, editing it never changes the logits, and it is computed only when
something listens.

How one is computed. A hook on the MLP's entry, all that stays installed, asks whether anybody
listens. If so it puts a hook on each pre-activation, *now*, so that it comes after every hook of
the user's: the centroid is that of the values the MLP goes on with, interventions included. The
closed form (`lch_plugin.mlp`) turns these into the centroid; the user's modules never run twice.

Private attributes used, for want of a public way:
    ``TransformerBridge._hook_registry``, ``GeneralizedComponent._hook_registry`` and
    ``._register_hook`` (transformer-lens 3.9): hook points added after boot are in no registry.
    ``TransformerBridge._weights_processed``: whether weights were processed, for the record.
    ``Module._forward_hooks`` (torch): whether a hook point has listeners of any kind.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens import HookedTransformer
from transformer_lens.components import MLP as HookedMLP
from transformer_lens.components import GatedMLP as HookedGatedMLP
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import MLPBridge, MoEBridge

from lch_plugin.errors import AttachError, InputError, SiteError, VanishingCentroidError
from lch_plugin.mlp import MLP, GatedMLP, PlainMLP, is_vanishing, mlp_centroid

LensModel: TypeAlias = TransformerBridge | HookedTransformer

# Names under which the MLPs of HuggingFace models keep their activation function.
_ACTIVATION_NAMES = ("act_fn", "act", "activation_fn", "activation", "activation_func")

# Largest relative distance between the closed form and autograd that attaching accepts: an
# order of magnitude above rounding, and far below what a wrong activation or layout gives.
_SELF_CHECK_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


class Handle:
    """The centroid hooks of one `attach` call. Leaving its ``with`` block detaches them.

    Attributes:
        hook_names: names of the hook points, in layer order.
    """

    def __init__(self, model: LensModel, sites: Sequence[CentroidSite]) -> None:
        self.hook_names = [site.name for site in sites]
        self._model = model
        self._sites = list(sites)

    def detach(self) -> None:
        """Restore the model exactly; a second call does nothing.

        SAEs attached to these hook points are reset first: their place is about to go.
        """
        sites, self._sites = self._sites, []
        for site in sites:
            _withdraw(self._model, site)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"Handle({self.hook_names if self._sites else 'detached'})"


def attach(
    model: LensModel,
    layers: int | Sequence[int] | None = None,
    site: str = "mlp",
    cotangent: Float[Tensor, " d_model"] | None = None,
) -> Handle:
    """Add ``blocks.L.mlp.hook_centroid`` hook points to a model.

    Each fires with a ``(batch, pos, d_model)`` tensor, at least float32: the centroid
    ``J^T v`` of that MLP at each position, in the MLP's input space (after the layer norm).
    Edits of the MLP's input or pre-activations by other hooks are seen; edits of ``hook_post``
    and ``hook_out`` replace what the MLP computes and are not.

    Attaching runs three tokens through the model, with the user's own hooks silenced, and
    compares every centroid with autograd through the model's own modules.

    Args:
        model: TransformerBridge or HookedTransformer, or SAELens' subclass of either.
        layers: which blocks, negative counting from the end; all if None.
        site: kind of component; ``"mlp"``.
        cotangent: ``v``, shape ``(d_model,)``; all ones if None (the paper's centroid).

    Returns:
        A handle; use it as a context manager or call ``handle.detach()``.

    Raises:
        InputError: the model is of no supported class, or the cotangent does not fit.
        SiteError: no such layer or site, an MLP of a kind without a closed form, weights that
            cannot be read, or the self-check found other values than autograd.
        AttachError: a layer already carries a centroid hook.
        VanishingCentroidError: the cotangent reads nothing of what the MLP writes, as all ones
            does after TransformerLens has centered the writing weights.
    """
    if site != "mlp":
        raise SiteError(f"site={site!r} is not known; the only site is 'mlp'.")
    sites = locate_mlps(model, layers, cotangent)
    for new in sites:
        new.check_cotangent()
    handle = Handle(model, sites)
    try:
        for new in sites:
            _publish(model, new)
        _self_check(model, sites)
    except BaseException:
        handle.detach()
        raise
    return handle


def attached_sites(model: LensModel) -> dict[str, CentroidSite]:
    """The centroid sites a model carries now, by hook name."""
    components = (getattr(block, "mlp", None) for block in getattr(model, "blocks", ()))
    sites = (vars(c).get("_centroid_site") for c in components if c is not None)
    return {site.name: site for site in sites if site is not None}


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


def as_tokens(
    model: LensModel, prompt: str | Int[Tensor, "*batch pos"]
) -> Int[Tensor, "batch pos"]:
    """Token ids of a prompt, on the model's device, checked to be what the model can read.

    Raises:
        InputError: no tokens, not integers, an id out of vocabulary, or longer than the context.
    """
    tokens = model.to_tokens(prompt) if isinstance(prompt, str) else prompt
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.ndim != 2 or tokens.numel() == 0 or tokens.is_floating_point():
        raise InputError(
            f"tokens of shape {tuple(tokens.shape)} and dtype {tokens.dtype}: integers of shape "
            "(pos,) or (batch, pos), at least one, are needed."
        )
    check_token_ids(model, int(tokens.min()), int(tokens.max()))
    if tokens.shape[-1] > model.cfg.n_ctx:
        raise InputError(
            f"{tokens.shape[-1]} tokens are longer than the model's context of {model.cfg.n_ctx}. "
            "Shorten the prompt."
        )
    return tokens.to(next(model.parameters()).device)


def check_token_ids(model: LensModel, lowest: int, highest: int) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        InputError: an id below zero, or at or above ``d_vocab``.
    """
    d_vocab = model.cfg.d_vocab
    if lowest < 0 or highest >= d_vocab:
        raise InputError(
            f"token ids {lowest} to {highest} leave the model's vocabulary, 0 to {d_vocab - 1}. "
            "Tokenise with the model's own tokenizer."
        )


def weight_processing(model: LensModel, site: CentroidSite) -> dict[str, bool]:
    """What TransformerLens' weight processing did that changes a centroid's meaning.

    Folding the layer norm moves the MLP's input space; centering the writing weights takes the
    all-ones direction out of what it writes. SAEs and probes do not carry over.
    """
    if isinstance(model, TransformerBridge):
        gain = getattr(getattr(model.blocks[site.layer], "ln2", None), "weight", None)
        # A fresh model has unit gains too, so these alone do not tell.
        folded = model._weights_processed and gain is not None and bool((gain == 1).all())
    else:
        folded = str(model.cfg.normalization_type).endswith("Pre")
    return {
        "layer_norm_folded": bool(folded),
        "writing_weights_centered": is_vanishing(site.weights),
    }


def mlp_inputs(
    model: LensModel, tokens: Int[Tensor, "batch pos"], sites: Sequence[CentroidSite]
) -> list[Float[Tensor, "batch pos d_model"]]:
    """What each MLP reads on these tokens, at least in float32, from one forward pass."""
    inputs: dict[int, Tensor] = {}

    def record(layer: int, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().reshape(*tokens.shape, -1)
        inputs[layer] = x.to(torch.promote_types(x.dtype, torch.float32))

    handles = [s.entry.register_forward_pre_hook(partial(record, s.layer)) for s in sites]
    try:
        with torch.no_grad():
            model(tokens, return_type=None)
    finally:
        for handle in handles:
            handle.remove()
    return [inputs[s.layer] for s in sites]


class CentroidSite:
    """One MLP of a model: where its parts are, and the hook point its centroid comes out of.

    Subclasses say where a toolkit keeps the parts. Everything is looked up when it is needed:
    weights may be processed or moved, and SAELens swaps hook points for others.
    """

    def __init__(self, layer: int, component: Any, cotangent: Tensor | None) -> None:
        self.layer = layer
        self.name = f"blocks.{layer}.mlp.hook_centroid"
        self.cotangent = cotangent
        self.component = component
        self._entry_hook: RemovableHandle | None = None
        self._capture_hooks: list[RemovableHandle] = []
        self._captured: dict[int, Tensor] = {}
        self._checked_W_out: int | None = None

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

    def install(self) -> None:
        """Start computing centroids for whoever listens at `point`."""
        self._entry_hook = self.entry.register_forward_pre_hook(self._on_entry)

    def remove(self) -> None:
        """Take every hook of ours off the model."""
        if self._entry_hook is not None:
            self._entry_hook.remove()
            self._entry_hook = None
        self._drop_captures()

    def check_readable(self) -> None:
        """Raise `SiteError` for weights that are not loaded, or quantised."""
        for name, parameter in self.component.named_parameters():
            if parameter.is_meta or not parameter.is_floating_point():
                raise SiteError(
                    f"{name} of the MLP at layer {self.layer} has dtype {parameter.dtype} on "
                    f"device {parameter.device}: the closed form needs loaded floating-point "
                    "weights. Load the model with its weights, unquantised."
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
        self._checked_W_out = mlp.W_out.data_ptr()

    def _on_entry(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._drop_captures()  # Left over only if the last forward pass raised half way.
        if not self._has_listener():
            return
        for i, point in enumerate(self.pre_activation_points):
            self._capture_hooks.append(point.register_forward_hook(partial(self._capture, i)))

    def _capture(self, i: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._captured[i] = output.detach()
        if len(self._captured) < len(self._capture_hooks):
            return
        pre = tuple(self._captured[i] for i in sorted(self._captured))
        self._drop_captures()
        mlp = self.weights
        if mlp.W_out.data_ptr() != self._checked_W_out:  # Processed or moved since.
            self.check_cotangent()
        self.point(mlp_centroid(mlp, pre, self.cotangent))

    def _drop_captures(self) -> None:
        for handle in self._capture_hooks:
            handle.remove()
        self._capture_hooks.clear()
        self._captured.clear()

    def _has_listener(self) -> bool:
        point = self.point
        return not isinstance(point, HookPoint) or bool(point._forward_hooks)


class _HookedSite(CentroidSite):
    """An MLP of a HookedTransformer."""

    @property
    def entry(self) -> nn.Module:
        return self.component

    exit = entry

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


class _BridgeSite(CentroidSite):
    """An MLP of a TransformerBridge.

    Where a family keeps ``fc1`` and ``fc2`` on the decoder layer (OPT), the bridge's MLP is
    never called and its two projections stand for it.
    """

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
            hook.hook_conversion = self._part("in").hook_in.hook_conversion

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
        site = _BridgeSite(layer, component, cotangent)
    elif (
        isinstance(component, HookedMLP | HookedGatedMLP)
        # A layer norm for an activation mixes neurons: the Jacobian has no diagonal in it.
        and not component.cfg.is_layer_norm_activation()
    ):
        site = _HookedSite(layer, component, cotangent)
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
    wanted = [layers] if isinstance(layers, int) else list(layers)
    if not wanted:
        raise SiteError("layers is empty; pass at least one layer, or None for all.")
    unknown = [i for i in wanted if not (isinstance(i, int) and -n_layers <= i < n_layers)]
    if unknown:
        raise SiteError(
            f"layers {unknown} do not exist: this model has layers 0 to {n_layers - 1}."
        )
    return sorted({i % n_layers for i in wanted})


def _check_cotangent(model: LensModel, cotangent: Tensor | None) -> None:
    if cotangent is None:
        return
    d_model = model.cfg.d_model
    if not isinstance(cotangent, Tensor) or cotangent.shape != (d_model,):
        shape = getattr(cotangent, "shape", type(cotangent).__name__)
        raise InputError(f"cotangent must be a tensor of shape ({d_model},), d_model; got {shape}.")
    if not bool(cotangent.isfinite().all()) or not bool(cotangent.any()):
        raise InputError("cotangent must be finite and not all zeros.")


def _publish(model: LensModel, site: CentroidSite) -> None:
    """Make a site's hook point part of the model, under its full name."""
    component = site.component
    if "hook_centroid" in component._modules:
        raise AttachError(
            f"{site.name} is already attached. Detach the earlier handle first, or attach other "
            "layers."
        )
    component._centroid_site = site
    if isinstance(site, _BridgeSite):
        component._register_hook = site.keep_full_name
    component.hook_centroid = HookPoint()
    if isinstance(model, TransformerBridge):
        model._hook_registry[site.name] = component.hook_centroid
    else:
        model.setup()
    site.install()


def _withdraw(model: LensModel, site: CentroidSite) -> None:
    """Undo `_publish`, also one that stopped half way."""
    component = site.component
    if vars(component).get("_centroid_site") is not site:
        return  # Refused by `_publish`: what is there belongs to another handle.
    if site.name in getattr(model, "acts_to_saes", {}):
        model.reset_saes(site.name)
    site.remove()
    del component._centroid_site
    component._modules.pop("hook_centroid", None)
    if isinstance(model, TransformerBridge):
        vars(component).pop("_register_hook", None)
        component._hook_registry.pop("hook_centroid", None)
        model._hook_registry.pop(site.name, None)
    else:
        model.setup()


def _self_check(model: LensModel, sites: Sequence[CentroidSite]) -> None:
    """Compare every site's centroid with autograd through the model's own MLP, on three tokens.

    Gradients are on only between an MLP's entry and its exit. So one forward pass serves all
    sites, and no module outside sees a tensor with a graph (a bridge that kept one could no
    longer be deep-copied).
    """
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Any] = {}
    centroids: dict[int, Tensor] = {}

    def enter(layer: int, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        torch.set_grad_enabled(True)
        inputs[layer] = args[0].detach().requires_grad_()
        return (inputs[layer], *args[1:])

    def leave(layer: int, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        torch.set_grad_enabled(False)
        outputs[layer] = output
        return output.detach() if isinstance(output, Tensor) else output

    def listen(layer: int, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        centroids[layer] = output

    device = next(model.parameters()).device
    tokens = torch.arange(3, device=device)[None] % model.cfg.d_vocab
    with torch.inference_mode(False), torch.no_grad(), _evaluating(model), _silenced(model):
        hooks = [
            hook
            for s in sites
            for hook in (
                s.entry.register_forward_pre_hook(partial(enter, s.layer)),
                s.exit.register_forward_hook(partial(leave, s.layer)),
                s.point.register_forward_hook(partial(listen, s.layer)),
            )
        ]
        try:
            model(tokens, return_type=None)
        finally:
            for hook in hooks:
                hook.remove()
    for s in sites:
        _compare_with_autograd(s, inputs.get(s.layer), outputs.get(s.layer), centroids.get(s.layer))


def _compare_with_autograd(site: CentroidSite, x: Tensor | None, y: Any, mu: Tensor | None) -> None:
    kind = type(site.component).__name__
    if x is None or mu is None or not isinstance(y, Tensor):
        raise SiteError(
            f"self-check of {site.name}: a forward pass of three tokens did not run this {kind} "
            "the way its closed form expects (its input, pre-activations or output never passed "
            "the hook points). Pass layers=[...] without it."
        )
    v = torch.ones_like(y) if site.cotangent is None else site.cotangent.to(y).expand_as(y)
    with torch.inference_mode(False):
        (truth,) = torch.autograd.grad(y, x, v)
    error = float((mu - truth.to(mu)).norm() / truth.to(mu).norm())
    tolerance = _SELF_CHECK_TOLERANCE[x.dtype]
    if not error <= tolerance:  # Not `>`: NaN has to fail as well.
        raise SiteError(
            f"self-check of {site.name}: the closed form is {error:.1e} (relative) away from "
            f"autograd through this {kind}, more than {tolerance:.0e} allows in {x.dtype}. It "
            "computes something other than a plain or gated MLP. Pass layers=[...] without it."
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, no random numbers), each module restored to its own mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _silenced(model: nn.Module) -> Iterator[None]:
    """No hook on any hook point fires inside: those belong to the user's own forward passes."""
    points = [module for module in model.modules() if isinstance(module, HookPoint)]
    saved = [(point._forward_hooks, point._backward_hooks) for point in points]
    for point in points:
        point._forward_hooks, point._backward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for point, (forward, backward) in zip(points, saved, strict=True):
            point._forward_hooks, point._backward_hooks = forward, backward

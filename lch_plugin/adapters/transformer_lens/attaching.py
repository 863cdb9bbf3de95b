"""Attach centroid hook points to a model, and detach them without a trace."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from lch_plugin.adapters.transformer_lens.self_check import self_check
from lch_plugin.adapters.transformer_lens.sites import (
    BridgeSite,
    CentroidSite,
    LensModel,
    locate_mlps,
)
from lch_plugin.errors import AttachError, SiteError


def attach(
    model: LensModel,
    layers: int | Sequence[int] | None = None,
    site: str = "mlp",
    cotangent: Float[Tensor, " d_model"] | None = None,
) -> Handle:
    """Add ``blocks.L.mlp.hook_centroid`` hook points to a model.

    Each fires with a ``(batch, pos, d_model)`` tensor, at least float32: the centroid
    ``J^T v`` of that MLP at each position, in the MLP's input space (after the layer norm), without
    dropout. Edits of the MLP's input or pre-activations by hooks on hook points are seen; edits of
    ``hook_post`` and ``hook_out`` replace what the MLP computes and are not.

    Attaching proves itself: see `self_check`.

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
        self_check(model, sites)
    except BaseException:
        handle.detach()
        raise
    return handle


def attached_sites(model: LensModel) -> dict[str, CentroidSite]:
    """The centroid sites a model carries now, by hook name."""
    components = (getattr(block, "mlp", None) for block in getattr(model, "blocks", ()))
    sites = (vars(c).get("_centroid_site") for c in components if c is not None)
    return {site.name: site for site in sites if site is not None}


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


def _publish(model: LensModel, site: CentroidSite) -> None:
    """Make a site's hook point part of the model, under its full name."""
    component = site.component
    if "hook_centroid" in component._modules:
        raise AttachError(
            f"{site.name} is already attached. Detach the earlier handle first, or attach other "
            "layers."
        )
    component._centroid_site = site
    if isinstance(site, BridgeSite):
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

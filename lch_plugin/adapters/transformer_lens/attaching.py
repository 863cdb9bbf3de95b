"""Attach centroid hook points to a model, and detach them without a trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lch_plugin.adapters.checks import check_loaded
from lch_plugin.adapters.transformer_lens import anatomy
from lch_plugin.adapters.transformer_lens.closed_forms import HeadReader, MLPReader, NeuronReader
from lch_plugin.adapters.transformer_lens.points import CentroidPoint
from lch_plugin.adapters.transformer_lens.readers import Reader
from lch_plugin.adapters.transformer_lens.self_check import check_readers, disagreements
from lch_plugin.adapters.transformer_lens.toolkit import HookedTransformer, LensModel
from lch_plugin.adapters.transformer_lens.tracker import tracker_of
from lch_plugin.adapters.transformer_lens.vjps import HeadVJPReader, LocalReader, VJPReader
from lch_plugin.cotangents import AnyCotangent, Logit
from lch_plugin.errors import InputError, SiteError
from lch_plugin.mlp import PlainMLP, is_piecewise_linear
from lch_plugin.sites import Kind, Site


def attach(
    model: LensModel,
    layers: int | Sequence[int] | None = None,
    site: Kind | Site | Sequence[Kind | Site] = "mlp",
    cotangent: Float[Tensor, " d_out"] | AnyCotangent | None = None,
) -> Handle:
    """Add centroid hook points to a model, such as ``blocks.L.mlp.hook_centroid``.

    Each fires with a ``(batch, pos, d_model)`` tensor, at least float32: the centroid ``J^T v`` of
    that component, in the space of what it reads (for MLPs and attention after the layer norm). It
    is computed only when something listens. Hooks on hook points that edit what a component reads,
    or values within it, are seen; edits of what it writes replace what it computes and are not.
    In MLPs, neurons and heads, dropout is no part of the centroid. Padding counts nowhere: outputs
    there do not, and centroids there are zero (`lch_plugin.padding`). Threads that share the model
    take turns.

    Attaching proves itself: see `lch_plugin.adapters.transformer_lens.self_check`.

    Args:
        model: TransformerBridge or HookedTransformer, or SAELens' subclass of either.
        layers: which blocks, negative counting from the end; all if None.
        site: which components: a kind, a `lch_plugin.Site`, or several of them. ``layers`` and
            ``cotangent`` are for kinds; a Site has its own.
        cotangent: ``v``, shape ``(d_out,)`` or from `lch_plugin.cotangents`; all ones if None (the
            paper's centroid).

    Returns:
        A handle; use it as a context manager or call ``handle.detach()``.

    Raises:
        InputError: the model is of no supported class, or settings and cotangents do not fit.
        SiteError: no such layer or component, weights that cannot be read, or the self-check found
            other values than autograd.
        AttachError: a hook point of that name is there.
        VanishingCentroidError: the cotangent reads nothing of what the component writes, as all
            ones does after TransformerLens has centered the writing weights.
        NotDifferentiableError: no gradient path leads through the component.
    """
    anatomy.check_model(model)
    listed = [site] if isinstance(site, str | Site) else list(site)
    if not listed:
        raise InputError("site=[] names no component.")
    if any(isinstance(s, Site) for s in listed) and (layers is not None or cotangent is not None):
        raise InputError(
            "layers and cotangent were given beside a Site, which has its own: "
            "Site(kind, layers=..., cotangent=...)."
        )
    sites = [s if isinstance(s, Site) else Site(s, layers, cotangent=cotangent) for s in listed]
    readers = [reader for s in sites for reader in _readers(model, s)]
    for reader in readers:
        reader.check()
    readers = _verified(model, readers)
    handle = Handle(model, readers)
    try:
        for reader in readers:
            for point in reader.points.values():
                point.publish(model)
                handle.published.append(point)
        _refresh(model)
        tracker = tracker_of(model)
        for reader in readers:
            tracker.add(reader)
        check_readers(model, readers)
    except BaseException:
        handle.detach()
        raise
    return handle


class Handle:
    """The centroid hooks of one `attach` call. Leaving its ``with`` block detaches them.

    Attributes:
        hook_names: names of all its hook points: the centroids', and those beside them (offsets,
            variances, ...).
        centroid_names: names of the centroids' hook points alone.
        methods: by centroid's name, how each is computed: ``"closed form"`` or ``"VJP"``.
    """

    def __init__(self, model: LensModel, readers: Sequence[Reader]) -> None:
        self.hook_names = [p.name for reader in readers for p in reader.points.values()]
        self.centroid_names = [reader.name for reader in readers]
        self.methods = {reader.name: reader.method for reader in readers}
        self.published: list[CentroidPoint] = []
        self._model = model
        self._readers = list(readers)

    def detach(self) -> None:
        """Restore the model exactly; a second call does nothing.

        SAEs attached to these hook points are reset first: their place is about to go.
        """
        points, self.published = self.published, []
        readers, self._readers = self._readers, []
        for point in points:
            point.reset_sae(self._model)
        for reader in readers:
            reader.remove()
        for point in points:
            point.withdraw(self._model)
        if points:
            _refresh(self._model)

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
        return f"Handle({self.centroid_names if self._readers else 'detached'})"


def _refresh(model: LensModel) -> None:
    """A HookedTransformer lists its hook points anew."""
    if isinstance(model, HookedTransformer):
        model.setup()


def _verified(model: LensModel, readers: list[Reader]) -> list[Reader]:
    """The same readers, but with an MLP differentiated where its closed form does not hold.

    Raises:
        SiteError: of a neuron, which has nothing but its closed form.
    """
    problems = disagreements(model, [r.parts for r in readers if isinstance(r, MLPReader)])
    verified: list[Reader] = []
    for reader in readers:
        problem = problems.get(reader.path) if isinstance(reader, MLPReader) else None
        if problem is None:
            verified.append(reader)
        elif isinstance(reader, MLPReader) and reader.can_be_differentiated:
            assert reader.layer is not None
            verified.append(_differentiated_mlp(model, reader.site, reader.stack, reader.layer))
        else:
            raise problem
    return verified


def _readers(model: LensModel, site: Site) -> list[Reader]:
    """A site at every layer it is about."""
    if site.kind == "model":
        return [_model_reader(model, site)]
    readers: list[Reader] = []
    for stack, blocks in anatomy.stacks(model, site.stack).items():
        if site.is_late and stack != "blocks":
            raise SiteError(f"{site.v.name}: cotangents from the logits need a decoder-only model.")
        if site.kind == "span":
            first, last = anatomy.layer_indices(blocks, site.layers, keep_order=True)
            if last < first:
                raise SiteError(
                    f"layers={site.layers!r}: the span ends with block {last}, before block "
                    f"{first} where it starts."
                )
            readers.append(_span_reader(model, site, stack, first, last))
        else:
            builders: dict[str, Callable[[LensModel, Site, str, int], Reader]] = {
                "mlp": _mlp_reader,
                "neuron": _mlp_reader,
                "attn": _attention_reader,
                "head": _head_reader,
                "block": _block_reader,
            }
            build = builders[site.kind]
            for layer in anatomy.layer_indices(blocks, site.layers):
                readers.append(build(model, site, stack, layer))
    return readers


def _points(
    model: LensModel,
    site: Site,
    layer: int | None,
    owner: Any,
    path: str,
    tail: str,
    *,
    region: bool = False,
) -> dict[str, CentroidPoint]:
    """The site's hook points: on the component, or on the model if they fire after the logits.

    SAELens takes a layer in a hook's name for the one to stop after.
    """
    if site.is_late:
        owner, path = model, ""
        tail = f"_{site.kind}_{layer}{tail.removeprefix(f'_{site.kind}')}"
    endings = [e for e in site.outputs if e != "_region" or region]
    return {e: CentroidPoint(owner, path, f"hook_centroid{tail}{e}") for e in endings}


def _mlp_reader(model: LensModel, site: Site, stack: str, layer: int) -> Reader:
    """In closed form if the MLP looks as if it had one; `_verified` has the last word."""
    path = f"{stack}.{layer}.mlp"
    component: Any = getattr(getattr(model, stack)[layer], "mlp", None)
    if component is None:
        raise SiteError(f"{path} does not exist. Pass layers=[...] without it.")
    check_loaded(component, path)
    try:
        if site.linearization == "detached":
            return _differentiated_mlp(model, site, stack, layer)
        parts = anatomy.locate_mlp(model, stack, layer)
        mlp = parts.weights
    except SiteError:
        if site.kind == "neuron":
            raise
        return _differentiated_mlp(model, site, stack, layer)
    parts.check_readable()
    region = site.expert and isinstance(mlp, PlainMLP) and is_piecewise_linear(mlp.act)
    points = _points(model, site, layer, component, path, site.suffix, region=region)
    cls = NeuronReader if site.kind == "neuron" else MLPReader
    gate = anatomy.mlp_gates(component)[1]
    return cls(site, layer, path, points, parts=parts, exit_gate=gate)


def _differentiated_mlp(model: LensModel, site: Site, stack: str, layer: int) -> Reader:
    path = f"{stack}.{layer}.mlp"
    if site.compute_dtype is not None:
        raise InputError(
            f"compute_dtype={site.compute_dtype}: {path} has no closed form here and is "
            "differentiated in the model's dtype. Load the model in the dtype you want."
        )
    component = getattr(model, stack)[layer].mlp
    points = _points(model, site, layer, component, path, site.suffix)
    start, end = anatomy.mlp_gates(component)
    if site.is_local:
        return LocalReader(site, layer, path, points, component=component, start=start, end=end)
    scope = component if anatomy.is_module(component) else getattr(model, stack)[layer]
    return VJPReader(site, layer, path, points, start=start, end=end, scope=scope)


def _attention_reader(model: LensModel, site: Site, stack: str, layer: int) -> Reader:
    path = f"{stack}.{layer}"
    attn, name = anatomy.attention(getattr(model, stack)[layer], path)
    points = _points(model, site, layer, attn, f"{path}.{name}", site.suffix)
    start, end = anatomy.attention_input(attn), anatomy.attention_output(attn)
    if site.is_local:
        return LocalReader(site, layer, path, points, component=attn, start=start, end=end)
    return VJPReader(site, layer, path, points, start=start, end=end, scope=attn)


def _head_reader(model: LensModel, site: Site, stack: str, layer: int) -> Reader:
    path = f"{stack}.{layer}"
    attn, name = anatomy.attention(getattr(model, stack)[layer], path)
    anatomy.check_heads(attn, path)
    points = _points(model, site, layer, attn, f"{path}.{name}", site.suffix)
    if site.linearization == "detached":
        return HeadReader(site, layer, path, points, attn=attn)
    start, end = anatomy.attention_input(attn), anatomy.heads_output(attn)
    return HeadVJPReader(site, layer, path, points, attn=attn, start=start, end=end)


def _block_reader(model: LensModel, site: Site, stack: str, layer: int) -> Reader:
    if not site.is_local:
        return _span_reader(model, site, stack, layer, layer)
    block, path = getattr(model, stack)[layer], f"{stack}.{layer}"
    points = _points(model, site, layer, block, path, site.suffix)
    start, end = anatomy.block_input(block), anatomy.block_output(block)
    return LocalReader(site, layer, path, points, component=block, start=start, end=end)


def _span_reader(model: LensModel, site: Site, stack: str, first: int, last: int) -> Reader:
    blocks, path = getattr(model, stack), f"{stack}.{last}"
    tail = (f"_from_{first}" if site.kind == "span" else "") + site.suffix
    points = _points(model, site, last, blocks[last], path, tail)
    return VJPReader(
        *(site, last, path, points),
        start=anatomy.block_input(blocks[first]),
        end=anatomy.block_output(blocks[last]),
        scope=blocks[first] if first == last else None,
        first=first,
    )


def _model_reader(model: LensModel, site: Site) -> Reader:
    if isinstance(site.v, Logit):
        raise InputError(
            "a Logit cotangent lies in the residual stream, and the model's output is the logits: "
            "use lch.cotangents.logit_difference, or a one-hot vector."
        )
    if hasattr(model, "encoder_blocks"):
        raise SiteError("an encoder-decoder has two inputs: use spans of its stacks.")
    points = _points(model, site, None, model, "", site.suffix)
    start, end = anatomy.embedding_output(model), anatomy.logits(model)
    return VJPReader(site, None, "", points, start=start, end=end, scope=None)

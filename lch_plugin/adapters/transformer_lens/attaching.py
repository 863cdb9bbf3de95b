"""Attach centroid hook points to a model, and detach them without a trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lch_plugin.adapters.checks import check_loaded
from lch_plugin.adapters.transformer_lens import architecture, mlps
from lch_plugin.adapters.transformer_lens.closed_forms import HeadReader, MLPReader, NeuronReader
from lch_plugin.adapters.transformer_lens.gates import Gate
from lch_plugin.adapters.transformer_lens.hook_points import CentroidPoint
from lch_plugin.adapters.transformer_lens.readers import Reader
from lch_plugin.adapters.transformer_lens.runs import Runs
from lch_plugin.adapters.transformer_lens.self_check import check_readers, disagreements
from lch_plugin.adapters.transformer_lens.toolkit import HookedTransformer, LensModel
from lch_plugin.adapters.transformer_lens.tracker import Tracker, tracker_of
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

    Example:
        >>> import lch_plugin as lch
        >>> model = lch.load_demo_model()
        >>> with lch.attach(model, layers=[2]) as handle:
        ...     _, cache = model.run_with_cache("A pear tree", names_filter=handle.hook_names)
        >>> cache["blocks.2.mlp.hook_centroid"].shape[-1]
        128
    """
    architecture.check_model(model)
    listed = [site] if isinstance(site, str | Site) else list(site)
    if not listed:
        raise InputError("site=[] names no component.")
    if any(isinstance(s, Site) for s in listed) and (layers is not None or cotangent is not None):
        raise InputError(
            "layers and cotangent were given beside a Site, which has its own: "
            "Site(kind, layers=..., cotangent=...)."
        )
    sites = [s if isinstance(s, Site) else Site(s, layers, cotangent=cotangent) for s in listed]
    tracker = tracker_of(model)
    # Hooks are silenced and modes set while it is checked, which other threads must not see.
    with tracker.runs.turn:
        readers = [reader for s in sites for reader in _readers(tracker.runs, s)]
        for reader in readers:
            reader.check()
        readers = _verified(tracker.runs, readers)
        handle = Handle(tracker, readers)
        try:
            for reader in readers:
                for point in reader.points.values():
                    point.publish(model)
                    handle.published.append(point)
            _refresh(model)
            for reader in readers:
                tracker.add(reader)
            check_readers(model, tracker, readers)
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

    def __init__(self, tracker: Tracker, readers: Sequence[Reader]) -> None:
        self.hook_names = [p.name for reader in readers for p in reader.points.values()]
        self.centroid_names = [reader.name for reader in readers]
        self.methods = {reader.name: reader.method for reader in readers}
        self.published: list[CentroidPoint] = []
        self._tracker = tracker
        self._readers = list(readers)
        self._records = [reader.record() for reader in readers]

    def records(self) -> list[dict[str, Any]]:
        """What each centroid is of, in terms of JSON, in the order of `centroid_names`."""
        return [dict(record) for record in self._records]

    def detach(self) -> None:
        """Restore the model exactly; a second call does nothing.

        SAEs attached to these hook points are reset first: their place is about to go.
        """
        model = self._tracker.runs.model
        with self._tracker.runs.turn:
            points, self.published = self.published, []
            readers, self._readers = self._readers, []
            for point in points:
                point.reset_sae(model)
            for reader in readers:
                self._tracker.forget(reader)
            for point in points:
                point.withdraw(model)
            if points:
                _refresh(model)

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


def _verified(runs: Runs, readers: list[Reader]) -> list[Reader]:
    """The same readers, but with an MLP differentiated where its closed form does not hold.

    Raises:
        SiteError: of a neuron, which has nothing but its closed form.
    """
    problems = disagreements(runs.model, [r.parts for r in readers if isinstance(r, MLPReader)])
    verified: list[Reader] = []
    for reader in readers:
        problem = problems.get(reader.path) if isinstance(reader, MLPReader) else None
        if problem is None:
            verified.append(reader)
        elif isinstance(reader, MLPReader) and reader.can_be_differentiated:
            assert reader.layer is not None
            verified.append(_differentiated_mlp(runs, reader.site, reader.stack, reader.layer))
        else:
            raise problem
    return verified


def _readers(runs: Runs, site: Site) -> list[Reader]:
    """A site at every layer it is about."""
    if isinstance(site.v, Logit) and site.of_kind.residual is None:
        raise InputError(
            f"a Logit cotangent lies in the residual stream, where a {site.kind} does not write: "
            "use lch.cotangents.logit_difference."
        )
    if site.of_kind.layers == "none":
        return [_model_reader(runs, site)]
    readers: list[Reader] = []
    for stack, blocks in architecture.stacks(runs.model, site.stack).items():
        if site.is_late and stack != "blocks":
            raise SiteError(f"{site.v.name}: cotangents from the logits need a decoder-only model.")
        if site.of_kind.layers == "ends":
            first, last = architecture.layer_indices(blocks, site.layers, keep_order=True)
            if last < first:
                raise SiteError(
                    f"layers={site.layers!r}: the span ends with block {last}, before block "
                    f"{first} where it starts."
                )
            readers.append(_span_reader(runs, site, stack, first, last))
        else:
            for layer in architecture.layer_indices(blocks, site.layers):
                readers.append(BUILDERS[site.kind](runs, site, stack, layer))
    return readers


def _points(
    runs: Runs,
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
        owner, path = runs.model, ""
        tail = f"_{site.kind}_{layer}{tail.removeprefix(f'_{site.kind}')}"
    endings = [e for e in site.endings if e != "_region" or region]
    return {e: CentroidPoint(owner, path, f"hook_centroid{tail}{e}") for e in endings}


def _mlp_reader(runs: Runs, site: Site, stack: str, layer: int) -> Reader:
    """In closed form if the MLP looks as if it had one; `_verified` has the last word."""
    path = f"{stack}.{layer}.mlp"
    component: Any = getattr(getattr(runs.model, stack)[layer], "mlp", None)
    if component is None:
        raise SiteError(f"{path} does not exist. Pass layers=[...] without it.")
    check_loaded(component, path)
    try:
        if site.linearization not in site.of_kind.closed_forms:
            return _differentiated_mlp(runs, site, stack, layer)
        parts = mlps.locate_mlp(runs.model, stack, layer)
        mlp = parts.weights
    except SiteError:
        if site.of_kind.is_indexed:
            raise
        return _differentiated_mlp(runs, site, stack, layer)
    parts.check_readable()
    region = site.expert and isinstance(mlp, PlainMLP) and is_piecewise_linear(mlp.act)
    points = _points(runs, site, layer, component, path, site.suffix, region=region)
    cls = NeuronReader if site.of_kind.is_indexed else MLPReader
    return cls(
        *(site, layer, path, points, runs), input_name=_mlp_input(component, path), parts=parts
    )


def _differentiated_mlp(runs: Runs, site: Site, stack: str, layer: int) -> Reader:
    block, path = getattr(runs.model, stack)[layer], f"{stack}.{layer}.mlp"
    if site.compute_dtype is not None:
        raise InputError(
            f"compute_dtype={site.compute_dtype}: {path} has no closed form here and is "
            "differentiated in the model's dtype. Load the model in the dtype you want."
        )
    points = _points(runs, site, layer, block.mlp, path, site.suffix)
    scope = block.mlp if mlps.is_module(block.mlp) else block
    return _by_vjp(
        *(site, layer, path, points, runs, scope, mlps.mlp_gates(block.mlp)),
        input_name=_mlp_input(block.mlp, path),
    )


def _mlp_input(component: Any, path: str) -> str:
    return path if mlps.is_module(component) else f"{path}.in"


def _attention_reader(runs: Runs, site: Site, stack: str, layer: int) -> Reader:
    path = f"{stack}.{layer}"
    attn, name = architecture.attention(getattr(runs.model, stack)[layer], path)
    points = _points(runs, site, layer, attn, f"{path}.{name}", site.suffix)
    gates = architecture.attention_input(attn), architecture.attention_output(attn)
    input_name = f"{path}.{name}"
    return _by_vjp(site, layer, path, points, runs, attn, gates, input_name=input_name)


def _head_reader(runs: Runs, site: Site, stack: str, layer: int) -> Reader:
    path = f"{stack}.{layer}"
    attn, name = architecture.attention(getattr(runs.model, stack)[layer], path)
    architecture.check_heads(attn, path)
    points = _points(runs, site, layer, attn, f"{path}.{name}", site.suffix)
    cls = HeadReader if site.linearization in site.of_kind.closed_forms else HeadVJPReader
    return cls(*(site, layer, path, points, runs), input_name=f"{path}.{name}", attn=attn)


def _block_reader(runs: Runs, site: Site, stack: str, layer: int) -> Reader:
    block, path = getattr(runs.model, stack)[layer], f"{stack}.{layer}"
    points = _points(runs, site, layer, block, path, site.suffix)
    gates = architecture.block_input(block), architecture.block_output(block)
    return _by_vjp(site, layer, path, points, runs, block, gates, input_name=path)


def _span_reader(runs: Runs, site: Site, stack: str, first: int, last: int) -> Reader:
    blocks, path = getattr(runs.model, stack), f"{stack}.{last}"
    tail = f"_from_{first}{site.suffix}"
    points = _points(runs, site, last, blocks[last], path, tail)
    return _by_vjp(
        *(site, last, path, points, runs, blocks[first] if first == last else None),
        (architecture.block_input(blocks[first]), architecture.block_output(blocks[last])),
        input_name=f"{stack}.{first}",
        start=first,
    )


def _model_reader(runs: Runs, site: Site) -> Reader:
    if hasattr(runs.model, "encoder_blocks"):
        raise SiteError("an encoder-decoder has two inputs: use spans of its stacks.")
    return _by_vjp(
        *(site, None, "", _points(runs, site, None, runs.model, "", site.suffix), runs, None),
        (architecture.embedding_output(runs.model), architecture.logits(runs.model)),
        input_name=architecture.embedding_name(runs.model),
    )


def _by_vjp(
    site: Site,
    layer: int | None,
    path: str,
    points: dict[str, CentroidPoint],
    runs: Runs,
    component: Any,
    gates: tuple[Gate, Gate],
    *,
    input_name: str,
    start: int | None = None,
) -> Reader:
    """A reader by vector-Jacobian products, of a module or of what lies between two gates.

    Args:
        component: the module around both gates; None if only the whole model is.
    """
    shared: Any = {
        "input_name": input_name,
        "start": start,
        "start_gate": gates[0],
        "end_gate": gates[1],
    }
    if site.is_local:
        return LocalReader(site, layer, path, points, runs, component=component, **shared)
    return VJPReader(site, layer, path, points, runs, scope=component, **shared)


#: How the reader of each kind of site that is in one block is built.
BUILDERS: Mapping[Kind, Callable[[Runs, Site, str, int], Reader]] = {
    "mlp": _mlp_reader,
    "neuron": _mlp_reader,
    "attn": _attention_reader,
    "head": _head_reader,
    "block": _block_reader,
}

"""Prove on three tokens that every site is what it is taken for.

Closed forms are compared with autograd through the model's own modules; an MLP that computes
something else is differentiated instead, a head that does is refused. Then every hook point has to
fire, with a centroid that is more than rounding noise, and every detached linearisation has to be
affine: with its fixed factors it must map another input exactly where its centroid says.

The passes run in evaluation mode with all hooks on hook points silenced: those belong to the user's
own forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lch_plugin.adapters.checks import (
    AFFINE_TOLERANCE,
    TOLERANCE,
    check_more_than_noise,
    noise,
    not_affine,
    off_by,
)
from lch_plugin.adapters.states import evaluating
from lch_plugin.adapters.transformer_lens.closed_forms import HeadReader, MLPReader
from lch_plugin.adapters.transformer_lens.gates import Gate
from lch_plugin.adapters.transformer_lens.hook_points import CentroidPoint, silenced
from lch_plugin.adapters.transformer_lens.mlps import UNPROCESSED, MLPParts
from lch_plugin.adapters.transformer_lens.readers import Reader
from lch_plugin.adapters.transformer_lens.toolkit import LensModel
from lch_plugin.adapters.transformer_lens.tracker import Tracker, without_padding
from lch_plugin.adapters.transformer_lens.vjps import HeadVJPReader, LocalReader, VJPReader
from lch_plugin.cotangents import (
    AnyCotangent,
    Cotangent,
    Logit,
    Metric,
    evaluate,
    is_fixed,
)
from lch_plugin.errors import InputError, SiteError
from lch_plugin.linearization import DetachedMode
from lch_plugin.mlp import mlp_centroid
from lch_plugin.sites import Site


def disagreements(model: LensModel, parts: Sequence[MLPParts]) -> dict[str, SiteError | None]:
    """For each MLP, why its closed form is not what the model computes, or None.

    Gradients are on only between an MLP's entry and its exit. So one forward pass serves all, and
    no module outside sees a tensor with a graph (a bridge that kept one could no longer be
    deep-copied).
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Any] = {}

    def enter(name: str, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        torch.set_grad_enabled(True)
        inputs[name] = args[0].detach().requires_grad_()
        return (inputs[name], *args[1:])

    def leave(name: str, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        torch.set_grad_enabled(False)
        outputs[name] = output
        return output.detach() if isinstance(output, Tensor) else output

    parts = list({p.name: p for p in parts}.values())
    if not parts:
        return {}
    hooks = [
        hook
        for p in parts
        for hook in (
            p.entry.register_forward_pre_hook(partial(enter, p.name)),
            p.exit.register_forward_hook(partial(leave, p.name)),
        )
    ]
    try:
        with trial_pass(model):
            run(model)
            return {
                p.name: _disagreement(p, inputs.get(p.name), outputs.get(p.name)) for p in parts
            }
    finally:
        for hook in hooks:
            hook.remove()


def _disagreement(parts: MLPParts, x: Tensor | None, y: Any) -> SiteError | None:
    kind = type(parts.component).__name__
    if x is None or not isinstance(y, Tensor):
        return SiteError(
            f"self-check of {parts.name}: a forward pass of three tokens did not run this {kind} "
            "the way its closed form expects (its input or output never passed the hook points). "
            "Pass layers=[...] without it."
        )
    # Not all ones, which centered writing weights are orthogonal to.
    v = noise(y.new_empty(y.shape[-1]))
    with torch.enable_grad():
        (truth,) = torch.autograd.grad(y, x, v.expand_as(y))
    try:
        mlp = parts.weights
        mu = mlp_centroid(mlp, mlp.pre_activations(x.detach()), v)
    except (SiteError, AttributeError, TypeError, RuntimeError) as error:
        return SiteError(
            f"self-check of {parts.name}: this {kind} cannot be read as a plain or gated MLP "
            f"({str(error).splitlines()[0]}). Pass layers=[...] without it."
        )
    return _distance_error(parts.name, kind, mu, truth, x.dtype)


def _distance_error(
    name: str, kind: str, mu: Tensor, truth: Tensor, dtype: torch.dtype
) -> SiteError | None:
    error, norm = float((mu - truth.to(mu)).norm()), float(truth.to(mu).norm())
    tolerance = TOLERANCE[dtype]
    if error <= tolerance * norm:  # Not `>` and the other way round: NaN has to fail as well.
        return None
    return SiteError(
        f"self-check of {name}: the closed form and autograd through this {kind} are {error:.1e} "
        f"apart, at a norm of {norm:.1e}; {tolerance:.0e} of it is allowed in {dtype}. The {kind} "
        "computes something other than its closed form, or a hook on one of its modules changes "
        "what it does. Pass layers=[...] without it."
    )


def check_readers(model: LensModel, tracker: Tracker, readers: Sequence[Reader]) -> None:
    """Let readers that have been attached fire, and look at what comes.

    Raises:
        SiteError: a hook point does not fire, a head is not what its closed form says, or a
            detached linearisation is not affine.
        VanishingCentroidError: a centroid is rounding noise.
    """
    sites = {reader: reader.site for reader in readers}
    detached = [r for r in readers if isinstance(r, VJPReader) and r.detach is not None]
    plain = [r for r in readers if r not in detached]
    try:
        for reader, site in _fitting(sites).items():
            reader.site = site
        with trial_pass(model):
            _check_heads(tracker, [r for r in plain if isinstance(r, HeadReader)])
            _check_plain(tracker, plain)
            for reader in detached:
                _check_detached(tracker, reader)
    finally:
        for reader, site in sites.items():
            reader.site = site
        for reader in detached:
            reader.detach = DetachedMode


@dataclass(frozen=True, eq=False)
class _Noise:
    """A random direction at each position."""

    name: str = "noise"

    def at(self, y: Tensor) -> Tensor:
        return noise(y)


@dataclass(frozen=True, eq=False)
class _Lenient:
    """A cotangent of the user's, or all ones where it does not fit three tokens."""

    v: Cotangent

    @property
    def name(self) -> str:
        return self.v.name

    def at(self, y: Tensor) -> Tensor:
        try:
            return evaluate(self.v, y)
        except InputError:
            return torch.ones_like(y)


def _fitting(sites: Mapping[Reader, Site]) -> dict[Reader, Site]:
    """The same sites, but such as three tokens have, and without the user's random numbers."""
    # Readers that share a cotangent go on sharing their backward pass.
    cotangents = {id(site.v): _fitting_cotangent(site.v) for site in sites.values()}
    return {
        reader: replace(
            site,
            cotangent=cotangents[id(site.v)],
            output_positions=None if site.positions is None else -1,
            generator=None,
            create_graph=False,
            n_samples=2 if site.is_local else site.n_samples,
        )
        for reader, site in sites.items()
    }


def _fitting_cotangent(v: AnyCotangent) -> AnyCotangent:
    if isinstance(v, Logit):
        return replace(v, position=None)
    if isinstance(v, Metric):

        def fn(logits: Tensor) -> Tensor:
            try:
                return v.fn(logits)
            except IndexError:
                return logits.sum()

        return Metric(fn, v.name, None if v.position is None else -1)
    return v if is_fixed(v) else _Lenient(v)


class _Spy:
    """Remembers the first tensor that passes a gate, and may shift it."""

    def __init__(self, tracker: Tracker, gate: Gate, shift: Tensor | None = None) -> None:
        self.value: Tensor | None = None
        self._tracker, self._shift = tracker, shift
        tracker.watch(gate, self)

    def is_wanted(self) -> bool:
        return not self._tracker.runs.paused and self.value is None

    def at(self, _gate: Gate, tensor: Tensor) -> Tensor | None:
        self.value = tensor.detach()
        if self._shift is None:
            return None
        self.value = self.value + self._shift
        return self.value


@dataclass(frozen=True)
class _Firing:
    """What a pass of three tokens gave.

    Attributes:
        values: by the name of a hook point.
        read, written: by reader, what its component reads and writes; not of every reader.
    """

    values: dict[str, Tensor]
    read: dict[Reader, Tensor]
    written: dict[Reader, Tensor]

    def mu(self, reader: Reader) -> Tensor:
        return self.values[reader.name]


def _fire(tracker: Tracker, readers: Sequence[Reader], shift: Tensor | None = None) -> _Firing:
    """Run the model with somebody listening to these readers.

    Raises:
        SiteError: a hook point does not fire.
    """
    values: dict[str, Tensor] = {}

    def listen(name: str, _module: nn.Module, _args: Any, output: Tensor) -> None:
        values[name] = output

    spied = [r for r in readers if isinstance(r, VJPReader | LocalReader) or type(r) is MLPReader]
    before = {r: _Spy(tracker, _entry(r), shift) for r in spied}
    after = {r: _Spy(tracker, r.gates[-1]) for r in spied}
    points = [point for reader in readers for point in reader.points.values()]
    hooks = [p.module.register_forward_hook(partial(listen, p.name)) for p in points]
    try:
        run(tracker.runs.model)
    finally:
        for hook in hooks:
            hook.remove()
        for spy in (*before.values(), *after.values()):
            tracker.unwatch(spy)
    for reader in readers:
        silent = [p.name for p in reader.points.values() if p.name not in values]
        if silent:
            raise SiteError(
                f"self-check: a forward pass of three tokens ran to its end and {silent} did not "
                f"fire, so the model does not run this {reader.site.kind} as its hook points say. "
                "Pass layers=[...] without it."
            )
    return _Firing(
        values,
        {r: spy.value for r, spy in before.items() if spy.value is not None},
        {r: spy.value for r, spy in after.items() if spy.value is not None},
    )


def _entry(reader: Reader) -> Gate:
    return reader.parts.input_gate if isinstance(reader, MLPReader) else reader.gates[0]


def _check_plain(tracker: Tracker, readers: Sequence[Reader]) -> None:
    if not readers:
        return
    firing = _fire(tracker, readers)
    for reader in readers:
        if type(reader) is MLPReader:
            _check_hooked(reader, firing.read[reader], firing.mu(reader))
    measured = [r for r in readers if isinstance(r, VJPReader | LocalReader) and not r.site.is_late]
    if measured:
        vs = {reader: reader.weighed(firing.written[reader]) for reader in measured}
        with _through_noise(measured):
            typical = _fire(tracker, measured)
        for reader, v in vs.items():
            _check_noise(reader, v, firing.mu(reader), typical.mu(reader))


@contextmanager
def _through_noise(readers: Iterable[Reader]) -> Iterator[None]:
    """Readers with a random cotangent for their own."""
    sites, random = {reader: reader.site for reader in readers}, _Noise()
    for reader, site in sites.items():
        reader.site = replace(site, cotangent=random)
    try:
        yield
    finally:
        for reader, site in sites.items():
            reader.site = site


def _check_noise(reader: Reader, v: Tensor, mu: Tensor, typical: Tensor) -> None:
    """Hold a centroid to that of a random cotangent of the same norm."""
    r = reader.weigh(noise(v), v)
    scale = float(v.norm() / r.norm())
    pairs = [(mu, typical)]
    if reader.site.of_kind.residual == "is" and v.shape == mu.shape:
        # The residual stream itself passes a cotangent on as it is.
        pairs.append((mu - v, typical - r))
    for a, b in pairs:
        norms = float(a.norm()), scale * float(b.norm())
        check_more_than_noise(reader.name, *norms, v.dtype, cure=UNPROCESSED)


def _check_hooked(reader: MLPReader, x: Tensor, hooked: Tensor) -> None:
    """Hold what the hook point gave to the closed form at what the MLP read."""
    v = reader.site.v
    if reader.site.is_local or not is_fixed(v):
        return
    assert isinstance(v, Cotangent)
    mlp = reader.parts.weights
    y = mlp.activations(mlp.pre_activations(x)) @ mlp.W_out.to(x.dtype)
    mu = mlp_centroid(mlp, mlp.pre_activations(x), evaluate(v, y), dtype=hooked.dtype)
    error = _distance_error(reader.name, type(reader.parts.component).__name__, hooked, mu, x.dtype)
    if error is not None:
        raise error


def _check_detached(tracker: Tracker, reader: VJPReader) -> None:
    """With its factors held fixed a component has to be affine: the same map at another input."""
    mode = DetachedMode()
    reader.detach = lambda: mode
    firing = _fire(tracker, [reader])
    if reader.site.is_late:
        return
    x, y, mu = firing.read[reader], firing.written[reader], firing.mu(reader)
    v, shift = reader.weighed(y), noise(x) * x.std()
    reader.detach = lambda: DetachedMode(mode.recorded)
    try:
        with _through_noise([reader]):
            shifted = _fire(tracker, [reader], shift)
    except (StopIteration, RuntimeError) as error:
        raise SiteError(
            f"{reader.name}: no detached linearisation of this model: {error}"
        ) from None
    _check_noise(reader, v, mu, shifted.mu(reader))
    off = off_by(v, shifted.written[reader] - y, mu, shift)
    if not off <= AFFINE_TOLERANCE[x.dtype]:
        raise not_affine(reader.name, reader.site.kind, off)


class _Kept(CentroidPoint):
    """In place of a hook point: keeps what it is shown."""

    has_listener = True
    value: Tensor | None = None

    def __init__(self, point: CentroidPoint) -> None:
        super().__init__(point.owner, point.name, "by_autograd")

    def fire(self, value: Tensor) -> None:
        self.value = value


def _check_heads(tracker: Tracker, readers: Sequence[HeadReader]) -> None:
    """Hold heads to autograd from what attention reads to their values, the pattern fixed."""
    kept = {reader: _Kept(reader.points[""]) for reader in readers}
    twins = [_by_autograd(reader, point) for reader, point in kept.items()]
    try:
        with _through_noise([*readers, *twins]):
            for twin in twins:
                tracker.add(twin)
            firing = _fire(tracker, readers) if readers else None
    finally:
        for twin in twins:
            tracker.forget(twin)
    for reader, point in kept.items():
        assert firing is not None
        assert point.value is not None
        mu, kind = firing.mu(reader), type(reader.attn).__name__
        dtype = reader.attn.W_O.dtype
        problem = _distance_error(reader.name, kind, mu, point.value.to(mu), dtype)
        if problem is not None:
            raise problem


def _by_autograd(reader: HeadReader, point: CentroidPoint) -> HeadVJPReader:
    """A reader of the same heads by a vector-Jacobian product, the pattern fixed."""
    return HeadVJPReader(
        replace(reader.site, expert=False, compute_dtype=None),
        *(reader.layer, reader.path, {"": point}, reader.runs),
        input_name=reader.input_name,
        attn=reader.attn,
    )


@contextmanager
def trial_pass(model: LensModel) -> Iterator[None]:
    """Conditions of a pass of ours: no gradients, no hooks, no dropout, no trace afterwards."""
    device = next(model.parameters()).device
    with (
        without_padding(model),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        evaluating(model),
        silenced(model),
    ):
        yield


def run(model: LensModel) -> None:
    """A forward pass of three tokens, or of noise for a model of images or sound."""
    parameter = next(model.parameters())
    shape = _noise_shape(model)
    if shape is None:
        model(torch.arange(3, device=parameter.device)[None] % model.cfg.d_vocab)
    else:
        model(noise(parameter.new_empty(shape)))


def _noise_shape(model: LensModel) -> tuple[int, ...] | None:
    """Shape of an input that is no tokens."""
    kinds = ("is_visual_model", "is_audio_model")
    if not any(getattr(model.cfg, kind, False) for kind in kinds):
        return None
    config = model.original_model.config
    if hasattr(config, "image_size"):
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return 1, getattr(config, "num_channels", 3), height, width
    if hasattr(config, "num_mel_bins"):
        return 1, config.max_length, config.num_mel_bins
    return 1, 20 * math.prod(config.conv_stride)

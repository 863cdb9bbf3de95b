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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lch_plugin.adapters.checks import TOLERANCE, check_more_than_noise, noise
from lch_plugin.adapters.states import evaluating
from lch_plugin.adapters.transformer_lens.anatomy import (
    MLPParts,
    attention_input,
    head_outputs,
    heads_output,
)
from lch_plugin.adapters.transformer_lens.closed_forms import HeadReader, MLPReader
from lch_plugin.adapters.transformer_lens.gates import Gate
from lch_plugin.adapters.transformer_lens.readers import Reader
from lch_plugin.adapters.transformer_lens.states import silenced
from lch_plugin.adapters.transformer_lens.toolkit import LensModel
from lch_plugin.adapters.transformer_lens.tracker import tracker_of, without_padding
from lch_plugin.adapters.transformer_lens.trial import Trial
from lch_plugin.adapters.transformer_lens.vjps import VJPReader
from lch_plugin.cotangents import Cotangent, evaluate, is_fixed
from lch_plugin.errors import SiteError
from lch_plugin.linearization import DetachedMode
from lch_plugin.mlp import mlp_centroid

_CURE = (
    "TransformerLens' center_writing_weights and center_unembed do this to all ones. Load the "
    "model without weight processing, or pass another cotangent."
)
# TOLERANCE for the detached linearisation: HuggingFace's norms compute in float32 at best.
_AFFINE_TOLERANCE = {**TOLERANCE, torch.float64: 1e-5, torch.float32: 1e-3}


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


def check_readers(model: LensModel, readers: Sequence[Reader]) -> None:
    """Let readers that have been attached fire once, and look at what comes.

    Raises:
        SiteError: a hook point does not fire, a head is not what its closed form says, or a
            detached linearisation is not affine.
        VanishingCentroidError: a centroid is rounding noise.
    """
    with trial_pass(model):
        _check_heads(model, [r for r in readers if isinstance(r, HeadReader)])
        plain = [r for r in readers if not (isinstance(r, VJPReader) and r.is_detached)]
        _check_firing(model, plain)
        for reader in readers:
            if isinstance(reader, VJPReader) and reader.is_detached:
                _check_affine(model, reader)


def _check_firing(model: LensModel, readers: Sequence[Reader]) -> Trial:
    fired: dict[str, Tensor] = {}

    def listen(name: str, _module: nn.Module, _args: Any, output: Tensor) -> None:
        fired[name] = output

    trial, inputs = Trial(), dict[Any, Tensor]()
    mlps = [r for r in readers if type(r) is MLPReader]
    hooks = [
        point.module.register_forward_hook(partial(listen, point.name))
        for reader in readers
        for point in reader.points.values()
    ]
    gates: list[Gate] = [reader.parts.input_gate for reader in mlps]
    tracker = tracker_of(model)
    tracker.trial = trial
    try:
        for mlp, gate in zip(mlps, gates, strict=True):
            gate.install(lambda: True, partial(_keep, inputs, mlp))
        if readers:
            run(model)
    finally:
        tracker.trial = None
        for hook in hooks:
            hook.remove()
        for gate in gates:
            gate.remove()
    for reader in readers:
        silent = [p.name for p in reader.points.values() if p.name not in fired]
        if silent:
            raise SiteError(
                f"self-check: a forward pass of three tokens ran to its end and {silent} did not "
                f"fire, so the model does not run this {reader.site.kind} as its hook points say. "
                "Pass layers=[...] without it."
            )
        _check_noise(reader, trial)
    for mlp in mlps:
        _check_hooked(mlp, inputs[mlp], fired[mlp.name])
    return trial


def _keep(inputs: dict[Any, Tensor], reader: MLPReader, x: Tensor) -> None:
    inputs.setdefault(reader, x.detach())  # A local centroid may run the MLP again afterwards.


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


def _check_noise(reader: Reader, trial: Trial) -> None:
    for mu, typical, dtype in trial.norms.get(reader, ()):
        check_more_than_noise(reader.name, mu, typical, dtype, cure=_CURE)


def _check_affine(model: LensModel, reader: VJPReader) -> None:
    trial = _check_firing(model, [reader])
    if reader not in trial.experts:
        return
    x, y, mu, v = trial.experts[reader]
    shift = noise(x) * x.std()
    tracker = tracker_of(model)
    replay = tracker.trial = Trial(shift=shift, replay=trial.recorded)
    hook = reader.points[""].module.register_forward_hook(lambda *_: None)
    try:
        run(model)
        _, shifted, _, _ = replay.experts[reader]
    except (StopIteration, RuntimeError) as error:
        raise SiteError(
            f"{reader.name}: no detached linearisation of this model: {error}"
        ) from None
    finally:
        hook.remove()
        tracker.trial = None
    change = (shifted - y).double()
    off = float((v.double() * change).sum() - (mu.double() * shift.double()).sum())
    if not abs(off) <= _AFFINE_TOLERANCE[x.dtype] * float(v.norm()) * float(change.norm()):
        raise SiteError(
            f"{reader.name}: with its factors fixed the {reader.site.kind} is not affine (off by "
            f"{abs(off):.1e} on another input), so it has no exact expert of this kind. Some "
            "function in it is not among those of lch_plugin.linearization. Use the Jacobian."
        )


def _check_heads(model: LensModel, readers: Sequence[HeadReader]) -> None:
    """Hold heads to autograd from what attention reads to their values, the pattern fixed."""
    trials = [_HeadTrial(attn, readers) for attn in {r.attn: None for r in readers}]
    try:
        for trial in trials:
            trial.start()
        if trials:
            run(model)
    finally:
        for trial in trials:
            trial.stop()
    for reader in readers:
        (problem,) = (t.problems.get(reader, _unseen(reader)) for t in trials if t.has(reader))
        if problem is not None:
            raise problem


def _unseen(reader: HeadReader) -> SiteError:
    return SiteError(
        f"self-check of {reader.name}: attention ran without passing its pattern and its values "
        'through hook points. Load the model with attn_implementation="eager".'
    )


class _HeadTrial:
    """One attention during the pass that checks its heads."""

    def __init__(self, attn: Any, readers: Sequence[HeadReader]) -> None:
        self.problems: dict[HeadReader, SiteError | None] = {}
        self._attn = attn
        self._readers = [r for r in readers if r.attn is attn]
        self._gates = attention_input(attn), heads_output(attn)
        self._values: dict[int, Tensor] = {}
        self._hooks: list[Any] = []
        self._mode: DetachedMode | None = None

    def has(self, reader: HeadReader) -> bool:
        return reader in self._readers

    def start(self) -> None:
        before, after = self._gates
        before.install(lambda: True, self._enter)
        after.install(lambda: True, self._leave)
        for i, point in enumerate(self._readers[0].value_points()):
            self._hooks.append(point.register_forward_hook(partial(self._keep, i)))

    def stop(self) -> None:
        self._close()
        for hook in self._hooks:
            hook.remove()
        for gate in self._gates:
            gate.remove()

    def _enter(self, x: Tensor) -> Tensor:
        torch.set_grad_enabled(True)
        self._mode = DetachedMode()
        self._mode.__enter__()
        self._x = self._mode.follow(x.detach().requires_grad_())
        return self._x.clone()

    def _keep(self, i: int, _module: nn.Module, _args: Any, value: Tensor) -> None:
        self._values[i] = value

    def _leave(self, y: Tensor) -> Tensor:
        self._close()
        if len(self._values) == 2:
            with torch.enable_grad():
                for reader in self._readers:
                    self.problems[reader] = self._compare(reader)
        return y.detach()

    def _close(self) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self._mode = None
            torch.set_grad_enabled(False)

    def _compare(self, reader: HeadReader) -> SiteError | None:
        pattern, z = self._values[0].detach(), self._values[1]
        y = head_outputs(reader.attn, reader.site.members, z)
        v = noise(y)
        (truth,) = torch.autograd.grad(y, self._x, v, retain_graph=True)
        kind, mu = type(reader.attn).__name__, reader.centroid(pattern, v)
        return _distance_error(reader.name, kind, mu, truth, truth.dtype)


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

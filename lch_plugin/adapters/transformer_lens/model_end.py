"""The end of a model, where cotangents come to be known that depend on the logits.

A `lch_plugin.cotangents.Logit` is known at the final norm, a `Metric` at the logits. Centroids that
need one wait in their run (`postpone`) until the model has got there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lch_plugin.adapters.deferred import Deferred, of_metric
from lch_plugin.adapters.transformer_lens.architecture import final_norm, logits, post_norm
from lch_plugin.adapters.transformer_lens.gates import Gate
from lch_plugin.adapters.transformer_lens.readers import Reader
from lch_plugin.adapters.transformer_lens.runs import Runs
from lch_plugin.cotangents import AnyCotangent, Logit, Metric
from lch_plugin.errors import InputError, SiteError
from lch_plugin.padding import spread

# Holds gradients on for Logit cotangents, under a name for messages.
_FINAL_NORM = "the final norm, for Logit cotangents,"


def postpone(reader: Reader, y: Tensor, finish: Callable[[Tensor], None]) -> Tensor | None:
    """Keep a centroid until its cotangent is known.

    Args:
        reader: whose.
        y: what its component writes.
        finish: computes and shows it, given the cotangent.

    Returns:
        What the model is to go on with instead of ``y``, if anything.

    Raises:
        SiteError: the model is not running, but the component alone.
    """
    runs = reader.runs
    if not runs.in_model:
        raise SiteError(
            f"{reader.name} needs the logits: run the whole model, not the component alone."
        )
    run, replaced = runs.current, None
    if isinstance(reader.site.v, Metric):
        run.scope.hold(reader)  # A `Site` with a Metric is never detached.
        if not y.requires_grad:
            y, replaced = run.scope.variable(y)
    run.deferred[reader] = Deferred(y, finish)
    return replaced


class ModelEnd:
    """Hands cotangents to those who wait for them."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._norm_gates: tuple[Gate, Gate] | None = None
        self._logits_gate: Gate | None = None

    def watch(self, cotangent: AnyCotangent) -> None:
        """Look out for what a cotangent depends on, from now on."""
        runs = self._runs
        if isinstance(cotangent, Metric) and self._logits_gate is None:
            self._logits_gate = logits(runs.model)
            runs.install(self._logits_gate, self._awaits_logits, self._on_logits)
        if isinstance(cotangent, Logit) and self._norm_gates is None:
            before, after = self._norm_gates = final_norm(runs.model)
            runs.install(before, self._awaits_norm, self._before_norm)
            runs.install(after, self._awaits_norm, self._after_norm)

    def _waiting(self, kind: type) -> dict[Reader, Deferred]:
        deferred = self._runs.current.deferred
        return {r: waits for r, waits in deferred.items() if isinstance(r.site.v, kind)}

    def _awaits(self, kind: type) -> bool:
        return not self._runs.paused and self._runs.in_model and bool(self._waiting(kind))

    # ------------------------------------------------------------------------- the final norm

    def _awaits_norm(self) -> bool:
        return self._awaits(Logit)

    def _before_norm(self, x: Tensor) -> Tensor:
        run = self._runs.current
        run.scope.hold(_FINAL_NORM)
        run.see(_FINAL_NORM).x, passed_on = run.scope.variable(x)
        return passed_on

    def _after_norm(self, y: Tensor) -> Tensor | None:
        run = self._runs.current
        x = run.take(_FINAL_NORM).x
        assert x is not None
        vs: dict[Logit, Tensor] = {}
        try:
            for cotangent in {r.site.v for r in self._waiting(Logit)}:
                assert isinstance(cotangent, Logit)
                v = self._through_unembedding(cotangent, y)
                (vs[cotangent],) = torch.autograd.grad(y, x, v, retain_graph=True)
        finally:
            run.scope.release(_FINAL_NORM)
        for reader, waits in self._waiting(Logit).items():
            del run.deferred[reader]
            assert isinstance(reader.site.v, Logit)
            self._finish_logit(reader, waits, vs[reader.site.v])
        return None if run.scope.is_open or run.scope.caller_grad else y.detach()

    def _through_unembedding(self, cotangent: Logit, y: Tensor) -> Tensor:
        W_U = self._runs.model.W_U
        ids = [cotangent.token] + ([] if cotangent.foil is None else [cotangent.foil])
        if any(not 0 <= i < W_U.shape[-1] for i in ids):
            raise InputError(f"{cotangent} names a token outside 0 to {W_U.shape[-1] - 1}.")
        v = W_U[:, cotangent.token]
        v = v if cotangent.foil is None else v - W_U[:, cotangent.foil]
        positions = None if cotangent.position is None else [cotangent.position]
        return spread(v.detach(), y, self._runs.current.tokens_at_the_end, positions)

    def _finish_logit(self, reader: Reader, waits: Deferred, v: Tensor) -> None:
        scope, model, kind = self._runs.current.scope, self._runs.model, reader.site.of_kind
        norm = None
        if kind.residual == "adds":
            assert kind.part is not None
            assert reader.layer is not None
            norm = post_norm(model.blocks[reader.layer], kind.part)
        if norm is not None:
            with scope.outside(), torch.enable_grad(), self._runs.silence(model):
                y = waits.y.detach().requires_grad_()
                (v,) = torch.autograd.grad(norm(y), y, v)
        v = v.reshape_as(waits.y)
        with scope.outside():
            waits.finish(reader.weigh(v, waits.y) if reader.site.mixes_positions else v)

    # ----------------------------------------------------------------------------- the logits

    def _awaits_logits(self) -> bool:
        return self._awaits(Metric)

    def _on_logits(self, found: Tensor) -> None:
        run, waiting = self._runs.current, self._waiting(Metric)
        by_metric: dict[int, list[Reader]] = {}
        for reader in waiting:
            by_metric.setdefault(id(reader.site.v), []).append(reader)
        for readers in by_metric.values():
            metric: Any = readers[0].site.v
            ys, paths = [waiting[r].y for r in readers], [r.path for r in readers]
            vs = of_metric(metric, found, ys, paths, run.tokens_at_the_end)
            for reader, v in zip(readers, vs, strict=True):
                with run.scope.outside():
                    waiting[reader].finish(reader.weigh(v, waiting[reader].y))
        for reader in waiting:
            run.forget(reader)

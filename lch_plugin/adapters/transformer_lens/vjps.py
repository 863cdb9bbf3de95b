"""Readers by vector-Jacobian products, on the graph that the model itself builds (`GradScope`).

Readers that end at the same place with the same cotangent share one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lch_plugin.adapters.arguments import Call, holds_tokens, input_of, without_caches
from lch_plugin.adapters.grad_scope import gradients
from lch_plugin.adapters.transformer_lens.architecture import (
    attention_input,
    check_members,
    head_outputs,
    heads_output,
    heads_values,
)
from lch_plugin.adapters.transformer_lens.gates import Gate
from lch_plugin.adapters.transformer_lens.model_end import postpone
from lch_plugin.adapters.transformer_lens.readers import Reader
from lch_plugin.adapters.transformer_lens.runs import Run
from lch_plugin.adapters.values import expert_values, local_values_by_running
from lch_plugin.cotangents import Metric, Ones, Random
from lch_plugin.errors import SiteError
from lch_plugin.linearization import DetachedMode


class VJPReader(Reader):
    """Any component, by one vector-Jacobian product on the model's own graph.

    Attributes:
        start_gate, end_gate: what it reads, and what it writes.
        detach: makes the mode of the detached linearisation; None of the Jacobian.
    """

    method = "VJP"

    def __init__(
        self, *args: Any, start_gate: Gate, end_gate: Gate, scope: nn.Module | None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.start_gate, self.end_gate = start_gate, end_gate
        is_detached = self.site.linearization == "detached"
        self.detach: Callable[[], DetachedMode] | None = DetachedMode if is_detached else None
        # The module around both gates; None if only the whole model is.
        self._scope = scope

    @property
    def gates(self) -> Sequence[Gate]:
        return [self.start_gate, self.end_gate]

    def hooks(self) -> list[RemovableHandle]:
        if self._scope is None:
            return []
        return [self._scope.register_forward_hook(self._on_leaving, always_call=True)]

    def can_start(self) -> bool:
        """Whether the other end will be passed: a lone block is no span."""
        return self._scope is not None or self.runs.in_model

    def _on_leaving(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        # After an exception the output was never passed.
        if not self.runs.paused and self._run.seen.pop(self, None) is not None:
            self._run.scope.release(self)

    def output(self, y: Tensor, _values: dict[Hashable, Tensor]) -> Tensor:
        """What it writes, given what passed the gate at its end, and those within."""
        return y

    def finish(self, x: Tensor, y: Tensor, mu: Tensor, v: Tensor) -> None:
        """Show a centroid that has been computed."""
        known = (self._kept(t) for t in (mu, x, y, v))
        self._show(expert_values(*known, mixes_positions=self.site.mixes_positions))

    def finish_late(self, x: Tensor, y: Tensor, v: Tensor) -> None:
        """Compute and show a centroid whose cotangent has come."""
        v = v.to(y)
        with torch.enable_grad():
            (mu,) = gradients(self.name, y, [x], v, keep=True)
        self.finish(x, y, mu, v)

    @property
    def cotangent_key(self) -> Hashable:
        """Equal for readers whose cotangents at the same output are."""
        v = self.site.v
        same = v if isinstance(v, Ones | Random) else id(v)
        site = self.site
        return same, tuple(site.positions or ()), site.mixes_positions, site.create_graph


class HeadVJPReader(VJPReader):
    """Attention heads, through their values and through where they look.

    A head writes ``z W_O``, ``z`` its mix of values. So the graph ends at ``z``, which a hook point
    shows for every head, while a cotangent is known where attention ends.
    """

    def __init__(self, *args: Any, attn: Any, **kwargs: Any) -> None:
        super().__init__(
            *args,
            scope=attn,
            start_gate=attention_input(attn),
            end_gate=heads_output(attn),
            **kwargs,
        )
        self._attn, self._z_gate = attn, heads_values(attn, last=False)

    @property
    def gates(self) -> Sequence[Gate]:
        return [self.start_gate, self._z_gate, self.end_gate]

    def check(self) -> None:
        check_members(self._attn, self.path, self.site.members)

    def at(self, gate: Gate, tensor: Tensor) -> None:
        if self in self._run.seen:
            self._run.seen[self].values[gate.key] = tensor

    @property
    def cotangent_key(self) -> Hashable:
        return self

    def output(self, _y: Tensor, values: dict[Hashable, Tensor]) -> Tensor:
        z = values.get(self._z_gate.key)
        if z is None:
            raise SiteError(
                f"{self.name}: attention ran without passing its heads through a hook point, so "
                "what they write is unknown."
            )
        return head_outputs(self._attn, self.site.members, z)


def open_scope(run: Run, readers: Sequence[VJPReader], x: Tensor) -> Tensor:
    """Components begin here: gradients on, and ``x`` a variable; what the model goes on with."""
    for reader in readers:
        run.scope.hold(reader, reader.detach)
    variable, passed_on = run.scope.variable(x)
    for reader in readers:
        run.see(reader).x = variable
    return passed_on


def close_scope(run: Run, readers: Sequence[VJPReader], y: Tensor) -> Tensor | None:
    """Components end here: their centroids, or (late cotangents) a place among those that wait."""
    seen = {reader: run.take(reader) for reader in readers}
    late = [reader for reader in readers if reader.site.is_late]
    try:
        xs = {reader: _known(seen[reader].x) for reader in readers}
        ys = {reader: reader.output(y, seen[reader].values) for reader in readers}
        _finish_now(run, [r for r in readers if r not in late], xs, ys, keep=bool(late))
        for reader in late:
            postpone(reader, y, partial(reader.finish_late, xs[reader], ys[reader]))
    finally:
        for reader in readers:
            if reader not in late or not isinstance(reader.site.v, Metric):
                run.scope.release(reader)
    return None if run.scope.is_open or run.scope.caller_grad else y.detach()


def _finish_now(run: Run, readers: Sequence[VJPReader], xs: Any, ys: Any, *, keep: bool) -> None:
    """Centroids whose cotangent is known: one backward pass for each cotangent."""
    groups: dict[Hashable, list[VJPReader]] = {}
    for reader in readers:
        groups.setdefault(reader.cotangent_key, []).append(reader)
    keep = keep or run.scope.is_held_besides(readers) or run.scope.caller_grad
    for i, group in enumerate(groups.values(), 1):
        y = ys[group[0]]
        v = group[0].weighed(y)
        names = str([r.name for r in group])
        inputs = [xs[reader] for reader in group]
        create_graph = group[0].site.create_graph
        keep_now = keep or i < len(groups)
        mus = gradients(names, y, inputs, v, keep=keep_now, create_graph=create_graph)
        for reader, mu in zip(group, mus, strict=True):
            reader.finish(xs[reader], y, mu, v)


def _known(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


class LocalReader(Reader):
    """Mean centroid over a neighbourhood of a component with no closed form.

    The component runs again, once a sample and one at a time, with every hook point within
    silenced: memory is that of one graph, and nobody's hooks see the samples. Interventions within
    the component are not seen either; those before it are. A span, and the model itself, are no
    modules with an input of their own: for them the whole model runs again, with the sample put
    where they begin.
    """

    method = "VJP"

    def __init__(
        self,
        *args: Any,
        component: nn.Module | None,
        start_gate: Gate,
        end_gate: Gate,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._component, self._start, self._end = component, start_gate, end_gate
        # While the model runs again: what is to pass its start, and what has passed its end.
        self._sample: Tensor | None = None
        self._written: Tensor | None = None

    @property
    def gates(self) -> Sequence[Gate]:
        return [self._start, self._end]

    def hooks(self) -> list[RemovableHandle]:
        if self._component is None:
            return []
        return [self._component.register_forward_pre_hook(self._on_call, with_kwargs=True)]

    def is_wanted(self) -> bool:
        return self._sample is not None or super().is_wanted()

    def at(self, gate: Gate, tensor: Tensor) -> Tensor | None:
        is_start = gate.key == self._start.key
        if self._sample is not None:
            if is_start:
                return self._sample
            self._written = tensor
            return tensor.detach()  # What follows needs no graph.
        if is_start:
            if self._component is None and self.runs.in_model:  # A lone block is no span.
                self._run.see(self).call = self._again(self._run.call, self._run.caches)
            self._run.see(self).x = self._kept(tensor)
            return None
        seen = self._run.take(self)
        if seen.x is None or seen.call is None:
            return None
        finish = partial(self._finish, seen.x, seen.call)
        if self.site.is_late:
            return postpone(self, tensor, finish)
        v = self.weighed(tensor.detach())
        with self._run.scope.outside():
            finish(v)
        return None

    def _finish(self, x: Tensor, call: Call, v: Tensor) -> None:
        def run(sample: Tensor) -> Tensor:
            if self._component is None:
                return self._run_model(call, sample)
            _, instead = input_of(call, self.name)
            args, kwargs = instead(sample)
            output = self._component(*args, **kwargs)
            return output[0] if isinstance(output, tuple) else output

        with self.runs.silence(self.runs.model if self._component is None else self._component):
            values = local_values_by_running(self.site, x, run, v)
        self._show(values)

    def _run_model(self, call: Call, sample: Tensor) -> Tensor:
        self._sample = sample
        try:
            self.runs.root.forward(*call[0], **call[1])
            assert self._written is not None
            return self._written
        finally:
            self._sample = self._written = None

    def _on_call(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.is_wanted():
            self._run.see(self).call = self._again((args, kwargs), [])

    def _again(self, call: Call, caches: Sequence[Any]) -> Call:
        """A call as it is to be made again."""
        args, kwargs = call
        if any(holds_tokens(c, self.start or 0) for c in (*args, *kwargs.values())):
            raise SiteError(
                f"{self.name}: a local centroid runs the {self.site.kind} again, which a key-value "
                "cache that holds earlier tokens does not allow. Run the whole sequence at once, "
                "without a cache."
            )
        return without_caches(call, caches)

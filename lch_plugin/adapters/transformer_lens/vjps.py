"""Readers by vector-Jacobian products, on the graph that the model itself builds (`passes`)."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lch_plugin.adapters.checks import check_no_padding
from lch_plugin.adapters.passes import gradients
from lch_plugin.adapters.transformer_lens.anatomy import (
    check_members,
    head_outputs,
    heads_values,
)
from lch_plugin.adapters.transformer_lens.gates import Gate
from lch_plugin.adapters.transformer_lens.readers import Reader
from lch_plugin.centroids import centroid
from lch_plugin.cotangents import Metric, Ones, Random
from lch_plugin.errors import SiteError

if TYPE_CHECKING:
    from lch_plugin.adapters.transformer_lens.tracker import Tracker


class VJPReader(Reader):
    """Any component, by one vector-Jacobian product on the model's own graph."""

    method = "VJP"

    def __init__(
        self,
        *args: Any,
        start: Gate,
        end: Gate,
        scope: nn.Module | None,
        first: int | None = None,
    ) -> None:
        super().__init__(*args, start=first)
        self.start_gate, self.end_gate = start, end
        # The module around both gates; None if only the whole model is.
        self._scope = scope

    @property
    def is_detached(self) -> bool:
        """Whether this is the detached linearisation."""
        return self.site.linearization == "detached"

    def install(self, tracker: Tracker) -> None:
        super().install(tracker)
        tracker.watch(self.start_gate, self)
        tracker.watch(self.end_gate, self)
        if self._scope is not None:
            self._hooks.append(
                self._scope.register_forward_hook(self._on_leaving, always_call=True)
            )

    def has_end(self, gate: Gate) -> bool:
        """Whether it starts or ends at a gate."""
        return gate.key in (self.start_gate.key, self.end_gate.key)

    def can_start(self) -> bool:
        """Whether the other end will be passed: a lone block is no span."""
        assert self.tracker is not None
        return self._scope is not None or self.tracker.in_model

    def _on_leaving(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        # After an exception the output was never passed.
        if self.tracker is None or self.tracker.paused:
            return
        if self._pass.inputs.pop(self, None) is not None:
            self._pass.release(self)

    def output(self, y: Tensor) -> Tensor:
        """What it writes, given what passed the gate at its end."""
        return y

    def finish(self, x: Tensor, y: Tensor, mu: Tensor, v: Tensor) -> None:
        """Show a centroid that has been computed."""
        mu = mu.detach()
        self._show(self._expert(mu, x.detach(), y.detach(), v.detach()))

    def finish_late(self, x: Tensor, y: Tensor, v: Tensor) -> None:
        """Compute and show a centroid whose cotangent has come."""
        v = v.to(y)
        with torch.enable_grad():
            mu = gradient(self, y, x, v)
        self.finish(x, y, mu, v)

    @property
    def cotangent_key(self) -> Hashable:
        """Equal for readers whose cotangents at the same output are."""
        v = self.site.v
        same = v if isinstance(v, Ones | Random) else id(v)
        return same, tuple(self.positions or ()), self.site.mixes_positions

    def weighed(self, y: Tensor) -> Tensor:
        """The cotangent spread over ``y``."""
        if isinstance(self.site.v, Metric):  # Of the model itself: its output is the logits.
            leaf, tokens = y.detach().requires_grad_(), self._pass.masks.get(self.stack)
            assert self.tracker is not None
            (v,) = torch.autograd.grad(self.tracker.metric(self.site.v, leaf, tokens), leaf)
            check_no_padding(self.site.v, v, tokens)
        else:
            v = self._at(y)
        return self.weigh(v, y) if self.site.mixes_positions else v.to(y).expand_as(y)


class HeadVJPReader(VJPReader):
    """Attention heads, through their values and through where they look.

    A head writes ``z W_O``, ``z`` its mix of values. So the graph ends at ``z``, which a hook point
    shows for every head, while a cotangent is known where attention ends.
    """

    def __init__(self, *args: Any, attn: Any, **kwargs: Any) -> None:
        super().__init__(*args, scope=attn, **kwargs)
        self._attn, self._z_gate = attn, heads_values(attn)

    def install(self, tracker: Tracker) -> None:
        super().install(tracker)
        tracker.watch(self._z_gate, self)

    def check(self) -> None:
        check_members(self._attn, self.path, self.site.members)

    def at(self, gate: Gate, tensor: Tensor) -> None:
        if self in self._pass.inputs:
            self._pass.captured[self, "z"] = tensor

    @property
    def cotangent_key(self) -> Hashable:
        return self

    def output(self, _y: Tensor) -> Tensor:
        z = self._pass.captured.pop((self, "z"), None)
        if z is None:
            raise SiteError(
                f"{self.name}: attention ran without passing its heads through a hook point, so "
                "what they write is unknown."
            )
        return head_outputs(self._attn, self.site.members, z)


class LocalReader(Reader):
    """Mean centroid over a neighbourhood of a component with no closed form.

    The component runs again, once a sample and one at a time, with every hook point within
    silenced: memory is that of one graph, and nobody's hooks see the samples. Interventions within
    the component are not seen either; those before it are.
    """

    method = "VJP"

    def __init__(
        self, *args: Any, component: nn.Module, start: Gate, end: Gate, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._component, self._start, self._end = component, start, end

    def install(self, tracker: Tracker) -> None:
        super().install(tracker)
        self._hooks.append(
            self._component.register_forward_pre_hook(self._on_call, with_kwargs=True)
        )
        tracker.watch(self._start, self)
        tracker.watch(self._end, self)

    def at(self, gate: Gate, tensor: Tensor) -> Tensor | None:
        captured = self._pass.captured
        if gate.key == self._start.key:
            captured[self, "x"] = tensor.detach()
            return None
        x, call = captured.pop((self, "x"), None), captured.pop((self, "call"), None)
        if x is None or call is None:
            return None
        y = tensor.detach()
        assert self.tracker is not None
        v = self._at(y)
        v = self.weigh(v, y) if self.site.mixes_positions else v
        args, kwargs = call

        def run(sample: Tensor) -> Tensor:
            output = _call_with(self._component, sample, args, kwargs)
            return output[0] if isinstance(output, tuple) else output

        def mu_at(samples: Tensor) -> Tensor:
            return torch.stack([centroid(run, sample, v) for sample in samples])

        with self._pass.outside():
            with self.tracker.silence(self._component):
                if self.tracker.trial is not None:
                    spread = v.to(y).expand_as(y)
                    self.tracker.trial.note(self, x, y, spread, partial(centroid, run, x))
                values = self._local(x, mu_at)
            self._show(values)
        return None

    def _on_call(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.is_wanted():
            return
        if any(_cached_length(c, self.layer or 0) for c in (*args, *kwargs.values())):
            raise SiteError(
                f"{self.name}: a local centroid runs the {self.site.kind} again, which a key-value "
                "cache that holds earlier tokens does not allow. Run the whole sequence at once, "
                "without a cache."
            )
        # An empty cache is filled by the model's own call, and none of our calls' affair.
        self._pass.captured[self, "call"] = (
            tuple(None if _is_cache(a) else a for a in args),
            {name: None if _is_cache(a) else a for name, a in kwargs.items()},
        )


_INPUTS = ("query_input", "key_input", "value_input", "hidden_states")


def _call_with(module: nn.Module, x: Tensor, args: Any, kwargs: Any) -> Any:
    named = [name for name in _INPUTS if name in kwargs]
    if named:
        return module(*args, **{**kwargs, **dict.fromkeys(named, x)})
    return module(x, *args[1:], **kwargs)


def _is_cache(value: Any) -> bool:
    """Whether this holds keys and values: HuggingFace's class, or TransformerLens'."""
    return hasattr(value, "get_seq_length") or hasattr(value, "past_keys")


def _cached_length(value: Any, layer: int) -> int:
    if not _is_cache(value):
        return 0
    if hasattr(value, "past_keys"):
        return int(value.past_keys.shape[1])
    return int(value.get_seq_length(layer))


def gradient(reader: VJPReader, y: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """Gradient of ``v . y`` in ``x``, which may be asked for again."""
    return gradients(reader.name, y, [x], v, keep=True)[0]

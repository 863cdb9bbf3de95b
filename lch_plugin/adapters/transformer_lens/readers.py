"""Readers: how the centroid of one component of one model comes about in a forward pass.

A `lch_plugin.Site` says what is wanted; a reader is that at one place of one model, with its hook
points. Two ways lead to a centroid:

- `MLPReader`, `NeuronReader`, `HeadReader`: a closed form on values that the model computes anyway;
- `VJPReader`: a vector-Jacobian product on the model's own graph (`passes`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lch_plugin.adapters.transformer_lens.anatomy import MLPParts, attention_input, heads_output
from lch_plugin.adapters.transformer_lens.gates import Gate
from lch_plugin.adapters.transformer_lens.passes import Pass, at_positions
from lch_plugin.adapters.transformer_lens.points import CentroidPoint
from lch_plugin.centroids import centroid, mean_over_neighbourhood
from lch_plugin.cotangents import Cotangent, Logit, Metric, Ones, Random, Vector, evaluate, is_fixed
from lch_plugin.errors import InputError, NonFiniteError, SiteError, VanishingCentroidError
from lch_plugin.mlp import (
    MLP,
    at_least_float32,
    centroid_of_neurons,
    read_direction,
    reads_nothing,
)
from lch_plugin.sites import Site, integers

if TYPE_CHECKING:
    from lch_plugin.adapters.transformer_lens.tracker import Tracker


class Reader:
    """One component of one model, and the hook points its centroid comes out of.

    Attributes:
        site: what is wanted.
        layer: the component's block; a span's last; None for a model.
        start: a span's first block, else ``layer``.
        path: the component's name in the model.
        points: by ending of `Site.outputs`.
        tracker: of the model it is attached to.
    """

    method = ""

    def __init__(
        self,
        site: Site,
        layer: int | None,
        path: str,
        points: dict[str, CentroidPoint],
        *,
        start: int | None = None,
    ) -> None:
        self.site = site
        self.layer = layer
        self.start = layer if start is None else start
        self.path = path
        self.points = points
        self.tracker: Tracker | None = None
        self._hooks: list[RemovableHandle] = []
        self._captures: list[Capture] = []

    @property
    def name(self) -> str:
        """Name of the centroid's hook point."""
        return self.points[""].name

    def record(self) -> dict[str, Any]:
        """What the centroid is of, in terms of JSON."""
        v = self.site.v
        record: dict[str, Any] = {
            "site": self.site.kind,
            "layer": self.layer,
            "cotangent": v.v.tolist() if isinstance(v, Vector) else v.name,
            "linearization": self.site.linearization,
            "label": self.site.label,
        }
        if isinstance(v, Logit) and v.position is not None:
            record["cotangent_position"] = v.position
        if self.stack != "blocks":
            record["stack"] = self.stack
        if self.site.compute_dtype is not None:
            record["compute_dtype"] = str(self.site.compute_dtype)
        if self.start != self.layer:
            record["first_layer"] = self.start
        if self.site.members:
            record["index"] = list(self.site.members)
        if self.positions is not None:
            record["output_positions"] = self.positions
        if self.site.radius is not None:
            record |= {
                "radius": self.site.radius,
                "n_samples": self.site.n_samples,
                "neighbourhood": self.site.neighbourhood,
            }
        return record

    def __repr__(self) -> str:
        return self.name

    def is_wanted(self) -> bool:
        """Whether anybody listens."""
        assert self.tracker is not None
        return not self.tracker.paused and any(p.has_listener for p in self.points.values())

    def install(self, tracker: Tracker) -> None:
        """Start computing centroids for whoever listens."""
        self.tracker = tracker

    def check(self) -> None:
        """Raise for what can be known to be wrong before a forward pass."""

    def at(self, gate: Gate, tensor: Tensor) -> Tensor | None:
        """See the tensor at a gate; may return another to go on with."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget calls that never ended."""
        for capture in self._captures:
            capture.reset()

    def remove(self) -> None:
        """Take every hook of this reader off the model."""
        self.reset()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self.tracker is not None:
            self.tracker.forget(self)

    @property
    def _pass(self) -> Pass:
        assert self.tracker is not None
        return self.tracker.current

    @property
    def stack(self) -> str:
        """The list of blocks it belongs to."""
        return self.path.partition(".")[0] or "blocks"

    @property
    def positions(self) -> list[int] | None:
        """Output positions that count; all if None."""
        positions = self.site.output_positions
        if positions is not None and self.tracker is not None and self.tracker.trial is not None:
            return [-1]  # Three tokens need not have the positions that the user's will.
        return None if positions is None else integers(positions)

    def _at(self, y: Tensor) -> Tensor:
        """A cotangent that is known by now."""
        v = self.site.v
        assert isinstance(v, Cotangent)
        try:
            return evaluate(v, y)
        except InputError:
            # What fits the user's sequences need not fit the three tokens of a trial.
            if is_fixed(v) or self.tracker is None or self.tracker.trial is None:
                raise
            return torch.ones_like(y)

    def _show(self, values: dict[str, Callable[[], Tensor]]) -> None:
        """Hand values to whoever listens, computing only those."""
        with self._pass.outside():
            for ending, value in values.items():
                point = self.points.get(ending)
                if point is None or not point.has_listener:
                    continue
                tensor = value().detach()
                # The sum first, which takes one pass: it is finite unless an entry is not.
                finite = not tensor.is_floating_point() or bool(tensor.sum().isfinite())
                if not finite and not bool(tensor.isfinite().all()):
                    bad = int((~tensor.isfinite()).sum())
                    raise NonFiniteError(
                        f"{point.name} came out with {bad} of {tensor.numel()} values NaN or "
                        f"infinite, at layer {self.layer}. Look at the activations there (half "
                        "precision overflows at 65504: load the model in float32), and at masked "
                        "rows, whose gradients may be NaN where their values are not."
                    )
                point.fire(tensor)

    def _expert(self, mu: Tensor, x: Tensor, y: Tensor, v: Tensor) -> dict[str, Callable[[], Any]]:
        """Centroid and, for an `expert` site, the numbers that go with it."""
        mu, x, y, v = (t.to(at_least_float32(t)) for t in (mu, x, y, v))
        # A component that mixes positions has one affine expert a sequence.
        dims = (-2, -1) if self.site.mixes_positions else (-1,)

        def offset() -> Tensor:
            return (v * y).sum(dims) - (mu * x).sum(dims)

        return {
            "": lambda: mu,
            "_offset": offset,
            "_radius": lambda: mu.square().sum(dims) + 2 * offset(),
            "_alignment": lambda: torch.nn.functional.cosine_similarity(mu, x, dim=-1),
        }

    def _local(self, x: Tensor, mu: Callable[[Tensor], Tensor]) -> dict[str, Callable[[], Tensor]]:
        """Mean centroid over the site's neighbourhood of ``x``, and its spread."""
        site, generator = self.site, self.site.generator
        assert site.radius is not None
        assert self.tracker is not None
        if generator is None or self.tracker.trial is not None:  # The user's is for their passes.
            generator = torch.Generator(x.device).manual_seed(0)
        local = mean_over_neighbourhood(
            mu,
            x,
            radius=site.radius,
            n_samples=site.n_samples,
            neighbourhood=site.neighbourhood,
            generator=generator,
        )
        return {
            "": lambda: local.mean.to(at_least_float32(x)),
            "_variance": lambda: local.variance,
            "_standard_error": lambda: local.standard_error,
        }


class Capture:
    """Puts the values of some hook points aside, as they are after every hook of the user's.

    The hooks are registered when ``owner`` is entered, so that they come last, and taken off when
    it is left, by an exception too.
    """

    def __init__(
        self,
        owner: nn.Module,
        points: Callable[[], tuple[nn.Module, ...]],
        wanted: Callable[[], bool],
        store: Callable[[tuple[Tensor, ...]], None],
    ) -> None:
        self._owner, self._points, self._wanted, self._store = owner, points, wanted, store
        # One for each call under way: a user's hook may run the model again.
        self._calls: list[list[RemovableHandle]] = []

    def register(self) -> list[RemovableHandle]:
        return [
            self._owner.register_forward_pre_hook(self._enter),
            self._owner.register_forward_hook(self._leave, always_call=True),
        ]

    def reset(self) -> None:
        """Forget calls that never ended."""
        while self._calls:
            self._leave(None, None, None)

    def _enter(self, _module: nn.Module, _args: Any) -> None:
        hooks: list[RemovableHandle] = []
        self._calls.append(hooks)
        if self._wanted():
            points, values = self._points(), dict[int, Tensor]()
            hooks += [
                point.register_forward_hook(
                    partial(self._capture, len(self._calls), values, i, len(points))
                )
                for i, point in enumerate(points)
            ]

    def _leave(self, _module: Any, _args: Any, _output: Any) -> None:
        if self._calls:  # Not if we were detached within the call.
            for hook in self._calls.pop():
                hook.remove()

    def _capture(
        self,
        depth: int,
        values: dict[int, Tensor],
        i: int,
        n: int,
        _module: nn.Module,
        _args: Any,
        output: Tensor,
    ) -> None:
        if depth != len(self._calls):
            return  # The value of a call within this one.
        values[i] = output.detach()
        if len(values) == n:
            self._store(tuple(values[i] for i in range(n)))
            values.clear()


class MLPReader(Reader):
    """An MLP in closed form (`lch_plugin.mlp`), from the pre-activations the model computes."""

    method = "closed form"

    def __init__(self, *args: Any, parts: MLPParts, exit_gate: Gate, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parts = parts
        self._exit = exit_gate
        self._checked: tuple[int, int] | None = None

    @property
    def mlp(self) -> MLP:
        """The MLP, or the part of it that the site is about."""
        return self.parts.weights

    @property
    def can_be_differentiated(self) -> bool:
        """Whether the model's own module says the same, should the closed form be wrong."""
        return True

    def install(self, tracker: Tracker) -> None:
        super().install(tracker)
        capture = Capture(
            self.parts.entry, self._pre_activation_points, self.is_wanted, self._on_pre
        )
        self._captures.append(capture)
        self._hooks += capture.register()
        if self.site.expert or self.site.radius is not None:
            tracker.watch(self.parts.input_gate, self)
        tracker.watch(self._exit, self)

    def check(self) -> None:
        """Raise for a fixed cotangent that does not fit, or reads nothing of what is written."""
        v = self._fixed()
        if v is not None:
            self.parts.check_cotangent(None if isinstance(self.site.v, Ones) else v)

    def at(self, gate: Gate, tensor: Tensor) -> Tensor | None:
        captured = self._pass.captured
        if gate.key != self._exit.key:
            captured[self, "x"] = tensor.detach()
            return None
        pre, x = captured.pop((self, "pre"), None), captured.pop((self, "x"), None)
        if pre is None:
            raise SiteError(
                f"{self.name}: the MLP ran without passing the hook points of its pre-activations, "
                "so its centroid is unknown."
            )
        if self.site.is_late:
            assert self.tracker is not None
            return self.tracker.postpone(
                self, tensor, partial(self._finish, pre, x, tensor.detach())
            )
        with self._pass.outside():
            self._finish(pre, x, tensor.detach(), None)
        return None

    def _pre_activation_points(self) -> tuple[nn.Module, ...]:
        return self.parts.pre_activation_points

    def _on_pre(self, pre: tuple[Tensor, ...]) -> None:
        self._pass.captured[self, "pre"] = pre

    def _finish(
        self, pre: tuple[Tensor, ...], x: Tensor | None, y: Tensor, v: Tensor | None
    ) -> None:
        """Show the centroid; ``v`` is given if it came late."""
        mlp, dtype = self.mlp, self.site.compute_dtype or at_least_float32(y)
        s = self._reading(mlp, y, v, dtype)
        if self.site.radius is not None:
            assert x is not None

            def mu_at(samples: Tensor) -> Tensor:
                return centroid_of_neurons(mlp, mlp.pre_activations(samples), s, dtype=dtype)

            self._show(self._local(x.to(dtype), mu_at))
        elif not self.site.expert:
            self._show({"": lambda: centroid_of_neurons(mlp, pre, s, dtype=dtype)})
        else:
            assert x is not None
            mu = centroid_of_neurons(mlp, pre, s, dtype=dtype)
            values = self._expert(mu, x, y, self._at(y) if v is None else v)
            self._show(values | {"_region": lambda: pre[0] > 0})

    def _reading(self, mlp: MLP, y: Tensor, v: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Weight of each neuron in ``v . f(x)``."""
        if v is not None or not is_fixed(self.site.v):
            return read_direction(mlp, self._at(y) if v is None else v, dtype=dtype)
        identity = mlp.W_out.data_ptr(), mlp.W_out._version
        if self._checked != identity:
            self.check()  # Weights may have been processed, trained or moved since.
            self._checked = identity
        ones = isinstance(self.site.v, Ones)
        return read_direction(mlp, None if ones else self._fixed(), dtype=dtype)

    def _fixed(self) -> Tensor | None:
        """The cotangent, if it is the same in every pass."""
        W_out = self.parts.weights.W_out
        like = W_out.new_empty(1, W_out.shape[-1], dtype=at_least_float32(W_out))
        return self._at(like) if is_fixed(self.site.v) else None


class NeuronReader(MLPReader):
    """Neurons of an MLP: the gradient of their weighted activations in what the MLP reads.

    Their activations are the output; a cotangent that comes late reads what they write.
    """

    @property
    def can_be_differentiated(self) -> bool:
        return False

    @property
    def mlp(self) -> MLP:
        return self.parts.weights.neurons(list(self.site.members))

    def check(self) -> None:
        d_mlp = self.parts.weights.W_out.shape[0]
        unknown = [j for j in self.site.members if j >= d_mlp]
        if unknown:
            raise SiteError(f"{self.path} has neurons 0 to {d_mlp - 1}, not {unknown}.")
        if isinstance(self.site.v, Vector):
            self._at(self.site.v.v.new_empty(1, len(self.site.members)))

    def _on_pre(self, pre: tuple[Tensor, ...]) -> None:
        super()._on_pre(tuple(z[..., list(self.site.members)] for z in pre))

    def _finish(
        self, pre: tuple[Tensor, ...], x: Tensor | None, y: Tensor, v: Tensor | None
    ) -> None:
        if v is None:
            y = self.mlp.activations(tuple(z.to(at_least_float32(z)) for z in pre))
        super()._finish(pre, x, y, v)

    def _reading(self, mlp: MLP, y: Tensor, v: Tensor | None, dtype: torch.dtype) -> Tensor:
        return self._at(y) if v is None else read_direction(mlp, v, dtype=dtype)


class HeadReader(Reader):
    """Attention heads with the pattern held fixed, in closed form.

    A head then writes ``y_t = sum_s A_ts x_s W_V W_O``, which is linear in what attention reads:
    ``mu_s = sum_t A_ts (v_t W_O^T) W_V^T``.
    """

    method = "closed form"

    def __init__(self, *args: Any, attn: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attn = attn
        self._exit = heads_output(attn)

    def install(self, tracker: Tracker) -> None:
        super().install(tracker)
        capture = Capture(self.attn, self.value_points, self.is_wanted, self._on_values)
        self._captures.append(capture)
        self._hooks += capture.register()
        if self.site.expert:
            start = attention_input(self.attn)
            tracker.watch(start, self)
        tracker.watch(self._exit, self)

    def check(self) -> None:
        """Raise for heads that do not exist."""
        n_heads = self.attn.W_O.shape[0]
        unknown = [h for h in self.site.members if h >= n_heads]
        if unknown:
            raise SiteError(f"{self.path} has heads 0 to {n_heads - 1}, not {unknown}.")
        if is_fixed(self.site.v):
            W_O = self.weights(at_least_float32(self.attn.W_O))[1].flatten(0, 1)
            if reads_nothing(W_O, self._at(W_O)):
                raise VanishingCentroidError(
                    f"{self.name}: the cotangent is orthogonal to everything these heads write, so "
                    "the centroid would be rounding noise. TransformerLens' center_writing_weights "
                    "does this to all ones. Load the model without weight processing, or pass "
                    "another cotangent."
                )

    def at(self, gate: Gate, tensor: Tensor) -> Tensor | None:
        captured = self._pass.captured
        if gate.key != self._exit.key:
            captured[self, "x"] = tensor.detach()
            return None
        values = captured.pop((self, "values"), None)
        if values is None:
            raise SiteError(
                f"{self.name}: attention ran without passing its pattern through a hook point. "
                'Load the model with attn_implementation="eager".'
            )
        x = captured.pop((self, "x"), None)
        if self.site.is_late:
            assert self.tracker is not None
            return self.tracker.postpone(self, tensor, partial(self._finish, values, x))
        with self._pass.outside():
            self._finish(values, x, None)
        return None

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``W_V`` and ``W_O`` of the group, ``(n, d_model, d_head)`` and ``(n, d_head, d_model)``.

        With grouped queries several heads share one ``W_V``.
        """
        heads = list(self.site.members)
        W_V, W_O = self.attn.W_V.detach(), self.attn.W_O.detach()
        per_group = W_O.shape[0] // W_V.shape[0]
        return W_V[[h // per_group for h in heads]].to(dtype), W_O[heads].to(dtype)

    def centroid(self, pattern: Tensor, v: Tensor) -> Tensor:
        """``mu``, ``(batch, pos, d_model)``, for ``v`` of the same shape."""
        W_V, W_O = self.weights(v.dtype)
        A = pattern[:, list(self.site.members)].to(v.dtype)
        u = torch.einsum("btd,hed->bhte", v, W_O)
        return torch.einsum("bhts,bhte,hde->bsd", A, u, W_V)

    def value_points(self) -> tuple[nn.Module, ...]:
        """Hook points of the attention pattern and of the heads' values."""
        z = (
            self.attn.hook_z
            if not hasattr(self.attn, "original_component")
            else self.attn.o.hook_in
        )
        return self.attn.hook_pattern, z

    def _on_values(self, values: tuple[Tensor, ...]) -> None:
        self._pass.captured[self, "values"] = values

    def _finish(self, values: tuple[Tensor, ...], x: Tensor | None, v: Tensor | None) -> None:
        pattern, z = values
        dtype = self.site.compute_dtype or at_least_float32(z)
        heads = list(self.site.members)
        W_O = self.weights(dtype)[1]
        z = z.reshape(*z.shape[:2], -1, W_O.shape[1])[:, :, heads].to(dtype)
        y = torch.einsum("bthe,hed->btd", z, W_O)
        if v is None:
            v = self._pass.weigh(self._at(y), y, self.positions, self.stack)
        mu = self.centroid(pattern, v.to(dtype))
        if x is None:
            self._show({"": lambda: mu})
            return
        if x.shape != mu.shape:
            raise SiteError(
                f"{self.name}: with a key-value cache the head reads earlier tokens as well, which "
                "are not at hand for its offset. Run the whole sequence at once."
            )
        self._show(self._expert(mu, x, y, v.to(dtype)))


class VJPReader(Reader):
    """Any component, by one vector-Jacobian product on the model's own graph."""

    method = "VJP"

    def __init__(self, *args: Any, start: Gate, end: Gate, scope: nn.Module | None, **kwargs: Any):
        super().__init__(*args, start=kwargs.pop("first", None), **kwargs)
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

    def finish(self, x: Tensor, y: Tensor, mu: Tensor, v: Tensor) -> None:
        """Show a centroid that has been computed."""
        mu = mu.detach()
        self._show(self._expert(mu, x.detach(), y.detach(), v.detach()))

    @property
    def cotangent_key(self) -> Hashable:
        """Equal for readers whose cotangents at the same output are."""
        v = self.site.v
        same = v if isinstance(v, Ones | Random) else id(v)
        return same, tuple(self.positions or ()), self.site.mixes_positions

    def weighed(self, y: Tensor) -> Tensor:
        """The cotangent spread over ``y``."""
        if isinstance(self.site.v, Metric):  # Of the model itself: its output is the logits.
            leaf = y.detach().requires_grad_()
            (v,) = torch.autograd.grad(self.site.v.value(leaf), leaf)
            return at_positions(v, self.positions)
        v = self._at(y)
        if self.site.mixes_positions:
            return self._pass.weigh(v, y, self.positions, self.stack)
        return v.to(y).expand_as(y)


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
        v = self._pass.weigh(v, y, self.positions, self.stack) if self.site.mixes_positions else v
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

"""Readers: how the centroid of one component of one model comes about in a forward pass.

A `lch_plugin.Site` says what is wanted; a reader is that at one place of one model, with its hook
points. Two ways lead to a centroid: `closed_forms`, from values that the model computes anyway, and
`vjps`, by a vector-Jacobian product on the model's own graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.hooks import RemovableHandle

from lch_plugin.adapters.checks import check_finite
from lch_plugin.adapters.passes import Pass
from lch_plugin.adapters.transformer_lens.gates import Gate
from lch_plugin.adapters.transformer_lens.points import CentroidPoint
from lch_plugin.centroids import mean_over_neighbourhood
from lch_plugin.cotangents import Cotangent, Logit, Vector, evaluate, is_fixed
from lch_plugin.errors import InputError
from lch_plugin.mlp import at_least_float32
from lch_plugin.padding import Finder, blank, spread
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
        if self.site.is_local:
            of_radius = self.site.sigma is None
            record |= {
                **({"radius": self.site.radius} if of_radius else {"sigma": self.site.sigma}),
                "n_samples": self.site.n_samples,
                "neighbourhood": self.site.neighbourhood,
            }
        if self.site.is_local and self.site.centre:
            record["centre"] = True
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
    def padding(self) -> Finder | None:
        """What finds the padding of the model's inputs, while it is attached."""
        return None if self.tracker is None else self.tracker.padding

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

    def weigh(self, v: Tensor, y: Tensor) -> Tensor:
        """A cotangent spread over the outputs ``y`` that count."""
        return spread(v, y, self._pass.masks.get(self.stack), self.positions)

    def _show(self, values: dict[str, Callable[[], Tensor]]) -> None:
        """Hand values to whoever listens, computing only those."""
        tokens = self._pass.masks.get(self.stack)
        with self._pass.outside():
            for ending, value in values.items():
                point = self.points.get(ending)
                if point is None or not point.has_listener:
                    continue
                tensor = blank(value().detach(), tokens)
                check_finite(point.name, tensor, f", at layer {self.layer}")
                point.fire(tensor)

    def _expert(self, mu: Tensor, x: Tensor, y: Tensor, v: Tensor) -> dict[str, Callable[[], Any]]:
        """Centroid and, for an `expert` site, the numbers that go with it."""
        mu, x, y, v = (t.to(at_least_float32(t)) for t in (mu, x, y, v))

        def total(t: Tensor) -> Tensor:
            # A component that mixes positions has one affine expert a sequence; another one has one
            # a position, with a last dimension where TransformerLens counts positions from the end.
            return t.sum((-2, -1)) if self.site.mixes_positions else t.sum(-1, keepdim=True)

        def offset() -> Tensor:
            return total(v * y) - total(mu * x)

        return {
            "": lambda: mu,
            "_offset": offset,
            "_radius": lambda: total(mu.square()) + 2 * offset(),
            "_alignment": lambda: cosine_similarity(mu, x, dim=-1)[..., None],
        }

    def _local(self, x: Tensor, mu: Callable[[Tensor], Tensor]) -> dict[str, Callable[[], Tensor]]:
        """Mean centroid over the site's neighbourhood of ``x``, and its spread."""
        site, generator = self.site, self.site.generator
        assert self.tracker is not None
        if generator is None or self.tracker.trial is not None:  # The user's is for their passes.
            generator = torch.Generator(x.device).manual_seed(0)
        local = mean_over_neighbourhood(
            mu,
            x,
            radius=site.radius,
            sigma=site.sigma,
            n_samples=site.n_samples,
            neighbourhood=site.neighbourhood,
            centre=site.centre,
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

"""Readers: how the centroid of one component of one model comes about in a forward pass.

A `lch_plugin.Site` says what is wanted; a reader is that at one place of one model: the gates where
it meets tensors, and the hook points its values come out of. Two ways lead to a centroid:
`closed_forms`, from values that the model computes anyway, and `vjps`, by a vector-Jacobian product
on the model's own graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lch_plugin.adapters.checks import check_finite
from lch_plugin.adapters.deferred import of_metric
from lch_plugin.adapters.transformer_lens.gates import Gate
from lch_plugin.adapters.transformer_lens.hook_points import CentroidPoint
from lch_plugin.adapters.transformer_lens.runs import Run, Runs
from lch_plugin.adapters.values import Values
from lch_plugin.centroids import check_gradients_on
from lch_plugin.cotangents import Cotangent, Metric, evaluate
from lch_plugin.padding import Finder, blank, spread
from lch_plugin.sites import Site


class Reader:
    """One component of one model, and the hook points its centroid comes out of.

    Attributes:
        site: what is wanted.
        layer: the component's block; a span's last; None for a model.
        start: a span's first block, else ``layer``.
        path: the component's name in the model.
        input_name: name of the module whose input is what the component reads; of a model the hook
            point of the embeddings.
        points: by ending of `Site.endings`.
        runs: the model's forward passes.
    """

    method = ""

    def __init__(
        self,
        site: Site,
        layer: int | None,
        path: str,
        points: Mapping[str, CentroidPoint],
        runs: Runs,
        *,
        input_name: str,
        start: int | None = None,
    ) -> None:
        self.site = site
        self.layer = layer
        self.start = layer if start is None else start
        self.path = path
        self.input_name = input_name
        self.points = points
        self.runs = runs

    @property
    def name(self) -> str:
        """Name of the centroid's hook point."""
        return self.points[""].name

    @property
    def gates(self) -> Sequence[Gate]:
        """Where it meets tensors."""
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """What the centroid is of, in terms of JSON."""
        record = {**self.site.record(), "layer": self.layer}
        if self.stack != "blocks":
            record["stack"] = self.stack
        if self.start != self.layer:
            record["first_layer"] = self.start
        return record

    def __repr__(self) -> str:
        return self.name

    def is_wanted(self) -> bool:
        """Whether anybody listens."""
        return not self.runs.paused and any(p.has_listener for p in self.points.values())

    def check(self) -> None:
        """Raise for what can be known to be wrong before a forward pass."""

    def hooks(self) -> list[RemovableHandle]:
        """Hooks that it needs besides its gates, registered now."""
        return []

    def at(self, gate: Gate, tensor: Tensor) -> Tensor | None:
        """See the tensor at a gate; may return another to go on with."""
        raise NotImplementedError

    @property
    def padding(self) -> Finder:
        """What finds the padding of the model's inputs."""
        return self.runs.padding

    @property
    def stack(self) -> str:
        """The list of blocks it belongs to."""
        return self.path.partition(".")[0] or "blocks"

    @property
    def _run(self) -> Run:
        return self.runs.current

    @property
    def _tokens(self) -> Tensor | None:
        """Which positions of its stack are tokens, if some are not."""
        return self._run.masks.get(self.stack)

    def _at(self, y: Tensor) -> Tensor:
        """A cotangent that is known by now."""
        v = self.site.v
        if isinstance(v, Metric):  # Of the model itself: its output is the logits.
            leaf = y.detach().requires_grad_()
            return of_metric(v, leaf, [leaf], ["the model"], self._tokens)[0]
        assert isinstance(v, Cotangent)
        return evaluate(v, y)

    def weighed(self, y: Tensor) -> Tensor:
        """The cotangent spread over ``y``, if it is known by now."""
        v = self._at(y)
        return self.weigh(v, y) if self.site.mixes_positions else v.to(y).expand_as(y)

    def weigh(self, v: Tensor, y: Tensor) -> Tensor:
        """A cotangent spread over the outputs ``y`` that count."""
        return spread(v, y, self._tokens, self.site.positions)

    def _kept(self, tensor: Tensor) -> Tensor:
        """A tensor, with its graph only where that is asked for."""
        return tensor if self.site.create_graph else tensor.detach()

    def _show(self, values: Values) -> None:
        """Hand values to whoever listens, computing only those."""
        tokens = self._tokens
        with self._run.scope.outside():
            if self.site.create_graph:
                check_gradients_on()
            for ending, value in values.items():
                point = self.points.get(ending)
                if point is None or not point.has_listener:
                    continue
                tensor = blank(self._kept(value()), tokens)
                check_finite(point.name, tensor, f", at layer {self.layer}")
                point.fire(tensor)

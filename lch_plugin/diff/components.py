"""Components of one model, on their own inputs or on given ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lch_plugin.adapters.states import evaluating, without_autocast
from lch_plugin.adapters.transformer_lens import LensModel, attach, run_edited
from lch_plugin.adapters.transformer_lens.architecture import attention, layer_indices, stacks
from lch_plugin.adapters.transformer_lens.gates import Act, Gate
from lch_plugin.cotangents import Cotangent
from lch_plugin.errors import SiteError
from lch_plugin.lens.components import component_ends
from lch_plugin.lens.passes import watching
from lch_plugin.sites import Site


@dataclass
class Seen:
    """What one pass showed, by component.

    Attributes:
        inputs: what it read.
        written: what passed the gates at its end, by number.
        centroids: through each cotangent, by its number.
    """

    inputs: dict[int, Tensor] = field(default_factory=dict)
    written: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    centroids: dict[int, dict[int, Tensor]] = field(default_factory=dict)


class Components:
    """The components of a site, one a layer, while `watched` lasts.

    Attributes:
        names: such as ``blocks.2.mlp``.
        layers: of each; of a span its last.
        modules: those that hold their parameters; None of what is a part of one, or several.
    """

    def __init__(self, model: LensModel, site: Site) -> None:
        self._model = model
        # Each of one layer, as `component_ends` takes them.
        blocks = stacks(model, site.stack or "blocks")[site.stack or "blocks"]
        is_span = site.of_kind.layers == "ends"
        self.layers = layer_indices(blocks, site.layers, keep_order=is_span)
        sites = [site] if is_span else [replace(site, layers=[layer]) for layer in self.layers]
        self.layers = self.layers[-1:] if is_span else self.layers
        self._ends = [component_ends(model, one) for one in sites]
        self.modules = [_module(blocks[layer], site.kind) for layer in self.layers]
        self.names: list[str] = []
        self._points: list[list[str]] = []
        self._seen: Seen | None = None
        self._given: Mapping[int, Tensor] = {}

    @property
    def acts(self) -> list[tuple[Gate, Act]]:
        """What to do at each gate."""
        found: list[tuple[Gate, Act]] = []
        for i, ends in enumerate(self._ends):
            found.append((ends.read, partial(self._read, i)))
            found += [(gate, partial(self._keep, i, j)) for j, gate in enumerate(ends.written)]
        return found

    def attached(self, points: Sequence[str], n_cotangents: int) -> None:
        """Take note of the centroids' hook points, those of one cotangent after another."""
        n = len(self._ends)
        self._points = [list(points[k * n : (k + 1) * n]) for k in range(n_cotangents)]
        self.names = [_name(point) for point in self._points[0]]

    def run(
        self,
        ids: Int[Tensor, "batch pos"],
        given: Mapping[int, Tensor] | None = None,
        *,
        centroids: bool = True,
    ) -> Seen:
        """One pass.

        Args:
            ids: prompts of one length.
            given: what each component reads in place of its own input.
            centroids: whether to compute them.

        Raises:
            SiteError: a component did not run.
        """
        self._seen, self._given = Seen(), given or {}
        edits = {
            point: partial(self._show, i, k)
            for k, points in enumerate(self._points if centroids else [])
            for i, point in enumerate(points)
        }
        try:
            with torch.no_grad(), evaluating(self._model), without_autocast():
                run_edited(self._model, ids, edits, last_only=True)
            seen = self._seen
        finally:
            self._seen, self._given = None, {}
        for i, name in enumerate(self.names):
            if i not in seen.inputs or len(seen.written.get(i, ())) < len(self._ends[i].written):
                raise SiteError(
                    f"what {name} reads or writes did not pass its hook points. If an SAE stands "
                    "there, call reset_saes() first."
                )
        return seen

    def centroids(self, seen: Seen, i: int) -> list[Float[Tensor, "*batch d"]]:
        """The centroids of component ``i``, through each cotangent."""
        return [seen.centroids[i][k] for k in range(len(self._points))]

    def output(self, seen: Seen, i: int) -> Float[Tensor, "*batch d"]:
        """What component ``i`` wrote."""
        ends = self._ends[i]
        return ends.output(*(seen.written[i][j] for j in range(len(ends.written))))

    def _read(self, i: int, x: Tensor) -> Tensor | None:
        if self._seen is None:  # A pass of attaching's own.
            return None
        if i in self._given:
            self._seen.inputs[i] = self._given[i]
            return self._given[i]
        # A copy: some models add to the residual stream in place.
        self._seen.inputs[i] = x.detach().clone()
        return None

    def _keep(self, i: int, j: int, y: Tensor) -> None:
        if self._seen is not None:
            self._seen.written.setdefault(i, {})[j] = y.detach().clone()

    def _show(self, i: int, k: int, mu: Tensor) -> None:
        if self._seen is not None:
            self._seen.centroids.setdefault(i, {})[k] = mu.detach()


@contextmanager
def watched(model: LensModel, site: Site, cotangents: Sequence[Cotangent]) -> Iterator[Components]:
    """While this lasts, the components of a site can be run.

    Gates come before the centroids', which so are those at the inputs that are given.

    Args:
        model: TransformerBridge or HookedTransformer.
        site: of any kind but a model.
        cotangents: of the centroids.

    Raises:
        SiteError, VanishingCentroidError, NotDifferentiableError: as `lch_plugin.attach`.
    """
    found = Components(model, site)
    sites = [replace(site, cotangent=v, label=f"diff{k}") for k, v in enumerate(cotangents)]
    with watching(found.acts), attach(model, site=sites) as handle:
        found.attached(handle.centroid_names, len(cotangents))
        yield found


def _name(point: str) -> str:
    """``blocks.2.attn.hook_centroid_head_1_diff0`` as ``blocks.2.attn.head_1``."""
    path, _, tail = point.partition(".hook_centroid")
    tail = tail.rpartition("_diff")[0].removeprefix("_")
    return f"{path}.{tail}" if tail else path


def _module(block: Any, kind: str) -> nn.Module | None:
    if kind == "attn":
        module: nn.Module = attention(block, "")[0]
        return module
    return {"mlp": getattr(block, "mlp", None), "block": block}.get(kind)

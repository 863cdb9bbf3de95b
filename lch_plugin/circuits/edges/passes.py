"""A model run reader by reader: what each of them reads can be seen, and be another for each.

The residual stream that a reader reads is the sum of what the writers before it wrote, so to
change an edge is to add to what its reader reads. Attention reads once for all its heads; to give
each head its own reads, its queries, keys and values are computed from them here, by the norm and
the weights of the model, and put at their hook points (`HeadReads`). `SplitModel.check` holds both
to the model: that reads are sums of writes, and that these are its queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from lch_plugin.adapters.states import evaluating
from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.adapters.transformer_lens.gates import Gate
from lch_plugin.adapters.transformer_lens.residual import (
    SLOTS,
    HeadReads,
    Slot,
    components,
    final_read,
)
from lch_plugin.circuits.edges.wiring import Wiring
from lch_plugin.circuits.prompt_batches import Prompts
from lch_plugin.errors import InputError, SiteError
from lch_plugin.mlp import at_least_float32

#: Who reads the residual stream: attention, for all heads of a layer, an MLP, or the final norm.
Reading: TypeAlias = tuple[Literal["attn", "mlp", "logits"], int]
# Bytes that what all writers write may take, for the prompts that are run together.
_MEMORY = 2**30


class Watch:
    """What is done with the values of a pass, as they come; here nothing."""

    def reads(
        self, reading: Reading, value: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"] | None:
        """Something reads the residual stream; what is returned is read in its place."""

    def projects(self, layer: int, slot: Slot, value: Tensor) -> Tensor | None:
        """Queries, keys or values pass their hook point, in its shape; as above."""

    def mixes(self, layer: int, z: Float[Tensor, "head batch pos d_head"]) -> None:
        """Heads have mixed their values."""

    def writes(self, layer: int, value: Float[Tensor, "batch pos d_model"]) -> None:
        """An MLP has written."""


@dataclass(eq=False)
class Record(Watch):
    """What was read and written.

    Attributes:
        read: by who reads; of attention, before its norm.
        mixed: by layer, what the heads mix of their values.
        written: by layer, what the MLP writes.
    """

    read: dict[Reading, Float[Tensor, "batch pos d_model"]] = field(default_factory=dict)
    mixed: dict[int, Float[Tensor, "head batch pos d_head"]] = field(default_factory=dict)
    written: dict[int, Float[Tensor, "batch pos d_model"]] = field(default_factory=dict)

    def reads(self, reading: Reading, value: Tensor) -> Tensor | None:
        self.read[reading] = _wide(value)
        return None

    def mixes(self, layer: int, z: Tensor) -> None:
        self.mixed[layer] = _wide(z)

    def writes(self, layer: int, value: Tensor) -> None:
        self.written[layer] = _wide(value)


class SplitModel:
    """A model, its writers and its readers.

    Attributes:
        wiring: its edges.
        heads: by layer.

    Args:
        model: TransformerBridge or HookedTransformer.

    Raises:
        SiteError: as `components`; or a layer without an MLP, or with more or fewer heads.
    """

    def __init__(self, model: LensModel) -> None:
        self._model = model
        self._components = components(model)
        n_layers = 1 + max(component.layer for component in self._components)
        self.heads = [HeadReads(model, layer) for layer in range(n_layers)]
        n_heads = {heads.n_heads for heads in self.heads}
        if len(self._components) != 2 * n_layers or len(n_heads) > 1:
            raise SiteError(
                "this model's blocks do not all have as many heads and an MLP, and the edges of "
                "others have no names here. Score nodes: lch_plugin.circuits.node_attribution."
            )
        self.wiring = Wiring(n_layers, n_heads.pop(), bool(model.cfg.parallel_attn_mlp))

    def run(
        self,
        batch: Prompts,
        watch: Watch,
        edits: Mapping[str, Callable[[Tensor], Tensor | None]] | None = None,
    ) -> Float[Tensor, "batch out d_vocab"]:
        """Logits that the metric needs, of a pass that is watched.

        Args:
            batch: whose clean prompts are run.
            watch: sees the values, and may replace them.
            edits: of other hook points, as `run_edited`.

        Raises:
            InputError, SiteError: as `run_edited`.
        """
        edits = dict(edits or {})
        gates: dict[object, tuple[Gate, list[Reading]]] = {}
        seen: set[Reading] = set()
        last: Reading = ("logits", self.wiring.n_layers)
        readings = [(c.read, (c.kind, c.layer)) for c in self._components]
        for gate, reading in [*readings, (final_read(self._model), last)]:
            gates.setdefault(gate.key, (gate, []))[1].append(reading)

        def on_read(here: list[Reading], value: Tensor) -> Tensor:
            seen.update(here)
            rows = value.reshape(len(batch), -1, value.shape[-1])  # OPT joins batch and position.
            for reading in here:
                # Attention that shares its norm with an MLP reads what the MLP does; it does not
                # matter where its queries, keys and values are replaced.
                replaced = watch.reads(reading, value.reshape(rows.shape))
                rows = rows if replaced is None else replaced
            return rows.to(value).reshape(value.shape)

        def on_mixed(heads: HeadReads, value: Tensor) -> Tensor:
            z = heads.by_head("z", value)
            watch.mixes(heads.layer, z)
            return heads.mixed(z)

        def on_written(layer: int, value: Tensor) -> None:
            watch.writes(layer, value.reshape(len(batch), -1, value.shape[-1]))

        with ExitStack() as stack:
            for heads in self.heads:
                stack.enter_context(heads.entered())
                for slot, name in heads.names.items():
                    edits[name] = partial(watch.projects, heads.layer, slot)
                edits[heads.z_name] = partial(on_mixed, heads)
            for gate, here in gates.values():
                gate.install(lambda: True, partial(on_read, here))
                stack.callback(gate.remove)
            for component in self._components:
                if component.kind == "mlp":
                    component.write.install(lambda: True, partial(on_written, component.layer))
                    stack.callback(component.write.remove)
            logits = batch.run(self._model, edits)
        missed = [f"{kind} {layer}" for kind, layer in {r for _, r in readings} - seen]
        if missed:
            raise SiteError(
                f"what {missed} reads did not pass its hook points, so its edges cannot be told. "
                "If an SAE stands there, call reset_saes() first."
            )
        return logits

    def record(self, batch: Prompts) -> Record:
        """What is read and written on the clean prompts."""
        record = Record()
        with evaluating(self._model), torch.no_grad():
            self.run(batch, record)
        return record

    def changes(self, own: Record, other: Record) -> Float[Tensor, "writer batch pos d_model"]:
        """What each writer writes, less what it writes in another record."""
        first = own.read["attn", 0] - other.read["attn", 0]
        found = first.new_zeros(len(self.wiring.writers), *first.shape)
        found[0] = first
        for heads in self.heads:
            start = self.wiring.first_writer(heads.layer)
            z = own.mixed[heads.layer] - other.mixed[heads.layer]
            found[start : start + heads.n_heads] = heads.written(z)
            found[start + heads.n_heads] = own.written[heads.layer] - other.written[heads.layer]
        return found

    def batches(self, prompts: Prompts, most: int | None = None) -> Iterator[Prompts]:
        """The prompts, as many at a time as memory allows for: one at least, and ``most`` if given.

        Counted are what all writers write and what all heads of a layer read, of each token.

        Raises:
            InputError: prompts without corrupt twins.
        """
        if prompts.corrupt is None:
            raise InputError(
                "an edge is compared with what its writer writes on corrupt prompts, and there are "
                "none. Give corrupt twins."
            )
        d_model = int(self._model.cfg.d_model)
        n_rows = len(self.wiring.writers) + 4 * len(SLOTS) * self.wiring.n_heads
        width = max(4, next(self._model.parameters()).element_size())
        size = max(1, _MEMORY // (n_rows * prompts.clean.shape[1] * d_model * width))
        size = size if most is None else min(size, most)
        for start in range(0, len(prompts), size):
            yield prompts[start : start + size] if size < len(prompts) else prompts

    def check(self, prompts: Prompts) -> None:
        """Hold the wiring to the model, on the first of some prompts with corrupt twins.

        Raises:
            SiteError: a read does not change as the writes before it do, or queries, keys or
                values are no projections of what attention reads.
        """
        pair = prompts[[0]]
        own, other = _Projections(), _Projections()
        with evaluating(self._model), torch.no_grad():
            self.run(pair, own)
            self.run(twin(pair), other)
            tolerance = _tolerance(next(iter(own.projected.values())).dtype)
            total = self.changes(own, other).cumsum(0)
            for group in self.wiring.readers:
                reading: Reading = (
                    ("attn", group.layer) if group.kind in SLOTS else (group.kind, group.layer)  # type: ignore[assignment]
                )
                read = own.read[reading]
                change = read - other.read[reading]
                off = float((change - total[group.n_writers - 1]).norm())
                # Where the prompts hardly differ, what is left is the rounding of the read.
                rounding = tolerance**2 * float(read.norm())
                if not off <= tolerance * float(change.norm()) + rounding:
                    raise SiteError(
                        f"what {group.names[0]} reads is not the sum of what embeddings, heads and "
                        f"MLPs wrote before it: off by {off / float(change.norm()):.1e} of its "
                        "change between the prompts. The blocks scale or normalise what is "
                        "written, or a hook edits it. Score nodes: "
                        "lch_plugin.circuits.node_attribution."
                    )
            for heads in self.heads:
                self._check_projections(heads, own, tolerance)

    def _check_projections(self, heads: HeadReads, own: _Projections, tolerance: float) -> None:
        for slot in SLOTS:
            value = own.projected[heads.layer, slot]
            read = own.read["attn", heads.layer].to(value.dtype)
            expected = heads.by_head(slot, value)
            normed = heads.norm(read).expand(heads.n_heads, *read.shape)
            off = float((heads.projected(slot, normed) - expected).norm())
            if not off <= tolerance * float(expected.norm()):
                raise SiteError(
                    f"the {slot} of layer {heads.layer} differ from a projection of what attention "
                    f"reads, by {off / float(expected.norm()):.1e}: its heads cannot be given "
                    "reads of their own. Score nodes: lch_plugin.circuits.node_attribution."
                )


class _Projections(Record):
    """Queries, keys and values too."""

    def __init__(self) -> None:
        super().__init__()
        self.projected: dict[tuple[int, Slot], Tensor] = {}

    def projects(self, layer: int, slot: Slot, value: Tensor) -> Tensor | None:
        self.projected[layer, slot] = value
        return None


def twin(batch: Prompts) -> Prompts:
    """The corrupt prompts, as clean ones."""
    assert batch.corrupt is not None
    return replace(batch, clean=batch.corrupt)


def _tolerance(dtype: torch.dtype) -> float:
    """Half of the digits that a model computes with; RMS norms compute in float32 at most."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) ** 0.5


def _wide(value: Tensor) -> Tensor:
    return value.detach().to(at_least_float32(value))

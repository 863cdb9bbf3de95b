"""What a model says with the edges of a circuit alone.

Each reader reads, of every writer whose edge to it is kept, what the writer writes in this run,
and of every other what it writes on the corrupt prompt. That is the intervention of EAP-IG (Hanna
et al., arXiv 2403.17806) and of MIB (arXiv 2504.13151). With no edge at all, all readers read the
corrupt prompt, its embeddings too, and the logits are those of the corrupt prompt.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from lch_plugin.adapters.states import evaluating, without_autocast
from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.adapters.transformer_lens.residual import Slot
from lch_plugin.circuits.edges.passes import Reading, Record, SplitModel, Watch, twin
from lch_plugin.circuits.edges.wiring import EdgeCircuit
from lch_plugin.circuits.prompt_batches import Prompts, batches_of
from lch_plugin.errors import InputError
from lch_plugin.mlp import at_least_float32


class EdgeAblation:
    """Prompts, and what writers write on their corrupt twins, for any number of circuits.

    Attributes:
        batches: of prompts, as many at a time as memory allows for.
        wiring: the model's edges.

    Args:
        model: TransformerBridge or HookedTransformer.
        prompts: in batches of one length, with corrupt twins.

    Raises:
        InputError: no prompts, or some without corrupt twins.
        SiteError: the edges of this model cannot be told: `SplitModel.check`.
    """

    def __init__(self, model: LensModel, prompts: Prompts | Iterable[Prompts]) -> None:
        self._model, self._split = model, SplitModel(model)
        self.wiring = self._split.wiring
        given = batches_of(prompts)
        self.batches = [part for batch in given for part in self._split.batches(batch)]
        if not self.batches:
            raise InputError("there are no prompts to run a circuit on.")
        self._split.check(self.batches[0])
        self._corrupt = [self._split.record(twin(batch)) for batch in self.batches]

    @without_autocast()
    def metric(self, circuit: EdgeCircuit) -> Float[Tensor, " prompt"]:
        """The metric of each prompt, every edge outside the circuit cut; on the CPU.

        Raises:
            InputError: the circuit is one of another model's edges; or as `Prompts.measure`.
            SiteError: a hook point did not fire.
        """
        if circuit.wiring != self.wiring:
            raise InputError(
                f"the circuit is of {circuit.wiring}, and this model has {self.wiring}."
            )
        return self.with_shares(circuit.keep.to(torch.float64))

    def with_shares(self, keep: Float[Tensor, " edge"]) -> Float[Tensor, " prompt"]:
        """The metric of each prompt, a share of each edge kept: 1 as it is, 0 cut."""
        found = []
        with evaluating(self._model), torch.no_grad():
            for batch, corrupt in zip(self.batches, self._corrupt, strict=True):
                logits = self._split.run(batch, Cut(self._split, keep, corrupt))
                found.append(batch.measure(logits).double().cpu())
        return torch.cat(found)

    def everything(self) -> EdgeCircuit:
        """The circuit of all edges: the model as it is."""
        return EdgeCircuit(self.wiring, torch.ones(self.wiring.n_edges, dtype=torch.bool))


@without_autocast()
def run_edges(
    model: LensModel, prompts: Prompts | Iterable[Prompts], circuit: EdgeCircuit
) -> Float[Tensor, " prompt"]:
    """The metric of each prompt with every edge outside a circuit cut.

    Args:
        model, prompts: as `EdgeAblation`.
        circuit: the edges that stay.

    Raises:
        InputError, SiteError: as `EdgeAblation`.
    """
    return EdgeAblation(model, prompts).metric(circuit)


class Cut(Watch):
    """A pass in which readers do not read all that is written.

    Args:
        split: the model.
        keep: the share of each edge that is kept.
        corrupt: what is written on the corrupt prompts.
    """

    def __init__(self, split: SplitModel, keep: Float[Tensor, " edge"], corrupt: Record) -> None:
        self._split, self._corrupt = split, corrupt
        start = corrupt.read["attn", 0]
        self._cut = {
            (group.kind, group.layer): (1 - kept).to(start)
            for group, kept in split.wiring.split(keep)
        }
        # What each writer writes in this run less what it writes on the corrupt prompts.
        self._changes = start.new_zeros(len(split.wiring.writers), *start.shape)
        self._read: Tensor | None = None

    def reads(self, reading: Reading, value: Tensor) -> Tensor | None:
        kind, layer = reading
        if kind == "attn":
            self._read = value.to(at_least_float32(value))
            if layer == 0:
                self.embedded(self._read - self._corrupt.read[reading])
            return None
        lost = self._lost(self._cut[kind, layer])
        # The final norm may read the last position alone.
        return None if lost is None else value - lost[0][:, -value.shape[1] :].to(value)

    def projects(self, layer: int, slot: Slot, value: Tensor) -> Tensor | None:
        lost = self._lost(self._cut[slot, layer])
        if lost is None:
            return None
        heads, read = self._split.heads[layer], self._read
        assert read is not None
        normed = heads.norm((read - lost).to(value.dtype))
        return heads.joined(slot, heads.projected(slot, normed))

    def embedded(self, change: Float[Tensor, "batch pos d_model"]) -> None:
        """What the embeddings are, less what they are on the corrupt prompts."""
        self._changes[0] = change

    def mixes(self, layer: int, z: Tensor) -> None:
        heads, start = self._split.heads[layer], self._split.wiring.first_writer(layer)
        change = z.to(self._changes) - self._corrupt.mixed[layer]
        self._changes[start : start + heads.n_heads] = heads.written(change)

    def writes(self, layer: int, value: Tensor) -> None:
        place = self._split.wiring.first_writer(layer) + self._split.heads[layer].n_heads
        self._changes[place] = value.to(self._changes) - self._corrupt.written[layer]

    def _lost(self, cut: Float[Tensor, "reader writer"]) -> Tensor | None:
        """What each reader reads too much, ``(reader, batch, pos, d_model)``; None if nothing."""
        if not cut.requires_grad and not bool(cut.any()):
            return None
        changes = self._changes[: cut.shape[1]]
        return (cut @ changes.flatten(1)).reshape(len(cut), *changes.shape[1:])

r"""What each edge is worth: what its writer writes, times the centroid of its reader.

With ``w`` what the writer writes, less what it writes on the corrupt prompt, and ``g`` the gradient
of the metric in what the reader reads, through its own norm::

    score = g . w        summed over positions

the change of the metric, to first order, if the reader alone reads the corrupt write. At the clean
prompt this is edge attribution patching (Syed et al., arXiv 2310.10348); averaged over places on
the way from the corrupt to the clean prompt, with the embeddings between the two, EAP-IG (Hanna et
al., arXiv 2403.17806).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from lch_plugin.adapters.states import evaluating, without_autocast
from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.circuits.edges.ablation import Cut
from lch_plugin.circuits.edges.passes import Record, SplitModel, twin
from lch_plugin.circuits.edges.wiring import EdgeScores
from lch_plugin.circuits.prompt_batches import Prompts, batches_of
from lch_plugin.circuits.scores.attribution import between, embedding_name
from lch_plugin.errors import InputError
from lch_plugin.progress import track

# Prompts that are differentiated together: every reader of every layer has a part of the graph.
_N_PROMPTS = 8


@without_autocast()
def edge_attribution(
    model: LensModel,
    prompts: Prompts | Iterable[Prompts],
    *,
    places: Sequence[float] = (0.3, 0.5, 0.7),
) -> EdgeScores:
    """Score every edge: what cutting it, and no other, takes from the metric, to first order.

    Args:
        model: TransformerBridge or HookedTransformer.
        prompts: with corrupt twins.
        places: shares of the way from the corrupt prompt to the clean one at which the gradients
            are taken whose mean it is: one forward and one backward pass each. ``(1.0,)`` is edge
            attribution patching, ``(0.2, 0.4, 0.6, 0.8, 1.0)`` EAP-IG with five steps.

    Returns:
        Scores, averaged over prompts, in units of the metric; positive if removing the edge lowers
        it.

    Raises:
        InputError: no prompts, some without corrupt twins, or places out of range; or as
            `Prompts.measure`.
        SiteError: the edges of this model cannot be told: `SplitModel.check`.

    Example:
        >>> import lch_plugin as lch
        >>> from lch_plugin import circuits
        >>> model = lch.load_demo_model()
        >>> scores = circuits.edge_attribution(model, circuits.task(model, "an", 4))
        >>> len(scores.top(3))
        3
    """
    if not places or not all(0 <= place <= 1 for place in places):
        raise InputError(f"places={tuple(places)}: give at least one share between 0 and 1.")
    split = SplitModel(model)
    given = batches_of(prompts)
    parts = [part for batch in given for part in split.batches(batch, _N_PROMPTS)]
    if not parts:
        raise InputError("there are no prompts to score edges on.")
    split.check(parts[0])
    total = torch.zeros(split.wiring.n_edges, dtype=torch.float64)
    embed = embedding_name(model)
    for batch in track(parts, "scores of edges"):
        clean, corrupt = split.record(batch), split.record(twin(batch))
        changes = split.changes(clean, corrupt)
        ends = [_embeddings(split, one, embed) for one in (twin(batch), batch)]
        for place in places:
            moved = between(ends[0], place, ends[1])
            edits = {embed: lambda _value, moved=moved: moved}
            cut = torch.zeros(split.wiring.n_edges, requires_grad=True)
            with evaluating(model), torch.inference_mode(False), torch.enable_grad():
                reading = _Read(split, cut, corrupt, changes)
                metric = batch.measure(split.run(batch, reading, edits)).sum()
                (slope,) = torch.autograd.grad(metric, cut)
            total -= slope.double().cpu() / len(places)
    return EdgeScores(split.wiring, (total / sum(map(len, parts))).float())


class _Read(Cut):
    """A pass in which nothing is cut, and what cutting would take away is differentiated in."""

    def __init__(
        self,
        split: SplitModel,
        cut: Float[Tensor, " edge"],
        corrupt: Record,
        changes: Float[Tensor, "writer batch pos d_model"],
    ) -> None:
        super().__init__(split, 1 - cut, corrupt)
        self._changes = changes

    def embedded(self, change: Tensor) -> None:
        """As `mixes`."""

    def mixes(self, layer: int, z: Tensor) -> None:
        """What is written at this place is not what the edge is worth."""

    def writes(self, layer: int, value: Tensor) -> None:
        """As `mixes`."""


def _embeddings(split: SplitModel, batch: Prompts, name: str) -> Tensor:
    """What passes the hook point of the token embeddings."""
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        split.run(batch, Record(), {name: partial(seen.__setitem__, name)})
    return seen[name].detach()

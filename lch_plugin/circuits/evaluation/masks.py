r"""Which nodes to keep, learned: masks of circuits of every size at once, that start from scores.

A score says what a node does by itself; which nodes do best *together* only trying can tell. Here
an order of the nodes is learned, whose first ``k`` are a circuit for every ``k``. Each step draws a
size, runs the circuit of that size as it is judged, every other node at its value on the corrupt
prompt, and moves nodes up or down the order by the derivative of::

    mean over prompts of (f - 1)^2

in what is kept of each node: those outside the circuit have such a derivative as well. So it is
faithfulness itself that is optimised, by targeted centroids taken where the circuit stands, and
more than the model does is as wrong as less. Learned masks are an old idea (Cao et al., arXiv
2104.08142; nested sizes from one run as in Matryoshka attribution, arXiv 2609.25518); starting from
scores makes some tens of steps enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lch_plugin.adapters.states import without_autocast
from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.circuits.evaluation.ablation import Ablation, Reference
from lch_plugin.circuits.evaluation.faithfulness import Scale
from lch_plugin.circuits.nodes import NodeScores
from lch_plugin.circuits.prompt_batches import Prompts
from lch_plugin.circuits.scores.attribution import CLEAN, Method, kept_gradients
from lch_plugin.errors import InputError
from lch_plugin.progress import track

# Of the logarithm of the rank, in which the order is learned: the largest step, and how far from
# the boundary of a circuit, in the same units, nodes still move.
_STEP, _WIDTH = 0.3, 0.5
# Of the loss at a circuit, the share that a step may take away if the loss is linear: many nodes
# move at once, and together they would go much too far (Polyak's step size, whose least loss is 0).
_CAUTION = 0.3
# Decay of the running means of the derivative and of its square, as in Adam.
_MEAN, _SQUARE = 0.5, 0.95
# Of the derivatives near the boundary, the share that is noise, and moves little.
_NOISE = 0.9
# Sizes, evenly by logarithm, at which what was learned is compared with what it began from.
_N_COMPARED = 4


@without_autocast()
def learn_masks(
    model: LensModel,
    prompts: Prompts | Iterable[Prompts],
    scores: NodeScores,
    *,
    sizes: tuple[float, float] = (0.004, 0.25),
    steps: int = 60,
    reference: Reference = "resample",
    generator: torch.Generator | None = None,
) -> NodeScores:
    """An order of the nodes whose first ``k`` recover the metric, learned for a range of sizes.

    Each step is one forward and one backward pass of one batch of prompts. Circuits of the order
    are then judged as those of any scores: ``learned.circuit(size)``, `faithfulness`.

    Args:
        model: TransformerBridge or HookedTransformer.
        prompts: to learn on. A mask fits the prompts it is learned on: judge it on others.
        scores: to begin from.
        sizes: the smallest and the largest share of the nodes that circuits are learned for.
        steps: how many.
        reference: what nodes outside a circuit are replaced by, as `Ablation`.
        generator: of the sizes and of the order of the batches, on the CPU.

    Returns:
        Values that order the nodes, highest first: one over a rank. They are in no unit, and none
        is negative: no node works against a circuit that it belongs to.

    Raises:
        InputError: sizes out of range, no steps; the masks collapsed: circuits recover the metric
            less well than those of the scores; or as `faithfulness`.
        SiteError: as `faithfulness`.

    Example:
        >>> import lch_plugin as lch
        >>> from lch_plugin import circuits
        >>> model = lch.load_demo_model()
        >>> found_on = circuits.task(model, "an", 16, split="train")
        >>> scores = circuits.node_attribution(model, found_on)
        >>> learned = circuits.learn_masks(model, found_on, scores, steps=8)
        >>> len(learned.circuit(50))
        50
    """
    smallest, largest = sizes
    if not 0 < smallest < largest < 1:
        raise InputError(f"sizes={sizes}: give two shares of the nodes, as in (0.004, 0.25).")
    if steps < 1:
        raise InputError(f"steps={steps} must be at least 1.")
    task = _Task(model, prompts, scores, reference)
    order = _Order(scores)
    n_nodes = len(scores.values)
    drawn = _spread(steps, generator)
    counts = [max(1, round(n_nodes * smallest * (largest / smallest) ** u)) for u in drawn]
    for step, count in enumerate(track(counts, "masks")):
        derivative, loss = task.loss(step % task.n_batches, order.kept(count))
        order.move(derivative, loss, count)
    learned = NodeScores(scores.points, order.values.exp().float())
    compared = [
        max(1, round(n_nodes * smallest * (largest / smallest) ** (i / (_N_COMPARED - 1))))
        for i in range(_N_COMPARED)
    ]
    before, after = (task.mean_loss(one, compared) for one in (scores, learned))
    if not after <= before:
        raise InputError(
            f"the masks collapsed: at {compared} nodes they are off by {math.sqrt(after):.2f} of "
            f"the metric, and the scores they began from by {math.sqrt(before):.2f}. Keep the "
            "scores, or learn on more prompts or for more steps."
        )
    return learned


class _Task:
    """Circuits of some prompts, and how far from the model they are.

    Args:
        As `learn_masks`.
    """

    def __init__(
        self,
        model: LensModel,
        prompts: Prompts | Iterable[Prompts],
        scores: NodeScores,
        reference: Reference,
    ) -> None:
        self._model = model
        self._ablation = Ablation(model, prompts, scores.points, reference)
        self._points = scores.points
        scale = Scale.of(self._ablation)
        self._full, self._way = scale.full, float((scale.full - scale.empty).mean())

    @property
    def n_batches(self) -> int:
        """Batches of prompts."""
        return len(self._ablation.batches)

    def loss(
        self, which: int, keep: Float[Tensor, " node"]
    ) -> tuple[Float[Tensor, " node"], float]:
        """Of one batch, the derivative of the loss in what is kept of each node, and the loss."""
        batch, values = self._ablation.batches[which], self._ablation.values[which]
        full = self._full.split(list(map(len, self._ablation.batches)))[which]
        sizes = [point.n_nodes for point in self._points]
        shares = dict(zip((p.name for p in self._points), keep.split(sizes), strict=True))
        found = kept_gradients(
            self._model, batch, self._points, values, shares, Method(prompt=CLEAN)
        )
        off = (found.metric.double().cpu() - full) / self._way
        slope = 2 * off / self._way / len(batch)
        per_prompt = torch.cat([found.nodes[p.name].double().sum(1).cpu() for p in self._points], 1)
        return slope @ per_prompt, float(off.square().mean())

    def mean_loss(self, scores: NodeScores, counts: Sequence[int]) -> float:
        """The loss of all prompts, averaged over circuits of some sizes."""
        kept = torch.stack([self._ablation.metric(scores.circuit(count)) for count in counts])
        return float(((kept - self._full) / self._way).square().mean())


class _Order:
    """An order of nodes that can be learned: values that are minus the logarithm of a rank.

    Attributes:
        values: of the nodes, highest first.
    """

    def __init__(self, scores: NodeScores) -> None:
        n_nodes = len(scores.values)
        ranks = torch.empty(n_nodes, dtype=torch.float64)
        best_first = scores.values.cpu().argsort(descending=True, stable=True)
        ranks[best_first] = torch.arange(1, n_nodes + 1, dtype=torch.float64)
        self.values = -ranks.log()
        self._mean = torch.zeros(n_nodes, dtype=torch.float64)
        self._square = torch.zeros(n_nodes, dtype=torch.float64)
        self._steps = 0

    def kept(self, count: int) -> Float[Tensor, " node"]:
        """1 of the first ``count`` nodes, 0 of the others."""
        keep = torch.zeros(len(self.values))
        keep[self._first(count)] = 1
        return keep

    def move(self, derivative: Float[Tensor, " node"], loss: float, count: int) -> None:
        """Move nodes against the derivative of a loss in what the first ``count`` keep."""
        self._steps += 1
        # As if a node were kept to the sigmoid of how far it lies inside: nodes far from the
        # boundary would hardly change, and whether they belong is not this circuit's question.
        inside = self.values - self.values[self._first(count)[-1]]
        kept = torch.sigmoid(inside / _WIDTH)
        slope = derivative * kept * (1 - kept) / _WIDTH
        self._mean.lerp_(slope, 1 - _MEAN)
        self._square.lerp_(slope.square(), 1 - _SQUARE)
        mean = self._mean / (1 - _MEAN**self._steps)
        size = (self._square / (1 - _SQUARE**self._steps)).sqrt()
        # Adam gives every node the same step, however little it matters, and there are many.
        noise = size[self._first(3 * count)].quantile(_NOISE)
        direction = mean / (size + noise + torch.finfo(size.dtype).tiny)
        fall = float(slope @ direction)
        length = min(_STEP, _CAUTION * loss / fall) if fall > 0 else _STEP
        self.values -= length * direction

    def _first(self, count: int) -> Tensor:
        return self.values.argsort(descending=True, stable=True)[:count]


def _spread(n: int, generator: torch.Generator | None) -> list[float]:
    """Numbers between 0 and 1, evenly spread and in random order."""
    order = torch.randperm(n, generator=generator)
    return ((order + 0.5) / n).tolist()

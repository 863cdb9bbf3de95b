r"""Is a circuit true? How much of the metric it recovers by itself, and what it leaves out.

With every node outside the circuit ``C`` replaced (`ablation`), the metric, averaged over prompts,
is ``m(C)``. The share recovered is::

    f(C) = (m(C) - m(empty)) / (m(full) - m(empty))

``empty`` keeps no node and ``full`` all; embeddings and biases stay in both. f may lie below 0 or
above 1, and need not grow with the circuit: nodes may work against the metric.

`faithfulness` follows f along circuits of growing size, with the two areas of the MIB benchmark
(Mueller et al., arXiv 2504.13151): CPR, the area under f over the share of nodes kept, and CMD, the
area under ``|1 - f|``. As in its evaluator, the areas are those of the trapezoid rule over the
shares, on a linear axis, from the first share to the last; nothing is added at a share of zero.
Where f exceeds 1, CPR may as well. MIB ranks nodes by signed score for CPR and by magnitude for
CMD.

`judge` tests one circuit against the criteria of Wang et al. (arXiv 2211.00593): faithfulness,
completeness and minimality; `smallest_circuit` looks for one. Controls are random circuits with as
many nodes of each kind in each layer, and intervals are those of the percentile bootstrap over
prompts, which are resampled together in numerator and denominator. They are of this circuit on
other prompts: what another choice of prompts to find it on would change is not in them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, overload, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lch_plugin.adapters.states import without_autocast
from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.circuits.edges.ablation import EdgeAblation
from lch_plugin.circuits.edges.wiring import EdgeCircuit, EdgeScores
from lch_plugin.circuits.evaluation.ablation import Ablation, Reference
from lch_plugin.circuits.nodes import Circuit, Node, NodeScores
from lch_plugin.circuits.prompt_batches import Prompts
from lch_plugin.errors import InputError
from lch_plugin.progress import track

#: Shares of the nodes that MIB's evaluator keeps.
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
# m(full) and m(empty) this close, relative to the metric, differ by rounding.
_ROUNDING = 1e-6


@runtime_checkable
class Ablated(Protocol):
    """Prompts on which circuits can be run: of nodes (`Ablation`) or of edges (`EdgeAblation`)."""

    def metric(self, circuit: Any) -> Float[Tensor, " prompt"]:
        """The metric of each prompt with a circuit alone."""
        ...

    def everything(self) -> Any:
        """The circuit of all of them."""
        ...


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """The share of the metric that circuits of growing size recover.

    Attributes:
        reference: what nodes outside the circuit were replaced by.
        by: what nodes were ranked by.
        shares: of the nodes that are kept, rising.
        sizes: nodes kept at each share; at least one.
        full: metric of each prompt with all nodes.
        empty: with none.
        kept: with each circuit.
        recovered: f of each circuit.
        interval: of f, low and high; NaN if there is one prompt only.
        random: f of random circuits with as many nodes of each kind in each layer; 1 where all
            nodes are kept, and there is but one circuit.
        cpr_interval, cmd_interval: of the two areas.
        confidence: of all intervals.
    """

    reference: Reference
    by: Literal["score", "magnitude"]
    shares: tuple[float, ...]
    sizes: tuple[int, ...]
    full: Float[Tensor, " prompt"]
    empty: Float[Tensor, " prompt"]
    kept: Float[Tensor, "size prompt"]
    recovered: Float[Tensor, " size"]
    interval: Float[Tensor, "size 2"]
    random: Float[Tensor, "size n_random"]
    cpr_interval: tuple[float, float]
    cmd_interval: tuple[float, float]
    confidence: float

    @property
    def cpr(self) -> float:
        """Area under f over the share of nodes kept; higher is better."""
        return float(cpr(self.shares, self.recovered))

    @property
    def cmd(self) -> float:
        """Area under ``|1 - f|``; 0 is best."""
        return float(cmd(self.shares, self.recovered))

    @property
    def random_cpr(self) -> Float[Tensor, " n_random"]:
        """CPR of the random circuits."""
        return cpr(self.shares, self.random.mT)

    @property
    def random_cmd(self) -> Float[Tensor, " n_random"]:
        """CMD of the random circuits."""
        return cmd(self.shares, self.random.mT)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        rows = zip(
            self.shares,
            self.sizes,
            self.kept.mean(1).tolist(),
            self.recovered.tolist(),
            self.interval.tolist(),
            self.random.tolist(),
            strict=True,
        )
        names = ("share", "n_nodes", "metric", "recovered", "interval", "random")
        return _json(
            {
                **_of_model(self.reference, self.full, self.empty, self.confidence),
                "by": self.by,
                "circuits": [dict(zip(names, row, strict=True)) for row in rows],
                "cpr": self.cpr,
                "cpr_interval": self.cpr_interval,
                "cmd": self.cmd,
                "cmd_interval": self.cmd_interval,
                "random_cpr": self.random_cpr.tolist(),
                "random_cmd": self.random_cmd.tolist(),
            }
        )


@dataclass(frozen=True, eq=False)
class Judgement:
    """What is known of one circuit.

    Attributes:
        circuit: which.
        reference: what nodes outside it were replaced by.
        full: metric of each prompt with all nodes.
        empty: with none.
        kept: with the circuit.
        complement: with everything but the circuit.
        recovered: f of the circuit: 1 is faithful.
        interval: of it, low and high; NaN if there is one prompt only.
        complement_recovered: f of everything but the circuit: near 0 if the circuit is complete.
            Above, the rest can do the task as well.
        complement_interval: of it.
        completeness: ``|f(C - K) - f(full - K)|`` for random subsets K of the circuit, each node
            with probability 1/2: 0 if the circuit reacts as the model does.
        minimality: by how much f falls when a node leaves the circuit. Near 0 for nodes that do
            nothing, and for those that others of the circuit stand in for.
        random: f of random circuits with as many nodes of each kind in each layer.
        confidence: of the intervals.
    """

    circuit: Circuit
    reference: Reference
    full: Float[Tensor, " prompt"]
    empty: Float[Tensor, " prompt"]
    kept: Float[Tensor, " prompt"]
    complement: Float[Tensor, " prompt"]
    recovered: float
    interval: tuple[float, float]
    complement_recovered: float
    complement_interval: tuple[float, float]
    completeness: Float[Tensor, " n_subsets"]
    minimality: dict[Node, float]
    random: Float[Tensor, " n_random"]
    confidence: float

    def idle_share(self, tolerance: float = 0.001) -> float:
        """Of the nodes taken out, the share that moved f by no more than this, either way."""
        return sum(abs(fall) <= tolerance for fall in self.minimality.values()) / len(
            self.minimality
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return _json(
            {
                **_of_model(self.reference, self.full, self.empty, self.confidence),
                "circuit": self.circuit.to_dict(),
                "n_nodes": len(self.circuit),
                "share": self.circuit.share,
                "metric": float(self.kept.mean()),
                "recovered": self.recovered,
                "interval": self.interval,
                "rest_metric": float(self.complement.mean()),
                "rest_recovered": self.complement_recovered,
                "rest_interval": self.complement_interval,
                "incompleteness": {
                    "gaps": self.completeness.tolist(),
                    "mean": float(self.completeness.mean()),
                    "max": float(self.completeness.max()),
                },
                "falls": {str(node): fall for node, fall in self.minimality.items()},
                "idle_share": self.idle_share(),
                "random": self.random.tolist(),
            }
        )


@without_autocast()
def faithfulness(
    model: LensModel,
    prompts: Prompts | Iterable[Prompts],
    scores: NodeScores | EdgeScores,
    *,
    reference: Reference = "resample",
    sizes: Sequence[float] = SHARES,
    by: Literal["score", "magnitude"] = "score",
    n_random: int = 10,
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> Faithfulness:
    """How much of the metric the highest-scoring nodes recover, by how many they are.

    One forward pass of all prompts for each size, and for each of its random circuits.

    Args:
        model: TransformerBridge or HookedTransformer.
        prompts: best not those that the scores were found on.
        scores: of every node, or of every edge; only ``"resample"`` can be asked of edges.
        reference: what nodes outside the circuit are replaced by, as `Ablation`.
        sizes: shares of the nodes to keep, above 0 and up to 1, at least two of them. A share is
            rounded down to whole nodes, but to no less than one.
        by: rank nodes by score or by its magnitude.
        n_random: random circuits of each size.
        n_bootstrap: resamples of the prompts.
        confidence: of the intervals.
        generator: source of the randomness, on the CPU.

    Raises:
        InputError: an argument cannot be used as given, ``m(full)`` equals ``m(empty)``, or as
            `Ablation`.
        SiteError: as `Ablation`.
    """
    shares = tuple(sorted(set(sizes)))
    if len(shares) < 2 or not all(0 < share <= 1 for share in shares):
        raise InputError(f"sizes={tuple(sizes)}: give at least two shares above 0 and up to 1.")
    _check_counts(n_random=n_random, n_bootstrap=n_bootstrap)
    _check_confidence(confidence)
    ablation = _ablation(model, prompts, scores, reference)
    scale = Scale.of(ablation)
    n_nodes = len(scores.values)
    counts = [size_of(share, n_nodes) for share in shares]
    circuits = {count: scores.circuit(count, by=by) for count in counts}
    found = {n_nodes: (scale.full, torch.ones(n_random, dtype=torch.float64))}
    for count, circuit in track(circuits.items(), "circuits by size"):
        if count < n_nodes:
            controls = [ablation.metric(circuit.random(generator)) for _ in range(n_random)]
            found[count] = ablation.metric(circuit), scale.recovered(torch.stack(controls))
    kept = torch.stack([found[count][0] for count in counts])
    # f of every size, and the areas, in each resample of the prompts.
    resampled = scale.resampled(kept, n_bootstrap, generator)
    areas = torch.stack([cpr(shares, resampled.mT), cmd(shares, resampled.mT)])
    (cpr_low, cpr_high), (cmd_low, cmd_high) = _interval(areas, confidence).tolist()
    return Faithfulness(
        reference=reference,
        by=by,
        shares=shares,
        sizes=tuple(counts),
        full=scale.full,
        empty=scale.empty,
        kept=kept,
        recovered=scale.recovered(kept),
        interval=_interval(resampled, confidence),
        random=torch.stack([found[count][1] for count in counts]),
        cpr_interval=(cpr_low, cpr_high),
        cmd_interval=(cmd_low, cmd_high),
        confidence=confidence,
    )


@without_autocast()
def judge(
    model: LensModel,
    prompts: Prompts | Iterable[Prompts],
    circuit: Circuit,
    *,
    reference: Reference = "resample",
    nodes: Sequence[Node] | int = 20,
    n_subsets: int = 10,
    n_random: int = 10,
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> Judgement:
    """Test one circuit: is it faithful, complete and minimal, and more so than random ones?

    Args:
        model, prompts, reference: as `faithfulness`.
        circuit: which.
        nodes: those to take out of it one at a time, one forward pass of all prompts each; or how
            many of its nodes, drawn at random.
        n_subsets: random subsets of the circuit to take out of it, and of the model.
        n_random, n_bootstrap, confidence, generator: as `faithfulness`.

    Raises:
        InputError: the circuit is empty, a node to take out is not in it; or as `faithfulness`.
        SiteError: as `Ablation`.
    """
    _check_counts(n_subsets=n_subsets, n_random=n_random, n_bootstrap=n_bootstrap)
    _check_confidence(confidence)
    if not len(circuit):
        raise InputError("the circuit is empty: there is nothing to judge.")
    members = circuit.nodes
    if isinstance(nodes, int):
        drawn = torch.randperm(len(members), generator=generator)[: max(0, nodes)]
        tested = [members[i] for i in drawn.sort().values.tolist()]
    else:
        tested = list(nodes)
    outside = [str(node) for node in tested if node not in set(members)]
    if outside or not tested:
        raise InputError(f"nodes {outside} are not in the circuit; give at least one that is.")
    ablation = Ablation(model, prompts, circuit.points, reference)
    scale = Scale.of(ablation)
    kept, rest = ablation.metric(circuit), ablation.metric(~circuit)
    both = torch.stack([kept, rest])
    recovered, rest_recovered = scale.recovered(both).tolist()
    intervals = _interval(scale.resampled(both, n_bootstrap, generator), confidence).tolist()

    def f(one: Circuit) -> float:
        return float(scale.recovered(ablation.metric(one)))

    falls = {
        node: recovered - f(circuit.without(node)) for node in track(tested, "nodes taken out")
    }
    gaps, random = [], []
    for _ in track(range(n_subsets), "subsets taken out"):
        subset = torch.rand(len(circuit.keep), generator=generator) < 0.5
        without = ~(circuit.keep & subset)
        reduced = Circuit(circuit.points, circuit.keep & without)
        gaps.append(abs(f(reduced) - f(Circuit(circuit.points, without))))
    for _ in track(range(n_random), "random circuits"):
        random.append(f(circuit.random(generator)))
    return Judgement(
        circuit=circuit,
        reference=reference,
        full=scale.full,
        empty=scale.empty,
        kept=kept,
        complement=rest,
        recovered=recovered,
        interval=tuple(intervals[0]),
        complement_recovered=rest_recovered,
        complement_interval=tuple(intervals[1]),
        completeness=torch.tensor(gaps, dtype=torch.float64),
        minimality=falls,
        random=torch.tensor(random, dtype=torch.float64),
        confidence=confidence,
    )


@overload
def smallest_circuit(
    model: LensModel,
    prompts: Prompts | Iterable[Prompts],
    scores: NodeScores,
    recovered: float = ...,
    *,
    reference: Reference = ...,
    by: Literal["score", "magnitude"] = ...,
) -> Circuit: ...


@overload
def smallest_circuit(
    model: LensModel,
    prompts: Prompts | Iterable[Prompts],
    scores: EdgeScores,
    recovered: float = ...,
    *,
    reference: Reference = ...,
    by: Literal["score", "magnitude"] = ...,
) -> EdgeCircuit: ...


@without_autocast()
def smallest_circuit(
    model: LensModel,
    prompts: Prompts | Iterable[Prompts],
    scores: NodeScores | EdgeScores,
    recovered: float = 0.8,
    *,
    reference: Reference = "resample",
    by: Literal["score", "magnitude"] = "score",
) -> Circuit | EdgeCircuit:
    """The fewest highest-scoring nodes found to recover a share of the metric, and not far more.

    Sizes are doubled from one node until f reaches the share, and the last step is bisected: about
    ``2 log2(size)`` forward passes. The circuit that comes out recovers the share and, unless it is
    a single node, the one with a node less does not; since f need not grow with size, a smaller
    size between those tried might. It recovers no more than ``2 - recovered``, as far above 1 as
    the share is below: a circuit without the nodes that work against the metric may do several
    times what the model does, and is then no more true of it than one that does a fraction.

    Args:
        model, prompts, scores, reference, by: as `faithfulness`. What a circuit recovers of prompts
            that its nodes were scored on is more than it does of others: give others.
        recovered: the share of the metric, above 0 and below 1.

    Raises:
        InputError: no circuit recovers that share and no more than its mirror above 1; or as
            `faithfulness`.
        SiteError: as `faithfulness`.
    """
    if not 0 < recovered < 1:
        raise InputError(f"recovered={recovered} must lie between 0 and 1, as 0.8 does.")
    ablation = _ablation(model, prompts, scores, reference)
    scale = Scale.of(ablation)
    n_nodes = len(scores.values)
    tried = {0: 0.0, n_nodes: 1.0}  # All nodes recover all of it, but for rounding.

    def enough(size: int) -> bool:
        if size not in tried:
            kept = ablation.metric(scores.circuit(size, by=by))
            tried[size] = float(scale.recovered(kept))
        return tried[size] >= recovered

    low, high = 0, 1
    while not enough(high):
        low, high = high, min(2 * high, n_nodes)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    if high == n_nodes:
        raise InputError(
            f"no circuit recovers {recovered:.0%} of the metric: {low} of {n_nodes} nodes recover "
            f"{tried[low]:.0%}, and all of them are the model. Score nodes by another method or on "
            "more prompts, or ask for less."
        )
    if tried[high] > 2 - recovered:
        raise InputError(
            f"no circuit recovers {recovered:.0%} to {2 - recovered:.0%}: {low} nodes recover "
            f"{tried[low]:.0%} of the metric, and {high} nodes {tried[high]:.0%}. Ask for less, or "
            "choose the number of nodes."
        )
    return scores.circuit(high, by=by)


def size_of(share: float, n_nodes: int) -> int:
    """A share of the nodes, rounded down to whole nodes, but to no less than one.

    >>> size_of(0.29, 100), size_of(0.001, 20)
    (29, 1)
    """
    # Of 0.29 * 100, binary floating point leaves 28.999...
    return max(1, math.floor(share * n_nodes + 1e-9))


def cpr(shares: Sequence[float], recovered: Float[Tensor, "*n size"]) -> Float[Tensor, "*n"]:
    """Area under f over the share of nodes kept, by the trapezoid rule."""
    return torch.trapezoid(recovered, recovered.new_tensor(shares))


def cmd(shares: Sequence[float], recovered: Float[Tensor, "*n size"]) -> Float[Tensor, "*n"]:
    """Area under ``|1 - f|`` over the share of nodes kept, by the trapezoid rule."""
    return torch.trapezoid((1 - recovered).abs(), recovered.new_tensor(shares))


@dataclass(frozen=True, eq=False)
class Scale:
    """The metric of each prompt with all nodes and with none: what f is 1 and 0 at."""

    full: Float[Tensor, " prompt"]
    empty: Float[Tensor, " prompt"]

    @classmethod
    def of(cls, ablation: Ablated) -> Scale:
        everything = ablation.everything()
        scale = cls(ablation.metric(everything), ablation.metric(~everything))
        full, empty = float(scale.full.mean()), float(scale.empty.mean())
        size = float((scale.full.abs() + scale.empty.abs()).mean())
        if abs(full - empty) <= _ROUNDING * size:
            raise InputError(
                f"the metric is {full:.6g} with all nodes and {empty:.6g} with none: there is "
                "nothing for a circuit to recover. Do the corrupt prompts change what is measured?"
            )
        return scale

    def recovered(self, kept: Float[Tensor, "*n prompt"]) -> Float[Tensor, "*n"]:
        """f, from the metric of each prompt."""
        return _recovered(kept.mean(-1), self.full.mean(), self.empty.mean())

    def resampled(
        self,
        kept: Float[Tensor, "n prompt"],
        n_bootstrap: int,
        generator: torch.Generator | None,
    ) -> Float[Tensor, "n n_bootstrap"]:
        """f in resamples of the prompts with replacement; NaN if there is one prompt only."""
        n_prompts = kept.shape[1]
        if n_prompts == 1:
            return kept.new_full((len(kept), n_bootstrap), torch.nan)
        drawn = torch.randint(n_prompts, (n_prompts, n_bootstrap), generator=generator)
        times = kept.new_zeros(n_prompts, n_bootstrap)
        times.scatter_add_(0, drawn, torch.ones_like(times))
        means = torch.cat([kept, self.full[None], self.empty[None]]) @ times / n_prompts
        return _recovered(means[:-2], means[-2], means[-1])


def _recovered(kept: Tensor, full: Tensor, empty: Tensor) -> Tensor:
    return (kept - empty) / (full - empty)


def _interval(resampled: Float[Tensor, "n n_bootstrap"], confidence: float) -> Float[Tensor, "n 2"]:
    """Percentile interval of each row."""
    tail = (1 - confidence) / 2
    return resampled.quantile(resampled.new_tensor([tail, 1 - tail]), dim=1).mT


def _ablation(
    model: LensModel,
    prompts: Prompts | Iterable[Prompts],
    scores: NodeScores | EdgeScores,
    reference: Reference,
) -> Ablated:
    """Circuits of what was scored, on prompts."""
    if isinstance(scores, NodeScores):
        return Ablation(model, prompts, scores.points, reference)
    if reference != "resample":
        raise InputError(
            f"reference={reference!r}: what is cut from an edge is what its writer writes on the "
            "corrupt prompt. Leave it at 'resample'."
        )
    return EdgeAblation(model, prompts)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name}={count} must be at least 1.")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"confidence={confidence} must lie between 0 and 1, as 0.95 does.")


def _of_model(
    reference: Reference,
    full: Float[Tensor, " prompt"],
    empty: Float[Tensor, " prompt"],
    confidence: float,
) -> dict[str, Any]:
    return {
        "reference": reference,
        "n_prompts": len(full),
        "metric_full": float(full.mean()),
        "metric_empty": float(empty.mean()),
        "confidence": confidence,
    }


def _json(value: Any) -> Any:
    """With lists for tuples, and None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_json(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

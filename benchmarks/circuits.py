"""Targeted centroids beside what circuits are found with today, on the tasks of `lch.circuits`.

    python -W ignore benchmarks/circuits.py --json FILE

On the embedded model, for two sets of nodes: heads and neurons (2,064), and heads and whole MLPs
(20, as the MIB benchmark has them). Nodes are scored on the training split of a task and judged on
the test split:

- rank agreement with exact activation patching of one node at a time, on a few pairs of the
  training split: Spearman's coefficient over all nodes and over the 100 that matter most, and which
  share of the 50 largest (of 20 nodes, 10) is among the 50 largest of the method;
- CPR, nodes ranked by score, and CMD, by magnitude, everything outside the circuit replaced by the
  activations of the corrupt prompt (`lch.circuits.faithfulness`); and the share of the metric that
  the top 5 % of the nodes recover;
- time to score all nodes, in forward passes of all prompts, the median of rounds in which the
  methods take turns; and the most memory that tensors made meanwhile hold, for one batch.

Markdown on the standard output, and all figures as JSON with ``--json``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import baselines
import torch
from common import in_turn, machine, ratio
from rich.console import Console
from scipy.stats import spearmanr
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformer_lens.model_bridge import TransformerBridge

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens import node_points
from lch_plugin.circuits import TASKS, Circuit, NodeScores, Prompts, node_attribution, task
from lch_plugin.circuits.evaluation.ablation import Ablation
from lch_plugin.circuits.evaluation.faithfulness import SHARES, cmd, cpr

Score = Callable[[], NodeScores]
UNIVERSES = {"heads and neurons": ("head", "neuron"), "heads and MLPs": ("head", "mlp")}
TOP, PRECISION_AT, SHARE = 100, 50, 0.05
RANDOM_SEEDS = 3
PLAIN = "plain forward passes"


@dataclass(frozen=True)
class Row:
    """One method on one task; what it costs is None where it is not measured."""

    task: str
    nodes: str
    method: str
    spearman: float
    spearman_top: float
    precision: float
    cpr: float
    cmd: float
    recovered: float
    seconds: float | None = None
    passes: float | None = None
    mebibytes: float | None = None


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made within hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_key(a) for a in args if isinstance(a, torch.Tensor)}
        outputs = result if isinstance(result, tuple | list) else (result,)
        for tensor in outputs:
            # What views a tensor that was there before takes no memory.
            if isinstance(tensor, torch.Tensor) and _key(tensor) not in given:
                storage = tensor.untyped_storage()
                self._held[_key(tensor)] = (StorageWeakRef(storage), storage.nbytes())
        self._held = {k: held for k, held in self._held.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return result


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def methods(
    model: TransformerBridge, train: list[Prompts], kinds: tuple[Any, ...]
) -> dict[str, Score]:
    """Every method but exact patching and the random control."""
    points = node_points(model, kinds)
    alone = [Prompts(batch.clean, batch.metric) for batch in train]
    ours = partial(node_attribution, model, kinds=kinds)
    found: dict[str, Score] = {
        "targeted centroids": partial(ours, train),
        "targeted centroids, QK paths": partial(ours, train, through_patterns=True),
        "targeted centroids, zero reference": partial(ours, alone),
        "targeted centroids, Jacobian": partial(ours, train, linearization="jacobian"),
    }
    for name in ("attribution_patching", "gradient_x_activation"):
        found[name.replace("_", " ")] = partial(getattr(baselines, name), model, train, points)
    for steps in (5, 20):
        found[f"integrated gradients (EAP-IG), {steps} steps"] = partial(
            baselines.integrated_gradients, model, train, points, steps=steps
        )
    found["integrated gradients of activations, 5 steps"] = partial(
        baselines.integrated_gradients_of_activations, model, train, points, steps=5
    )
    return found


def agreement(scores: NodeScores, exact: NodeScores) -> dict[str, float]:
    """Spearman over all nodes and over those that matter most, and precision at 50."""
    top = exact.values.abs().argsort(descending=True)
    chosen = top[:TOP]
    n = min(PRECISION_AT, len(top) // 2)
    largest = scores.values.abs().argsort(descending=True)[:n]
    return {
        "spearman": float(spearmanr(scores.values, exact.values).statistic),
        "spearman_top": float(spearmanr(scores.values[chosen], exact.values[chosen]).statistic),
        "precision": len({*largest.tolist()} & {*top[:n].tolist()}) / n,
    }


class Judge:
    """Judges circuits of growing size as `lch.circuits.faithfulness`, without its controls."""

    def __init__(
        self, model: TransformerBridge, test: list[Prompts], points: baselines.Points
    ) -> None:
        self._ablation = Ablation(model, test, points, "resample")
        everything = self._ablation.everything()
        self._full, self._empty = map(self._metric, (everything, ~everything))

    def _metric(self, circuit: Circuit) -> float:
        return float(self._ablation.metric(circuit).mean())

    def __call__(self, scores: NodeScores) -> dict[str, float]:
        """CPR, CMD and the share of the metric that a small circuit recovers."""
        by_score, by_magnitude = (self._recovered(scores, by) for by in ("score", "magnitude"))
        return {
            "cpr": float(cpr(SHARES, by_score)),
            "cmd": float(cmd(SHARES, by_magnitude)),
            "recovered": float(by_score[SHARES.index(SHARE)]),
        }

    def _recovered(self, scores: NodeScores, by: Literal["score", "magnitude"]) -> torch.Tensor:
        n_nodes = len(scores.values)
        counts = [max(1, math.floor(share * n_nodes + 1e-9)) for share in SHARES]
        kept = {n: self._metric(scores.circuit(n, by=by)) for n in dict.fromkeys(counts)}
        recovered = torch.tensor([kept[n] for n in counts], dtype=torch.float64)
        return (recovered - self._empty) / (self._full - self._empty)


def peak_mebibytes(score: Score) -> float:
    with PeakMemory() as memory:
        score()
    return memory.peak / 2**20


def compare(
    model: TransformerBridge, name: str, nodes: str, *, pairs: int, patched: int, rounds: int
) -> list[Row]:
    """All methods on one task and set of nodes."""
    train, test = (task(model, name, pairs, split=split) for split in ("train", "test"))
    few = task(model, name, patched, split="train")
    kinds = UNIVERSES[nodes]
    points = node_points(model, kinds)
    if "mlp" in kinds:
        baselines.check_attribution_patching(model, few, points)
    exact, judge = baselines.exact_patching(model, few, points), Judge(model, test, points)
    found, on_few = methods(model, train, kinds), methods(model, few, kinds)
    # Memory grows with the batch, not with the number of batches.
    on_one_batch = methods(model, train[:1], kinds)
    seconds = in_turn({**found, PLAIN: partial(plain_passes, model, train)}, rounds)

    def row(method: str, scores: NodeScores, compared: NodeScores, **cost: float) -> Row:
        figures = {**agreement(compared, exact), **judge(scores)}
        return Row(name, nodes, method, **figures, **cost)

    rows = [
        row(
            method,
            score(),
            on_few[method](),
            seconds=statistics.median(seconds[method]),
            passes=ratio(seconds, method, PLAIN),
            mebibytes=peak_mebibytes(on_one_batch[method]),
        )
        for method, score in found.items()
    ]
    rows.append(row(f"exact patching, {patched} pairs", exact, exact))
    orders = (baselines.random_scores(points, seed) for seed in range(RANDOM_SEEDS))
    return [*rows, mean_row([row("random", order, order) for order in orders])]


def plain_passes(model: TransformerBridge, batches: list[Prompts]) -> None:
    """What time is measured in: a forward pass of every prompt."""
    with torch.no_grad():
        for batch in batches:
            model(batch.clean)


def mean_row(rows: list[Row]) -> Row:
    """Figures averaged over rows that differ in nothing else."""
    first = asdict(rows[0])
    columns = {key: [getattr(row, key) for row in rows] for key in first}
    return Row(
        **{
            key: statistics.fmean(values) if isinstance(first[key], float) else first[key]
            for key, values in columns.items()
        }
    )


def markdown(rows: list[Row]) -> str:
    """A table for each task and set of nodes, and one of the means over tasks."""
    lines = []
    for nodes in dict.fromkeys(row.nodes for row in rows):
        of_nodes = [row for row in rows if row.nodes == nodes]
        names = dict.fromkeys(row.method for row in of_nodes)
        tasks = dict.fromkeys(row.task for row in of_nodes)
        parts = {name: [row for row in of_nodes if row.task == name] for name in tasks}
        parts["mean of the tasks"] = [
            mean_row([row for row in of_nodes if row.method == name]) for name in names
        ]
        for title, part in parts.items():
            lines += [f"### {title}, {nodes}", "", *_table(part), ""]
    return "\n".join(lines)


def _table(rows: list[Row]) -> list[str]:
    columns = {
        "Spearman": "{0.spearman:.3f}",
        f"top {TOP}": "{0.spearman_top:.3f}",
        f"precision at {PRECISION_AT}": "{0.precision:.2f}",
        "CPR": "{0.cpr:.3f}",
        "CMD": "{0.cmd:.3f}",
        f"f at {SHARE:.0%}": "{0.recovered:.2f}",
        "passes": "{0.passes:.1f}",
        "MiB": "{0.mebibytes:.0f}",
    }
    costs = ("passes", "MiB")

    def line(row: Row) -> str:
        shown = (
            "" if row.seconds is None and c in costs else f.format(row) for c, f in columns.items()
        )
        return f"| {row.method} | " + " | ".join(shown) + " |"

    return [
        "| method | " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * len(columns),
        *map(line, rows),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--nodes", nargs="+", choices=list(UNIVERSES), default=list(UNIVERSES))
    parser.add_argument("--pairs", type=int, default=60, help="of each split")
    parser.add_argument("--patched", type=int, default=12, help="of these, for exact patching")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=200)
    console.print(f"{machine()}; embedded model, {options.pairs} pairs of each split\n")
    model = lch.load_demo_model()
    rows = []
    for nodes in options.nodes:
        for name in options.tasks:
            rows += compare(
                model,
                name,
                nodes,
                pairs=options.pairs,
                patched=options.patched,
                rounds=options.rounds,
            )
            if options.json:
                options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    console.file.write(markdown(rows))


if __name__ == "__main__":
    main()

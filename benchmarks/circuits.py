"""Targeted centroids beside what circuits are found with today, on the tasks of `lch.circuits`.

    python -W ignore benchmarks/circuits.py --json FILE                      the embedded model
    python -W ignore benchmarks/circuits.py --model DIR --pairs 16 --json FILE     another

Two sets of nodes: heads and neurons, and heads and whole MLPs (as the MIB benchmark has them).
Nodes are scored on prompts of the training split of a task and judged on the test split, both such
as the model gets right:

- the share f of the metric that circuits of the highest scores recover, by size; CPR, nodes ranked
  by score, and CMD, by magnitude; everything outside the circuit is replaced by the activations of
  the corrupt prompt (`lch.circuits.faithfulness`);
- with ``--patched N``, rank agreement with exact activation patching of one node at a time, on N
  pairs of the training split: Spearman's coefficient over all nodes and over the 100 that matter
  most;
- time to score all nodes, in seconds and in forward passes of all prompts, the median of rounds in
  which the methods take turns; and the most memory that tensors made meanwhile hold, for one batch.

Tasks that a model does on fewer than seven in ten pairs, or cannot express, are left out. Markdown
on the standard output, and all figures as JSON with ``--json``.
"""

from __future__ import annotations

import argparse
import itertools
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
from lch_plugin.circuits import (
    METHODS,
    TASKS,
    Circuit,
    NodeScores,
    Prompts,
    learn_masks,
    node_attribution,
    solved,
    task,
    task_templates,
)
from lch_plugin.circuits.evaluation.ablation import Ablation
from lch_plugin.circuits.evaluation.faithfulness import SHARES, cmd, cpr

Score = Callable[[], NodeScores]
UNIVERSES = {"heads and neurons": ("head", "neuron"), "heads and MLPs": ("head", "mlp")}
TOP = 100
#: Shares of the nodes that a table shows.
SHOWN = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
RANDOM_SEEDS = 3
PLAIN = "plain forward passes"
#: Of the pairs, those that a model has to get right.
RIGHT = 0.7
#: Layers times steps from which integrated gradients of activations are not affordable.
MOST_PASSES = 100


@dataclass(frozen=True)
class Row:
    """One method on one task; what it costs is None where it is not measured."""

    task: str
    nodes: str
    method: str
    recovered: list[float]
    cpr: float
    cmd: float
    spearman: float | None = None
    spearman_top: float | None = None
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
    found: dict[str, Score] = {
        f"targeted centroids, {name}": partial(
            node_attribution, model, train, kinds=kinds, method=name
        )
        for name in METHODS
    }
    found["masks from integrated"] = partial(masks, model, train, kinds)
    for name in ("attribution_patching", "gradient_x_activation"):
        found[name.replace("_", " ")] = partial(getattr(baselines, name), model, train, points)
    found["integrated gradients (EAP-IG), 5 steps"] = partial(
        baselines.integrated_gradients, model, train, points, steps=5
    )
    if model.cfg.n_layers * 2 * 5 <= MOST_PASSES:
        found["integrated gradients of activations, 5 steps"] = partial(
            baselines.integrated_gradients_of_activations, model, train, points, steps=5
        )
    return found


def masks(model: TransformerBridge, train: list[Prompts], kinds: tuple[Any, ...]) -> NodeScores:
    """Learned from the default scores, which are part of what they cost."""
    scores = node_attribution(model, train, kinds)
    return learn_masks(model, train, scores, generator=torch.Generator().manual_seed(0))


def agreement(scores: NodeScores, exact: NodeScores) -> dict[str, float]:
    """Spearman over all nodes and over those that matter most."""
    chosen = exact.values.abs().argsort(descending=True)[:TOP]
    return {
        "spearman": float(spearmanr(scores.values, exact.values).statistic),
        "spearman_top": float(spearmanr(scores.values[chosen], exact.values[chosen]).statistic),
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

    def __call__(self, scores: NodeScores) -> dict[str, Any]:
        """CPR, CMD and the share of the metric that circuits recover, by size."""
        by_score, by_magnitude = (self._recovered(scores, by) for by in ("score", "magnitude"))
        return {
            "cpr": float(cpr(SHARES, by_score)),
            "cmd": float(cmd(SHARES, by_magnitude)),
            "recovered": by_score.tolist(),
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
    train, test = (solved(model, task(model, name, pairs, split=s)) for s in ("train", "test"))
    kinds = UNIVERSES[nodes]
    points = node_points(model, kinds)
    judge = Judge(model, test, points)
    found = methods(model, train, kinds)
    few, exact = [], None
    if patched:
        few = solved(model, task(model, name, patched, split="train"))
        if "mlp" in kinds:
            baselines.check_attribution_patching(model, few, points)
        exact = baselines.exact_patching(model, few, points)
    on_few = methods(model, few, kinds)
    # Memory grows with the batch, not with the number of batches.
    on_one_batch = methods(model, train[:1], kinds)
    plain = {PLAIN: partial(plain_passes, model, train)}
    seconds = in_turn({**found, **plain}, rounds) if rounds else {}

    def row(method: str, scores: NodeScores, compared: NodeScores | None, **cost: float) -> Row:
        agreed = agreement(compared, exact) if compared and exact else {}
        return Row(name, nodes, method, **judge(scores), **agreed, **cost)

    rows = [
        row(
            method,
            score(),
            on_few[method]() if patched else None,
            seconds=statistics.median(seconds[method]),
            passes=ratio(seconds, method, PLAIN),
            mebibytes=peak_mebibytes(on_one_batch[method]),
        )
        if rounds
        else row(method, score(), on_few[method]() if patched else None)
        for method, score in found.items()
    ]
    if exact:
        rows.append(row(f"exact patching, {patched} pairs", exact, exact))
    orders = (baselines.random_scores(points, seed) for seed in range(RANDOM_SEEDS))
    return [*rows, mean_row([row("random", order, order) for order in orders])]


def plain_passes(model: TransformerBridge, batches: list[Prompts]) -> None:
    """What time is measured in: a forward pass of every prompt."""
    with torch.no_grad():
        for batch in batches:
            batch.run(model, {})


def mean_row(rows: list[Row]) -> Row:
    """Figures averaged over rows that differ in nothing else."""

    def mean(values: list[Any]) -> Any:
        if isinstance(values[0], list):
            return [statistics.fmean(column) for column in zip(*values, strict=True)]
        return statistics.fmean(values) if isinstance(values[0], float) else values[0]

    columns = [asdict(row) for row in rows]
    return Row(**{key: mean([column[key] for column in columns]) for key in columns[0]})


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
    places = {f"{share:.1%}".replace(".0", ""): SHARES.index(share) for share in SHOWN}
    columns: dict[str, Callable[[Row], float | None]] = {
        **{
            f"f at {name}": partial(lambda at, row: row.recovered[at], i)
            for name, i in places.items()
        },
        "CPR": lambda row: row.cpr,
        "CMD": lambda row: row.cmd,
        "Spearman": lambda row: row.spearman,
        f"top {TOP}": lambda row: row.spearman_top,
        "seconds": lambda row: row.seconds,
        "passes": lambda row: row.passes,
        "MiB": lambda row: row.mebibytes,
    }
    shown = {
        name: get for name, get in columns.items() if any(get(row) is not None for row in rows)
    }
    digits = {"CPR": 3, "CMD": 3, "MiB": 0, "passes": 1, "seconds": 1}

    def cell(name: str, value: float | None) -> str:
        return "" if value is None else f"{value:.{digits.get(name, 2)}f}"

    lines = [
        f"| {row.method} | "
        + " | ".join(cell(name, get(row)) for name, get in shown.items())
        + " |"
        for row in rows
    ]
    head = "| method | " + " | ".join(shown) + " |"
    return [head, "| --- |" + " ---: |" * len(shown), *lines]


def able(model: TransformerBridge, pairs: int) -> list[str]:
    """Tasks that the model's tokenizer can express, and that it does."""
    found = []
    for name in TASKS:
        try:
            templates = task_templates(model, name, pairs)
        except lch.InputError:
            continue
        if sum(one.n * one.accuracy for one in templates) >= RIGHT * pairs:
            found.append(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="directory, hub name or .gguf; the embedded model if none")
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--nodes", nargs="+", choices=list(UNIVERSES), default=list(UNIVERSES))
    parser.add_argument("--pairs", type=int, default=60, help="of each split")
    parser.add_argument("--patched", type=int, default=0, help="of these, for exact patching")
    parser.add_argument("--rounds", type=int, default=1, help="to measure time in; 0 for none")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=200)
    model = lch.load(options.model).bridge() if options.model else lch.load_demo_model()
    name = options.model or "the embedded model"
    console.print(
        f"{machine()}; {name}, {options.pairs} pairs of each split, less those it fails\n"
    )
    rows: list[Row] = []
    wanted = options.tasks or able(model, options.pairs)
    for nodes, chosen in itertools.product(options.nodes, wanted):
        console.print(f"{chosen}, {nodes}", style="dim")
        rows += compare(
            model,
            chosen,
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

"""What the two experiments on delayed generalisation share: methods, the loop, table and figure."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from common import parse, parser, save
from torch import Tensor, nn

import lch_plugin as lch
from lch_plugin.figures import ACTIVATIONS, CENTROIDS, GREY, new_figure

TARGET = 0.85
Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """A way to train: AdamW's weight decay, and the weights of the two penalties."""

    name: str
    colour: str
    weight_decay: float = 0.0
    jacobian: float = 0.0
    alignment: float = 0.0

    def penalty(self, run: lch.alignment.Run, generator: torch.Generator) -> Tensor:
        total = torch.zeros(())
        if self.jacobian:
            # The published penalty: the root of each item's estimate from one projection.
            norms = lch.alignment.squared_jacobian_norm(run, generator=generator)
            total = total + self.jacobian * norms.clamp_min(1e-8).sqrt().mean()
        if self.alignment:
            total = total + lch.alignment.alignment_loss(run, weight=self.alignment)
        return total


def methods(weight_decay: float, jacobian: float, alignment: float) -> list[Method]:
    """Each method alone."""
    return [
        Method("none", GREY),
        Method("weight decay", ACTIVATIONS, weight_decay=weight_decay),
        Method("Jacobian", CENTROIDS, jacobian=jacobian),
        Method("alignment", "#15803d", alignment=alignment),
    ]


class Largest:
    """The largest output of each item, as a cotangent."""

    name = "largest"

    def at(self, y: Tensor) -> Tensor:
        return nn.functional.one_hot(y.argmax(-1), y.shape[-1]).to(y)


@dataclass(frozen=True)
class Task:
    """A model to train, and what to measure on the way."""

    model: nn.Module
    batches: Iterator[tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    accuracies: Callable[[], dict[str, float]]
    probe: Tensor
    site: str = ""
    output: Callable[[Any], Tensor] = lambda logits: logits
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)


def train(task: Task, method: Method, seed: int, steps: int, every: int) -> Records:
    """Measures and accuracies every so many steps, until the test accuracy is reached."""
    optimizer = torch.optim.AdamW(
        task.model.parameters(), lr=task.lr, betas=task.betas, weight_decay=method.weight_decay
    )
    generator = torch.Generator().manual_seed(seed)
    at = (task.model, task.probe, task.site)
    ones = lch.alignment.Monitor(*at, output=task.output)
    largest = lch.alignment.Monitor(*at, output=task.output, cotangent=Largest(), rank=False)
    records: Records = []
    for step in range(steps + 1):
        if step % every == 0:
            of_largest = {"alignment of largest": largest.update(step)["alignment"]}
            records.append({**ones.update(step), **of_largest, **task.accuracies()})
            if records[-1]["test"] >= TARGET:
                break
        inputs, target = next(task.batches)
        run = lch.alignment.run(task.model, inputs, task.site, output=task.output)
        loss = task.loss(task.output(run.output), target) + method.penalty(run, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return records


def experiment(
    make: Callable[[int], Task], methods: list[Method], seeds: range, steps: int, every: int
) -> dict[str, list[Records]]:
    found: dict[str, list[Records]] = {method.name: [] for method in methods}
    for seed in seeds:
        for method in methods:
            start = time.perf_counter()
            records = train(make(seed), method, seed, steps, every)
            found[method.name].append(records)
            last = {name: value for name, value in records[-1].items() if value is not None}
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in last.items())
            print(f"seed {seed}, {method.name}: {numbers}, {time.perf_counter() - start:.0f} s")
    return found


def first_step(records: Records, name: str, value: float) -> int | None:
    return next((r["step"] for r in records if r[name] >= value), None)


def half_way(records: Records, name: str) -> int | None:
    """Once the training data are learnt, the first step half-way from there to the largest value.

    None where nothing rises any more.
    """
    learnt = first_step(records, "train", 0.99)
    late = [record for record in records if learnt is not None and record["step"] >= learnt]
    values = [record[name] for record in late]
    if not values or max(values) <= values[0]:
        return None
    return first_step(late, name, (values[0] + max(values)) / 2)


def summary(runs: list[Records]) -> dict[str, Any]:
    """Of each seed: steps to the target, and when alignments and accuracy had risen."""
    reached = [first_step(records, "test", TARGET) for records in runs]
    of = ("alignment", "alignment of largest", "test")
    halves = [{name: half_way(records, name) for name in of} for records in runs]
    found = [step for step in reached if step is not None]
    return {
        "steps_to_target": reached,
        "median_steps": statistics.median(found) if len(found) == len(runs) else None,
        "largest_test_accuracy": [max(r["test"] for r in records) for records in runs],
        "alignment": [(records[0]["alignment"], records[-1]["alignment"]) for records in runs],
        "half_way": halves,
    }


def report(
    args: argparse.Namespace,
    found: dict[str, list[Records]],
    methods: list[Method],
    **settings: Any,
) -> None:
    summaries = {name: summary(runs) for name, runs in found.items()}
    for name, numbers in summaries.items():
        print(name, json.dumps(numbers))
    names = ("test", "train", "alignment", "alignment of largest", "effective_rank")
    figure, axes = new_figure(18.0, 3.4, columns=5)
    for axis, name in zip(axes, names, strict=True):
        for method in methods:
            for i, records in enumerate(found[method.name]):
                steps, values = [r["step"] + 1 for r in records], [r[name] for r in records]
                label = None if i else method.name
                axis.plot(steps, values, color=method.colour, alpha=0.6, lw=1.2, label=label)
        axis.set(title=name.replace("_", " "), xlabel="step + 1", xscale="log")
    axes[0].axhline(TARGET, color=GREY, ls="--", lw=1)
    axes[0].legend(fontsize=8)
    about = [asdict(method) for method in methods]
    save(args, {"summary": summaries, "curves": found}, figure, methods=about, **settings)


def arguments(doc: str | None, steps: int) -> argparse.Namespace:
    options = parser(doc, None)
    options.add_argument("--seeds", type=int, help="how many; 5, or 1 with --small")
    options.add_argument("--steps", type=int, default=steps)
    args = parse(options)
    args.seeds = args.seeds or (1 if args.small else 5)
    return args

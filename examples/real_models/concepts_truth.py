"""Truth as a direction of what an MLP reads and of its centroids: found, added, erased.

Takes a CSV file with columns ``statement`` and ``label`` (1 true, 0 false), as those of Marks and
Tegmark, "The Geometry of Truth" (arXiv 2310.06824), and a directory or name of a HuggingFace model:

    python examples/real_models/concepts_truth.py cities.csv SmolLM2-135M-Instruct --layers 14 20

Half of the statements find directions and erasures, the other half judge them. Prints

- the accuracy of three directions on held-out statements, at the MLP's input and at its centroid;
- that of a probe fitted anew to held-out statements, before and after erasures;
- what adding the direction to what the MLP reads does to the coordinate of truth where the next MLP
  reads, in units of the distance between true and false there, beside random directions.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lch_plugin as lch
from lch_plugin import concepts
from lch_plugin.steering import edited_input, steering

ESTIMATORS = {
    "difference of means": concepts.difference_of_means,
    "cav": concepts.cav,
    "boundary": lambda x, y: concepts.boundary(x, y, n_pairs=len(x)).concept,
}


def read_statements(path: Path, n: int, seed: int) -> tuple[list[str], Tensor]:
    """As many statements, drawn at random, and which of them are true."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows = random.Random(seed).sample(rows, min(n, len(rows)))
    return [row["statement"] for row in rows], torch.tensor([int(row["label"]) for row in rows])


class Statements:
    """Statements in batches of the same number of tokens, so that there is no padding."""

    def __init__(self, tokenizer: Any, texts: list[str], size: int = 32) -> None:
        by_length = defaultdict(list)
        for i, text in enumerate(texts):
            ids = tokenizer(text)["input_ids"]
            by_length[len(ids)].append((i, ids))
        self.batches = [
            group[start : start + size]
            for group in by_length.values()
            for start in range(0, len(group), size)
        ]

    def read(self, model: Any, names: list[str], handle: Any = None) -> tuple[dict, dict]:
        """What components read at the last token, and their centroids there if attached."""
        inputs, mus = ({name: {} for name in names} for _ in range(2))
        seen: dict[str, Tensor] = {}

        def keep(name: str, x: Tensor) -> Tensor:
            seen[name] = x
            return x

        for batch in self.batches:
            with ExitStack() as stack, torch.no_grad():
                for name in names:
                    stack.enter_context(edited_input(model, name, partial(keep, name)))
                model(torch.tensor([ids for _, ids in batch]))
            for row, (i, _) in enumerate(batch):
                for name in names:
                    inputs[name][i] = seen[name][row, -1]
                    if handle is not None:
                        mus[name][i] = handle.cache[name][row, -1]
        return tuple(
            {k: torch.stack([v[i] for i in sorted(v)]) for k, v in found.items() if v}
            for found in (inputs, mus)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("model")
    parser.add_argument("--layers", type=int, nargs="+", default=[14, 20])
    parser.add_argument("--mlps", default="model.layers.{}.mlp", help="names of MLPs")
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--n-random", type=int, default=10)
    parser.add_argument("--n-steered", type=int, default=50, help="held-out statements")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    loaded = lch.load(args.model, dtype="float32")
    texts, labels = read_statements(args.csv, args.n, args.seed)
    statements = Statements(loaded.processor, texts)
    names = [args.mlps.format(i) for layer in args.layers for i in (layer, layer + 1)]
    names = list(dict.fromkeys(names))
    with lch.huggingface.attach(loaded.model, names) as handle:
        inputs, mus = statements.read(loaded.model, names, handle)
    values = {"input": inputs, "centroid": mus}
    half = len(texts) // 2
    find, judge = slice(half), slice(half, None)
    shown = slice(half, half + args.n_steered)
    held_out = Statements(loaded.processor, texts[shown])
    noise = torch.randn(
        args.n_random,
        values["input"][names[0]].shape[1],
        generator=torch.Generator().manual_seed(args.seed),
    )
    results = []
    for layer in args.layers:
        name, later = (args.mlps.format(i) for i in (layer, layer + 1))
        result: dict[str, Any] = {"layer": layer, "accuracy": {}, "erasure": {}}
        for place, found in values.items():
            x = found[name]
            directions = {k: fn(x[find], labels[find]) for k, fn in ESTIMATORS.items()}
            result["accuracy"][place] = {
                k: c.accuracy(x[judge], labels[judge]) for k, c in directions.items()
            }
            for method in (concepts.leace, concepts.inlp):
                refit = concepts.refit(method(x[find], labels[find]), x[judge], labels[judge])
                result["erasure"][f"{place}, {method.__name__}"] = vars(refit)
        truth = concepts.difference_of_means(values["input"][name][find], labels[find])
        there = concepts.difference_of_means(values["input"][later][find], labels[find])
        before = there.scores(values["input"][later][shown])
        shifts = []
        for direction in (truth.direction, *torch.nn.functional.normalize(noise, dim=1)):
            with steering(loaded.model, name, truth.scale * direction):
                moved = held_out.read(loaded.model, [later])[0][later]
            shifts.append(float((there.scores(moved) - before).mean() / there.scale))
        others = torch.tensor(shifts[1:])
        result["steering"] = {
            "shift": shifts[0],
            "random_mean": float(others.mean()),
            "random_std": float(others.std()),
            "random_largest": float(others.abs().max()),
            "norm_over_input": truth.scale / float(values["input"][name].norm(dim=1).mean()),
        }
        results.append(result)
        print(json.dumps(result, indent=1), flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        settings = {k: str(v) for k, v in vars(args).items()}
        record = {"settings": settings, "lch_plugin": lch.__version__, "layers": results}
        (args.out / "results.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

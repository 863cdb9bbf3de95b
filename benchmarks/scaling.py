"""How the cost of centroids and of attribution grows with a model and its input.

    make bench

One number at a time is doubled from a small model of Llama's kind with random weights. Measured are

- centroids: those of every MLP, as time above a plain pass, and as memory above it;
- scores: every head and neuron of a batch of prompt pairs, blended, pass included.

The slope is that of the least-squares line through the logarithms: 1 where twice as much takes
twice the time. Tasks take turns; seconds are medians.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, replace

import numpy as np
import torch
from centroids import excess, listening, peak_bytes
from common import Shape, Task, in_turn, machine, table
from rich.console import Console

from lch_plugin.circuits import Prompts, logit_difference, node_attribution


@dataclass(frozen=True)
class Size:
    """A model of Llama's kind, and its input."""

    layers: int = 4
    d_model: int = 256
    d_mlp: int = 512
    vocabulary: int = 2000
    context: int = 64
    prompts: int = 4

    def shape(self) -> Shape:
        config = {
            "vocab_size": self.vocabulary,
            "num_hidden_layers": self.layers,
            "hidden_size": self.d_model,
            "intermediate_size": self.d_mlp,
            "num_attention_heads": self.d_model // 64,
            "num_key_value_heads": self.d_model // 64,
        }
        return Shape("llama", config, self.prompts, self.context)


#: What grows, by what it means for the number of nodes: layers and d_mlp are neurons as well.
GROWS = {
    "layers": (4, 8, 16, 32),
    "d_model": (128, 256, 512, 1024),
    "d_mlp": (512, 1024, 2048, 4096),
    "vocabulary": (2000, 4000, 8000, 16000),
    "context": (64, 128, 256, 512),
    "prompts": (4, 8, 16, 32),
}


def measure(size: Size, rounds: int) -> tuple[float, float, float]:
    """Seconds of centroids above a pass, their peak bytes above it, and seconds of scores."""
    shape = size.shape()
    bare, listened = shape.build(), listening(shape)
    x = shape.input()
    metric = logit_difference([[1]] * len(x), [[2]] * len(x))
    prompts = Prompts(x, metric, corrupt=x.roll(1, dims=1))
    tasks: dict[str, Task] = {
        "forward": lambda: bare(x, return_type=None),
        "centroids": lambda: listened(x, return_type=None),
    }
    with torch.no_grad():
        seconds = in_turn(tasks, rounds)
        above = peak_bytes(tasks["centroids"]) - peak_bytes(tasks["forward"])
    scored = in_turn({"scores": lambda: node_attribution(bare, prompts, method="blended")}, rounds)
    return (
        statistics.median(excess(seconds, "centroids")),
        above,
        statistics.median(scored["scores"]),
    )


def slope(xs: list[int], ys: list[float]) -> float:
    """Of the line through the logarithms; NaN if a number is not above zero."""
    if min(ys) <= 0:
        return float("nan")
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=list(GROWS))
    options = parser.parse_args()
    console = Console(width=140)
    console.print(f"{machine('transformers')}; the others are those of {Size()}")
    rows = []
    for name, sizes in GROWS.items():
        if options.only not in (None, name):
            continue
        found = [measure(replace(Size(), **{name: size}), options.rounds) for size in sizes]
        for what, values, unit in zip(
            ("centroids above a pass, ms", "memory above it, MB", "scores of all nodes, ms"),
            zip(*found, strict=True),
            (1e3, 1e-6, 1e3),
            strict=True,
        ):
            numbers = [f"{unit * value:.1f}" for value in values]
            whole = slope(list(sizes), list(values))
            last = slope(list(sizes[-2:]), list(values[-2:]))
            rows.append([f"{name} {sizes[0]} … {sizes[-1]}", what, *numbers])
            rows[-1] += [f"{whole:.2f}", f"{last:.2f}"]
    columns = ["from, to", "what", "1 x", "2 x", "4 x", "8 x", "slope", "slope of the last two"]
    console.print(table("What grows how", columns, rows))


if __name__ == "__main__":
    main()

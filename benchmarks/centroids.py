"""What centroids cost beside a forward pass: time, memory, and how near to the limit.

    make bench

Tasks take turns, round after round in one process, so that what slows the machine slows all of
them; a ratio is the median of the rounds' ratios. Weights are random, since time does not depend on
them, or those of ``--model DIR``.

Every MLP of a model:

- idle: attached, with nobody listening
- limit: the pass, plus the extra matrix products alone (one a layer, two if gated)
- centroids: the pass with a listener at every layer that keeps nothing
- recipe: capture each MLP's input, run the MLP again on it, autograd with ones

Memory is what the pass allocates at its peak above a plain pass, in buffers of (tokens, d_mlp).

The same through the other adapters, on the plain HuggingFace model: attached to it, and inside an
nnsight trace, beside a trace that asks for the output alone.

A span of all blocks, as time above the plain pass, beside one backward pass over the same blocks;
and local centroids of one MLP, a point at a time, beside the matrix products they consist of.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import SHAPES, Saved, Shape, Task, in_turn, machine, ratio, table
from nnsight import NNsight
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformer_lens.model_bridge import TransformerBridge

import lch_plugin as lch


def listening(shape: Shape | Saved, site: str | lch.Site = "mlp") -> TransformerBridge:
    """A model with listeners that keep nothing, so that the centroids alone are timed.

    They are added once: adding hooks by name takes TransformerLens longer than a small model runs.
    """
    model = shape.build()
    for name in lch.attach(model, site=site).hook_names:
        model.add_hook(name, lambda value, hook: None)
    return model


def recipe(model: TransformerBridge, x: Tensor) -> None:
    """Centroids of every MLP, as one would write them down."""
    inputs: dict[int, Tensor] = {}
    hooks = [
        block.mlp.register_forward_pre_hook(
            lambda module, args, layer=layer: inputs.update({layer: args[0]})
        )
        for layer, block in enumerate(model.blocks)
    ]
    model(x, return_type=None)
    for hook in hooks:
        hook.remove()
    with torch.enable_grad():
        for layer, block in enumerate(model.blocks):
            mlp_input = inputs.pop(layer).detach().requires_grad_()
            y = block.mlp(mlp_input)
            torch.autograd.grad(y, mlp_input, torch.ones_like(y))


def excess(seconds: dict[str, list[float]], task: str) -> list[float]:
    """Seconds above the plain pass, round by round."""
    return [t - f for t, f in zip(seconds[task], seconds["forward"], strict=True)]


def peak_bytes(task: Task) -> int:
    """Most memory that a task holds at once, beyond what was there before it."""
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
        tempfile.TemporaryDirectory() as directory,
    ):
        task()
        profiled.stop()
        path = Path(directory) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def every_mlp(label: str, shape: Shape | Saved, rounds: int) -> list[str]:
    bare, attached, listened = shape.build(), shape.build(), listening(shape)
    lch.attach(attached)
    x = shape.input()
    rows = shape.batch * shape.pos
    weights = [
        W
        for block in bare.blocks
        for W in [block.mlp.W_in] + ([block.mlp.W_gate] if "gate" in block.mlp.submodules else [])
    ]
    d_mlp = weights[0].shape[1]
    buffer = torch.randn(rows, d_mlp)

    def limit() -> None:
        bare(x, return_type=None)
        for W in weights:
            buffer @ W.T

    tasks: dict[str, Task] = {
        "forward": lambda: bare(x, return_type=None),
        "idle": lambda: attached(x, return_type=None),
        "limit": limit,
        "centroids": lambda: listened(x, return_type=None),
        "recipe": lambda: recipe(bare, x),
    }
    seconds = in_turn(tasks, rounds)
    above = peak_bytes(tasks["centroids"]) - peak_bytes(tasks["forward"])
    return [
        label,
        f"{statistics.median(seconds['forward']):.3f}",
        *(f"{ratio(seconds, name, 'forward'):.3f}" for name in list(tasks)[1:]),
        f"{ratio(seconds, 'centroids', 'limit'):.3f}",
        f"{ratio(seconds, 'recipe', 'centroids'):.2f}",
        f"{above / (rows * d_mlp * 4):.2f}",
    ]


def other_adapters(label: str, shape: Shape | Saved, rounds: int) -> list[str]:
    bare, attached = shape.huggingface(), shape.huggingface()
    names = lch.huggingface.mlp_names(bare)
    lch.huggingface.attach(attached, names)
    traced = NNsight(shape.huggingface())
    envoys = [traced.get(name) for name in names]
    x = shape.input()
    weights = [
        W
        for module in map(bare.get_submodule, names)
        for W in (p for p in module.parameters() if p.ndim == 2)
    ]
    # Of each MLP all matrices but the last, which writes.
    d_model = bare.config.hidden_size
    reading = [W for i, W in enumerate(weights) if (i + 1) % (len(weights) // len(names))]
    oriented = [W if W.shape[0] == d_model else W.T for W in reading]
    buffer = torch.randn(shape.batch * shape.pos, oriented[0].shape[1])

    def limit() -> None:
        bare(x)
        for W in oriented:
            buffer @ W.T

    def trace() -> None:
        with traced.trace(x):
            traced.output.save()

    def centroids_in_trace() -> None:
        with traced.trace(x):
            for envoy in envoys:
                lch.nnsight.centroid(envoy)

    tasks: dict[str, Task] = {
        "forward": lambda: bare(x),
        "limit": limit,
        "attached": lambda: attached(x),
        "trace": trace,
        "centroids in it": centroids_in_trace,
    }
    seconds = in_turn(tasks, rounds)
    return [
        label,
        f"{statistics.median(seconds['forward']):.3f}",
        *(f"{ratio(seconds, name, 'forward'):.3f}" for name in list(tasks)[1:]),
        f"{ratio(seconds, 'attached', 'limit'):.3f}",
        f"{ratio(seconds, 'centroids in it', 'limit'):.3f}",
    ]


def span(label: str, shape: Shape | Saved, rounds: int) -> list[str]:
    bare, differentiated = shape.build(), shape.build()
    last = len(bare.blocks) - 1
    listened = listening(shape, lch.Site("span", (0, last)))
    x, ends, backward_seconds = shape.input(), dict[str, Tensor](), list[float]()

    def keep(value: Tensor, hook: Any) -> None:
        ends[hook.name] = value

    points = ["blocks.0.hook_in", f"blocks.{last}.hook_out"]
    for point in points:
        differentiated.add_hook(point, keep)

    def backward() -> None:
        with torch.enable_grad():
            differentiated(x, return_type=None)
            start = time.perf_counter()
            y = ends[points[1]]
            torch.autograd.grad(y, ends[points[0]], torch.ones_like(y))
            backward_seconds.append(time.perf_counter() - start)
        ends.clear()

    tasks: dict[str, Task] = {
        "forward": lambda: bare(x, return_type=None),
        "span": lambda: listened(x, return_type=None),
        "backward": backward,
    }
    seconds = in_turn(tasks, rounds)
    above = excess(seconds, "span")
    alone = backward_seconds[1:]
    return [
        label,
        *(f"{statistics.median(t):.3f}" for t in (seconds["forward"], above, alone)),
        f"{statistics.median(a / b for a, b in zip(above, alone, strict=True)):.3f}",
        f"{ratio(seconds, 'span', 'backward'):.3f}",
    ]


def local(label: str, shape: Shape | Saved, rounds: int, n_samples: int = 16) -> list[str]:
    bare = shape.build()
    listened = listening(shape, lch.Site("mlp", 6, radius=0.25, n_samples=n_samples))
    x = shape.input()
    mlp, rows = bare.blocks[6].mlp, shape.batch * shape.pos
    into = [mlp.W_in] + ([mlp.W_gate] if "gate" in mlp.submodules else [])
    point, activations = torch.randn(rows, mlp.W_in.shape[0]), torch.randn(rows, mlp.W_in.shape[1])

    def limit() -> None:
        for _ in range(n_samples):
            for W in into:
                point @ W
                activations @ W.T

    tasks: dict[str, Task] = {
        "forward": lambda: bare(x, return_type=None),
        "local": lambda: listened(x, return_type=None),
        "limit": limit,
    }
    seconds = in_turn(tasks, rounds)
    above = excess(seconds, "local")
    return [
        label,
        f"{1e3 * statistics.median(above) / n_samples:.1f}",
        f"{1e3 * statistics.median(seconds['limit']) / n_samples:.1f}",
        f"{statistics.median(a / b for a, b in zip(above, seconds['limit'], strict=True)):.2f}",
    ]


def idle(rounds: int) -> list[list[str]]:
    """What hooks that find nobody listening cost: seen best where a pass is short."""
    x = torch.zeros(1, 4, dtype=torch.long)
    bare = lch.load_demo_model()
    sites = {
        "mlp": ["mlp"],
        "mlp, attn, block, model": ["mlp", "attn", "block", "model"],
    }
    rows = []
    for label, attached in sites.items():
        model = lch.load_demo_model()
        lch.attach(model, site=attached)  # type: ignore[arg-type]
        seconds = in_turn(
            {
                "forward": lambda: bare(x, return_type=None),
                "idle": partial(model, x, return_type=None),
            },
            rounds,
        )
        above = statistics.median(excess(seconds, "idle"))
        rows.append([label, f"{1e6 * above / len(bare.blocks):.0f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=["mlps", "adapters", "idle", "spans", "local"])
    parser.add_argument(
        "--model", action="append", help="real weights in place of these shapes; repeatable"
    )
    options = parser.parse_args()
    shapes = {Path(m).name: Saved(m) for m in options.model} if options.model else SHAPES
    console = Console(width=140)
    console.print(
        f"{machine('transformers')}; "
        + ", ".join(f"{label}: {s.batch} x {s.pos} tokens" for label, s in shapes.items())
    )

    def measured(measure: Callable[[str, Shape | Saved, int], list[str]]) -> list[list[str]]:
        with torch.no_grad():
            return [measure(label, shape, options.rounds) for label, shape in shapes.items()]

    if options.only in (None, "mlps"):
        columns = ["model", "forward, s", "idle", "limit", "centroids", "recipe"]
        columns += ["centroids / limit", "recipe / centroids", "memory, buffers"]
        console.print(table("Every MLP, as ratios to forward", columns, measured(every_mlp)))
    if options.only in (None, "adapters"):
        columns = ["model", "forward, s", "limit", "attached", "trace", "centroids in it"]
        columns += ["attached / limit", "in a trace / limit"]
        title = "Every MLP of the HuggingFace model, as ratios to forward"
        console.print(table(title, columns, measured(other_adapters)))
    if options.only in (None, "idle"):
        with torch.no_grad():
            rows = idle(20 * options.rounds)
        title = "Attached and nobody listening (demo model, 4 tokens)"
        console.print(table(title, ["sites", "microseconds a layer"], rows))
    if options.only in (None, "spans"):
        columns = ["model", "forward, s", "span above it, s", "backward, s", "above / backward"]
        columns += ["whole pass / pass with backward"]
        console.print(table("A span of all blocks", columns, measured(span)))
    if options.only in (None, "local"):
        columns = ["model", "ms a point", "its matmuls alone, ms", "ratio"]
        console.print(table("Local centroids of one MLP", columns, measured(local)))


if __name__ == "__main__":
    main()

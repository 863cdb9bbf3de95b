"""Centroids of every MLP on a GPU: time beside the limit, share of the matmul peak, memory.

    python benchmarks/gpu.py                       # where CUDA is
    python benchmarks/gpu.py --device cpu --tiny   # that it runs, anywhere

Random weights in the shapes of GPT-2 Large and of a Llama of 7 billion, in bfloat16 and float32,
with MLPs as they are and compiled by ``torch.compile``. Tasks take turns, and the device is waited
for after each.

- limit: the pass, plus the extra matrix products alone (one a layer, two if gated)
- centroids: the pass with a listener at every layer that keeps nothing
- share of peak: floating-point operations of the pass and of those products in the time of the
  centroids, beside what one large matrix product in that dtype reaches on this device
- memory: allocated at the peak above a plain pass, in buffers of (tokens, d_mlp)
"""

from __future__ import annotations

import argparse
import statistics

import torch
from common import Shape, Task, in_turn, machine, ratio, table
from rich.console import Console

import lch_plugin as lch

_LLAMA = {"vocab_size": 32000, "num_key_value_heads": 32, "num_attention_heads": 32}
SHAPES = {
    "GPT-2 Large": Shape(
        "gpt2", {"vocab_size": 50257, "n_layer": 36, "n_embd": 1280, "n_head": 20}, 8, 1024
    ),
    "Llama, 7 B": Shape(
        "llama",
        {**_LLAMA, "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008},
        2,
        1024,
    ),
}
TINY = {
    "tiny Llama": Shape(
        "llama",
        {**_LLAMA, "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256},
        1,
        16,
    )
}


def waiting(task: Task, device: str) -> Task:
    """The task until the device is done with it."""

    def whole() -> None:
        task()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    return whole


def peak_bytes(task: Task, device: str) -> int:
    """Allocated at the peak; 0 where the device does not count."""
    if not device.startswith("cuda"):
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    task()
    return torch.cuda.max_memory_allocated(device) - before


def matmul_rate(device: str, dtype: torch.dtype, n: int, rounds: int) -> float:
    """Floating-point operations a second of one large matrix product."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = in_turn({"product": waiting(lambda: a @ b, device)}, rounds)["product"]
    return 2 * n**3 / statistics.median(seconds)


def row(
    label: str, shape: Shape, device: str, dtype: torch.dtype, rounds: int, n: int
) -> list[list[str]]:
    model = shape.build(device, dtype)
    x = shape.input().to(device)
    tokens = x.numel()
    weights = [
        W
        for block in model.blocks
        for W in [block.mlp.W_in] + ([block.mlp.W_gate] if "gate" in block.mlp.submodules else [])
    ]
    d_mlp = weights[0].shape[1]
    buffer = torch.randn(tokens, d_mlp, device=device, dtype=dtype)

    def forward() -> None:
        model(x, return_type=None)

    def limit() -> None:
        forward()
        for W in weights:
            buffer @ W.T

    listened = shape.build(device, dtype)
    for name in lch.attach(listened).hook_names:
        listened.add_hook(name, lambda value, hook: None)
    peak = matmul_rate(device, dtype, n, rounds)
    found = []
    for kind in ("eager", "compiled"):
        if kind == "compiled":
            for block in (*model.blocks, *listened.blocks):
                block.original_component.mlp.compile()
        tasks = {
            name: waiting(task, device)
            for name, task in {
                "forward": forward,
                "limit": limit,
                "centroids": lambda: listened(x, return_type=None),
            }.items()
        }
        seconds = in_turn(tasks, rounds)
        above = peak_bytes(tasks["centroids"], device) - peak_bytes(tasks["forward"], device)
        operations = (
            2
            * tokens
            * (sum(p.numel() for p in model.blocks.parameters()) + sum(W.numel() for W in weights))
        )
        rate = operations / statistics.median(seconds["centroids"])
        found.append(
            [
                f"{label}, {kind}",
                str(dtype).removeprefix("torch."),
                f"{1e3 * statistics.median(seconds['forward']):.1f}",
                f"{ratio(seconds, 'limit', 'forward'):.3f}",
                f"{ratio(seconds, 'centroids', 'forward'):.3f}",
                f"{ratio(seconds, 'centroids', 'limit'):.3f}",
                f"{rate / peak:.2f}",
                f"{above / (tokens * d_mlp * dtype.itemsize):.2f}",
            ]
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="a model of two layers")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is here. Give --device cpu --tiny to see that it runs.")
    console = Console(width=150)
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device
    console.print(f"{name}; {machine('transformers')}")
    rows = []
    with torch.no_grad():
        for label, shape in (TINY if options.tiny else SHAPES).items():
            for dtype in (torch.bfloat16, torch.float32):
                n = 256 if options.tiny else 8192
                rows += row(label, shape, options.device, dtype, options.rounds, n)
    columns = ["model", "dtype", "forward, ms", "limit", "centroids", "centroids / limit"]
    columns += ["share of matmul peak", "memory, buffers"]
    console.print(table("Every MLP, as ratios to forward", columns, rows))


if __name__ == "__main__":
    main()

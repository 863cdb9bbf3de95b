"""What centroids of every MLP cost beside a plain forward pass.

    make bench

Timed in turn, round after round in one process, so that what slows the machine slows all of them:

- forward: a plain pass, nothing attached
- idle: attached, with nobody listening
- limit: the pass, plus the extra matrix products alone (one a layer, two if gated)
- centroids: the pass with a listener at every layer
- recipe: capture each MLP's input, run the MLP again on it, autograd with ones

Medians of the rounds, as ratios to the median of forward. Random weights: time does not depend on
them.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lch_plugin as lch
from lch_plugin.demo import DEMO_MODEL_DIR

SHAPES = {
    "gpt2-small": ("gpt2", {"vocab_size": 5000}),
    "gated, 12 x 768": (
        "llama",
        {
            "vocab_size": 5000,
            "num_hidden_layers": 12,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_attention_heads": 12,
        },
    ),
}


def build(family: str, settings: dict[str, int]) -> TransformerBridge:
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.config.architectures = [type(model).__name__]
    return TransformerBridge.boot_transformers(
        "benchmark",
        hf_model=model,
        tokenizer=AutoTokenizer.from_pretrained(DEMO_MODEL_DIR),
        device="cpu",
    )


def listening(model: TransformerBridge, tokens: Tensor, names: list[str]) -> None:
    """A listener that keeps nothing, so that the centroids alone are timed."""
    model.run_with_hooks(
        tokens, fwd_hooks=[(name, lambda value, hook: None) for name in names], return_type=None
    )


def limit(model: TransformerBridge, tokens: Tensor) -> None:
    model(tokens, return_type=None)
    for block in model.blocks:
        weights = [block.mlp.W_in] + ([block.mlp.W_gate] if "gate" in block.mlp.submodules else [])
        for W in weights:
            torch.empty(*tokens.shape, W.shape[1]) @ W.T


def recipe(model: TransformerBridge, tokens: Tensor) -> None:
    inputs: dict[int, Tensor] = {}
    hooks = [
        block.mlp.register_forward_pre_hook(
            lambda module, args, layer=layer: inputs.update({layer: args[0]})
        )
        for layer, block in enumerate(model.blocks)
    ]
    model(tokens, return_type=None)
    for hook in hooks:
        hook.remove()
    with torch.enable_grad():
        for layer, block in enumerate(model.blocks):
            x = inputs.pop(layer).detach().requires_grad_()
            y = block.mlp(x)
            torch.autograd.grad(y, x, torch.ones_like(y))


def measure(
    family: str, settings: dict[str, int], shape: tuple[int, int], rounds: int
) -> dict[str, float]:
    """Median seconds of each task."""
    bare, attached = build(family, settings), build(family, settings)
    names = lch.attach(attached).hook_names
    tokens = torch.randint(0, settings["vocab_size"], shape)
    tasks: dict[str, Callable[[], object]] = {
        "forward": lambda: bare(tokens, return_type=None),
        "idle": lambda: attached(tokens, return_type=None),
        "limit": lambda: limit(bare, tokens),
        "centroids": lambda: listening(attached, tokens, names),
        "recipe": lambda: recipe(bare, tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for i in range(rounds + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if i > 0:  # The first round warms up.
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pos", type=int, default=128)
    options = parser.parse_args()
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformer-lens", "transformers"))
    table = Table(
        title=f"{options.batch} x {options.pos} tokens, float32, {torch.get_num_threads()} threads "
        f"of {cpu_name()}, {packages}; ratios to forward"
    )
    for column in ("model", "forward, s", "idle", "limit", "centroids", "recipe"):
        table.add_column(column, justify="right")
    table.add_column("centroids / limit", justify="right")
    table.add_column("recipe / centroids", justify="right")
    with torch.no_grad():
        for label, (family, settings) in SHAPES.items():
            t = measure(family, settings, (options.batch, options.pos), options.rounds)
            table.add_row(
                label,
                f"{t['forward']:.3f}",
                *(f"{t[n] / t['forward']:.3f}" for n in ("idle", "limit", "centroids", "recipe")),
                f"{t['centroids'] / t['limit']:.3f}",
                f"{t['recipe'] / t['centroids']:.2f}",
            )
    Console(width=140).print(table)


def cpu_name() -> str:
    """As Linux gives it, or the architecture elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


if __name__ == "__main__":
    main()

"""What the benchmarks share: shapes, taking turns, tables."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.table import Table
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)

import lch_plugin as lch
from lch_plugin.demo import DEMO_MODEL_DIR

Task = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """An architecture to measure, and the input that it is measured on."""

    model_type: str
    config: dict[str, Any]
    batch: int
    pos: int

    def input(self) -> Tensor:
        if self.model_type == "vit":
            return torch.randn(self.batch, 3, 224, 224)
        return torch.randint(0, self.config["vocab_size"], (self.batch, self.pos))

    def huggingface(
        self, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> PreTrainedModel:
        config = AutoConfig.for_model(self.model_type, **self.config)
        auto = AutoModelForImageClassification if self.model_type == "vit" else AutoModelForCausalLM
        with torch.device(device):  # One of 7 B is not made twice.
            model = auto.from_config(config, dtype=dtype, attn_implementation="eager").eval()
        model.config.architectures = [type(model).__name__]
        return model

    def build(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> TransformerBridge:
        # For a model of images TransformerLens asks the hub for a processor, which noise can do
        # without.
        with mock.patch.object(AutoProcessor, "from_pretrained", return_value=None):
            return TransformerBridge.boot_transformers(
                "benchmark",
                hf_model=self.huggingface(device, dtype),
                tokenizer=AutoTokenizer.from_pretrained(DEMO_MODEL_DIR),
                device=device,
                dtype=dtype,
            )


@dataclass(frozen=True)
class Saved:
    """A model with its weights, from a directory or wherever else `lch.load` finds it."""

    source: str
    batch: int = 4
    pos: int = 128

    def input(self) -> Tensor:
        config = AutoConfig.from_pretrained(self.source).get_text_config()
        return torch.randint(0, config.vocab_size, (self.batch, self.pos))

    def huggingface(self) -> PreTrainedModel:
        model = lch.load(self.source, dtype="float32").model
        model.set_attn_implementation("eager")
        return model

    def build(self) -> TransformerBridge:
        return lch.load(self.source, dtype="float32").bridge()


SHAPES: dict[str, Shape | Saved] = {
    "GPT-2 small": Shape("gpt2", {"vocab_size": 5000}, 4, 128),
    "gated, 12 x 768": Shape(
        "llama",
        {
            "vocab_size": 5000,
            "num_hidden_layers": 12,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_attention_heads": 12,
        },
        4,
        128,
    ),
    "ViT-base": Shape("vit", {}, 2, 197),
}


def in_turn(tasks: dict[str, Task], rounds: int) -> dict[str, list[float]]:
    """Seconds of each task in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for i in range(rounds + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if i > 0:  # The first round warms up.
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], task: str, base: str) -> float:
    return statistics.median(t / b for t, b in zip(seconds[task], seconds[base], strict=True))


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    found = Table(title=title, title_justify="left")
    for column in columns:
        found.add_column(column, justify="right")
    for row in rows:
        found.add_row(*row)
    return found


def machine(*packages: str) -> str:
    """Threads, processor and versions."""
    versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformer-lens", *packages))
    return f"{torch.get_num_threads()} threads of {cpu_name()}, {versions}, float32"


def cpu_name() -> str:
    """As Linux gives it, or the architecture elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()

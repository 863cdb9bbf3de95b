"""What SAEs on centroids cost beside SAELens on activations: training live, caching, from a cache.

    make bench

A GPT-2 small with random weights, layer 6; time does not depend on the weights. ``--model DIR``
takes another one, and its middle layer. Tasks take turns, round after round in one process; a ratio
is the median of the rounds' ratios.

- live: `lch.saes.train` on the MLP's centroids, beside SAELens' own runner, with the same
  configuration, on what the MLP reads. TopK, from text tokens to a trained SAE.
- cache: `lch.saes.cache` of centroids and inputs of three layers, beside the forward passes that
  compute them and a raw write of the same bytes, each flushed to the disk.
- from a cache: `lch.saes.train` beside SAELens' own runner on the same directory, and the batches
  alone; the SAE is small, so that reading matters.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import SHAPES, Task, in_turn, machine, ratio, table
from datasets import Dataset
from rich.console import Console
from sae_lens import ActivationsStore, LanguageModelSAETrainingRunner, TopKTrainingSAEConfig
from transformer_lens.model_bridge import TransformerBridge

import lch_plugin as lch

CONTEXT = 128
CENTROID, INPUT = "hook_centroid", "hook_in"


def hook(model: TransformerBridge, point: str, layer: int | None = None) -> str:
    """A hook point of a layer's MLP; of the middle one if none is named."""
    layer = model.cfg.n_layers // 2 if layer is None else layer
    return f"blocks.{layer}.mlp.{point}"


def texts(model: TransformerBridge, n_tokens: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.cfg.d_vocab, (n_tokens // CONTEXT, CONTEXT), generator=generator)
    return Dataset.from_dict({"tokens": ids.tolist()})


def config(model: TransformerBridge, point: str, d_sae: int, n_tokens: int, **settings: Any) -> Any:
    sae = TopKTrainingSAEConfig(
        d_in=model.cfg.d_model, d_sae=d_sae, k=32, normalize_activations="expected_average_only_in"
    )
    return lch.saes.runner_config(
        sae,
        hook(model, point),
        training_tokens=n_tokens,
        train_batch_size_tokens=1024,
        n_batches_for_norm_estimate=4,
        store_batch_size_prompts=8,
        **settings,
    )


def tokens_per_second(n_tokens: int, seconds: list[float]) -> str:
    return f"{n_tokens / statistics.median(seconds):,.0f}"


def live(model: TransformerBridge, rounds: int) -> list[str]:
    n_tokens, d_sae = 12 * 1024, 4 * model.cfg.d_model
    data = texts(model, 4 * n_tokens)
    tasks: dict[str, Task] = {
        "centroids": lambda: lch.saes.train(model, data, config(model, CENTROID, d_sae, n_tokens)),
        "activations": lambda: LanguageModelSAETrainingRunner(
            config(model, INPUT, d_sae, n_tokens), override_dataset=data, override_model=model
        ).run(),
    }
    seconds = in_turn(tasks, rounds)
    return [
        *(tokens_per_second(n_tokens, seconds[name]) for name in tasks),
        f"{ratio(seconds, 'activations', 'centroids'):.2f}",
    ]


def caching(model: TransformerBridge, rounds: int, directory: Path) -> list[str]:
    n_tokens, batch_size = 8 * 1024, 16
    data = texts(model, n_tokens)
    last = model.cfg.n_layers // 2
    layers = (last // 3, 2 * last // 3, last)
    hooks = [hook(model, point, n) for n in layers for point in (CENTROID, INPUT)]
    batches = torch.tensor(data["tokens"]).split(batch_size)
    ours, raw = directory / "cache", directory / "raw"

    def cache() -> None:
        shutil.rmtree(ours, ignore_errors=True)
        lch.saes.cache(
            model, data, ours, hook_names=hooks, context_size=CONTEXT, batch_size=batch_size
        )

    def passes_and_writes() -> None:
        with lch.attach(model, layers=list(layers)), raw.open("wb") as file, torch.no_grad():
            for batch in batches:
                found = model.run_with_cache(batch, names_filter=hooks, stop_at_layer=last + 1)[1]
                for name in hooks:
                    file.write(found[name].numpy().data)
            file.flush()
            os.fsync(file.fileno())

    seconds = in_turn({"cache": cache, "least": passes_and_writes}, rounds)
    return [
        tokens_per_second(n_tokens, seconds["cache"]),
        tokens_per_second(n_tokens, seconds["least"]),
        f"{sum(f.stat().st_size for f in ours.iterdir()) / 1e6:.0f} MB",
        f"{ratio(seconds, 'least', 'cache'):.2f}",
    ]


def from_cache(model: TransformerBridge, rounds: int, directory: Path) -> list[list[str]]:
    n_tokens, n_batches = 64 * 1024, 60
    path = directory / "for-training"
    data = texts(model, n_tokens)
    lch.saes.cache(model, data, path, hook_names=[hook(model, CENTROID)], context_size=CONTEXT)
    settings = {"use_cached_activations": True, "cached_activations_path": str(path)}

    def saelens() -> LanguageModelSAETrainingRunner:
        return LanguageModelSAETrainingRunner(
            config(model, CENTROID, 256, n_tokens, **settings),
            override_dataset=data,
            override_model=model,
        )

    def drain(batches: Iterator[torch.Tensor]) -> None:
        for _ in itertools.islice(batches, n_batches):
            pass

    def read() -> None:
        stream = lch.saes.Cache(path).stream(
            hook(model, CENTROID), batch_size=1024, buffer_size=4096
        )
        drain(stream)

    def read_as_saelens() -> None:
        one = config(model, CENTROID, 256, n_tokens, **settings)
        drain(ActivationsStore.from_config(model, one, override_dataset=data))

    pairs: dict[str, tuple[Task, Task, int]] = {
        "batches alone": (read, read_as_saelens, n_batches * 1024),
        "training, d_sae 256": (
            lambda: lch.saes.train(None, None, config(model, CENTROID, 256, n_tokens, **settings)),
            lambda: saelens().run(),
            n_tokens,
        ),
    }
    rows = []
    for label, (ours, theirs, n) in pairs.items():
        seconds = in_turn({"ours": ours, "theirs": theirs}, rounds)
        rows.append(
            [
                label,
                tokens_per_second(n, seconds["ours"]),
                tokens_per_second(n, seconds["theirs"]),
                f"{ratio(seconds, 'theirs', 'ours'):.2f}",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help="directory of one, in the place of GPT-2 small")
    parser.add_argument("--only", choices=["live", "cache", "from-cache"])
    options = parser.parse_args()
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    console = Console(width=140)
    name = Path(options.model).name if options.model else "GPT-2 small"
    console.print(f"{machine('sae-lens', 'datasets')}; {name}, tokens a second")
    if options.model:
        model = lch.load(options.model, dtype="float32").bridge()
    else:
        model = SHAPES["GPT-2 small"].build()
    with tempfile.TemporaryDirectory() as directory:
        if options.only in (None, "live"):
            row = live(model, options.rounds)
            columns = ["centroids", "SAELens, activations", "centroids / activations"]
            console.print(table("Training live, d_sae 4 d_model", columns, [row]))
        if options.only in (None, "cache"):
            row = caching(model, options.rounds, Path(directory))
            columns = ["cache", "passes and raw write", "written", "cache / passes and raw write"]
            console.print(table("Writing a cache of six hook points", columns, [row]))
        if options.only in (None, "from-cache"):
            rows = from_cache(model, options.rounds, Path(directory))
            columns = ["", "lch.saes", "SAELens", "lch.saes / SAELens"]
            console.print(table("From a cache", columns, rows))


if __name__ == "__main__":
    main()

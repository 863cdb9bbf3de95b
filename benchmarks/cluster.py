"""Caching centroids on a Ray cluster beside one process, in one thread each.

    python benchmarks/cluster.py --model DIRECTORY

For each number of workers `lch.saes.cache` writes the same shards of random tokens, in this process
and on workers of a Ray on this machine. Starting workers takes seconds that do not grow with the
text; so two lengths are run, and the speed is of the tokens between them. The files are compared
byte by byte, and what a token takes on the disk is counted.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch
from common import machine, table
from datasets import Dataset
from rich.console import Console

import lch_plugin as lch
from lch_plugin.demo import DEMO_MODEL_DIR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(DEMO_MODEL_DIR), help="directory or name")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=128, help="of the longer run")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    name = chosen.model

    def load() -> Any:  # By value to the workers.
        return lch.load(name, dtype="float32").bridge()

    model = load()
    generator = torch.Generator().manual_seed(0)
    shape = (chosen.sequences, chosen.context)
    ids = torch.randint(0, model.cfg.d_vocab, shape, generator=generator).tolist()
    hook = f"blocks.{chosen.layer}.mlp.hook_centroid"
    ray.init(
        address="local",
        num_cpus=max(chosen.workers),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=100 * 2**20,
    )
    lengths = chosen.sequences // 4, chosen.sequences
    # As many shards for each worker, in both.
    n_shards = 4 * max(chosen.workers)
    seconds: dict[tuple[int, int], float] = {}
    files: dict[tuple[int, int], dict[str, bytes]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for n in lengths:
            for workers in (0, *chosen.workers):
                cluster = lch.cluster.Cluster(workers=workers) if workers else None
                start = time.perf_counter()
                cache = lch.saes.cache(
                    model,
                    Dataset.from_dict({"tokens": ids[:n]}),
                    Path(directory) / f"{workers}-{n}",
                    hook_names=hook,
                    context_size=chosen.context,
                    batch_size=n // n_shards,
                    max_shard_size=1,
                    cluster=cluster,
                    load=cluster and load,
                )
                seconds[workers, n] = time.perf_counter() - start
                files[workers, n] = {p.name: p.read_bytes() for p in cache.path.glob("data-*")}
    n_more = (lengths[1] - lengths[0]) * chosen.context
    rates = {
        workers: n_more / (seconds[workers, lengths[1]] - seconds[workers, lengths[0]])
        for workers in (0, *chosen.workers)
    }
    rows = [
        [
            str(workers or "no cluster"),
            *(f"{seconds[workers, n]:.1f}" for n in lengths),
            f"{rate:.0f}",
            f"{rate / rates[0]:.2f}",
            str(all(files[workers, n] == files[0, n] for n in lengths)),
        ]
        for workers, rate in rates.items()
    ]
    times = [f"{n} sequences, s" for n in lengths]
    columns = ["workers", *times, "tokens/s", "ratio", "same bytes"]
    console = Console()
    console.print(table(f"{hook} of {Path(name).name}", columns, rows))
    n_bytes = sum(map(len, files[0, lengths[1]].values()))
    console.print(
        f"{n_bytes / chosen.sequences / chosen.context:.1f} bytes a token, of which values are "
        f"{4 * cache.d_in[hook]}"
    )
    console.print(machine("sae-lens", "ray"), soft_wrap=True)
    ray.shutdown()


if __name__ == "__main__":
    main()

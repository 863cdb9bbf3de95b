"""The package's three uses on real models, every step a command that anyone can run.

    python examples/real_models/run.py WEIGHTS --out real [--truth DIR]

WEIGHTS is what ``weights.py`` makes: a directory with a directory for each model. Each step runs in
a process of its own, whose time and peak memory are recorded, and is left out when its results are
there already, so that an interrupted run goes on. ``tables.md`` has the results as tables.

``--truth`` is a directory of statements, true and false, as ``cities.csv`` of Marks and Tegmark's
"The Geometry of Truth" (arXiv 2310.06824). Without it nothing is probed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tables import write_tables

HERE = Path(__file__).parent
LCH = (str(Path(sys.executable).with_name("lch")),)
SITES = {"centroid": "blocks.{}.mlp.hook_centroid", "input": "blocks.{}.mlp.hook_in"}


@dataclass(frozen=True)
class Model:
    """A real model, and what of it is looked at.

    Attributes:
        layers: a quarter, half and three quarters of the way.
        tasks: those that it solves.
    """

    name: str
    layers: tuple[int, int, int]
    tasks: tuple[str, ...]


MODELS = (
    Model("smollm2", (7, 15, 22), ("ioi", "capitals")),
    Model("gemma3", (4, 9, 13), ("ioi", "capitals")),
)
N_CACHED, N_TRAINED, N_EVALUATED = 65_536, 131_072, 6_000
PROBED = ("cities", "neg_cities", "sp_en_trans", "larger_than")


@dataclass(frozen=True)
class Step:
    """A command, and the directory that it makes."""

    name: str
    command: tuple[str, ...]
    out: Path


def steps(model: Model, weights: Path, out: Path, truth: Path | None) -> Iterator[Step]:
    """What is run on a model, in order: later steps read what earlier ones made."""
    source, out = str(weights / model.name), out / model.name
    python = (sys.executable, "-W", "ignore")

    def step(name: str, *command: str, needs: tuple[str, ...] = LCH) -> Step:
        directory = out / name.replace(" ", "-")
        return Step(name, (*needs, *command, "--out", str(directory)), directory)

    yield step("exactness", str(HERE / "exactness.py"), source, needs=python)
    hooks = {
        (layer, site): hook.format(layer) for layer in model.layers for site, hook in SITES.items()
    }
    text = [str(out.parent / "corpus" / f"{split}.jsonl") for split in ("train", "test")]
    of_cache = ("--text", text[0], "--context-size", "128", "--n-tokens", str(N_CACHED))
    cache = step("cache", "sae", "cache", *hooks.values(), "--model", source, *of_cache)
    yield cache
    for (layer, site), hook in hooks.items():
        trained = step(
            f"sae {layer} {site}",
            *("sae", "train", hook, "--cache", str(cache.out), "--tokens", str(N_TRAINED)),
            *("--setting", "k=32", "--d-sae", "2304"),
        )
        yield trained
        held_out = ("--text", text[1], "--n-tokens", str(N_EVALUATED))
        of_model = (str(trained.out), "--model", source, *held_out)
        # Steering is a pass for each feature and strength: a quarter of an hour for each SAE.
        evaluate = ("sae", "evaluate", *of_model, "--n-features", "0")
        yield step(f"evaluate {layer} {site}", *evaluate)
        if site == "centroid" and layer == model.layers[1]:
            yield step("features", "sae", "features", *of_model, "--n-features", "200")
    corpus = ("--dataset", str(out.parent / "corpus"), "--test-split", "test", "--k", "32")
    module = f"model.layers.{model.layers[1]}.mlp"
    size = ("--d-sae", "1152", "--rows", "32768", "--test-rows", str(N_EVALUATED))
    compared = ("--model", source, "--module", module, *corpus, *size, "--items", "1000")
    yield step("compare", "sae", "compare", *compared)
    for task in model.tasks:
        yield step(f"circuit {task}", "circuit", "--task", task, "--model", source)
    if truth is not None:
        sets = [part for name in PROBED for part in ("--train", str(truth / f"{name}.csv"))]
        layers = ",".join(map(str, model.layers))
        how = ("--layers", layers, "--rows", "200", "--probe", "mass-mean", "--probe", "logistic")
        yield step("probe", "probe", *sets, *how, "--model", source)
    about = ("The capital of France is", "--answer", " Paris", "--foil", " Rome")
    yield step("saliency", "saliency", *about, "--model", source)


def run(step: Step) -> dict[str, Any]:
    """Run a step, its output into a file beside its directory.

    Returns:
        Seconds, and the peak of memory in bytes.

    Raises:
        SystemExit: the command failed.
    """
    step.out.parent.mkdir(parents=True, exist_ok=True)
    log = step.out.with_suffix(".log")
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            step.command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parents[1])},
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        shutil.rmtree(step.out, ignore_errors=True)
        raise SystemExit(f"{step.name} failed: {' '.join(step.command)}\n{log.read_text()[-2000:]}")
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": time.perf_counter() - start, "peak_bytes": usage.ru_maxrss * unit}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--truth", type=Path, help="directory of .csv files with statement,label")
    parser.add_argument("--only", help="steps whose name contains this")
    args = parser.parse_args()

    models = [model for model in MODELS if (args.weights / model.name).is_dir()]
    if not models:
        raise SystemExit(f"{args.weights} has none of {[m.name for m in MODELS]}: run weights.py")
    corpus = args.out / "corpus"
    if not corpus.is_dir():
        subprocess.run([sys.executable, str(HERE / "corpus.py"), str(corpus)], check=True)
    plan = [(m, s) for m in models for s in steps(m, args.weights, args.out, args.truth)]
    if args.only:
        plan = [(m, s) for m, s in plan if args.only in s.name]
    for i, (model, step) in enumerate(plan, 1):
        cost = step.out.with_suffix(".json")
        if cost.is_file():
            continue
        print(f"[{i}/{len(plan)}] {model.name}: {step.name} ...", end=" ", flush=True)
        spent = run(step)
        command = " ".join(Path(part).name if "/" in part else part for part in step.command)
        cost.write_text(json.dumps({"step": step.name, "command": command, **spent}) + "\n")
        print(f"{spent['seconds']:.0f} s, {spent['peak_bytes'] / 2**30:.1f} GiB", flush=True)
    write_tables(args.out, [m.name for m in models])


if __name__ == "__main__":
    main()

"""What writes, in its smallest form: by name, a call that makes an output in a directory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sae_lens import TopKTrainingSAEConfig

import lch_plugin as lch
from lch_plugin.circuits.reports import neuron_run, task_run
from lch_plugin.demo import DEMO_MODEL_DIR
from lch_plugin.demo.corpus import stories
from lch_plugin.demo.vision import DEMO_VISION_MODEL_DIR
from lch_plugin.demonstration import run as demo
from lch_plugin.extract import extract
from lch_plugin.saes.comparison import ComparisonSettings, Labelled, compare
from lch_plugin.saes.comparison.embedded import labelled_digits
from lch_plugin.saes.training.checkpoints import newest_good

HOOK = "blocks.1.mlp.hook_centroid"


@cache
def model() -> Any:
    return lch.load_demo_model()


@cache
def loaded() -> Any:
    return lch.load(DEMO_MODEL_DIR)


@cache
def vision() -> Any:
    return lch.load(DEMO_VISION_MODEL_DIR)


@cache
def texts() -> list[str]:
    return list(stories(60, seed=0))


def make_cache(out: Path) -> None:
    lch.saes.cache(
        model(), texts(), out, hook_names=HOOK, context_size=32, batch_size=8, max_shard_size="40KB"
    )


def train(out: Path, **changes: Any) -> None:
    """On a cache beside the output, which `prepare` makes."""
    config = lch.saes.runner_config(
        TopKTrainingSAEConfig(d_in=128, d_sae=64, k=4),
        HOOK,
        **{
            "training_tokens": 4096,
            "train_batch_size_tokens": 256,
            "context_size": 32,
            "lr": 1e-3,
            "n_checkpoints": 3,
            "checkpoint_path": f"{out}-checkpoints",
            "use_cached_activations": True,
            "cached_activations_path": str(out.parent / "rows"),
            "output_path": str(out),
            **changes,
        },
    )
    lch.saes.train(None, None, config)


def resume(out: Path) -> None:
    """From the newest checkpoint of any killed run, if there is one."""
    runs = Path(f"{out}-checkpoints").glob("*/")
    found = [good for run in runs if (good := newest_good(run)) is not None]
    newest = max(found, key=lambda path: int(path.name), default=None)
    train(out, resume_from_checkpoint=None if newest is None else str(newest))


def make_features(out: Path) -> None:
    sae = lch.saes.load_sae(out.parent / "dictionary")
    lch.saes.features(model(), sae, texts()[:20], n_features=2).save(out)


def evaluate(out: Path) -> None:
    from lch_plugin.saes.evaluation.report import evaluation_report

    sae = lch.saes.load_sae(out.parent / "dictionary")
    evaluation_report(model(), sae, texts()[:20], out, n_features=2, n_sequences=4, n_random=2)


def find_circuit(out: Path) -> None:
    task_run.run(model(), "an", out, n=6, nodes=40)


def compare_sites(out: Path) -> None:
    settings = ComparisonSettings(
        k=(2,), n_seeds=2, d_sae=8, n_rows=2048, n_test_rows=1024, n_items=40, batch_size=128
    )
    compare(vision(), "encoder.layer.1.mlp", digits("train"), digits("test"), out, settings)


@cache
def digits(split: str) -> Labelled:
    return labelled_digits(split)


def make_demo(out: Path) -> None:
    demo.run(out)


def score_neurons(out: Path) -> None:
    prompt = "I climbed up the pear tree and picked a"
    neuron_run.run(model(), prompt, layer=2, answer=" pear", foil=" apple", out=out, n_samples=8)


def make_centroids(out: Path) -> None:
    extract(loaded(), "Tom saw an apple", out)


OPERATIONS: dict[str, Callable[[Path], None]] = {
    "cache": make_cache,
    "train": train,
    "resume": resume,
    "compare": compare_sites,
    "circuit": find_circuit,
    "neurons": score_neurons,
    "features": make_features,
    "evaluate": evaluate,
    "centroids": make_centroids,
    "demo": make_demo,
}


def prepare(directory: Path) -> None:
    """What operations read, made once beside their outputs."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    make_cache(directory / "rows")
    train(directory / "dictionary", n_checkpoints=0, checkpoint_path=None)


def small_demo() -> None:
    """The demonstration in its smallest form, for the rest of this process."""
    for name, value in {
        "N_TRAINING_STORIES": 60,
        "N_TEST_STORIES": 10,
        "TRAINING_TOKENS": 2048,
        "D_SAE": 32,
        "N_PROMPTS": 8,
        "N_RANDOM": 2,
    }.items():
        setattr(demo, name, value)

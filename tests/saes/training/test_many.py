"""Many SAEs on a cluster are those of one process, and what cannot be is refused before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig

import lch_plugin as lch
from lch_plugin.cluster import Cluster
from lch_plugin.saes.caching.cache import Cache
from tests import models
from tests.cli import run
from tests.saes.training.test_resuming import INPUT, assert_same, settings
from tests.saes.training.test_train import DATA, HOOK, config


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("caches") / "cache"
    return lch.saes.cache(models.bridge("gpt2"), DATA, path, hook_names=[HOOK, INPUT], batch_size=8)


def configs(cached: Cache, out: Path) -> list[LanguageModelSAERunnerConfig[Any]]:
    return [
        config(hook_name=hook, output_path=str(out / hook), **settings(cached))
        for hook in (HOOK, INPUT)
    ]


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.usefixtures("ray_here")
def test_saes_are_those_of_one_process(
    cached: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # Paths that are relative here mean nothing on a worker.
    found = {
        of.hook_name: sae
        for of, sae in lch.saes.train_many(configs(cached, Path("many")), Cluster(workers=2))
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for of in configs(cached, tmp_path / "one"):
            assert_same(found[of.hook_name], lch.saes.train(None, None, of))
    finally:
        torch.set_num_threads(threads)
    for hook in (HOOK, INPUT):
        assert_same(lch.saes.load_sae(Path("many") / hook), lch.saes.load_sae(Path("one") / hook))


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.usefixtures("ray_here")
def test_the_command_trains_layers_of_a_cache_on_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hooks = [f"blocks.{layer}.mlp.hook_centroid" for layer in (0, 1)]
    code, said = run("sae", "cache", *hooks, "--n-tokens", "2048", "--out", "cache")
    assert code == 0, said
    layers = (
        "--layers",
        "0,1",
        "--cache",
        "cache",
        "--tokens",
        "2048",
        "--d-sae",
        "64",
        "--setting",
        "k=8",
    )
    command = ("sae", "train", "blocks.*.mlp.hook_centroid", *layers, "--out", "saes")
    code, said = run(*command, "--workers", "2")
    assert code == 0, said
    for hook in hooks:
        assert json.loads((tmp_path / "saes" / hook / "cfg.json").read_text())["d_sae"] == 64


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_cached_activations": False}, "trained from a cache"),
        ({"output_path": None}, "Say where the SAE goes"),
        ({"output_path": "one"}, "the same output_path"),
        ({"cached_activations_path": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_before_workers_start(
    cached: Cache, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    # Nothing answers there: an error that names the address would come too late.
    pytest.importorskip("ray")
    nowhere = Cluster("127.0.0.1:1")
    several = configs(cached, tmp_path)
    for of in several:
        for name, value in change.items():
            setattr(of, name, value)
    with pytest.raises(lch.InputError, match=said):
        list(lch.saes.train_many(several, nowhere))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cache", "x"], "give --layers and --cache"),
        (["--layers", "0,1"], "give --layers and --cache"),
    ],
)
def test_the_command_needs_layers_of_a_cache(options: list[str], said: str) -> None:
    pytest.importorskip("ray")
    code, out = run("sae", "train", "blocks.*.mlp.hook_centroid", *options, "--workers", "2")
    assert code == 1
    assert said in " ".join(out.split())

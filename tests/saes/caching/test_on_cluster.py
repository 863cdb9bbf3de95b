"""`lch.saes.cache` on a cluster: the files of one process, whatever happens to workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lch_plugin as lch
from lch_plugin.cluster import Cluster, Shared, shared
from lch_plugin.demo.corpus import stories
from lch_plugin.saes.caching.computing import _Worker
from lch_plugin.saes.caching.shards import read_manifest
from tests.cli import run

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("ray_here")]

HOOKS = ["blocks.1.mlp.hook_centroid", "blocks.2.hook_resid_pre"]
TEXTS = list(stories(120, seed=0))
#: Eight shards of four sequences, and one of what is left.
SETTINGS: dict[str, Any] = {
    "hook_names": HOOKS,
    "context_size": 64,
    "batch_size": 4,
    "max_shard_size": 1,
    "n_tokens": 34 * 64,
}
ONE = Cluster(workers=1)


@pytest.fixture(scope="module")
def model() -> Any:
    return lch.load_demo_model()


@pytest.fixture(scope="module")
def alone(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache that one process writes."""
    return lch.saes.cache(model, TEXTS, tmp_path_factory.mktemp("alone") / "c", **SETTINGS).path


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def dying(killed: Path) -> Callable[[], Any]:
    """Loads the model; at the third pass over a shard its process is killed, once."""

    def load() -> Any:
        model, passes = lch.load_demo_model(), []

        def see(_module: Any, _args: Any, x: Any) -> None:
            passes.append(len(x))
            if passes.count(4) == 3 and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        model.hook_dict["hook_embed"].register_forward_hook(see)
        return model

    return load


def test_with_a_worker_killed_it_is_that_of_one_process_byte_for_byte(
    model: Any, alone: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    on = {"cluster": Cluster(workers=2), "load": dying(killed)}
    cache = lch.saes.cache(model, TEXTS, tmp_path / "c", **SETTINGS, **on)
    assert killed.exists()
    assert len(list(alone.glob("data-*.arrow"))) == 9
    assert files(cache.path) == files(alone)
    # Finished, it needs no cluster.
    nowhere = {"cluster": Cluster("127.0.0.1:1"), "load": lch.load_demo_model}
    lch.saes.cache(model, TEXTS, cache.path, **SETTINGS, **nowhere)


@pytest.mark.slow
def test_the_command_does_the_same(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS))
    arguments = ["--text", str(text), "--n-tokens", "600", "--context-size", "64"]
    for out, more in (("one", []), ("two", ["--workers", "1"])):
        code, said = run("sae", "cache", HOOKS[0], *arguments, "--out", str(tmp_path / out), *more)
        assert code == 0, said
    assert files(tmp_path / "one") == files(tmp_path / "two")
    for more, said in (
        (["--ray", "127.0.0.1:1"], "this process is connected to the Ray at"),
        (["--workers", "3"], "room for 2"),
    ):
        three = str(tmp_path / "three")
        code, found = run("sae", "cache", HOOKS[0], *arguments, "--out", three, *more)
        assert code == 1
        assert said in found
        assert not (tmp_path / "three").exists()


def without_the_model() -> Any:
    return lch.load("/no/such/model").bridge()


def other_model() -> Any:
    model = lch.load_demo_model()
    model.blocks[0].mlp.W_in.data.mul_(2.0)
    return model


@pytest.mark.slow
def test_a_worker_without_the_models_files_says_so_and_nothing_stays(
    model: Any, tmp_path: Path
) -> None:
    with pytest.raises(lch.InputError, match=r"/no/such/model.* at the same place") as caught:
        lch.saes.cache(
            model, TEXTS, tmp_path / "c", **SETTINGS, cluster=ONE, load=without_the_model
        )
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_otherwise_on_a_worker_is_refused(alone: Path, tmp_path: Path) -> None:
    manifest = read_manifest(alone, "")
    assert manifest is not None
    worker = _Worker(lch.load_demo_model, manifest, Shared(tmp_path, ".mark"))
    with pytest.raises(lch.InputError, match=r"does not see .* on a disk that all machines"):
        worker()
    with shared(tmp_path) as place:
        for changes, said in (
            ({"load": other_model}, "would compute something else. model, weights is"),
            ({"manifest": {**manifest, "versions": {"torch": "1"}}}, "and was '1'"),
        ):
            with pytest.raises(lch.InputError, match=said):
                replace(worker, place=place, **changes)()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"cluster": Cluster()}, "cluster and load go together"),
        ({"load": lch.load_demo_model}, "cluster and load go together"),
        ({"path": "s3://bucket/cache"}, "is no directory"),
    ],
)
def test_what_cannot_be_spread_is_refused(
    model: Any, more: dict[str, Any], said: str, tmp_path: Path
) -> None:
    arguments = {"path": tmp_path / "c", **SETTINGS, **more}
    with pytest.raises(lch.InputError, match=said):
        lch.saes.cache(model, TEXTS, **arguments)
    assert list(tmp_path.iterdir()) == []

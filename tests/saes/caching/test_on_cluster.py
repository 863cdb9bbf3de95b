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
from lch_plugin.cluster import Cluster
from lch_plugin.demo.corpus import stories
from lch_plugin.saes.caching.computing import _Worker
from lch_plugin.saes.caching.shards import MARK, read_manifest
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
ON_TWO: dict[str, Any] = {"cluster": Cluster(workers=2), "load": lch.load_demo_model}


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
    # Damaged, only what is damaged is computed, and a whole one needs no cluster.
    (cache.path / "data-00003.arrow").write_bytes(b"")
    lch.saes.cache(model, TEXTS, cache.path, **SETTINGS, **ON_TWO)
    assert files(cache.path) == files(alone)
    nowhere = {**ON_TWO, "cluster": Cluster("127.0.0.1:1")}
    lch.saes.cache(model, TEXTS, cache.path, **SETTINGS, **nowhere)


def test_the_command_does_the_same(alone: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS))
    for out, more in (("one", []), ("two", ["--workers", "2"])):
        arguments = ["--n-tokens", "600", "--context-size", "64", "--batch-size", "4"]
        code, said = run("sae", "cache", HOOKS[0], *arguments, "--out", str(tmp_path / out), *more)
        assert code == 0, said
    assert files(tmp_path / "one") == files(tmp_path / "two")


def other_model() -> Any:
    model = lch.load_demo_model()
    model.blocks[0].mlp.W_in.data.mul_(2.0)
    return model


def test_another_model_or_none_on_a_worker_is_refused_and_nothing_stays(
    model: Any, tmp_path: Path
) -> None:
    def none() -> Any:
        return lch.load("/no/such/model").bridge()

    for load, said in (
        (other_model, "would compute something else. model, weights is"),
        (none, "cannot load the model: .*/no/such/model.* at the same place"),
    ):
        on = {**ON_TWO, "load": load}
        with pytest.raises(lch.InputError, match=said) as caught:
            lch.saes.cache(model, TEXTS, tmp_path / "c", **SETTINGS, **on)
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []


def test_a_worker_that_does_not_see_the_directory_or_has_other_versions_says_so(
    alone: Path, tmp_path: Path
) -> None:
    manifest = read_manifest(alone, "")
    assert manifest is not None
    worker = _Worker(lch.load_demo_model, manifest, tmp_path)
    with pytest.raises(lch.InputError, match="does not see .* on a disk that all machines"):
        worker()
    (tmp_path / MARK).write_text("of another call")
    with pytest.raises(lch.InputError, match="does not see"):
        worker()
    (tmp_path / MARK).write_text(worker.mark)
    old = replace(worker, manifest={**manifest, "versions": {**manifest["versions"], "torch": "1"}})
    with pytest.raises(lch.InputError, match="versions, torch is .* and was '1'"):
        old()


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

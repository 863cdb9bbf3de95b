"""A sample of what `tests.faults.harness` tries, and what it cannot show."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lch_plugin as lch
from lch_plugin import files
from lch_plugin.files import (
    check_contents,
    check_new_directory,
    claimed,
    locked,
    new_directory,
    remove_leftovers,
    resumable_directory,
    write_directory,
    write_file,
)
from tests.faults.cycles import CYCLES, repeat
from tests.faults.harness import Artifacts, Bench
from tests.slow import all_but

# One process makes what is broken once.
pytestmark = pytest.mark.xdist_group("faults")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    threads = torch.get_num_threads()
    yield Bench(tmp_path_factory.mktemp("faults"))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def artifacts(bench: Bench) -> Artifacts:
    return Artifacts(bench)


@pytest.mark.parametrize("name", ["cache", "train", "features", "centroids"])
def test_killed_it_is_whole_or_absent_and_ends_up_the_same(bench: Bench, name: str) -> None:
    generator = random.Random(name)
    for _ in range({"cache": 2, "train": 4}.get(name, 2)):
        assert bench.kill(name, generator) is None


@pytest.mark.parametrize("kind", ["cache", "SAE", "checkpoint", "graph.json", "graph.graphml"])
@pytest.mark.parametrize("cut", [False, True])
def test_damage_is_refused_or_makes_no_difference(
    artifacts: Artifacts, kind: str, cut: bool
) -> None:
    generator = random.Random(f"{kind}{cut}")
    for _ in range(3):
        assert artifacts.damage(kind, generator, cut=cut) is None


@pytest.mark.parametrize("name", ["cache", "train", "features", "centroids"])
def test_on_a_full_disk_nothing_is_torn_and_what_is_finished_is_kept(
    bench: Bench, name: str
) -> None:
    bench.whole(name)
    for share in (0.1, 0.6):
        assert bench.fill(name, share) is None


# --- the writer ----------------------------------------------------------------------------------


def write_one(directory: Path) -> None:
    (directory / "a.txt").write_text("a")


def in_a_fork(work: Callable[[], Any]) -> int:
    """The process of a fork that does some work and then waits to be killed."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work_and_wait(work, told)
        finally:
            os._exit(1)
    os.close(told)
    assert os.read(ready, 1) == b"r"
    os.close(ready)
    return child


def work_and_wait(work: Callable[[], Any], told: int) -> None:
    with work():
        os.write(told, b"r")
        time.sleep(600)


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_lock_keeps_others_out_and_dies_with_its_process(tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = in_a_fork(lambda: new_directory(out))
    for other in (check_new_directory, lambda path: write_directory(path / "", write_one)):
        with pytest.raises(lch.OutputError, match="is being written by another process"):
            other(out)
    remove_leftovers(tmp_path)  # Not of those who are alive.
    assert len(list(tmp_path.glob(".out-*.tmp"))) == 1
    end(child)
    assert check_contents(tmp_path / "out-2", "")  # What the second wrote is not lost.
    shutil.rmtree(tmp_path / "out-2")
    (tmp_path / ".out-mine.tmp").mkdir()
    (tmp_path / ".out-12345678.tmp").mkdir()
    (tmp_path / ".out-12345678.tmp" / "mine.txt").write_text("mine")
    write_directory(out, write_one)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"out", ".out-mine.tmp", ".out-12345678.tmp"}
    assert check_contents(out, "")


def test_work_goes_on_after_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def begin() -> Any:
        block = resumable_directory(out, {"a": 1})
        partial = block.__enter__()
        write_directory(partial / "part", write_one)
        return new_directory(partial / "other")

    end(in_a_fork(begin))
    with resumable_directory(out, {"a": 1}) as partial:
        assert check_contents(partial / "part", "")
        assert {p.name for p in partial.iterdir()} == {"part", "settings.json", "files.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_name_that_is_taken_meanwhile_is_left_and_the_work_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write(directory: Path) -> None:
        write_one(directory)
        out.mkdir()
        (out / "theirs.txt").write_text("theirs")

    with pytest.raises(lch.OutputError, match=r"everything is kept in .*out-2\.$"):
        write_directory(out, write)
    assert (tmp_path / "out-2" / "a.txt").read_text() == "a"
    assert check_contents(tmp_path / "out-2", "")
    assert [p.name for p in out.iterdir()] == ["theirs.txt"]


def test_a_directory_that_vanishes_is_made_again(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with claimed(out):
        shutil.rmtree(tmp_path / "deep")
        (tmp_path / "deep").mkdir()
        write_directory(out, write_one)
    assert check_contents(out, "")


def test_where_nothing_can_be_written_the_work_goes_to_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").mkdir()

    def write(directory: Path) -> None:
        if directory.is_relative_to(tmp_path / "here"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file({"a": torch.ones(2)}, directory / "a.safetensors")

    message = r"No space left on device.*everything is kept in .*elsewhere/out\.$"
    with pytest.raises(lch.OutputError, match=message):
        write_directory(tmp_path / "here" / "out", write)
    assert check_contents(tmp_path / "elsewhere" / "out", "")
    assert not list((tmp_path / "here").iterdir())


def test_an_error_that_is_not_the_places_is_itself(tmp_path: Path) -> None:
    def write(directory: Path) -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError, match="bug"):
        write_directory(tmp_path / "out", write)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(lch.OutputError, match=r"It is kept in .*elsewhere/a.json/a.json"):
        write_file(tmp_path / "file" / "a.json", "{}")
    assert (tmp_path / "elsewhere" / "a.json" / "a.json").read_text() == "{}"


@pytest.mark.parametrize(
    "record",
    [
        "{",
        "[]",
        '{"files": 3}',
        '{"files": {"../a.txt": {"n_bytes": 1, "xxh3": "%s"}}}' % ("0" * 32),
        '{"files": {"/etc/passwd": {"n_bytes": 1, "xxh3": "%s"}}}' % ("0" * 32),
        '{"files": {"a.txt": {"n_bytes": -1, "xxh3": "%s"}}}' % ("0" * 32),
        '{"files": {"a.txt": {"n_bytes": 1e999, "xxh3": "%s"}}}' % ("0" * 32),
        '{"files": {"a.txt": {"n_bytes": 1, "xxh3": "x"}}}',
        '{"files": {"a.txt": {"n_bytes": 1, "xxh3": "%s", "more": 1}}}' % ("0" * 32),
        '{"files": {"a.txt": {"n_bytes": 1, "xxh3": "%s"}}}' % ("0" * 32),
        '{"files": {}, "files": {}}',
        "[" * 100_000,
        '{"files": {"pipe": {"n_bytes": 0, "xxh3": "%s"}}}' % ("0" * 32),
    ],
)
def test_a_record_is_not_believed(tmp_path: Path, record: str) -> None:
    write_directory(tmp_path / "out", write_one)
    os.mkfifo(tmp_path / "out" / "pipe")
    (tmp_path / "out" / "files.json").write_text(record)
    with pytest.raises(lch.InputError) as caught:
        check_contents(tmp_path / "out", "Make it again.")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("Make it again.")


def test_a_lock_is_its_threads_own(tmp_path: Path) -> None:
    with locked(tmp_path / "out"), locked(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


# --- adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", all_but(["bridge", "huggingface"], CYCLES))
def test_attaching_again_and_again_leaves_nothing(adapter: str) -> None:
    assert repeat(adapter, 30) is None

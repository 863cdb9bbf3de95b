"""Nothing half-written bears its final name."""

from __future__ import annotations

from pathlib import Path

import pytest

import lch_plugin as lch
from lch_plugin.demo import DEMO_MODEL_DIR
from lch_plugin.files import new_directory, portable


def test_a_finished_directory_takes_its_name(tmp_path: Path) -> None:
    with new_directory(tmp_path / "deep" / "out") as directory:
        (directory / "a.txt").write_text("a")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "a.txt").read_text() == "a"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_one_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_directory(tmp_path / "out"):
        raise error
    assert not list(tmp_path.iterdir())


def test_an_empty_directory_may_be_filled_and_a_full_one_may_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with new_directory(tmp_path / "empty") as directory:
        (directory / "a.txt").write_text("a")
    for taken in (tmp_path / "empty", tmp_path / "empty" / "a.txt"):
        with pytest.raises(lch.OutputError, match="other content"), new_directory(taken):
            pass
    assert (tmp_path / "empty" / "a.txt").read_text() == "a"


def test_a_link_to_an_empty_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_directory(tmp_path / "link") as directory:
        (directory / "a.txt").write_text("a")
    assert (tmp_path / "real" / "a.txt").read_text() == "a"
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("name", ["file/out", "n" * 250, "a\0b"])
def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("not a directory")
    with (
        pytest.raises(lch.OutputError, match="cannot be written"),
        new_directory(tmp_path / name),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_paths_of_embedded_models_are_the_same_on_every_machine() -> None:
    assert portable(str(DEMO_MODEL_DIR)) == "lch_plugin/demo/model"
    assert portable("gpt2") == "gpt2"
    assert portable("/models/gpt2") == "/models/gpt2"

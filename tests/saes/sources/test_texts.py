"""Text from files, directories, lists and datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

import lch_plugin as lch
from lch_plugin.saes import load_text

TEXTS = ["I climbed up the pear tree", "and picked an apple,", "ä pear"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps what it reads; not of tests, in the user's own directory."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def written(directory: Path, kind: str) -> Path:
    path, data = directory / f"texts.{kind}", Dataset.from_dict({"text": TEXTS})
    if kind == "txt":
        path.write_text("\n".join(TEXTS), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in TEXTS]), encoding="utf-8")
    elif kind == "jsonl":
        data.to_json(path)
    elif kind == "csv":
        data.to_csv(path, index=False)
    elif kind == "parquet":
        data.to_parquet(path)
    else:
        data.save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["txt", "json", "jsonl", "csv", "parquet", "saved"])
def test_files_of_every_kind_are_read(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path, kind)
    for source in (path, str(path)):
        assert load_text(source)["text"][:] == TEXTS
    if kind != "saved":
        stream = load_text(path, streaming=True)
        assert isinstance(stream, IterableDataset)
        assert [row["text"] for row in stream] == TEXTS


def test_lists_and_datasets(tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": TEXTS})
    stream = data.to_iterable_dataset()
    assert load_text(TEXTS)["text"][:] == TEXTS
    assert load_text(tuple(TEXTS))["text"][:] == TEXTS
    assert load_text(data) is data
    assert load_text(stream) is stream
    assert load_text(DatasetDict(train=data)) is data
    DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "saved")
    assert load_text(tmp_path / "saved")["text"][:] == TEXTS
    assert load_text(tmp_path / "saved", split="test")["text"][:] == TEXTS[1:2]


@pytest.mark.usefixtures("as_users_run")
def test_bad_sources_are_refused_by_name(tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": TEXTS})
    DatasetDict(train=data, test=data).save_to_disk(tmp_path / "saved")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "texts.pdf").touch()
    (tmp_path / "bad.jsonl").write_text("{no json")
    (tmp_path / "directory").mkdir()
    cases: list[tuple[str, Any]] = [
        ("does not exist", tmp_path / "nowhere"),
        ("does not exist", "nowhere.jsonl"),
        ("does not exist", "./nowhere"),
        ("given as a list", "Once upon a time there was a pear tree. " * 20),
        ("empty", tmp_path / "empty.txt"),
        ("kind", tmp_path / "texts.pdf"),
        ("cannot be read", tmp_path / "bad.jsonl"),
        ("save_to_disk", tmp_path / "directory"),
        ("cannot be read", "someone/nothing-of-that-name"),
        ("no text among the 0", []),
        ("no text among the 2", ["", " "]),
        ("no text", [1, 2]),
        ("no text", 3),
        ("no text", None),
        (r"splits \['train', 'test'\]", DatasetDict(train=data, test=data)),
        (r"splits \['test'\]", DatasetDict(test=data)),
    ]
    for match, source in cases:
        with pytest.raises(lch.InputError, match=match):
            load_text(source)
    with pytest.raises(lch.InputError, match="no 'dev'"):
        load_text(tmp_path / "saved", split="dev")

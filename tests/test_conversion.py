"""A converted model is the model, says what it was made of, and is whole or not there."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors import SafetensorError
from transformers import ViTImageProcessor

import lch_plugin as lch
from lch_plugin.errors import InputError, OutputError
from lch_plugin.extract import extract
from lch_plugin.files import check_contents, hash_file
from lch_plugin.loading import load
from lch_plugin.loading.conversions import CONVERSION
from lch_plugin.loading.gguf_reader import read_once
from tests import families, models
from tests.cli import run
from tests.test_loading import output, save_tokenizer, tiny, write_gguf


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "llama.gguf", tiny("llama"), "llama")


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    models.huggingface("gpt2").save_pretrained(tmp_path / "gpt2")
    save_tokenizer(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_a_converted_gguf_file_is_the_same_model(family: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny(family), family.removesuffix("_text"))
    first = load(path)
    first.save(tmp_path / "converted")
    second = load(tmp_path / "converted")
    assert type(second.model) is type(first.model)
    assert torch.equal(output(second.model), output(first.model))
    text = "abcab"
    assert second.processor(text).input_ids == first.processor(text).input_ids
    assert check_contents(tmp_path / "converted", "") is True


def test_a_tokenizer_that_would_not_be_read_again_is_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(llama)

    def damage(directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(loaded.processor, "save_pretrained", damage)
    with pytest.raises(InputError, match=r"cannot read the tokenizer of .*llama\.gguf"):
        loaded.save(tmp_path / "converted")
    assert [p.name for p in tmp_path.iterdir()] == ["llama.gguf"]


def test_the_record_says_what_it_was_made_of(llama: Path, tmp_path: Path) -> None:
    written = load(llama, dtype="bfloat16").save(tmp_path / "converted")
    record = load(tmp_path / "converted").conversion
    assert record == written
    assert record is not None
    assert (record.source, record.revision, record.dtype) == (str(llama), None, "bfloat16")
    assert record.weights["llama.gguf"].xxh3 == hash_file(llama)
    assert record.weights["llama.gguf"].n_bytes == llama.stat().st_size
    assert record.versions["transformers"] == transformers.__version__
    assert set(record.versions) == {"lch-plugin", "torch", "transformers", "gguf"}
    assert load(llama).conversion is None


def test_any_source_is_converted(gpt2: Path, tmp_path: Path) -> None:
    record = load(gpt2, dtype="float64").save(tmp_path / "double")
    assert list(record.weights) == ["model.safetensors"]
    found = load(tmp_path / "double")
    assert found.model.dtype == torch.float64
    assert found.processor("w7").input_ids == [7]
    families.huggingface("vit", torch.float32).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    load(tmp_path / "vit").save(tmp_path / "images")
    assert isinstance(load(tmp_path / "images").processor, ViTImageProcessor)


def test_a_damaged_record_is_refused(llama: Path, tmp_path: Path) -> None:
    load(llama).save(tmp_path / "converted")
    (tmp_path / "converted" / CONVERSION).write_text('{"source": 3}')
    with pytest.raises(InputError, match=r"conversion\.json is damaged.*Convert it again"):
        load(tmp_path / "converted")


def test_what_is_there_stays(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists with other content"):
        load(llama).save(tmp_path / "taken")
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["notes.txt"]


def test_a_bridge_is_not_saved(llama: Path, tmp_path: Path) -> None:
    loaded = load(llama)
    loaded.bridge()
    for again in (lambda: loaded.save(tmp_path / "converted"), loaded.bridge, loaded.hooked):
        with pytest.raises(InputError, match=r"a bridge was made of .*Load it again"):
            again()
    assert not (tmp_path / "converted").exists()


def test_a_disk_without_room_is_said_before_writing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(llama)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OutputError, match=r"needs 0\.0 GB, and 0\.0 GB of the disk are free"):
        loaded.save(tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_a_disk_that_fills_up_leaves_no_half_model(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(llama)

    def full(directory: Path, **_: Any) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise SafetensorError(f"I/O error: {errno.ENOSPC} No space left on device")

    monkeypatch.setattr(loaded.model, "save_pretrained", full)
    with pytest.raises(OutputError, match="No space left on device"):
        loaded.save(tmp_path / "converted")
    assert not any(tmp_path.rglob("*.safetensors"))


# The header is read once


def test_one_reader_serves_everybody(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walked = []
    build = gguf.GGUFReader._build_fields

    def count(self: Any, *args: Any) -> Any:
        walked.append(self)
        return build(self, *args)

    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", count)
    stock = gguf.GGUFReader, gguf.get_tensor_name_map
    load(llama)
    assert len(walked) == 1
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == stock


def test_it_reads_what_the_stock_reader_reads(llama: Path) -> None:
    stock = gguf.GGUFReader(llama)
    with read_once(llama) as reader:
        assert gguf.GGUFReader(str(llama)) is reader
    assert {k: f.contents() for k, f in reader.fields.items()} == {
        k: f.contents() for k, f in stock.fields.items()
    }
    for ours, theirs in zip(reader.tensors, stock.tensors, strict=True):
        assert (ours.name, ours.data.tobytes()) == (theirs.name, theirs.data.tobytes())


def test_another_file_has_a_reader_of_its_own(llama: Path, tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "other.gguf", tiny("qwen2"), "qwen2")
    with read_once(llama) as reader:
        assert gguf.GGUFReader(other).fields["general.architecture"].contents() == "qwen2"
        assert gguf.GGUFReader(llama, "c") is not reader


def test_a_load_that_fails_puts_everything_back(tmp_path: Path) -> None:
    stock = gguf.GGUFReader, gguf.get_tensor_name_map
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", drop="blk.1.ffn_up.weight")
    with pytest.raises(InputError, match="lacks 1 weights"):
        load(path)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == stock


def test_a_transformers_that_reads_on_its_own_gets_the_same_model(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a version that keeps the reader under a name of its own."""
    expected = output(load(llama).model)
    # What is put in place for it goes nowhere.
    monkeypatch.setattr("lch_plugin.loading.gguf_reader.vars", lambda _: {}, raising=False)
    assert torch.equal(output(load(llama).model), expected)


# What is said


def test_it_is_said_once_a_file_how_to_load_faster(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = write_gguf(tmp_path / "with space.gguf", tiny("llama"), "llama")
    with caplog.at_level(logging.WARNING, logger="lch_plugin.loading"):
        for path in (llama, llama, other):
            load(path)
    assert [r.name for r in caplog.records] == ["lch_plugin.loading"] * 2
    assert f"lch convert {llama} {llama.with_suffix('')}" in caplog.messages[0]
    assert f"lch convert '{other}'" in caplog.messages[1]
    assert "\n" not in "".join(caplog.messages)


def test_a_loaded_model_says_what_it_is_in_a_line(llama: Path) -> None:
    said = repr(load(llama))
    assert said.startswith(f"LoadedModel({llama}: LlamaForCausalLM, ")
    assert said.endswith(" parameters, float32, cpu)")
    assert "\n" not in said


# The command


def test_the_command_writes_what_load_reads(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = run("convert", "llama.gguf", "converted", "--dtype", "float64")
    assert (code, "lch convert" in said) == (0, False), said
    found = lch.load("converted")
    assert found.model.dtype == torch.float64
    assert found.conversion is not None
    assert found.conversion.source == "llama.gguf"
    torch.testing.assert_close(output(found.model), output(tiny("llama").double()))


def test_the_record_of_centroids_says_what_the_model_was_converted_from(
    llama: Path, tmp_path: Path
) -> None:
    record = load(llama).save(tmp_path / "converted")
    for source, kept in ((llama, None), (tmp_path / "converted", record.model_dump())):
        out = tmp_path / f"of-{source.name}"
        extract(load(source), "abc", out)
        assert json.loads((out / "record.json").read_text())["conversion"] == kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.gguf", "new"), "nowhere.gguf does not exist"),
        (("text.gguf", "new"), "text.gguf is no whole .gguf file"),
        (("half.gguf", "new"), "half.gguf is no whole .gguf file"),
        (("text.txt", "new"), "neither a directory nor a .gguf file"),
        (("llama.gguf", "full"), "exists with other content"),
        (("llama.gguf", "text.txt/new"), "cannot be written"),
        (("llama.gguf", "new", "--dtype", "int8"), "int8"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    arguments: tuple[str, ...],
    message: str,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("text.gguf", "text.txt"):
        (tmp_path / name).write_text("no model " * 100)
    (tmp_path / "half.gguf").write_bytes(llama.read_bytes()[:-3000])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    code, said = run("convert", *arguments)
    assert code in (1, 2)
    assert message in " ".join(said.split())
    assert sorted(tmp_path.rglob("*")) == before

"""A loaded model as a directory of its own, which loads in seconds and says where it came from."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from lch_plugin.errors import InputError, OutputError
from lch_plugin.files import FileRecord, claimed, hash_file, portable, write_directory
from lch_plugin.loading.directories import load_processor, weight_files
from lch_plugin.loading.origins import Origin
from lch_plugin.records import FileName, Record, read_record

#: In a directory that was converted, what it was made of.
CONVERSION = "conversion.json"


class Conversion(Record):
    """What a directory of weights was made of.

    Attributes:
        source: name on the hub, or path, as it was given.
        revision: commit on the hub; None of a path.
        weights: the files of weights that were read, by name.
        dtype: of the weights that were written.
        versions: of the packages that did it.
    """

    source: str
    revision: str | None
    weights: dict[FileName, FileRecord]
    dtype: str
    versions: dict[str, str]


def read_conversion(directory: Path) -> Conversion | None:
    """What a directory was converted from; None if it was not converted here.

    Raises:
        InputError: its record is damaged.
    """
    path = directory / CONVERSION
    return read_record(path, Conversion, "Convert it again.") if path.is_file() else None


def write_conversion(
    path: str | Path, model: PreTrainedModel, processor: Any, origin: Origin
) -> Conversion:
    """Write a model and its processor to a new directory, which `lch_plugin.load` reads.

    Args:
        path: an absent or empty directory.
        model: as it was loaded; no bridge may have been made of it.
        processor: its own; None if it has none.
        origin: where they came from.

    Raises:
        InputError: the model was handed to TransformerLens, which puts modules of its own into it;
            or its processor, once written, cannot be read.
        OutputError: the path holds something, cannot be written, or has no room.
    """
    check_unbridged(model, origin.name)
    with claimed(path) as path:
        needed = sum(p.nbytes for p in {*model.parameters(), *model.buffers()})
        free = shutil.disk_usage(path.parent).free
        if free < needed:
            raise OutputError(
                f"{path} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of the disk are "
                "free. Make room, choose another path, or give a dtype of fewer bytes."
            )
        record = _record(model, origin)

        def write(directory: Path) -> None:
            try:
                model.save_pretrained(directory)
            except SafetensorError as error:  # A disk that is full comes as this.
                raise OSError(None, str(error)) from error
            if processor is not None:
                processor.save_pretrained(directory)
                # Not everything that a .gguf file makes of a vocabulary is read again.
                load_processor(Origin(origin.name, directory, None), model)
            (directory / CONVERSION).write_text(record.model_dump_json(indent=2), encoding="utf-8")

        write_directory(path, write)
    return record


def check_unbridged(model: nn.Module, name: str) -> None:
    """Refuse a model that a bridge was made of, which is no longer HuggingFace's.

    Raises:
        InputError: it holds modules of TransformerLens.
    """
    if any(type(module).__module__.startswith("transformer_lens") for module in model.modules()):
        raise InputError(
            f"a bridge was made of {name}, which put modules of TransformerLens into it. Load it "
            "again for anything else."
        )


def _record(model: PreTrainedModel, origin: Origin) -> Conversion:
    is_gguf, path = not origin.path.is_dir(), origin.path
    files = [path] if is_gguf else [path / name for name in weight_files(origin.name, path)]
    packages = ("lch-plugin", "torch", "transformers", *(("gguf",) if is_gguf else ()))
    return Conversion(
        source=portable(origin.name),
        revision=origin.revision,
        weights={
            file.name: FileRecord(n_bytes=file.stat().st_size, xxh3=hash_file(file))
            for file in files
        },
        dtype=str(model.dtype).removeprefix("torch."),
        versions={name: version(name) for name in packages},
    )

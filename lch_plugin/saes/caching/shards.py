"""The files of a cache: Arrow streams as `datasets` saves them and SAELens reads them.

A row is one sequence: for each hook point an array ``(context_size, d_in)``, and its token ids. A
record batch holds what one forward pass computed. Files appear under their names only when they are
whole and on the disk.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import xxhash
from datasets import Array2D, Features, Value
from jaxtyping import Float, Int
from pydantic import AfterValidator, BaseModel, Field
from torch import Tensor

from lch_plugin.errors import InputError
from lch_plugin.files import hash_file, replace_file, sync_directory
from lch_plugin.records import (
    Count,
    FileName,
    Hash,
    Positive,
    Record,
    check_record,
    read_json,
    reason,
)

#: What a cache is of, and its shards; beside the files that `datasets` knows.
MANIFEST = "manifest.json"
#: The column of token ids, under SAELens' name for it.
TOKEN_IDS = "token_ids"
# What `datasets` says of a cache that has a manifest.
_MADE_HERE = "Values at hook points, written by lch_plugin; manifest.json says of what."
_INFO, _STATE = "dataset_info.json", "state.json"
_MOST_VALUES = 2**31 - 1


@dataclass(frozen=True)
class Shard:
    """One file of a cache, as the manifest has it.

    Attributes:
        file: its name.
        n_sequences: rows in it.
        n_bytes: its size.
        xxh3: of the file; None if nobody has recorded it.
        tokens: xxh3 of the token ids in it; None if nobody has recorded it.
    """

    file: str
    n_sequences: int
    n_bytes: int
    xxh3: str | None = None
    tokens: str | None = None

    def fault(self, directory: Path, *, read: bool) -> str | None:
        """What is wrong with the file, if anything: its size, and if ``read`` its content."""
        try:
            found = (directory / self.file).lstat()
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if not stat.S_ISREG(found.st_mode):
            return "is no plain file"
        n_bytes = found.st_size
        if n_bytes != self.n_bytes:
            return f"has {n_bytes:,} bytes where {self.n_bytes:,} were written"
        if read and self.xxh3 is not None and self.xxh3 != hash_file(directory / self.file):
            return "has other content than was written"
        return None


class _ModelRecord(Record):
    name: str
    revision: str | None
    class_name: Annotated[str, Field(alias="class")]
    weights: Hash
    tokenizer: Hash | None


class _HookRecord(Record):
    d_in: Positive
    centroid: dict[str, Any] | None


class _ShardRecord(Record):
    file: Annotated[str, Field(pattern=r"^data-\d{5,}\.arrow$")]
    n_sequences: Positive
    n_bytes: Positive
    xxh3: Hash
    tokens: Hash


def _each_once(shards: list[_ShardRecord]) -> list[_ShardRecord]:
    names = [shard.file for shard in shards]
    if len(set(names)) < len(names):
        raise ValueError("a file is there twice")
    return shards


class _SettingsRecord(Record):
    context_size: Positive
    dtype: Literal["float32", "float16"]
    seed: int | None
    batch_size: Positive
    batches_per_shard: Positive
    prepend_bos: bool
    sequence_separator_token: int | str | None
    disable_concat_sequences: bool
    use_chat_formatting: bool


class Manifest(Record):
    """What a cache is of, and its shards."""

    model: _ModelRecord
    hooks: Annotated[dict[str, _HookRecord], Field(min_length=1)]
    settings: _SettingsRecord
    n_tokens: Positive | None
    dataset: dict[str, str | None]
    versions: dict[str, str]
    n_sequences: Count | None
    shards: Annotated[list[_ShardRecord], AfterValidator(_each_once)]
    xxh3: Hash


class _DataFile(BaseModel):
    filename: FileName


class _State(BaseModel):
    """Of what `datasets` says of its files, what is read here."""

    data_files: Annotated[list[_DataFile], Field(alias="_data_files")]


def features(context_size: int, d_in: Mapping[str, int], dtype: str) -> Features:
    """The columns of a cache, as SAELens declares them."""
    columns: dict[str, Any] = {
        hook: Array2D(shape=(context_size, width), dtype=dtype) for hook, width in d_in.items()
    }
    columns[TOKEN_IDS] = datasets.Sequence(Value("int32"), length=context_size)
    return Features(columns)


def record_batch(
    columns: Features,
    tokens: Int[Tensor, "n pos"],
    values: Mapping[str, Float[Tensor, "n pos _"]],
) -> pa.RecordBatch:
    """Rows of a shard; values on the CPU are not copied.

    Raises:
        InputError: more values at one hook point than Arrow counts in 32 bits.
    """
    schema = columns.arrow_schema
    for name, x in values.items():
        if x.numel() > _MOST_VALUES:
            raise InputError(
                f"{name} has {tuple(x.shape)} values in a batch, more than the {_MOST_VALUES:,} "
                "that Arrow counts. Lower batch_size."
            )
    arrays = [_array_2d(values[name].numpy(), schema.field(name).type) for name in values]
    ids = pa.array(tokens.numpy().astype(np.int32).reshape(-1))
    arrays.append(pa.FixedSizeListArray.from_arrays(ids, tokens.shape[1]))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _array_2d(x: np.ndarray[Any, np.dtype[Any]], kind: pa.ExtensionType) -> pa.ExtensionArray:
    n, pos, width = x.shape
    by_position = pa.array(np.arange(n * pos + 1) * width, pa.int32())
    by_row = pa.array(np.arange(n + 1) * pos, pa.int32())
    rows = pa.ListArray.from_arrays(by_position, pa.array(x.reshape(-1)))
    return pa.ExtensionArray.from_storage(kind, pa.ListArray.from_arrays(by_row, rows))


def write_shard(
    path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]
) -> tuple[int, str]:
    """Write record batches as they come to a file that appears when it is whole.

    Returns:
        Its size in bytes, and its xxh3.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            sink = _Hashed(file)
            with pa.ipc.new_stream(pa.PythonFile(sink, "w"), schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
            n_bytes = file.tell()
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)
    sync_directory(path.parent)
    return n_bytes, sink.xxh3.hexdigest()


class _Hashed:
    """A file that hashes what is written to it."""

    closed = False

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file
        self.xxh3 = xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        self.xxh3.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def write_index(directory: Path, columns: Features, shards: Sequence[Shard]) -> None:
    """Write what makes shards a dataset that `datasets.load_from_disk` reads."""
    content = xxhash.xxh3_64("".join(str(shard.xxh3) for shard in shards).encode())
    state: dict[str, Any] = {
        "_data_files": [{"filename": shard.file} for shard in shards],
        "_fingerprint": content.hexdigest(),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    datasets.DatasetInfo(_MADE_HERE, features=columns).write_to_directory(str(directory))
    replace_file(directory / _STATE, json.dumps(state, indent=2))


def read_index(directory: Path, cure: str) -> tuple[Features, list[str]]:
    """Columns and files of a dataset that was saved to disk.

    Raises:
        InputError: there is none, its files are damaged, or it is one of ours that has lost its
            manifest.
    """
    state = check_record(read_json(directory / _STATE, cure), _State, str(directory / _STATE), cure)
    read_json(directory / _INFO, cure)
    try:
        info = datasets.DatasetInfo.from_directory(str(directory))
    except Exception as error:  # Of many types, and all of them about the file.
        raise InputError(f"{directory / _INFO} is damaged: {reason(error)}. {cure}") from error
    if not isinstance(info.features, Features):
        raise InputError(f"{directory / _INFO} names no columns. {cure}")
    if info.description == _MADE_HERE and not os.path.lexists(directory / MANIFEST):
        raise InputError(f"{directory} has lost its {MANIFEST}. {cure}")
    return info.features, [entry.filename for entry in state.data_files]


def read_manifest(directory: Path, cure: str) -> dict[str, Any] | None:
    """What a cache is of; None where there is no manifest.

    Raises:
        InputError: there is one, of something else, damaged or edited.
    """
    if not os.path.lexists(directory / MANIFEST):
        return None
    path = directory / MANIFEST
    content = read_json(path, cure)
    check_record(content, Manifest, str(path), cure)
    if content["xxh3"] != _hash_manifest(content):
        raise InputError(f"{path} has other content than was written. {cure}")
    found: dict[str, Any] = content
    return found


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write or replace what a cache is of, with its own hash.

    Raises:
        OSError: the disk refuses.
    """
    content = {**manifest, "xxh3": _hash_manifest(manifest)}
    replace_file(directory / MANIFEST, json.dumps(content, indent=2))


def _hash_manifest(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "xxh3"}
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_ours(name: str) -> bool:
    """Whether a file in a cache is one that writing it makes."""
    return re.fullmatch(r"data-\d{5,}\.arrow(\.tmp)?|\.lock", name) is not None


def read_shard(path: Path) -> list[pa.RecordBatch]:
    """Map a shard into memory: nothing is read before it is used."""
    with pa.memory_map(str(path)) as source:  # The mapping outlives the open file.
        return list(pa.ipc.open_stream(source))


def column(batch: pa.RecordBatch, name: str) -> np.ndarray[Any, np.dtype[Any]]:
    """Values ``(n, context_size, d_in)`` or token ids ``(n, context_size)``, not copied."""
    array = batch.column(name)
    if name != TOKEN_IDS:
        return array.to_numpy()  # By `datasets`, whose extension type it is.
    return array.flatten().to_numpy().reshape(len(array), -1)


def hash_tokens(tokens: np.ndarray[Any, np.dtype[Any]]) -> str:
    """xxh3 of token ids ``(n, pos)`` and their shape."""
    xxh3 = xxhash.xxh3_128(repr(tokens.shape).encode())
    xxh3.update(tokens.astype(np.int32).tobytes())
    return xxh3.hexdigest()

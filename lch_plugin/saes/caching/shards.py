"""The files of a cache: Arrow streams as `datasets` saves them and SAELens reads them.

A row is one sequence: for each hook point an array ``(context_size, d_in)``, and its token ids. A
record batch holds what one forward pass computed. Files appear under their names only when they are
whole and on the disk.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import xxhash
from datasets import Array2D, Features, Value
from jaxtyping import Float, Int
from torch import Tensor

from lch_plugin.errors import InputError

#: What a cache is of, and its shards; beside the files that `datasets` knows.
MANIFEST = "manifest.json"
#: The column of token ids, under SAELens' name for it.
TOKEN_IDS = "token_ids"
_INFO, _STATE = "dataset_info.json", "state.json"
_BLOCK = 2**24
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
            n_bytes = (directory / self.file).stat().st_size
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if n_bytes != self.n_bytes:
            return f"has {n_bytes:,} bytes where {self.n_bytes:,} were written"
        if read and self.xxh3 is not None and self.xxh3 != hash_file(directory / self.file):
            return "has other content than was written"
        return None


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
    _move(temporary, path)
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


def write_text(path: Path, text: str) -> None:
    """Write or replace a file in one step."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _move(temporary, path)


def _move(temporary: Path, path: Path) -> None:
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """See that names given and taken in a directory are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    datasets.DatasetInfo(features=columns).write_to_directory(str(directory))
    write_text(directory / _STATE, json.dumps(state, indent=2))


def read_index(directory: Path) -> tuple[Features, list[str]]:
    """Columns and files of a dataset that was saved to disk.

    Raises:
        OSError, ValueError, KeyError, TypeError: there is none, or its files are damaged.
    """
    state = json.loads((directory / _STATE).read_text(encoding="utf-8"))
    info = datasets.DatasetInfo.from_directory(str(directory))
    return info.features, [entry["filename"] for entry in state["_data_files"]]


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """What a cache is of; None where there is no manifest.

    Raises:
        ValueError: there is one, of something else or damaged.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or "shards" not in manifest:
        raise ValueError(f"{MANIFEST} is none of a cache")
    return manifest


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


def hash_file(path: Path) -> str:
    """xxh3 of a file, read a block at a time."""
    xxh3 = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            xxh3.update(block)
    return xxh3.hexdigest()


def hash_tokens(tokens: np.ndarray[Any, np.dtype[Any]]) -> str:
    """xxh3 of token ids ``(n, pos)`` and their shape."""
    xxh3 = xxhash.xxh3_128(repr(tokens.shape).encode())
    xxh3.update(tokens.astype(np.int32).tobytes())
    return xxh3.hexdigest()

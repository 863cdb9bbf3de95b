"""Text from wherever it is kept, as a dataset that a model can read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, TypeAlias

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from pyarrow import compute, types

from lch_plugin.adapters.transformer_lens import LensModel, check_token_ids
from lch_plugin.errors import InputError
from lch_plugin.saes.sources.hooked import HookedModel
from lch_plugin.saes.sources.hooks import d_vocab

Source: TypeAlias = (
    str | Path | Sequence[str] | Dataset | IterableDataset | DatasetDict | IterableDatasetDict
)

# Files that `datasets` reads, and its name for each kind.
_KINDS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# Columns that SAELens reads, in its order.
_TOKEN_COLUMNS = ("tokens", "input_ids")
_COLUMNS = (*_TOKEN_COLUMNS, "text", "problem")
_CHAT_COLUMNS = ("conversation", "conversations", "messages", "text")
_FORMS = (
    "What can be read is a dataset on the Hugging Face hub by its name (or name:configuration), a "
    f"directory written by save_to_disk, and a file of a kind among {', '.join(_KINDS)}"
)


def load_text(source: Source, *, split: str = "train", streaming: bool = False) -> Any:
    """A dataset of text or tokens, as SAELens takes them.

    A string names a path if it exists, starts with ``/``, ``.`` or ``~``, or ends like a file that
    can be read; any other is a name on the hub.

    Args:
        source: a dataset of the `datasets` library, which is returned as it is; a list of texts; a
            directory written by ``save_to_disk``; a file: ``.txt``, in which each line is a text,
            or ``.json``, ``.jsonl``, ``.csv`` or ``.parquet`` with a column that SAELens reads,
            such as ``text`` or ``tokens``; or a name on the hub, ``name:configuration`` if it has
            several.
        split: of a dataset on the hub, or of a directory that holds several.
        streaming: read a file or the hub as it is needed, in place of all of it at once. What is
            in memory or was saved to disk is not copied in any case.

    Returns:
        A ``Dataset``, or if it is streamed an ``IterableDataset``.

    Raises:
        InputError: nothing there or nothing in it, several splits of which none was chosen, or
            something else than text.

    Example:
        >>> texts = lch.saes.load_text("monology/pile-uncopyrighted", streaming=True)
    """
    if isinstance(source, DatasetDict | IterableDatasetDict):
        if list(source) != ["train"]:
            raise InputError(f"the dataset has the splits {list(source)}: pass one of them.")
        source = source["train"]
    if isinstance(source, Dataset | IterableDataset):
        return source
    if isinstance(source, str | Path):
        return _load(source, split, streaming)
    if not isinstance(source, Sequence) or not all(isinstance(text, str) for text in source):
        raise InputError(
            f"the text is a {type(source).__name__}, which is no text. {_FORMS}, and a list of "
            "strings."
        )
    if not any(text.strip() for text in source):
        raise InputError(f"there is no text among the {len(source)} given.")
    return Dataset.from_dict({"text": list(source)})


def _load(source: str | Path, split: str, streaming: bool) -> Any:
    name, path = str(source), Path(source).expanduser()
    is_path = isinstance(source, Path) or name.startswith(("/", ".", "~")) or path.suffix in _KINDS
    try:
        is_directory, is_there = path.is_dir(), path.exists()
    except OSError as error:
        raise InputError(
            f"{shortened(name)} cannot be a path: {error.strerror}. {_FORMS}. Texts are given as a "
            "list."
        ) from error
    if is_directory:
        return _from_disk(path, split)
    if is_there:
        if path.suffix not in _KINDS:
            raise InputError(f"{name} is a file of a kind that cannot be read. {_FORMS}.")
        if not path.stat().st_size:
            raise InputError(f"{name} is empty. Give a file with text in it.")
        kind, wanted, files = _KINDS[path.suffix], "train", str(path)
    elif is_path:
        raise InputError(f"{name} does not exist. Check the path. {_FORMS}.")
    else:
        kind, wanted, files = name, split, None
    repository, _, configuration = kind.partition(":")
    try:
        return datasets.load_dataset(
            repository, configuration or None, data_files=files, split=wanted, streaming=streaming
        )
    except Exception as error:  # Of many libraries' types, all of them about the source.
        raise InputError(f"{name} cannot be read: {error} {_FORMS}.") from error


def _from_disk(path: Path, split: str) -> Dataset:
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # Of any type, and all of them about the files.
        raise InputError(
            f"{path} is no directory that save_to_disk wrote: {error} {_FORMS}."
        ) from error
    if isinstance(found, DatasetDict):
        if split not in found:
            raise InputError(f"{path} has the splits {list(found)}, and no {split!r}.")
        found = found[split]
    return found


def check_dataset(
    model: LensModel | HookedModel,
    dataset: Dataset | IterableDataset,
    context_size: int,
    use_chat_formatting: bool = False,
) -> None:
    """Refuse a dataset without text or tokens, or with tokens that the model cannot read.

    Raises:
        InputError: it is one; of a stream this is seen by its first row.
    """
    if not isinstance(dataset, Dataset):
        dataset = Dataset.from_list(list(dataset.take(1)))
    readable = _CHAT_COLUMNS if use_chat_formatting else _COLUMNS
    columns = [c for c in readable if c in dataset.column_names]
    if len(dataset) == 0 or not columns:
        cure = "" if use_chat_formatting else " Conversations need use_chat_formatting=True."
        raise InputError(
            f"the dataset has {len(dataset)} rows and columns {dataset.column_names}: rows with "
            f"one of the columns {readable} are needed.{cure}"
        )
    if columns[0] not in _TOKEN_COLUMNS:
        return
    for batch in dataset.with_format("arrow").iter(10_000):
        rows = batch[columns[0]]
        is_list = types.is_list(rows.type) or types.is_large_list(rows.type)
        if not (is_list or types.is_fixed_size_list(rows.type)) or not (
            types.is_integer(rows.type.value_type) and rows.null_count == 0
        ):
            raise InputError(
                f"column {columns[0]!r} of the dataset holds {rows.type} with {rows.null_count} "
                "missing rows; each row has to be a list of integers."
            )
        shortest = compute.min(compute.list_value_length(rows)).as_py()
        if shortest < context_size:
            raise InputError(
                f"a row of the dataset has {shortest} tokens, fewer than "
                f"context_size={context_size}. Lower context_size, or tokenise into longer rows."
            )
        ids = compute.min_max(compute.list_flatten(rows)).as_py()
        check_token_ids(d_vocab(model), ids["min"], ids["max"])

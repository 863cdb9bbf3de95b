"""Text from wherever it is kept, as a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from lch_plugin.errors import InputError

Source: TypeAlias = (
    str | Path | Sequence[str] | Dataset | IterableDataset | DatasetDict | IterableDatasetDict
)

# Files that `datasets` reads, and its name for each kind.
_KINDS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
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
    if path.is_dir():
        return _from_disk(path, split)
    if path.exists():
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

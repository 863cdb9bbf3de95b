"""Text from wherever it is kept, as a dataset that a model can read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from pyarrow import compute, types
from torch import Tensor

from lch_plugin.adapters.transformer_lens import LensModel, check_token_ids
from lch_plugin.errors import InputError
from lch_plugin.saes.sources.hook_points import d_vocab
from lch_plugin.saes.sources.hooked_model import HookedModel

Source: TypeAlias = (
    str
    | Path
    | Sequence[str | None]
    | Dataset
    | IterableDataset
    | DatasetDict
    | IterableDatasetDict
)

# Files that `datasets` reads, and its name for each kind.
_KINDS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# Columns that SAELens reads, in its order.
_TOKEN_COLUMNS = ("tokens", "input_ids")
_COLUMNS = (*_TOKEN_COLUMNS, "text", "problem")
_CHAT_COLUMNS = ("conversation", "conversations", "messages", "text")
# What a row can hold, by the name of the column in which SAELens takes it.
_KINDS_OF_ROWS = {
    "text": "text",
    "tokens": "list of integers",
    "messages": "list of messages that each have role and content",
    # Labelled inputs alone.
    "words": "list of words",
    "image": "image",
}
_READABLE = ("text", "tokens", "messages")
_MESSAGE = ("role", "content")
_ROWS_AT_ONCE = 10_000
_FORMS = (
    "What can be read is a dataset on the Hugging Face hub by its name (or name:configuration), a "
    f"directory written by save_to_disk, and a file of a kind among {', '.join(_KINDS)}"
)


def load_text(
    source: Source,
    *,
    split: str = "train",
    streaming: bool = False,
    column: str | None = None,
    skip_empty: bool = False,
) -> Any:
    """A dataset of text or tokens, as SAELens takes them.

    Rows that are null, empty or of another kind are refused by what reads them: of a dataset in
    memory before anything starts, of a stream as they come. With ``column`` or ``skip_empty``, and
    of a list of texts, they are refused here.

    A string names a path if it exists, starts with ``/``, ``.`` or ``~``, or ends like a file that
    can be read; any other is a name on the hub.

    Args:
        source: a dataset of the `datasets` library, which is returned as it is; a list of texts; a
            directory written by ``save_to_disk``; a file: ``.txt``, in which each line that is not
            blank is a text, or ``.json``, ``.jsonl``, ``.csv`` or ``.parquet`` with a column that
            SAELens reads, such as ``text`` or ``tokens``; or a name on the hub,
            ``name:configuration`` if it has several.
        split: of a dataset on the hub, or of a directory that holds several.
        streaming: read a file or the hub as it is needed, in place of all of it at once. What is
            in memory or was saved to disk is not copied in any case.
        column: what to read, whatever its name: texts, lists of token ids, or conversations as
            lists of messages. What is returned has it alone, as ``text``, ``tokens`` or
            ``messages``. If None, the names that SAELens knows decide.
        skip_empty: leave out rows that are null, empty or white space. A warning says how many; of
            a stream so far, with the first, the tenth, the hundredth and so on.

    Returns:
        A ``Dataset``, or if it is streamed an ``IterableDataset``.

    Raises:
        InputError: nothing there or nothing in it, several splits of which none was chosen, no such
            column, or something else than text.

    Example:
        >>> texts = lch.saes.load_text("monology/pile-uncopyrighted", streaming=True)
    """
    data = _read(source, split, streaming, skip_empty)
    return data if column is None and not skip_empty else _settled(data, column, skip_empty)


def _read(source: Source, split: str, streaming: bool, skip_empty: bool) -> Any:
    """What a source holds, as it is; of a list texts alone, and with ``skip_empty`` empty rows."""
    if isinstance(source, DatasetDict | IterableDatasetDict):
        if list(source) != ["train"]:
            raise InputError(f"the dataset has the splits {list(source)}: pass one of them.")
        source = source["train"]
    if isinstance(source, Dataset | IterableDataset):
        return source
    if isinstance(source, str | Path):
        found = _load(source, split, streaming)
        found.info.description = str(source)  # For records of what was run on it.
        return found
    if not isinstance(source, Sequence):
        raise InputError(
            f"the text is a {type(source).__name__}, which is no text. {_FORMS}, and a list of "
            "strings."
        )
    if all(map(is_empty, source)):
        raise InputError(f"there is no text among the {len(source)} given.")
    check = _Rows("", ("text",), skip_empty)
    for i, text in enumerate(source):
        check(text, i)
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
        found = datasets.load_dataset(
            repository, configuration or None, data_files=files, split=wanted, streaming=streaming
        )
    except Exception as error:  # Of many libraries' types, all of them about the source.
        raise InputError(f"{name} cannot be read: {error} {_FORMS}.") from error
    return _without_blank_lines(found, name) if kind == _KINDS[".txt"] else found


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


def _without_blank_lines(data: Any, name: str) -> Any:
    """A file's lines that are texts, and not what stands between them."""
    if not isinstance(data, Dataset):
        return data.filter(lambda row: not is_empty(row["text"]))
    kept = _not_empty(data, "text")
    if not len(kept):
        raise InputError(f"{name} has no text in any line. Give a file with some.")
    return data if len(kept) == len(data) else data.select(kept)


def _settled(data: Any, column: str | None, skip_empty: bool) -> Any:
    """Rows looked through, and the column that was named, if one was, as SAELens takes it."""
    is_stream = not isinstance(data, Dataset)
    rows = iter(data) if is_stream else iter(())
    first: Any = next(rows, {})
    names = list(first) if is_stream else data.column_names
    read = column or next((c for c in (*_COLUMNS, *_CHAT_COLUMNS) if c in names), None)
    if read is None or read not in names:
        raise InputError(
            f"the dataset has columns {names}, of which none is {read or _COLUMNS!r}. Name the one "
            "of texts as column (--column)."
        )
    if is_stream:
        if skip_empty and is_empty(first[read]):
            first = next((row for row in rows if not is_empty(row.get(read))), None)
        kind = None if first is None else _kind(first[read])
    else:
        kind = _kind_of_column(data.data.schema.field(read).type)
    looked_at = _Rows(read, (kind,) if kind in _READABLE else _READABLE, skip_empty)
    data = looked_at.of(data, first if is_stream else None)
    if column is None or kind not in _READABLE:
        return data
    data = data.select_columns([column])
    return data if column == kind else data.rename_column(column, kind)


def check_dataset(
    model: LensModel | HookedModel,
    dataset: Dataset | IterableDataset,
    context_size: int,
    use_chat_formatting: bool = False,
) -> Any:
    """Refuse a dataset with rows that are no text or tokens, or tokens that the model cannot read.

    Returns:
        The dataset; a stream as one whose rows are looked at as they come.

    Raises:
        InputError: it is one; of a stream its first row is seen now.
    """
    is_stream = not isinstance(dataset, Dataset)
    first = next(iter(dataset), None) if is_stream else None
    names = list(first or {}) if is_stream else dataset.column_names
    n_rows = int(first is not None) if is_stream else len(dataset)
    readable = _CHAT_COLUMNS if use_chat_formatting else _COLUMNS
    column = next((c for c in readable if c in names), None)
    if n_rows == 0 or column is None:
        # SAELens' configuration holds a dataset for tokenised until it is told otherwise.
        chat = (
            " Conversations need use_chat_formatting=True, in SAELens' configuration together with "
            "is_dataset_tokenized=False, and a tokenizer with a chat template."
        )
        raise InputError(
            f"the dataset has {n_rows} rows and columns {names}: rows with one of the columns "
            f"{readable} are needed. Name another column with load_text(..., column=...) "
            f"(--column).{'' if use_chat_formatting else chat}"
        )
    if use_chat_formatting and not getattr(model.tokenizer, "chat_template", None):
        raise InputError(
            "use_chat_formatting=True, but the model's tokenizer has no chat template. Set "
            "model.tokenizer.chat_template, or take a model that was trained on conversations."
        )
    # With chat formatting SAELens takes a text as what a user says.
    kinds = ("messages", "text") if use_chat_formatting else ("text",)
    if column in _TOKEN_COLUMNS:
        kinds = ("tokens",)
    rows = _Rows(column, kinds, n_tokens=context_size, d_vocab=d_vocab(model))
    return rows.of(dataset, first)


def check_inputs(dataset: Dataset, column: str, skip_empty: bool = False) -> Dataset:
    """Refuse a row without a labelled input: a text, a list of words, or what can be an image.

    Returns:
        The dataset; with ``skip_empty`` without such rows, and a warning says how many.

    Raises:
        InputError: there is one, or the column holds numbers.
    """
    kind = dataset.data.schema.field(column).type
    is_image = types.is_struct(kind) or isinstance(kind, pa.BaseExtensionType)
    is_image |= _is_list(kind) and not types.is_string(kind.value_type)
    return _Rows(column, ("image",) if is_image else ("text", "words"), skip_empty).of(dataset)


@dataclass
class _Rows:
    """What the rows of a column have to be; called with a row's value and number to look at it.

    Attributes:
        column: its name; empty of a list.
        kinds: among those of `_KINDS_OF_ROWS`, what a row may hold.
        skip_empty: whether rows that hold nothing are left out, in place of refused.
        n_tokens: how many a row of tokens has at least.
        d_vocab: token ids are below it.
    """

    column: str
    kinds: tuple[str, ...]
    skip_empty: bool = False
    n_tokens: int = 1
    d_vocab: int | None = None
    _n_left_out: int = 0

    def of(self, data: Any, first: Any = None) -> Any:
        """The rows of a dataset without those left out; of a stream they are looked at later.

        Args:
            data: in memory or a stream.
            first: of a stream the first row that is not left out, which is looked at now.

        Raises:
            InputError: a row that is none of the kinds, or no row.
        """
        if not isinstance(data, Dataset):
            if first is not None:
                self._row(first, 0)
            return data.filter(self._row, with_indices=True)
        column = data.select_columns([self.column]).with_format(None)
        for start, rows in _arrays(data, self.column):
            suspects = self._suspects(rows)
            if self.skip_empty:
                suspects &= ~_empty(rows)
            for i in np.flatnonzero(suspects).tolist():
                self(column[start + i][self.column], start + i)
        kept = _not_empty(data, self.column) if self.skip_empty else range(len(data))
        if len(kept) == len(data):
            return data
        if not len(kept):
            raise InputError(
                f"none of the {len(data)} rows of the dataset has text in column {self.column!r}. "
                "Name another as column (--column), or give a dataset with some."
            )
        self._warn(f"{len(data) - len(kept):,} of {len(data):,} rows")
        return data.select(kept)

    def __call__(self, value: Any, index: int) -> bool:
        """Whether a row is read, and not left out.

        Raises:
            InputError: it is none of the kinds.
        """
        if is_empty(value):
            if self.skip_empty:
                return False
            cure = "Leave such rows out with load_text(..., skip_empty=True)"
            raise self._error(index, "missing" if value is None else "empty", value, cure)
        kind = _kind(value)
        if kind not in self.kinds:
            raise self._error(index, "wrong", value, "Leave such rows out")
        if kind == "tokens":
            if len(value) < self.n_tokens:
                raise InputError(
                    f"row {index} of the dataset has {len(value)} tokens, fewer than the "
                    f"{self.n_tokens} of context_size. Lower it, or tokenise into longer rows."
                )
            if self.d_vocab is not None:
                ids = np.asarray(value)
                try:
                    check_token_ids(self.d_vocab, int(ids.min()), int(ids.max()))
                except InputError as error:
                    raise InputError(f"row {index} of the dataset: {error}") from None
        return True

    def _row(self, row: Mapping[str, Any], index: int) -> bool:
        """As a call, with a row of a stream."""
        if self.column not in row:
            raise InputError(
                f"row {index} of the dataset has no column {self.column!r}, but {list(row)}. Give "
                "a stream whose rows all have it."
            )
        if index == 0:  # Each pass over a stream counts anew.
            self._n_left_out = 0
        is_read = self(row[self.column], index)
        if not is_read:
            self._n_left_out += 1
            n = self._n_left_out
            if n == 10 ** (len(str(n)) - 1):  # How many it will be, nobody knows.
                self._warn(f"{n:,} of the first {index + 1:,} rows")
        return is_read

    def _suspects(self, rows: Any) -> np.ndarray:
        """Which rows of an array of arrow's need a closer look, found without one at each."""
        if self.kinds == ("image",):  # Whether it is one is for the model's processor to say.
            return _empty(rows)
        kind = _kind_of_column(rows.type)
        if kind not in self.kinds or (rows.null_count and types.is_fixed_size_list(rows.type)):
            return np.ones(len(rows), dtype=bool)
        found = _empty(rows)
        if kind == "text":
            return found
        each = compute.list_flatten(rows)
        if kind == "tokens":
            found |= _mask(compute.less(compute.list_value_length(rows), self.n_tokens))
            ids = compute.min_max(each).as_py()
            is_known = self.d_vocab is None or ids["min"] is None
            if not each.null_count and (is_known or 0 <= ids["min"] <= ids["max"] < self.d_vocab):
                return found
            bad = compute.is_null(each)
            if self.d_vocab is not None:
                bad = compute.or_kleene(bad, compute.less(each, 0))
                bad = compute.or_kleene(bad, compute.greater_equal(each, self.d_vocab))
        elif kind == "words":
            bad = compute.is_null(each)
        else:
            if not all(rows.type.value_type.get_field_index(name) >= 0 for name in _MESSAGE):
                return np.ones(len(rows), dtype=bool)
            bad = pa.array(np.zeros(len(each), dtype=bool))
            for name in _MESSAGE:
                bad = compute.or_(bad, compute.is_null(compute.struct_field(each, name)))
        found[compute.list_parent_indices(rows).filter(bad).to_numpy()] = True
        return found

    def _error(self, index: int, state: str, value: Any, cure: str) -> InputError:
        if not self.column:
            whole, where, other = "the text is a list, and has", "", ""
        else:
            whole, where = "the dataset has", f" in column {self.column!r}"
            other = ", or name another column with load_text(..., column=...) (--column)"
        wanted = " or ".join(_KINDS_OF_ROWS[kind] for kind in self.kinds)
        return InputError(
            f"{whole} row {index} {state}{where}: {shortened(value)} is no {wanted}. {cure}{other}."
        )

    def _warn(self, which: str) -> None:
        warnings.warn(
            f"{which} have no text in column {self.column!r} and are left out.", stacklevel=2
        )


def _arrays(data: Dataset, column: str) -> Iterator[tuple[int, Any]]:
    """A column as arrays of arrow's, each with the number of its first row."""
    batches = data.select_columns([column]).with_format("arrow").iter(_ROWS_AT_ONCE)
    for i, batch in enumerate(batches):
        yield i * _ROWS_AT_ONCE, batch[column].combine_chunks()


def _not_empty(data: Dataset, column: str) -> np.ndarray:
    """Numbers of the rows that hold something."""
    found = [start + np.flatnonzero(~_empty(rows)) for start, rows in _arrays(data, column)]
    return np.concatenate([np.empty(0, dtype=int), *found])


def is_empty(value: Any) -> bool:
    """Whether a row holds nothing: null, white space, or no items."""
    if isinstance(value, str):
        return not value or value.isspace()
    return value is None or (hasattr(value, "__len__") and not _is_scalar(value) and not len(value))


def _is_scalar(value: Any) -> bool:
    """Whether it is a tensor or array of one number, without a length."""
    return getattr(value, "shape", None) == ()


def _empty(rows: Any) -> np.ndarray:
    """As `is_empty`, of each row of an array of arrow's."""
    found = compute.is_null(rows)
    if _kind_of_column(rows.type) == "text":
        is_blank = compute.or_(compute.equal(rows, ""), compute.utf8_is_space(rows))
        found = compute.or_kleene(found, is_blank)
    elif _is_list(rows.type):
        found = compute.or_kleene(found, compute.equal(compute.list_value_length(rows), 0))
    return _mask(found)


def _mask(found: Any) -> np.ndarray:
    return compute.fill_null(found, True).to_numpy(zero_copy_only=False)


def _is_list(kind: Any) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _kind_of_column(kind: Any) -> str | None:
    """What rows of a type of arrow's hold, as `_kind`."""
    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    if not _is_list(kind):
        return None
    if types.is_struct(kind.value_type):
        return "messages"
    if types.is_string(kind.value_type) or types.is_large_string(kind.value_type):
        return "words"
    return "tokens" if types.is_integer(kind.value_type) else None


def _kind(value: Any) -> str | None:
    """What a row that is not empty holds, one of `_KINDS_OF_ROWS`; None if it is none of them."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list | tuple | np.ndarray | Tensor) or _is_scalar(value):
        return None
    if all(isinstance(each, Mapping) for each in value):
        return "messages" if all(map(_is_message, value)) else None
    if all(isinstance(each, str) for each in value):
        return "words"
    try:
        ids = np.asarray(value)
    except (TypeError, ValueError):  # Lists in it, of different lengths.
        return None
    return "tokens" if ids.ndim == 1 and ids.dtype.kind in "iu" else None


def _is_message(message: Mapping[str, Any]) -> bool:
    # One that calls a tool says nothing.
    is_said = message.get("content") is not None or bool(message.get("tool_calls"))
    return message.get("role") is not None and is_said

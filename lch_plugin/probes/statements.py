"""Labelled statements, from a CSV file or a data set, checked before any model is loaded."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from jaxtyping import Int
from sklearn.model_selection import train_test_split

from lch_plugin.errors import InputError

#: Of each label, so that a fifth of them leaves at least one of each to test on.
FEWEST = 5
_COLUMNS = ("statement", "label")
_LARGEST = 500_000_000  # bytes


@dataclass(frozen=True, eq=False)
class Statements:
    """Statements that differ from each other, and whether each is true.

    Attributes:
        name: of the set.
        texts: the statements, without white space around them.
        labels: 1 for true and 0 for false, in the order of the texts.
        n_repeats: rows that said a statement again and were left out.
    """

    name: str
    texts: tuple[str, ...]
    labels: Int[np.ndarray, " n"]
    n_repeats: int = 0

    def __len__(self) -> int:
        return len(self.texts)


def read_statements(
    source: str | os.PathLike[str] | Dataset, name: str | None = None
) -> Statements:
    """Statements with their labels, each statement once.

    A statement that is in several rows is kept once, so that no split can have it on both sides.

    Args:
        source: a CSV file in UTF-8, or a ``datasets.Dataset``, with the columns ``statement`` and
            ``label`` (0 or 1); other columns do not matter.
        name: of the set; of a file its name without the ending if None.

    Raises:
        InputError: no such file or columns, an empty statement, a label that is not 0 or 1, a
            statement with both labels, or fewer than `FEWEST` statements of a label.

    Example:
        >>> rows = Dataset.from_dict({"statement": list("abcdefghij"), "label": [0, 1] * 5})
        >>> len(lch.probes.read_statements(rows, "letters"))
        10
    """
    if isinstance(source, Dataset):
        name = name or "statements"
        columns, where = list(source.column_names), f"the data set {name}"
        rows = [] if _missing(columns) else list(source.select_columns(list(_COLUMNS)))
    else:
        path = Path(source)
        name = name or path.stem
        where = str(path)
        columns, rows = _of_csv(path)
    if missing := _missing(columns):
        raise InputError(
            f"{where} has no column {' and no '.join(map(repr, missing))}, only "
            f"{', '.join(map(repr, columns)) or 'nothing'}. It needs statement and label."
        )
    return _checked(name, where, rows)


def sample(statements: Statements, n: int, seed: int) -> Statements:
    """At most ``n`` of the statements, with both labels as often as in all of them.

    Raises:
        InputError: so few that a label has fewer than `FEWEST`.
    """
    if n >= len(statements):
        return statements
    kept = np.arange(len(statements))
    if n >= 2 * FEWEST:
        kept, _ = train_test_split(
            kept, train_size=n, stratify=statements.labels, random_state=seed
        )
    labels = statements.labels[kept]
    if n < 2 * FEWEST or min(np.bincount(labels, minlength=2)) < FEWEST:
        raise InputError(
            f"{n} statements of {statements.name} are too few: each label needs {FEWEST} of them."
        )
    texts = tuple(statements.texts[i] for i in kept)
    return Statements(statements.name, texts, labels, statements.n_repeats)


def check_apart(sets: Sequence[Statements]) -> None:
    """Refuse sets that a probe cannot be trained on one of and tested on the other.

    Raises:
        InputError: two sets of one name, or a statement that is in two sets.
    """
    owner: dict[str, str] = {}
    for i, one in enumerate(sets):
        if one.name in (other.name for other in sets[:i]):
            raise InputError(f"two sets are called {one.name}: give each once, under its own name.")
        if shared := [text for text in one.texts if text in owner]:
            raise InputError(
                f"{len(shared)} statements of {one.name} are in {owner[shared[0]]} too, such as "
                f"{_short(shared[0])}: take them out of one."
            )
        owner |= dict.fromkeys(one.texts, one.name)


def _missing(columns: Sequence[str]) -> list[str]:
    return [name for name in _COLUMNS if name not in columns]


def _of_csv(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    if not path.is_file():
        raise InputError(f"{path} is no file. Name a CSV file with the columns statement, label.")
    if path.stat().st_size > _LARGEST:
        raise InputError(f"{path} has more than {_LARGEST // 10**6} MB: split it.")
    try:
        reader = csv.DictReader(StringIO(path.read_text("utf-8-sig"), newline=""), strict=True)
        return list(reader.fieldnames or ()), list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV in UTF-8: {error}.") from error


def _checked(name: str, where: str, rows: list[dict[str, Any]]) -> Statements:
    labels: dict[str, int] = {}
    for i, row in enumerate(rows, 1):
        text, label = row["statement"], row["label"]
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where}: row {i} has no statement. Fill it in, or remove the row.")
        text = text.strip()
        if label not in (0, 1, "0", "1"):
            raise InputError(
                f"{where}: row {i} has the label {label!r}. Labels are 1 (true) and 0 (false)."
            )
        if labels.setdefault(text, int(label)) != int(label):
            raise InputError(
                f"{where}: {_short(text)} is labelled 0 and 1. Remove one of the rows."
            )
    found = np.array(list(labels.values()), dtype=np.int64)
    counts = np.bincount(found, minlength=2)
    if not counts.all():
        raise InputError(
            f"{where} has {len(rows)} rows and none with the label {int(counts.argmin())}. A probe "
            "needs both."
        )
    if counts.min() < FEWEST:
        raise InputError(
            f"{where} has {counts.min()} statements with the label {counts.argmin()}, too few: "
            f"each label needs at least {FEWEST}."
        )
    return Statements(name, tuple(labels), found, len(rows) - len(found))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")

"""Prompts of one's own from a file: a row each, with its twin, its answers and its foils.

CSV with a header, several answers or foils separated by ``|``::

    clean,corrupt,answer,foil
    The capital of France is,The capital of Italy is, Paris, Rome
    The keys to the cabinet,The key to the cabinet, are| were, is| was

or JSON, a list of objects with the same names, whose answers and foils may be lists. Answers and
foils are tokens, with the space before them. ``corrupt`` may be left out of all rows.
"""

from __future__ import annotations

import csv
import os
from io import StringIO
from pathlib import Path
from typing import Any

from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.circuits.prompt_batches import Prompts, prompts
from lch_plugin.errors import InputError
from lch_plugin.metrics import Comparison, logit_difference
from lch_plugin.records import parse_json

_NEEDED, _OPTIONAL = ("clean", "answer", "foil"), "corrupt"
# What a file may hold, in bytes; prompts are written by people, and are few.
_LARGEST = 50_000_000
# How many rows that cannot be used are named.
_N_NAMED = 3


def read_prompts(
    model: LensModel,
    path: str | os.PathLike[str],
    *,
    metric: Comparison = logit_difference,
    batch_size: int = 32,
) -> list[Prompts]:
    """Prompts from a CSV or JSON file, in batches of one length.

    Args:
        model: whose tokenizer is used.
        path: of the file, whose name ends in ``.csv`` or ``.json``.
        metric, batch_size: as `lch_plugin.circuits.prompts`.

    Raises:
        InputError: the file cannot be read as one of the two, names are missing or unknown, or rows
            cannot be used: fields of another type, empty or repeated prompts, pairs of unequal
            length in tokens, answers or foils that are not single tokens. The first rows that
            cannot be used are named, with the reasons.
    """
    rows = read_rows(path)
    wrong = [f"row {i}: {reason}" for i, reason in _unusable(model, rows)]
    if wrong:
        more = f"; and {len(wrong) - _N_NAMED} more" if len(wrong) > _N_NAMED else ""
        named = "; ".join(reason.rstrip(".") for reason in wrong[:_N_NAMED])
        raise InputError(
            f"{path}: {len(wrong)} of {len(rows)} rows cannot be used: {named}{more}. Correct "
            "them, or take them out."
        )
    paired = _OPTIONAL in rows[0]
    return prompts(
        model,
        [row["clean"] for row in rows],
        [_listed(row["answer"]) for row in rows],
        [_listed(row["foil"]) for row in rows],
        [row[_OPTIONAL] for row in rows] if paired else None,
        metric=metric,
        batch_size=batch_size,
    )


def read_rows(file: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a file, all with the same names. No model is needed.

    Raises:
        InputError: the file cannot be read, or names are missing or unknown.
    """
    path = Path(file)
    if path.suffix.lower() not in (".csv", ".json"):
        raise InputError(f"{path} is no .csv or .json file of prompts, going by its name.")
    if not path.is_file():
        raise InputError(f"{path} is no file. Name a .csv or .json file of prompts.")
    if path.stat().st_size > _LARGEST:
        raise InputError(f"{path} has more than {_LARGEST // 10**6} MB: split it.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = _of_csv(text) if path.suffix.lower() == ".csv" else parse_json(text)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} cannot be read: {error}. It has to be UTF-8.") from error
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(
            f"{path} holds no prompts: a row each with the fields {', '.join(_NEEDED)}, and "
            f"{_OPTIONAL} for twins, in CSV under a header, in JSON as a list of objects."
        )
    for i, row in enumerate(rows, 1):
        if row.keys() != rows[0].keys():
            raise InputError(f"{path}: row {i} has other fields than row 1. Give all the same.")
    missing = [name for name in _NEEDED if name not in rows[0]]
    unknown = [str(name) for name in rows[0] if name not in (*_NEEDED, _OPTIONAL)]
    if missing or unknown:
        raise InputError(
            f"{path}: fields {missing} are missing and {unknown} are unknown. Fields are "
            f"{', '.join(_NEEDED)}, and {_OPTIONAL} for twins."
        )
    return rows


def _of_csv(text: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(StringIO(text, newline=""), strict=True)
    names = list(reader.fieldnames or ())
    if len(set(names)) < len(names):
        raise csv.Error(f"the header names a field twice: {', '.join(names)}")
    rows = list(reader)
    for i, row in enumerate(rows, 1):
        # A long row has a list under None, and a short one None for the rest.
        if None in row or None in row.values():
            raise csv.Error(
                f"row {i} has more or fewer fields than the header; put texts with a comma in "
                "double quotes"
            )
    return [
        {
            name: value.split("|") if name in _NEEDED[1:] and value else value
            for name, value in row.items()
        }
        for row in rows
    ]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _unusable(model: LensModel, rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Numbers of the rows that cannot be used, from 1, and why."""
    found: list[tuple[int, str]] = []
    seen: dict[tuple[Any, ...], int] = {}
    for i, row in enumerate(rows, 1):
        texts = [row[name] for name in ("clean", _OPTIONAL) if name in row]
        tokens = [*_listed(row["answer"]), *_listed(row["foil"])]
        if not all(isinstance(text, str) and text for text in texts):
            found.append((i, f"prompts {texts} are not all text"))
        elif not tokens or not all(isinstance(token, str) and token for token in tokens):
            found.append((i, f"answers and foils {tokens} are not all text"))
        elif (first := seen.setdefault(tuple(texts), i)) != i:
            found.append((i, f"the prompts of row {first} again"))
        else:
            try:
                prompts(
                    model,
                    row["clean"],
                    [_listed(row["answer"])],
                    [_listed(row["foil"])],
                    row.get(_OPTIONAL),
                )
            except InputError as error:
                found.append((i, str(error)))
    return found

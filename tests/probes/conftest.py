"""Statements that the embedded model can read."""

from __future__ import annotations

from pathlib import Path

import pytest

VERBS = ("saw", "picked", "bought", "found")
NAMES = ("Tom", "Anna", "Lucy", "Peter", "Eva")


def write(path: Path, rows: list[tuple[str, object]], header: str = "statement,label") -> Path:
    path.write_text("\n".join([header, *(f"{text},{label}" for text, label in rows)]) + "\n")
    return path


def fruit(*verbs: str) -> list[tuple[str, object]]:
    """Whether somebody did it to an apple, and not to a pear."""
    return [
        (f"{name} {verb} {thing} in the {place}.", int(thing == "an apple"))
        for name in NAMES
        for verb in verbs
        for place in ("garden", "park")
        for thing in ("an apple", "a pear")
    ]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three files of statements."""
    sets = {"saw": ("saw",), "picked": ("picked",), "bought": ("bought", "found")}
    return [write(tmp_path / f"{name}.csv", fruit(*verbs)) for name, verbs in sets.items()]

"""The parts of pages that code writes, between two comments each."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tests.docs import capabilities, command_line, layout

DOCS = Path(__file__).parents[2] / "docs"
#: By name: the page, and what writes the part of it.
PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "capabilities": ("reference/adapters.md", capabilities.tables),
    "command line": ("reference/command_line.md", command_line.commands),
    "layout": ("explanation/architecture.md", layout.tree),
}


def between(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=<!-- {name} -->\n)(.*?)(?=<!-- end of {name} -->)", re.DOTALL)


def on_page(name: str) -> str:
    """A part as its page has it."""
    found = between(name).search((DOCS / PARTS[name][0]).read_text())
    assert found is not None, name
    return found[0].strip()


def write() -> None:
    """Every part, anew."""
    for name, (page, part) in PARTS.items():
        text, path = f"\n{part()}\n\n", DOCS / page
        path.write_text(between(name).sub(lambda _, text=text: text, path.read_text()))

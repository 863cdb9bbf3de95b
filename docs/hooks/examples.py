"""Examples in docstrings, for mkdocstrings: ``Example:`` is a section as ``Examples:`` is."""

from __future__ import annotations

import re
from typing import Any

import griffe

_SINGULAR = re.compile(r"^( *)Example:$", re.MULTILINE)
# At the beginning of a line, outside of any section.
_BARE = re.compile(r"(?:^(?:>>>|\.\.\.) .*\n?)+", re.MULTILINE)


class Examples(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_kwargs: Any) -> None:
        _mend(pkg)


def _mend(thing: griffe.Object) -> None:
    if thing.docstring is not None:
        text = _SINGULAR.sub(r"\1Examples:", thing.docstring.value)
        thing.docstring.value = _BARE.sub(lambda found: f"```pycon\n{found[0]}\n```\n", text)
    for member in thing.members.values():
        if isinstance(member, griffe.Object):  # And no alias, which would be another's.
            _mend(member)

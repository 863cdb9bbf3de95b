"""The command line, by the function that the `lch` script calls."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import Any
from unittest import mock

from typer.main import get_command

from lch_plugin import cli

HOOK = "blocks.2.mlp.hook_centroid"


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and what is said on stderr; any other exception than SystemExit comes out."""
    said = io.StringIO()
    with (
        mock.patch("sys.argv", ["lch", *arguments]),
        redirect_stdout(io.StringIO()),
        redirect_stderr(said),
    ):
        try:
            cli.entry_point()
        except SystemExit as end:
            return (0 if end.code is None else int(end.code)), said.getvalue()
    return 0, said.getvalue()


def commands(command: Any = None, names: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command there is, by its name."""
    command = command or get_command(cli.app)
    if not hasattr(command, "commands"):
        yield " ".join(names), command
    for name, sub in getattr(command, "commands", {}).items():
        yield from commands(sub, (*names, name))


#: What each command cannot do without.
NEEDED = {
    "demo": [],
    "centroids": ["I picked"],
    "circuit": ["--task", "an"],
    "convert": ["model.gguf", "converted"],
    "info": [],
    "diff": ["before", "after", "--prompts", "file.txt"],
    "lens": ["I picked"],
    "probe": ["--train", "statements.csv"],
    "saliency": ["I picked", "--answer", " an"],
    "sae train": [HOOK],
    "sae cache": [HOOK],
    "sae features": ["dictionary"],
    "sae evaluate": ["dictionary"],
    "sae compare": [],
}
COMMANDS = dict(commands())

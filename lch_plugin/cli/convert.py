"""The ``lch convert`` command."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from lch_plugin.cli.options import Dtype, directory, source


def convert(
    model: Annotated[
        str,
        typer.Argument(help=".gguf file, name on the hub, or directory.", callback=source),
    ],
    out: Annotated[Path, typer.Argument(help="Directory to make.", callback=directory)],
    dtype: Dtype = None,
) -> None:
    """Write a model as a directory that loads in seconds: once for each .gguf file."""
    from lch_plugin.files import claimed
    from lch_plugin.loading import load

    # That this command makes loading fast is no news here.
    logging.getLogger("lch_plugin.loading").setLevel(logging.ERROR)
    with claimed(out) as out:
        loaded = load(model, dtype=dtype)
        loaded.save(out)
    typer.echo(f"{loaded!r} is in {out}: give --model {out}, or lch.load({str(out)!r}).")

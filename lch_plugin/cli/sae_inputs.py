"""The model and the text that the ``lch sae`` commands read."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lch_plugin.cli.options import source
from lch_plugin.errors import InputError

TrainingText = Annotated[
    str,
    typer.Option(help="File, directory or name on the hub; the demo's stories.", callback=source),
]
Column = Annotated[
    str | None, typer.Option(help="Of the text; the first that SAELens reads by default.")
]
SkipEmpty = Annotated[
    bool, typer.Option("--skip-empty", help="Leave out rows without text, and say how many.")
]
Layers = Annotated[
    str | None,
    typer.Option(help="Such as 5,10,15, or all: what * in a hook point stands for, in one pass."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Say what it would take, after a short trial; write nothing."),
]


def read_text(
    model: str, text: str, column: str | None, skip_empty: bool, *, streaming: bool = False
) -> Any:
    """The text that is named, or None. It is read before a model is loaded for it."""
    check_text(model, text, column, skip_empty)
    if not text:
        return None
    from lch_plugin.saes import load_text

    return load_text(text, streaming=streaming, column=column, skip_empty=skip_empty)


def check_text(model: str, text: str, column: str | None, skip_empty: bool) -> None:
    """Refuse options that mean nothing together."""
    if model and not text:
        raise InputError(f"--model {model} needs a --text: the demo's stories are for its own.")
    if column is not None and not text:
        raise InputError(f"--column {column} is one of a --text, and none is given. Give one.")
    if skip_empty and not text:
        raise InputError("--skip-empty is about the rows of a --text, and none is given.")


def load_bridge(model: str, dtype: str | None, device: str) -> Any:
    """A model in TransformerLens, the embedded one if none is named; here or on a worker."""
    from lch_plugin.demo import DEMO_MODEL_DIR
    from lch_plugin.loading import load

    return load(model or DEMO_MODEL_DIR, dtype=dtype, device=device).bridge()


def model_and_text(
    model: str,
    text: Any,
    dtype: str | None,
    device: str,
    *,
    n_stories: int,
    split: str,
    seed: int,
) -> tuple[Any, Any]:
    """A model in TransformerLens and a text for it; the embedded model and its stories if none."""
    from lch_plugin.demo.corpus import describe, write_stories
    from lch_plugin.saes import load_text

    bridge = load_bridge(model, dtype, device)
    if text is None:
        own = list(write_stories(n_stories, split=split, seed=seed))
        typer.echo(f"text: {describe(own, split, seed)}")
        text = load_text([story.text for story in own])
    return bridge, text

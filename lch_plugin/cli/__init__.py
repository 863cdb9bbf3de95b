"""The ``lch`` command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from lch_plugin.cli import circuit, convert, diff, info, interrupts, lens, probe, sae, saliency
from lch_plugin.cli.options import SEED, Device, Dtype, Model, Out, Seed
from lch_plugin.errors import InputError, LCHError
from lch_plugin.progress import only_long_bars

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, suggest_commands=True)
app.add_typer(sae.app, name="sae")
app.command()(circuit.circuit)
app.command()(convert.convert)
app.command()(info.info)
app.command()(diff.diff)
app.command()(lens.lens)
app.command()(probe.probe)
app.command()(saliency.saliency)


def _say_version(asked: bool) -> bool:
    if asked:
        typer.echo(f"lch_plugin {version('lch-plugin')}")
        raise typer.Exit
    return asked


@app.callback()
def main(
    _version: Annotated[
        bool,
        typer.Option("--version", help="Show it and exit.", callback=_say_version, is_eager=True),
    ] = False,
) -> None:
    """Centroids instead of activations, for the interpretability toolkits you already use."""


@app.command()
def demo(out: Out = Path("demo-report"), seed: Seed = 0, device: Device = "cpu") -> None:
    """Centroids, two SAEs and a circuit of the embedded model, as one HTML report."""
    from lch_plugin.demonstration.run import (
        run,  # Seconds of imports, which --help need not wait for.
    )

    run(out, seed=seed, device=device)


@app.command()
def centroids(
    prompts: Annotated[list[str], typer.Argument(help="Texts, run together.")],
    model: Model = "",
    modules: Annotated[
        list[str] | None,
        typer.Option(help="Components, * for a part of a name; all MLPs by default. Repeatable."),
    ] = None,
    random_cotangent: Annotated[
        int | None, typer.Option(help="Seed of a random cotangent in place of all ones.", **SEED)
    ] = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    out: Out = Path("centroids"),
) -> None:
    """Centroids of prompts, as safetensors. The embedded model if none is named."""
    if not all(prompts):
        raise InputError("there is an empty one among the prompts: put text in each.")
    from lch_plugin.files import check_new_directory

    check_new_directory(out)
    from lch_plugin.cotangents import Random
    from lch_plugin.demo import DEMO_MODEL_DIR
    from lch_plugin.extract import CENTROIDS, RECORD, extract
    from lch_plugin.loading import load

    loaded = load(model or DEMO_MODEL_DIR, dtype=dtype, device=device)
    cotangent = None if random_cotangent is None else Random(random_cotangent)
    extract(loaded, prompts, out, modules=modules, cotangent=cotangent)
    typer.echo(f"They are in {out / CENTROIDS}, under these names; {RECORD} says what they are of.")


def entry_point() -> None:
    """Run the command; a mistake of the user's is a message, not a traceback.

    Ctrl-C and SIGTERM say what is kept, and exit with 130 and 143.
    """
    with interrupts.watched() as received, only_long_bars():
        if (end := _run(received)) is not None:
            # Only now, when progress bars are gone with the command: the message comes last.
            code, message = end
            Console(stderr=True).print(message, highlight=False, soft_wrap=True)
            raise SystemExit(code)


def _run(received: Callable[[], int | None]) -> tuple[int, str] | None:
    """Run the command; exit code and message if it is cut short."""
    try:
        _check_encoding(sys.argv)
        app()
    except (SystemExit, KeyboardInterrupt) as stopped:
        # What typer makes of an interrupt differs between its versions.
        if getattr(stopped, "code", 1) in (None, 0) or not (number := received()):
            raise
        return 128 + number, _message("Interrupted.", interrupts.what_is_kept())
    except (LCHError, OSError) as error:
        return 1, _message("Error:", str(error))
    except (MemoryError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        if isinstance(error, NotImplementedError):
            cause = "torch cannot do this on the device. Choose another."
        elif isinstance(error, MemoryError) or "allocate" in reason:
            cause = "out of memory. Ask for less at once, or for fewer features."
        else:
            raise
        return 1, _message("Error:", f"{cause} {reason}")
    return None


def _check_encoding(arguments: list[str]) -> None:
    """Refuse bytes that are no text, which neither messages nor records could hold."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{argument!r} is not in UTF-8. Use another name.") from error


def _message(what: str, text: str) -> str:
    # Escaped, or [...] in a message would be taken for markup.
    return f"[bold red]{what}[/bold red] {escape(text)}"

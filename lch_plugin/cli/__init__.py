"""The ``lch`` command."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from lch_plugin.cli import circuit, sae
from lch_plugin.cli.options import Device, Dtype, Model, Out, Seed
from lch_plugin.errors import LCHError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(sae.app, name="sae")
app.command()(circuit.circuit)


@app.callback()
def main() -> None:
    """Centroids instead of activations, for the interpretability toolkits you already use."""


@app.command()
def demo(out: Out = Path("demo-report"), seed: Seed = 0, device: Device = "cpu") -> None:
    """Centroids, two SAEs and a circuit of the embedded model, as one HTML report."""
    from lch_plugin.demo.run import run  # Seconds of imports, which --help need not wait for.

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
        int | None, typer.Option(help="Seed of a random cotangent in place of all ones.")
    ] = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    out: Out = Path("centroids"),
) -> None:
    """Centroids of prompts, as safetensors. The embedded model if none is named."""
    from lch_plugin.cotangents import Random
    from lch_plugin.demo import DEMO_MODEL_DIR
    from lch_plugin.extract import extract
    from lch_plugin.files import check_new_directory
    from lch_plugin.loading import load

    check_new_directory(out)
    loaded = load(model or DEMO_MODEL_DIR, dtype=dtype, device=device)
    cotangent = None if random_cotangent is None else Random(random_cotangent)
    extract(loaded, prompts, out, modules=modules, cotangent=cotangent)


def entry_point() -> None:
    """Run the command; a mistake of the user's is a message, not a traceback."""
    # As an exception, so that temporary files are cleaned up on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except LCHError as error:
        # Escaped, or [...] in a message would be taken for markup; unwrapped, to be searched for.
        message = f"[bold red]Error:[/bold red] {escape(str(error))}"
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        raise SystemExit(1) from error

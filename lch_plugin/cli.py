"""The ``lch`` command."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from lch_plugin.errors import LCHError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Centroids instead of activations, for the interpretability toolkits you already use."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory to make.")] = Path("demo-report"),
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps...")] = "cpu",
) -> None:
    """Centroids, two SAEs and a circuit of the embedded model, as one HTML report."""
    from lch_plugin.demo.run import run  # Seconds of imports, which --help need not wait for.

    run(out, seed=seed, device=device)


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

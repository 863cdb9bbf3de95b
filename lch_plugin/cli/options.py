"""Options that several commands have, the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Option(help="Name on the hub, local directory, or .gguf file; the embedded one if none."),
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16...; the checkpoint's by default.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps...")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Out = Annotated[Path, typer.Option(help="Directory to make.")]

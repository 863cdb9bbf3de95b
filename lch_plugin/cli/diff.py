"""The ``lch diff`` command: what changed between two checkpoints, and on which inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lch_plugin.cli.options import MOST, Device, Dtype, Out, Seed, source


def diff(
    before: Annotated[
        str,
        typer.Argument(help="Name on the hub, local directory, or .gguf file.", callback=source),
    ],
    after: Annotated[
        str, typer.Argument(help="A later checkpoint of the same model.", callback=source)
    ],
    prompts: Annotated[
        Path, typer.Option(help="A text file, a prompt on each line.", callback=source)
    ],
    random_cotangents: Annotated[
        int, typer.Option(help="That estimate how much Jacobians changed.", min=2, max=MOST)
    ] = 8,
    top: Annotated[
        int, typer.Option(help="Inputs listed of each component.", min=1, max=MOST)
    ] = 10,
    dtype: Dtype = None,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = Path("diff"),
) -> None:
    """Which attention and MLPs of two checkpoints compute something else, and on which inputs."""
    from lch_plugin.diff.run import read_prompts, run
    from lch_plugin.files import check_new_directory
    from lch_plugin.loading import load

    texts = read_prompts(prompts)
    check_new_directory(out)
    old, new = (load(name, dtype=dtype, device=device) for name in (before, after))
    run(old, new, texts, out, n_random=random_cotangents, seed=seed, k=top)
    typer.echo(f"Open {out / 'report.html'}")

"""The ``lch lens`` command: what each layer and position adds to the next token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lch_plugin.cli.options import COUNT, MOST, Device, Dtype, Model, Out, one_of
from lch_plugin.errors import InputError


def lens(
    prompt: Annotated[str, typer.Argument(help="What is read.")],
    token: Annotated[
        list[str] | None,
        typer.Option(help="To read besides the likeliest, such as ' Paris'; may be repeated."),
    ] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(
            help="To read, 0 before the first block; may be repeated; all if none.",
            min=-MOST,
            max=MOST,
        ),
    ] = None,
    targets: Annotated[
        int, typer.Option(help="Last positions whose next token can be chosen.", **COUNT)
    ] = 4,
    top: Annotated[int, typer.Option(help="Tokens listed for each cell.", **COUNT)] = 5,
    linearization: Annotated[
        str,
        typer.Option(
            help="detached, which is exact, or jacobian.",
            callback=one_of("detached", "jacobian"),
        ),
    ] = "detached",
    model: Model = "",
    dtype: Dtype = None,
    device: Device = "cpu",
    out: Out = Path("lens"),
) -> None:
    """What the residual stream at each layer and position adds to the logits, exactly."""
    if not prompt.strip():
        raise InputError("the prompt is empty: there is no token to read.")
    if "" in (token or ()):
        raise InputError("--token is empty: give the text of one token, or leave it out.")
    from lch_plugin.files import check_new_directory

    check_new_directory(out)
    from lch_plugin.demo import DEMO_MODEL_DIR
    from lch_plugin.lens.run import run
    from lch_plugin.loading import load

    loaded = load(model or DEMO_MODEL_DIR, dtype=dtype, device=device)
    run(
        *(loaded, prompt, out),
        tokens=token or (),
        layers=layer,
        n_targets=targets,
        k=top,
        linearization=linearization,  # type: ignore[arg-type]
    )
    typer.echo(f"Open {out / 'report.html'}")

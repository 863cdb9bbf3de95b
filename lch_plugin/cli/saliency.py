"""The ``lch saliency`` command: which tokens of a prompt an answer rests on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lch_plugin.cli.options import COUNT, Device, Dtype, Model, Out, Seed, zero_or_more
from lch_plugin.errors import InputError


def saliency(
    prompt: Annotated[str, typer.Argument(help="Whose tokens are scored.")],
    answer: Annotated[str, typer.Option(help="Right after the prompt, such as ' Paris'.")],
    foil: Annotated[
        str | None, typer.Option(help="What to compare the answer with, such as ' Rome'.")
    ] = None,
    samples: Annotated[int, typer.Option(help="In the neighbourhood.", **COUNT)] = 24,
    sigma: Annotated[
        float,
        typer.Option(
            help="Of the noise, in standard deviations of the embeddings.", callback=zero_or_more
        ),
    ] = 0.05,
    model: Model = "",
    dtype: Dtype = None,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = Path("saliency"),
) -> None:
    """Which tokens of a prompt an answer rests on, by centroids and by Captum, judged."""
    from lch_plugin.demo import DEMO_MODEL_DIR
    from lch_plugin.files import check_new_directory
    from lch_plugin.loading import load
    from lch_plugin.saliency.run import run

    if not prompt.strip():
        raise InputError("the prompt is empty: there is no token to score.")
    if not answer.strip() or answer == foil:
        raise InputError("--answer is empty, or equal to --foil: give a text of its own.")
    check_new_directory(out)
    loaded = load(model or DEMO_MODEL_DIR, dtype=dtype, device=device)
    settings = {"n_samples": samples, "sigma": sigma, "seed": seed}
    run(loaded, prompt, answer, out, foil=foil, **settings)  # type: ignore[arg-type]
    typer.echo(f"Open {out / 'report.html'}")

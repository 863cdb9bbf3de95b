"""The ``lch saliency`` command: what an answer, or a class, rests on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lch_plugin.cli.options import (
    COUNT,
    COUNT_OR_NONE,
    Device,
    Dtype,
    Model,
    Out,
    Seed,
    source,
    zero_or_more,
)
from lch_plugin.errors import InputError


def saliency(
    prompt: Annotated[str | None, typer.Argument(help="Whose tokens are scored.")] = None,
    answer: Annotated[
        str | None, typer.Option(help="Right after the prompt, such as ' Paris'.")
    ] = None,
    foil: Annotated[
        str | None, typer.Option(help="What to compare the answer with, such as ' Rome'.")
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="Whose pixels are scored, in place of a prompt.", callback=source),
    ] = None,
    target: Annotated[
        int | None,
        typer.Option(help="Class of an image; by default the predicted one.", **COUNT_OR_NONE),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="In the neighbourhood; 24 of a prompt and 30 of an image.", **COUNT),
    ] = None,
    sigma: Annotated[
        float | None,
        typer.Option(
            help="Of Gaussian noise: .05 of the embeddings' standard deviation, .15 of the image's "
            "range.",
            callback=zero_or_more,
        ),
    ] = None,
    radius: Annotated[
        float | None,
        typer.Option(
            help="Of a ball around an image in place of Gaussian noise, in units of its range.",
            callback=zero_or_more,
        ),
    ] = None,
    model: Model = "",
    dtype: Dtype = None,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = Path("saliency"),
) -> None:
    """What an answer rests on in a prompt, or a class in an image, by centroids and by Captum."""
    from lch_plugin.files import check_new_directory

    settings: dict[str, Any] = {"n_samples": samples, "sigma": sigma}
    settings = {"seed": seed} | {k: v for k, v in settings.items() if v is not None}
    if image is None:
        for name, value in (("target", target), ("radius", radius)):
            if value is not None:
                raise InputError(f"--{name} {value} is of an image: give --image, or leave it out.")
        if prompt is None or not prompt.strip():
            raise InputError("there is no prompt: give one with --answer, or --image FILE.")
        if answer is None or not answer.strip() or answer == foil:
            raise InputError("--answer is empty, or equal to --foil: give a text of its own.")
        check_new_directory(out)
        from lch_plugin.demo import DEMO_MODEL_DIR
        from lch_plugin.loading import load
        from lch_plugin.saliency.run import run

        loaded = load(model or DEMO_MODEL_DIR, dtype=dtype, device=device)
        run(loaded, prompt, answer, out, foil=foil, **settings)
    else:
        if any(given is not None for given in (prompt, answer, foil)):
            raise InputError("an image has no prompt, --answer or --foil: give these or --image.")
        from lch_plugin.demo.vision.classifier import load_demo_classifier
        from lch_plugin.loading import load
        from lch_plugin.saliency.image_files import read_picture
        from lch_plugin.saliency.image_maps import Neighbourhood
        from lch_plugin.saliency.run import run_image

        Neighbourhood(sigma, radius)
        picture = read_picture(image)
        check_new_directory(out)
        where: Any = {"dtype": dtype, "device": device}
        loaded = load(model, **where) if model else load_demo_classifier(**where)
        run_image(loaded, picture, out, name=image.name, target=target, radius=radius, **settings)
    typer.echo(f"Open {out / 'report.html'}")

"""The ``lch probe`` command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lch_plugin.cli.options import COUNT, SEED, Device, Dtype, Model, Out, Seed
from lch_plugin.errors import InputError

if TYPE_CHECKING:
    from lch_plugin.adapters.transformer_lens import TransformerBridge
    from lch_plugin.cotangents import AnyCotangent


def probe(
    train: Annotated[
        list[Path],
        typer.Option(help="Statements to train on, a .csv with statement,label. Repeatable."),
    ],
    test: Annotated[
        list[Path] | None, typer.Option(help="Others to test on alone. Repeatable.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Blocks, as 6,12; all by default. -1 is the last.")
    ] = None,
    component: Annotated[
        list[str] | None,
        typer.Option(help="mlp (the default), attn or block. Repeatable."),
    ] = None,
    probe: Annotated[
        list[str] | None,
        typer.Option(
            help="mass-mean (the default), mass-mean-covariance, logistic or lda. Repeatable."
        ),
    ] = None,
    token: Annotated[
        str, typer.Option(help="last, mean over the statement, or how many of the last.")
    ] = "last",
    seeds: Annotated[int, typer.Option(help="Splits; at least 3.", min=3, max=1000)] = 3,
    rows: Annotated[
        int | None, typer.Option(help="At most so many statements of each set.", **COUNT)
    ] = None,
    k: Annotated[
        str | None, typer.Option(help="Coordinates of sparse probes, as 1,4,16; none by default.")
    ] = None,
    rank_by: Annotated[
        str,
        typer.Option(
            help="How their coordinates are chosen: mean-difference, f or mutual-information."
        ),
    ] = "mean-difference",
    centre: Annotated[
        bool,
        typer.Option(
            "--centre",
            help="Centre each set at its own mean, for which tested statements are read, too.",
        ),
    ] = False,
    cotangent: Annotated[
        str, typer.Option(help="Of the centroids: ones, random:SEED or logit:TOKEN.")
    ] = "ones",
    model: Model = "",
    dtype: Dtype = None,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = Path("probes"),
) -> None:
    """Probes of truth: trained on some sets of statements, tested on all."""
    settings: dict[str, Any] = {
        "components": component or ["mlp"],
        "probes": probe or ["mass-mean"],
        "token": token if (last := _number(token)) is None else last,
        "seeds": seeds,
        "k": [] if k is None else _numbers("k", k),
        "rank_by": rank_by,
    }
    blocks = None if layers is None else _numbers("layers", layers)
    cotangent_of = _cotangent(cotangent)
    from lch_plugin import probes
    from lch_plugin.demo import DEMO_MODEL_DIR
    from lch_plugin.files import check_new_directory
    from lch_plugin.loading import load

    sets = [[probes.read_statements(path) for path in paths] for paths in (train, test or [])]
    if rows is not None:
        sets = [[probes.sample(one, rows, seed) for one in some] for some in sets]
    probes.check(*sets, **settings)
    check_new_directory(out)
    loaded = load(model or DEMO_MODEL_DIR, dtype=dtype, device=device)
    bridge = loaded.bridge()
    found = probes.run(
        bridge,
        sets[0],
        out,
        test=sets[1],
        layers=blocks,
        **settings,
        centre=centre,
        cotangent=cotangent_of(bridge),
        seed=seed,
        revision=loaded.revision,
    )
    _print(found)
    typer.echo(f"Open {out / 'report.html'}")


def _numbers(name: str, text: str) -> list[int]:
    parts = text.split(",")
    found = [number for part in parts if (number := _number(part)) is not None]
    if len(found) < len(parts):
        raise InputError(f"--{name} {text!r} is no list of whole numbers: give such as 6,12.")
    return found


def _number(text: str) -> int | None:
    """A whole number; None of any other text, or of more digits than Python reads."""
    try:
        return int(text)
    except ValueError:
        return None


def _cotangent(text: str) -> Callable[[TransformerBridge], AnyCotangent]:
    """What a text says, once there is a model whose tokens it can name."""
    kind, _, value = text.partition(":")
    seed = _number(value) if kind == "random" else None
    has_seed = seed is not None and SEED["min"] <= seed <= SEED["max"]
    if not (text == "ones" or has_seed or (kind == "logit" and value)):
        raise InputError(
            f"--cotangent {text!r} is not known: give ones, random:SEED or logit:TOKEN, such as "
            "random:0 or 'logit: true'."
        )
    from lch_plugin.circuits.prompt_batches import single_token
    from lch_plugin.cotangents import Logit, Ones, Random

    if text == "ones":
        return lambda model: Ones()
    if seed is not None:
        return lambda model: Random(seed)
    return lambda model: Logit(single_token(model, value))


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        *("probe", "site", "layer", "own test", "AUROC", "other sets", "AUROC"),
        caption="per cent; 50 is chance; controls are in the report",
    )
    for r in found["results"]:
        cells = [
            "-" if scores is None else f"{100 * scores[measure]['probe']['mean']:.1f}"
            for scores in (r["summary"]["own"], r["summary"]["others"])
            for measure in ("accuracy", "auroc")
        ]
        table.add_row(r["probe"], f"{r['component']} {r['part']}", str(r["layer"]), *cells)
    Console().print(table)

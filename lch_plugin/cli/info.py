"""The ``lch info`` command: what a model has to offer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from lch_plugin.cli.options import Device, Dtype, Model

if TYPE_CHECKING:
    from lch_plugin.inspection import ModelInfo, SiteInfo


def info(
    model: Model = "",
    json: Annotated[bool, typer.Option("--json", help="For programs, as JSON.")] = False,
    dtype: Dtype = None,
    device: Device = "cpu",
) -> None:
    """Sites of a model, how each centroid is computed and why, memory, and measured time."""
    from lch_plugin.demo import DEMO_MODEL_DIR
    from lch_plugin.inspection import inspect_model
    from lch_plugin.loading import load

    found = inspect_model(load(model or DEMO_MODEL_DIR, dtype=dtype, device=device))
    if json:
        from json import dumps

        typer.echo(dumps(found.record(), indent=2))
    else:
        _print(found)


def _print(found: ModelInfo) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    about = Table(show_header=False, box=None)
    for name, value in _lines(found):
        about.add_row(f"[bold]{name}[/bold]", escape(value))
    table = Table("site", "hook points", "width", "method", "time")
    reasons: dict[str, list[str]] = {}
    for site in found.sites:
        time = "" if site.seconds is None else f"{site.seconds * 1e3:,.0f} ms"
        width = "" if site.shape is None else f"{site.shape[-1]:,}"
        table.add_row(site.site, escape(_hooks(site)), width, _method(site), time)
        reasons.setdefault(_why(site), []).append(site.site)
    why = Table(show_header=False, box=None)
    for reason, sites in reasons.items():
        why.add_row(f"[bold]{', '.join(sites)}[/bold]", escape(reason))
    for part in (about, table, why):
        console.print(part)


def _lines(found: ModelInfo) -> list[tuple[str, str]]:
    sizes = {"layers": found.n_layers, "d_model": found.d_model, "d_mlp": found.d_mlp}
    sizes["context"] = found.context
    revision = "" if found.revision is None else f" at {found.revision}"
    mu = next((site.n_bytes for site in found.sites if site.n_bytes is not None), None)
    per_token = {
        "residual stream": found.residual_bytes,
        "neurons": found.neuron_bytes,
        "centroid": mu,
    }
    lines = [
        ("model", f"{found.model}{revision}"),
        ("class", f"{found.architecture}, {found.dtype}, {found.device}"),
        ("sizes", ", ".join(f"{name} {n:,}" for name, n in sizes.items() if n is not None)),
        ("parameters", f"{found.n_parameters:,}, {found.weight_bytes / 1e6:,.1f} MB"),
        (
            "bytes of a token at a layer",
            ", ".join(f"{name} {n:,}" for name, n in per_token.items() if n is not None),
        ),
        ("adapter", found.adapter + (f": {found.why_adapter}" if found.why_adapter else "")),
    ]
    if found.processing is not None:
        lines.append(("weights", _processing(found.processing)))
    if found.seconds is not None:
        where = "" if found.n_positions is None else f" of {found.n_positions} positions"
        lines.append(("a pass", f"{found.seconds * 1e3:,.0f} ms{where}, without centroids, once"))
    return lines


def _processing(processing: dict[str, bool]) -> str:
    if processing["writing_weights_centered"]:
        return (
            "the writing weights are centred: all-ones centroids of MLPs vanish. Load the model "
            "without processing, or give another cotangent"
        )
    return "processed by TransformerLens" if processing["processed"] else "as in the checkpoint"


def _hooks(site: SiteInfo) -> str:
    """Names with * for the layer."""
    names = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name, count=1) for name in site.methods))
    if len(site.methods) == 1:
        names = list(site.methods)
    return "\n".join(names) or "none"


def _method(site: SiteInfo) -> str:
    methods = list(site.methods.values())
    if len(set(methods)) < 2:
        return "".join(methods[:1])
    return ", ".join(f"{methods.count(m)} {m}" for m in dict.fromkeys(methods))


def _why(site: SiteInfo) -> str:
    return ". ".join(filter(None, (site.why, site.problem and f"Refused: {site.problem}")))

"""Results as one self-contained HTML page: no request, pictures inside."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from matplotlib.figure import Figure


def write_report(
    directory: Path,
    template: str,
    results: Mapping[str, Any],
    figures: Mapping[str, Figure],
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Write ``report.html``, ``results.json`` and one PNG a figure into a directory.

    The page shows nothing that is not in a file there: the template gets the results, the pictures
    and what other files say, and no more.

    Args:
        directory: an existing directory.
        template: name of a template of this package.
        results: JSON-serialisable values.
        figures: by name; the template finds them as ``figures.NAME``.
        beside: JSON-serialisable values that the caller writes to a file of their own.
    """
    pictures = {}
    for name, figure in figures.items():
        buffer = io.BytesIO()
        # Without a date or version inside, the same numbers give the same file.
        figure.savefig(buffer, format="png", metadata={"Software": None})
        (directory / f"{name}.png").write_bytes(buffer.getvalue())
        encoded = base64.b64encode(buffer.getvalue()).decode()
        pictures[name] = f"data:image/png;base64,{encoded}"
    text = json.dumps(results, indent=2, allow_nan=False, ensure_ascii=False)
    (directory / "results.json").write_text(text + "\n", encoding="utf-8")
    values = {**json.loads(text), **(beside or {}), "figures": pictures}
    (directory / "report.html").write_text(render(template, values), encoding="utf-8")


def render(template: str, values: Mapping[str, Any]) -> str:
    """A page, from a template of this package; a value that is missing raises."""
    environment = Environment(
        loader=PackageLoader("lch_plugin"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)

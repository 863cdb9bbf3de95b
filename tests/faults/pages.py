"""Hostile text in every page: each string that a report shows, replaced by one that would run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lch_plugin.report as report
from tests.browser import CHROMIUM, browse

HOSTILE = (
    "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 1'>"
    '"onmouseover="window.hit=1" {{ 7 * 7 }} &lt;b&gt; \u202e'
)
# Words that a page chooses by, and does not show as they are.
_CHOSEN = ("centroid", "input", "output", "head", "neuron", "mlp", "metric", "embedding")


def hostile(values: Any) -> Any:
    """The same with every text in place of which something else may stand."""
    if isinstance(values, dict):
        return {k: v if k in _KEPT else hostile(v) for k, v in values.items()}
    if isinstance(values, list | tuple):
        return [hostile(v) for v in values]
    return f"{values}{HOSTILE}" if isinstance(values, str) and values not in _CHOSEN else values


_KEPT = (
    "figures",
    "kind",
    "key",
    "units",
    "names",
    "versions",
    "of",
    "metric",
    "part",
    "hook_name",
)


def captured(run: Callable[[], Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The templates and values of the pages that something writes."""
    found: list[tuple[str, dict[str, Any]]] = []
    original = report.render

    def render(template: str, values: Any) -> str:
        found.append((template, dict(values)))
        return original(template, values)

    report.render = render  # type: ignore[assignment]
    try:
        run()
    finally:
        report.render = original
    yield from found


def check_page(template: str, values: dict[str, Any]) -> str | None:
    """What ran of hostile text in a page, if anything did; None too if there is no browser."""
    if CHROMIUM is None:
        return None
    with tempfile.TemporaryDirectory() as directory:
        page = Path(directory) / "page.html"
        page.write_text(report.render(template, hostile(values)), encoding="utf-8")
        script = "return [window.hit || 0, document.querySelectorAll('img[src=x]').length];"
        found, said = browse(page, script, Path(directory) / "profile")
    return None if found == [0, 0] and not said else f"{template}: {found} {said[:300]}"

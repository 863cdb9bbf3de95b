"""The site builds without a warning, needs nothing from elsewhere, and has every public name."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest

import lch_plugin as lch
from tests.toolkits import needs_saes

pytest.importorskip("mkdocs")
ROOT = Path(__file__).parents[2]
#: By page of the API, whose names it has.
API = {
    "lch_plugin": "lch_plugin",
    "cotangents": "lch_plugin.cotangents",
    "circuits": "lch_plugin.circuits",
    "saes": "lch_plugin.saes",
    "huggingface": "lch_plugin.adapters.huggingface",
    "nnsight": "lch_plugin.adapters.nnsight",
    "diagnostics": "lch_plugin.diagnostics",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return directory


@needs_saes
def test_every_public_name_is_in_the_api(site: Path) -> None:
    for page, name in API.items():
        module = import_module(name)
        public = getattr(module, "__all__", None) or [
            n
            for n, thing in vars(module).items()
            if not n.startswith("_") and getattr(thing, "__module__", None) == name
        ]
        text = (site / "reference" / "api" / f"{page}.html").read_text()
        there = set(re.findall(rf'id="{re.escape(name)}\.(\w+)"', text))
        modules = {n for n in public if isinstance(getattr(lch, n, None), type(lch))}
        # A function that bears the name of a module beside it is taken for that.
        modules |= {found.name for found in iter_modules(getattr(module, "__path__", ()))}
        assert set(public) - there - modules == set(), page


def test_no_page_needs_anything_from_elsewhere(site: Path) -> None:
    fetched = re.compile(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*"')
    for page in site.rglob("*.html"):
        assert not fetched.findall(page.read_text()), page
    for style in site.rglob("*.css"):
        assert not re.findall(r"url\(['\"]?(?:https?:)?//", style.read_text()), style

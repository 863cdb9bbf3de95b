"""Imports point one way: each room of the package knows those below it, and few know a toolkit."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

import lch_plugin
from tests.toolkits import HAS_SAES, LENS

ROOT = Path(lch_plugin.__file__).parent

#: The rooms of a package, from the lowest to the highest: each imports only those before it.
ROOMS = {
    "lch_plugin": (
        "errors",
        "names",
        "progress",
        "devices",
        "records",
        "files",
        "statistics",
        "weak_cache",
        "cluster",
        "padding",
        "mlp",
        "metrics",
        "cotangents",
        "centroids",
        "linearization",
        "linear_maps",
        "sites",
        "diagnostics",
        "adapters",
        "steering",
        "loading",
        "figures",
        "report",
        "max_activating",
        "demo",
        "saes",
        "circuits",
        "probes",
        "concepts",
        "saliency",
        "alignment",
        "lens",
        "diff",
        "extract",
        "inspection",
        "demonstration",
        "cli",
        "__main__",
    ),
    "lch_plugin.adapters": (
        "turns",
        "arguments",
        "states",
        "passes",
        "checks",
        "structure",
        "grad_scope",
        "deferred",
        "values",
        "huggingface",
        "nnsight",
        "transformer_lens",
        "hooked",
    ),
    "lch_plugin.adapters.transformer_lens": (
        "toolkit",
        "gates",
        "hook_points",
        "architecture",
        "mlps",
        "stand_ins",
        "runs",
        "readers",
        "model_end",
        "closed_forms",
        "vjps",
        "tracker",
        "self_check",
        "attaching",
        "inputs",
        "nodes",
        "residual",
        "unprocessed",
    ),
    "lch_plugin.saes": (
        "toolkit",
        "sources",
        "caching",
        "evaluation",
        "training",
        "estimates",
        "dashboards",
        "comparison",
    ),
    "lch_plugin.lens": (
        "asked",
        "exactness",
        "passes",
        "drawing",
        "reading",
        "flows",
        "components",
        "singular",
        "spans",
        "averages",
        "run",
    ),
    "lch_plugin.circuits": (
        "kinds",
        "prompt_batches",
        "prompt_files",
        "tasks",
        "ranking",
        "nodes",
        "scores",
        "graphs",
        "edges",
        "evaluation",
        "reports",
    ),
}
#: Who may import a toolkit: these modules, and those within these packages.
TOOLKITS = {
    "transformer_lens": "lch_plugin.adapters.transformer_lens.toolkit",
    "nnsight": "lch_plugin.adapters.nnsight",
    "sae_lens": "lch_plugin.saes",
    "ray": "lch_plugin.cluster",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(module: str) -> Iterator[str]:
    """What a module imports anywhere in it, also in functions and for annotations alone."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in MODULES else str(node.module)


IMPORTS = {module: set(imports(module)) for module in MODULES}


def room(package: str, module: str) -> str | None:
    """The room of a package that a module is in; None if it is in none of them."""
    inside = module.removeprefix(f"{package}.")
    return None if inside == module else inside.partition(".")[0]


@pytest.mark.parametrize("package", ROOMS)
def test_each_room_imports_only_those_below_it(package: str) -> None:
    height = {name: i for i, name in enumerate(ROOMS[package])}
    inside = {module: here for module in MODULES if (here := room(package, module))}
    assert set(inside.values()) == height.keys()
    upwards = [
        f"{module} -> {other}"
        for module, here in inside.items()
        for other in IMPORTS[module]
        if other == package or (other in inside and height[inside[other]] > height[here])
    ]
    assert upwards == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = nx.DiGraph((m, other) for m, others in IMPORTS.items() for other in others)
    circles = [circle for circle in nx.strongly_connected_components(graph) if len(circle) > 1]
    assert circles == []


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_a_toolkit_is_imported_only_where_that_is_promised(toolkit: str) -> None:
    place = TOOLKITS[toolkit]
    users = {m for m in MODULES if any(i.partition(".")[0] == toolkit for i in IMPORTS[m])}
    assert users
    assert {user for user in users if user != place and not user.startswith(f"{place}.")} == set()


@pytest.mark.parametrize("package", [m for m, path in MODULES.items() if path.stem == "__init__"])
def test_no_name_of_a_package_hides_one_of_its_modules(package: str) -> None:
    hidden = {
        f"{package}.{name.asname or name.name}"
        for node in ast.walk(ast.parse(MODULES[package].read_text()))
        if isinstance(node, ast.ImportFrom) and node.module != package
        for name in node.names
    }
    assert not hidden & MODULES.keys()


ASK_FOR_SAES = """\
try: print(lch.saes.__name__.rpartition(".")[2])
except lch.LCHError as error: print(error)
"""


def without_saelens(code: str, directory: Path, lens: str = "3.9.0") -> str:
    """What a process says in which SAELens cannot be imported."""
    before = (
        "import importlib.metadata, sys\n"
        "sys.modules['sae_lens'] = None\n"
        "known = importlib.metadata.version\n"
        "importlib.metadata.version = lambda name: "
        f"{lens!r} if name == 'transformer-lens' else known(name)\n"
    )
    return said_by(before + code, directory)


def said_by(code: str, directory: Path) -> str:
    """What a process says, with the toolkits that the tests run with."""
    path = filter(None, (str(ROOT.parent), os.environ.get("PYTHONPATH")))
    found = subprocess.run(
        [sys.executable, "-c", "import lch_plugin as lch\n" + code],
        capture_output=True,
        text=True,
        check=False,
        cwd=directory,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
    )
    return found.stdout + found.stderr


@pytest.mark.parametrize(
    ("lens", "said"),
    [
        ("3.9.0", "lch_plugin.saes needs SAELens: pip install 'lch-plugin[saes]'"),
        ("4.3.0", "SAELens, which does not support TransformerLens 4.3.0 yet: pip install"),
    ],
)
def test_without_saelens_saes_say_in_one_line_what_to_do(
    lens: str, said: str, tmp_path: Path
) -> None:
    found = without_saelens(ASK_FOR_SAES, tmp_path, lens)
    assert said in found
    assert found.count("\n") == 1


def test_saes_are_there_or_say_in_one_line_why_not(tmp_path: Path) -> None:
    """With the TransformerLens and the SAELens that are installed, whatever these are."""
    found = said_by(ASK_FOR_SAES, tmp_path)
    if HAS_SAES:
        assert found == "saes\n"
    else:
        assert f"SAELens, which does not support TransformerLens {LENS} yet: pip install" in found
        assert found.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["sae", "train", "--help"],
        pytest.param(["centroids", "Tom saw an apple"], marks=pytest.mark.slow),
        pytest.param(
            ["circuit", "--prompt", "Tom saw an", "--layer", "1", "--samples", "4"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_without_saelens_all_other_commands_work(command: list[str], tmp_path: Path) -> None:
    code = (
        f"sys.argv = ['lch', *{command}]\n"
        "from lch_plugin import cli\n"
        "try: cli.entry_point()\n"
        "except SystemExit as end: print('code', end.code)"
    )
    assert "code 0\n" in without_saelens(code, tmp_path)


def test_without_saelens_a_command_for_saes_is_one_line_and_code_1(tmp_path: Path) -> None:
    code = "sys.argv = ['lch', 'sae', 'train', 'hook']\nlch.circuits\nfrom lch_plugin import cli\n"
    found = without_saelens(code + "cli.entry_point()", tmp_path)
    assert found.startswith("Error: lch_plugin.saes needs SAELens")
    assert found.count("\n") == 1


def test_without_saelens_steering_and_concepts_are_there(tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "model = torch.nn.Sequential(torch.nn.Linear(3, 3))\n"
        "with lch.steering.steering(model, '0', torch.ones(3)): y = model(torch.zeros(3))\n"
        "print(torch.equal(y, model(torch.ones(3))), lch.concepts.cav.__name__)"
    )
    assert "True cav\n" in without_saelens(code, tmp_path)

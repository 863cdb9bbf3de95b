"""What the command line says before anything heavy is imported, and the ways to start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import lch_plugin
from tests.cli import COMMANDS, NEEDED, run

HEAVY = (
    *("torch", "transformers", "transformer_lens", "sae_lens", "nnsight", "ray"),
    *("sklearn", "pandas", "datasets", "matplotlib", "captum"),
)
#: Lines that are wrong in what can be known without a model, or only ask for help.
LINES = [
    ["--help"],
    ["--version"],
    ["lns", "I picked"],
    ["sae", "train", "--help"],
    *([*name.split(), *NEEDED[name], "--no-such-option"] for name in COMMANDS),
    ["demo", "--seed", "x"],
    ["lens", "I picked", "--linearization", "detachd"],
    ["lens", ""],
    ["centroids", ""],
    ["circuit"],
    ["circuit", "--task", "an", "--layer", "3"],
    ["saliency", "I picked", "--answer", ""],
    ["probe", "--train", "statements.csv", "--layers", "x"],
    ["probe", "--train", "statements.csv", "--cotangent", "two"],
    ["sae", "train", "hook", "--column", "text"],
    ["sae", "cache", "hook", "--model", "gpt2"],
    ["sae", "features", "dictionary", "--column", "text"],
    ["sae", "evaluate", "dictionary", "--skip-empty"],
    ["sae", "compare", "--model", "gpt2"],
]
RUN_ALL = f"""
import contextlib, io, json, sys
from lch_plugin.cli import entry_point
found = []
for line in json.loads(sys.argv[1]):
    sys.argv[:] = ["lch", *line]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            entry_point()
        except SystemExit as end:
            code = end.code or 0
    found.append([line, code, [name for name in {HEAVY} if name in sys.modules]])
print(json.dumps(found))
"""


def python(*arguments: str) -> str:
    path = filter(None, (str(Path(lch_plugin.__file__).parents[1]), os.environ.get("PYTHONPATH")))
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
    )
    return done.stdout


def test_help_and_mistakes_are_said_before_anything_heavy_is_imported() -> None:
    found = json.loads(python("-c", RUN_ALL, json.dumps(LINES)))
    assert len(found) == len(LINES)
    imported: list[str] = []
    for line, code, modules in found:
        asked = line[-1] in ("--help", "--version")
        assert (code == 0) == asked, line
        # All lines share a process: what one imports is there at the next.
        assert modules == imported, line
    assert imported == []


def test_the_package_itself_imports_nothing_heavy() -> None:
    code = f"import sys, lch_plugin; print([m for m in {HEAVY} if m in sys.modules])"
    assert python("-c", code) == "[]\n"


def test_python_m_is_the_same_command() -> None:
    assert python("-m", "lch_plugin", "--version") == f"lch_plugin {version('lch-plugin')}\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["lns", "x"], "'lens'"),
        (["sae", "trian", "x"], "'train'"),
        (["lens", "x", "--tokn", "a"], "--token"),
        (["lens", "x", "--linearization", "detachd"], "Did you mean detached?"),
    ],
)
def test_a_wrong_name_is_answered_by_the_nearest(line: list[str], said: str) -> None:
    code, text = run(*line)
    assert code == 2
    assert said in " ".join(text.replace("│", " ").split())


def test_completion_can_be_installed() -> None:
    assert {"--install-completion", "--show-completion"} <= set(
        python("-m", "lch_plugin", "--help").split()
    )

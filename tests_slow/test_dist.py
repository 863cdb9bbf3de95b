"""The wheel and the sdist, and what a user has of them: outside of the repository, in a venv alone.

What the package depends on is not installed again: the venv sees the packages of the interpreter
that runs the tests. It does not see its editable install of this one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lch_plugin"
#: Files of the package that are no modules.
DATA = {
    str(path.relative_to(ROOT))
    for folder in ("demo/model", "demo/vision/model", "templates")
    for path in (PACKAGE / folder).iterdir()
    if path.is_file()
} | {"lch_plugin/py.typed"}
#: Some of what `make test` reads besides.
BESIDE = {"pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt", "mkdocs.yml"} | {
    *(".ci/run", ".github/workflows/test.yml", "tests/cli/__init__.py", "docs/index.md")
}
MODULES = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}


def said_by(*command: str | Path, cwd: Path) -> str:
    """What a command says, which knows nothing of this repository."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**env, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with both, as `make dist` builds them."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, cwd=out)
    return out


@pytest.fixture(scope="module")
def bin_of(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of a venv with the wheel."""
    home = tmp_path_factory.mktemp("home") / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    (wheel,) = dist.glob("*.whl")
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    said_by(sys.executable, "-m", "pip", "--python", python, *install, cwd=home)
    own = Path(
        said_by(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=home)[:-1]
    )
    others = sysconfig.get_path("purelib")
    # A .pth within a directory that a .pth names is not read: no editable install of this package.
    (own / "others.pth").write_text(f"{others}\n", encoding="utf-8")
    return python.parent


def test_both_have_every_module_and_all_data(dist: Path) -> None:
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as opened:
        in_wheel = set(opened.namelist())
    with tarfile.open(sdist) as opened_tar:
        in_sdist = {name.partition("/")[2] for name in opened_tar.getnames()}
    assert {*MODULES, *DATA} - in_wheel == set()
    assert {*MODULES, *DATA, *BESIDE} - in_sdist == set()
    strangers = {n for n in in_wheel if not n.startswith("lch_plugin")}
    assert strangers == set(), "the wheel installs more than the package"


def test_the_size_is_the_one_that_is_documented(dist: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "install.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"The wheel has ([\d.]+) MB", page)
    (wheel,) = dist.glob("*.whl")
    assert f"{wheel.stat().st_size / 1e6:.1f}" == said


def test_it_is_the_installed_one(bin_of: Path, tmp_path: Path) -> None:
    said = said_by(
        bin_of / "python", "-c", "import lch_plugin as l; print(l.__file__)", cwd=tmp_path
    )
    assert Path(said.strip()).is_relative_to(bin_of.parent)


def test_both_ways_to_the_command_line_say_the_version(bin_of: Path, tmp_path: Path) -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    want = f"lch_plugin {version[1]}\n"
    assert said_by(bin_of / "lch", "--version", cwd=tmp_path) == want
    assert said_by(bin_of / "python", "-m", "lch_plugin", "--version", cwd=tmp_path) == want


def test_commands_run_on_the_embedded_model(bin_of: Path, tmp_path: Path) -> None:
    said_by(bin_of / "lch", "centroids", "I climbed up the pear tree", cwd=tmp_path)
    assert (tmp_path / "centroids" / "centroids.safetensors").stat().st_size > 0
    said_by(bin_of / "lch", "lens", "I climbed up the pear tree", cwd=tmp_path)
    assert "<html" in (tmp_path / "lens" / "report.html").read_text(encoding="utf-8")
    found = json.loads(said_by(bin_of / "lch", "info", "--json", cwd=tmp_path))
    assert found["architecture"] == "GPT2LMHeadModel"


def test_the_vision_model_is_in_it(bin_of: Path, tmp_path: Path) -> None:
    code = (
        "import lch_plugin as lch; from lch_plugin.demo.vision import digits\n"
        "model = lch.load_demo_vision_model()\n"
        "with lch.huggingface.attach(model) as handle: model(digits('test')[0][:2])\n"
        "print(len(handle.cache))"
    )
    assert int(said_by(bin_of / "python", "-W", "ignore", "-c", code, cwd=tmp_path)) > 0

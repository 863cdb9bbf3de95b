"""What the pages and the examples show runs, as it stands."""

from __future__ import annotations

import doctest
import importlib.util
import re
import runpy
import shlex
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor
from typer.main import get_command

import lch_plugin as lch
from lch_plugin import cli, demo
from tests import families
from tests.slow import all_but
from tests.toolkits import HAS_SAES, needs_saes, require_saes

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "lch_plugin/**/*.md")
    for path in ROOT.glob(pattern)
)
#: Before a block that cannot run here, with the reason.
NOT_RUN = re.compile(r"<!-- not run: .+ -->\n\Z")
#: So few blocks may have that mark.
MAX_NOT_RUN = 3
#: Pages and examples that take more than ten seconds.
SLOW = {
    "centroids_by_site.py",
    "vision_sae.py",
    "docs/how-to/concepts.md",
    "docs/how-to/find_a_circuit.md",
}
#: In blocks, names and examples that need SAELens.
NAMES_SAES = re.compile("sae", re.IGNORECASE)


def blocks(page: str, language: str) -> Iterator[tuple[str, bool]]:
    """The fenced blocks of a page, and whether each is to be run."""
    text = (ROOT / page).read_text()
    for found in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield found[1], NOT_RUN.search(text[: found.start()]) is None


PAGES_WITH_PYTHON = [page for page in PAGES if any(run for _, run in blocks(page, "python"))]


@pytest.mark.parametrize("page", all_but(set(PAGES_WITH_PYTHON) - SLOW, PAGES_WITH_PYTHON))
def test_the_pages_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page are one script: without SAELens, up to the first block of SAEs."""
    shown = [code for code, run in blocks(page, "python") if run]
    if not HAS_SAES:
        shown = list(takewhile(lambda code: not NAMES_SAES.search(code), shown))
        if not shown:
            require_saes()
    code = "\n".join(shown)
    # From a file: nnsight reads the source of what it traces.
    script = tmp_path / "page.py"
    script.write_text(code)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script))


def test_what_does_not_run_is_rare() -> None:
    left_out = [page for page in PAGES for _, run in blocks(page, "python") if not run]
    assert len(left_out) <= MAX_NOT_RUN, left_out
    for page in PAGES:
        for code, _ in blocks(page, "python"):
            compile(code, page, "exec")


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_commands_exist(page: str) -> None:
    for line in shell_lines(page):
        check_shell(line, whole=True)
    for code in inline_codes(page):
        check_shell(code, whole=False)


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_names_exist(page: str) -> None:
    """Files of the repository, and names of the package, that stand between backticks."""
    for code in inline_codes(page):
        if found := re.match(r"(?:docs|examples|benchmarks|tests|lch_plugin)/[\w/.-]+", code):
            assert (ROOT / found[0]).exists(), code
        if found := re.match(r"(?:lch|lch_plugin)(?:\.[A-Za-z_]\w*)+", code):
            if not HAS_SAES and NAMES_SAES.search(found[0]):
                continue
            thing = lch
            for name in found[0].split(".")[1:]:
                thing = getattr(thing, name, None) or submodule(thing, name)


TOP_LEVEL = [
    name
    for name in lch.__all__
    if HAS_SAES or name != "saes"
    if callable(fn := getattr(lch, name)) and ">>>" in (fn.__doc__ or "")
]


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_the_examples_of_the_functions_at_the_top_run(name: str) -> None:
    found = doctest.DocTestFinder(recurse=False).find(
        getattr(lch, name), name, globs={"torch": torch, "lch": lch, **vars(demo)}
    )
    for example in found:
        assert doctest.DocTestRunner().run(example).failed == 0


def submodule(package: object, name: str) -> object:
    return importlib.import_module(f"{package.__name__}.{name}")  # type: ignore[attr-defined]


def shell_lines(page: str) -> Iterator[str]:
    """Commands of shell blocks, continued lines put together."""
    text = "\n".join(code for code, _ in blocks(page, "bash"))
    yield from (line.strip() for line in text.replace("\\\n", " ").splitlines())


def inline_codes(page: str) -> list[str]:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def check_shell(line: str, *, whole: bool) -> None:
    """That what a line calls exists: a command with these options, a target, a script, a module.

    Args:
        line: of a shell.
        whole: what the command cannot do without has to be there.
    """
    match line.split():
        case ["lch", *_]:
            check_command(line, whole=whole)
        case ["make", target, *_]:
            assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.M), line
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module), line
        case ["python", script, *_]:
            assert (ROOT / script).is_file(), line


def check_command(line: str, *, whole: bool) -> None:
    command, words = get_command(cli.app), shlex.split(line)[1:]
    if words and words[0].startswith("-"):  # An option of the command that has all others.
        assert words == ["--help"] or words[0] in [o for p in command.params for o in p.opts], line
        return
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, line
        command = command.commands[words.pop(0)]
    assert words or not whole or not hasattr(command, "commands"), line
    words = [word for word in words if word != "..."]
    for parameter in command.params:  # Whether there is such a file or device here is no matter.
        parameter.callback = None
    # Raises of an option that there is not.
    command.make_context(line, words, resilient_parsing=not whole)


@pytest.mark.parametrize("example", all_but(set(EXAMPLES) - SLOW, EXAMPLES))
def test_examples_run(
    example: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = {"train_centroid_sae.py": ["sae"], "vision_sae.py": ["--rows", "4096"]}
    if NAMES_SAES.search(example):
        require_saes()
    monkeypatch.chdir(tmp_path)
    run_example(example, arguments.get(example, []), monkeypatch)
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
@needs_saes
def test_the_vision_example_takes_other_models_and_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    families.huggingface("vit_base", torch.float32).save_pretrained(tmp_path / "model")
    size = {"height": 16, "width": 16}
    ViTImageProcessor(size=size).save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    for i in range(40):
        directory = tmp_path / "images" / ("train" if i < 24 else "test") / "ab"[i % 2]
        directory.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 127 + 128 * (i % 2), (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    arguments = "--model model --images images --module layers.1.mlp --rows 2048"
    run_example("vision_sae.py", arguments.split(), monkeypatch)
    assert (tmp_path / "vision_sae.png").is_file()
    assert "centroid, BatchTopK" in capsys.readouterr().out


def run_example(example: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [example, *arguments])
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")

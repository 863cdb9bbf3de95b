"""What the files of a release say of the package, held to what it is."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
FILES = sorted((ROOT / ".github").rglob("*.yml"))


def field(name: str) -> str:
    found = re.search(rf'^{name} = "(.+)"$', PROJECT, re.MULTILINE)
    assert found is not None
    return found[1]


def steps(name: str) -> list[dict[str, Any]]:
    read = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))
    return [step for job in read["jobs"].values() for step in job["steps"]]


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == field("version")
    assert cited["license"] == field("license")
    assert [author["name"] for author in cited["authors"]] == re.findall(
        r'authors = \[\{ name = "(.+?)" \}\]', PROJECT
    )
    (paper,) = cited["references"]
    assert paper["url"].endswith("2604.11962")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_for_github_are_yaml(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_the_workflow_runs_what_ci_runs() -> None:
    assert [step["run"] for step in steps("test.yml") if "run" in step] == [".ci/run"]


def test_targets_that_workflows_make_are_there() -> None:
    made = (ROOT / "Makefile").read_text(encoding="utf-8")
    wanted = [
        target
        for step in steps("release.yml")
        for target in re.findall(r"\bmake (\w+)", step.get("run", ""))
    ]
    assert wanted == ["dist"]
    assert all(f"\n{target}:" in made for target in wanted)


def test_the_oldest_python_of_the_matrix_is_the_one_that_is_required() -> None:
    read = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
    matrix = read["jobs"]["test"]["strategy"]["matrix"]
    pythons = [*matrix["python"], *(one["python"] for one in matrix["include"])]
    oldest = min(tuple(map(int, python.split("."))) for python in pythons)
    assert field("requires-python") == ">=" + ".".join(map(str, oldest))
    assert sys.version_info[:2] in {tuple(map(int, python.split("."))) for python in pythons}

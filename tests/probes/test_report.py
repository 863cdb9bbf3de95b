"""The command writes the whole matrix, with its controls, as JSON, plots and a page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lch_plugin as lch
from lch_plugin import probes
from lch_plugin.cli import app


def call(*arguments: object) -> object:
    return CliRunner().invoke(app, ["probe", *map(str, arguments)])


def test_the_command_writes_a_report(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    train = [part for path in files[:2] for part in ("--train", path)]
    options = ["--test", files[2], "--layers", "1,2", "--probe", "mass-mean", "--probe", "lda"]
    done = call(*train, *options, "--k", "1,4", "--token", "mean", "--seed", 5, "--out", out)
    assert done.exit_code == 0, done.output
    found = json.loads((out / "results.json").read_text())
    assert found["run"]["seeds"] == [5, 6, 7]
    assert found["run"]["token"] == "mean"
    assert [s["n"] for s in found["sets"]] == [20, 20, 40]
    hooks = [r["hook"] for r in found["results"] if r["probe"] == "lda"]
    ends = ("centroid", "in", "out")
    assert hooks == [f"blocks.{layer}.mlp.hook_{end}" for layer in (1, 2) for end in ends]
    for r in found["results"]:
        assert [len(r["accuracy"]), *map(len, r["accuracy"][0])] == [3, 3, 3]
        for where in ("own", "others"):
            means = {k: v["mean"] for k, v in r["summary"][where].items()}
            expected = means["accuracy"] - means["control"]
            assert means["selectivity"] == pytest.approx(expected)
    # Apples are told from pears by tokens that are in the mean; 16 statements are trained on.
    for r in found["results"]:
        if r["probe"] == "lda":
            accuracy, control = (r["summary"]["others"][k]["mean"] for k in ("accuracy", "control"))
            assert accuracy > control + 0.1
    assert {s["k"] for s in found["sparse"]} == {1, 4}
    page = (out / "report.html").read_text()
    assert "selectivity" in page
    assert page.count("data:image/png") == 6
    assert (out / "matrix_lda.png").exists()


def test_python_takes_two_components_and_one_set(files: list[Path], tmp_path: Path) -> None:
    one = probes.read_statements(files[2])
    found = probes.run(
        lch.load_demo_model(), [one], tmp_path / "out", layers=[0], components=["attn", "block"]
    )
    assert [r["component"] for r in found["results"]] == ["attn"] * 3 + ["block"] * 3
    assert found["results"][0]["summary"]["others"] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--probe", "svm"], "probe 'svm' is not known"),
        (["--component", "head"], "component 'head' is not known"),
        (["--token", "first"], "--token 'first' is no list of whole numbers"),
        (["--token", "0"], "token 0 is not known"),
        (["--layers", "a"], "--layers 'a' is no list of whole numbers"),
        (["--k", "0"], "a probe reads at least 1 coordinate"),
        (["--rows", "4"], "are too few"),
        (["--probe", "lda", "--probe", "lda"], "a probe is named twice"),
    ],
)
def test_what_cannot_be_done_is_said_before_a_model_is_loaded(
    options: list[str], said: str, files: list[Path], tmp_path: Path, as_users_run: None
) -> None:
    done = call(
        "--train", files[0], *options, "--model", tmp_path / "none", "--out", tmp_path / "o"
    )
    assert isinstance(done.exception, lch.InputError)
    assert said in str(done.exception)
    assert not (tmp_path / "o").exists()


def test_fewer_than_three_seeds_are_refused(files: list[Path]) -> None:
    with pytest.raises(lch.InputError, match="at least 3"):
        probes.check([probes.read_statements(files[0])], seeds=2)

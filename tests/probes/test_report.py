"""The command writes the whole matrix, with its controls, as JSON, plots and a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
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
    options = ["--test", files[2], "--layers", "-2", "--probe", "mass-mean", "--probe", "lda"]
    done = call(*train, *options, "--token", "mean", "--seed", 5, "--out", out)
    assert done.exit_code == 0, done.output
    found = json.loads((out / "results.json").read_text())
    assert found["run"]["seeds"] == [5, 6, 7]
    assert found["run"]["token"] == "mean"
    assert [s["n"] for s in found["sets"]] == [20, 20, 40]
    hooks = [r["hook"] for r in found["results"] if r["probe"] == "lda"]
    ends = ("centroid", "in", "out")
    assert hooks == [f"blocks.2.mlp.hook_{end}" for end in ends]
    for r in found["results"]:
        for measure in ("accuracy", "auroc"):
            cells = r[measure]["probe"]
            assert [len(cells), *map(len, cells[0])] == [3, 3, 3]
            for where in ("own", "others"):
                means = {k: v["mean"] for k, v in r["summary"][where][measure].items()}
                assert means["selectivity"] == pytest.approx(means["probe"] - means["control"])
            # Row by row: the mean of a row's cells of other sets.
            row = np.array(cells)[:, 1, [0, 2]]
            assert r["trained_on"]["picked"][measure]["probe"]["mean"] == pytest.approx(row.mean())
    # Apples are told from pears by tokens that are in the mean; 16 statements are trained on.
    for r in found["results"]:
        if r["probe"] == "lda":
            for score in r["summary"]["others"].values():
                assert score["probe"]["mean"] > score["control"]["mean"] + 0.1
    page = (out / "report.html").read_text()
    assert "selectivity" in page
    assert page.count("data:image/png") == 8
    assert (out / "matrix_lda_auroc.png").exists()


def test_python_takes_two_components_and_one_set(files: list[Path], tmp_path: Path) -> None:
    one = probes.read_statements(files[2])
    found = probes.run(
        lch.load_demo_model(), [one], tmp_path / "out", layers=[0], components=["attn", "block"]
    )
    assert [r["component"] for r in found["results"]] == ["attn"] * 3 + ["block"] * 3
    assert found["results"][0]["summary"]["others"] is None


def test_settings_change_what_they_are_of_and_are_recorded(
    files: list[Path], tmp_path: Path
) -> None:
    sets = [probes.read_statements(path) for path in files[:2]]
    model = lch.load_demo_model()

    def run(**settings: Any) -> dict[str, Any]:
        out = tmp_path / "-".join(settings)
        return probes.run(model, sets, out, layers=[1], token="mean", **settings)

    plain = run(k=[4])
    centred = run(centre=True)
    for before, after in zip(plain["results"], centred["results"], strict=True):
        np.testing.assert_allclose(before["auroc"]["probe"], after["auroc"]["probe"])
        assert before["accuracy"]["probe"] != after["accuracy"]["probe"]
    ranked = run(k=[4], rank_by="f")
    assert ranked["results"] == plain["results"]
    assert ranked["sparse"] != plain["sparse"]
    logit = run(cotangent=lch.cotangents.Logit(5))
    changed = [a != b for a, b in zip(plain["results"], logit["results"], strict=True)]
    assert changed == [True, False, False]  # A cotangent is the centroids' alone.
    assert logit["results"][0]["cotangent"] == "logit_5"


@pytest.mark.parametrize(
    ("text", "name"), [("ones", "ones"), ("random:3", "random3"), ("logit: apple", "logit_")]
)
def test_settings_are_given_as_text(
    text: str, name: str, files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--layers", 1, "--k", "4", "--rank-by", "f", "--centre", "--out", out]
    done = call("--train", files[0], "--cotangent", text, *options)
    assert done.exit_code == 0, done.output
    found = json.loads((out / "results.json").read_text())
    assert found["run"]["cotangent"].startswith(name)
    assert found["run"]["centre"] is True
    assert found["run"]["rank_by"] == "f"
    assert [sparse["k"] for sparse in found["sparse"]] == [4, 4, 4]


def test_what_a_model_lacks_is_said_in_one_line(files: list[Path], tmp_path: Path) -> None:
    one, model = probes.read_statements(files[0]), lch.load_demo_model()
    with pytest.raises(lch.InputError, match="this model has 128 coordinates"):
        probes.run(model, [one], tmp_path / "out", k=[1, 128])
    done = call("--train", files[0], "--cotangent", "logit: two words", "--out", tmp_path / "out")
    assert isinstance(done.exception, lch.InputError)
    assert "tokens of this tokenizer" in str(done.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--probe", "svm"], "probe 'svm' is not known"),
        (["--component", "head"], "component 'head' is not known"),
        (["--token", "first"], "token 'first' is not known"),
        (["--token", "4,5"], "token '4,5' is not known"),
        (["--token", "0"], "token 0 is not known"),
        (["--layers", "a"], "--layers 'a' is no list of whole numbers"),
        (["--cotangent", "logit:"], "--cotangent 'logit:' is not known: give ones, random:SEED"),
        (["--cotangent", "random:-1"], "--cotangent 'random:-1' is not known"),
        (["--rank-by", "l1"], "rank_by='l1' is not known"),
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

"""`lch demo` in a small setting: the whole of it, twice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from sae_lens import SAE
from scipy.stats import false_discovery_control
from typer.testing import CliRunner

import lch_plugin as lch
from lch_plugin import cli
from lch_plugin.demonstration import run as demo

# In one process, so that what the fixtures make is made once.
pytestmark = pytest.mark.xdist_group("demo_run")


@pytest.fixture(scope="module")
def small() -> Any:
    patch = pytest.MonkeyPatch()
    for name, value in {
        "N_TRAINING_STORIES": 200,
        "N_TEST_STORIES": 30,
        "TRAINING_TOKENS": 8192,
        "D_SAE": 64,
        "N_PROMPTS": 20,
        "N_RANDOM": 5,
    }.items():
        patch.setattr(demo, name, value)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def report(small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "report"
    result = CliRunner().invoke(cli.app, ["demo", "--out", str(out), "--seed", "1"])
    assert result.exit_code == 0, result.output
    return out


def test_everything_is_there_and_loads(report: Path) -> None:
    assert {p.name for p in report.iterdir()} == {
        "report.html",
        "results.json",
        "centroids.png",
        "firing.png",
        "neurons.png",
        "ablations.png",
        "sae-centroids",
        "sae-activations",
        "files.json",
    }
    metadata = SAE.load_from_disk(report / "sae-centroids").cfg.metadata
    assert metadata.lch_centroid["layer"] == demo.SAE_LAYER
    assert "lch_centroid" not in SAE.load_from_disk(report / "sae-activations").cfg.metadata


def test_the_page_is_self_contained_and_shows_the_results(report: Path) -> None:
    page = (report / "report.html").read_text()
    results = json.loads((report / "results.json").read_text())
    for source in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert source.startswith("data:image/png;base64,")
    assert "<script" not in page
    assert f"{results['circuit']['logit_difference']:+.2f}" in page
    for sae in results["saes"]["trained"].values():
        assert f"{sae['explained_variance']:.3f}" in page
        assert all(f"feature {f['index']}" in page for f in sae["features"])
    assert all(len(set(a["neurons"])) == 10 for a in results["circuit"]["ablations"])
    assert results["run"]["seed"] == 1
    ablations = results["circuit"]["ablations"]
    expected = false_discovery_control([a["p_value"] for a in ablations])
    assert [a["p_corrected"] for a in ablations] == pytest.approx(expected)
    assert f"corrected for the {len(ablations)} tests" in page


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(report: Path, tmp_path: Path) -> None:
    demo.run(tmp_path / "again", seed=1)
    again = (tmp_path / "again" / "results.json").read_bytes()
    assert again == (report / "results.json").read_bytes()


def test_a_directory_with_other_content_is_refused_and_kept(
    report: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (report / "results.json").read_bytes()
    with pytest.raises(lch.OutputError, match="other content"):
        demo.run(report)
    monkeypatch.setattr("sys.argv", ["lch", "demo", "--out", str(report)])
    with pytest.raises(SystemExit) as exit_:
        cli.entry_point()
    assert exit_.value.code == 1
    assert "other content" in capsys.readouterr().err
    assert (report / "results.json").read_bytes() == before


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta"])
def test_an_unusable_device_is_refused(tmp_path: Path, device: str) -> None:
    with pytest.raises(lch.InputError, match=device):
        demo.run(tmp_path / "report", device=device)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing_half_done(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "a_an_circuit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path / "report")
    assert not list(tmp_path.iterdir())

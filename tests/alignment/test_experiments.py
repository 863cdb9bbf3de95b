"""The experiments on delayed generalisation run, and write what they found."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

PAPER = Path(__file__).parents[2] / "examples" / "paper"


@pytest.mark.parametrize("name", ["grokking_digits", "grokking_modular"])
def test_an_experiment_compares_four_methods(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(PAPER))
    arguments = ["--small", "--steps", "50", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [name, *arguments])
    runpy.run_path(str(PAPER / f"{name}.py"), run_name="__main__")
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["curves"]) == ["none", "weight decay", "Jacobian", "alignment"]
    first = [runs[0][0] for runs in found["curves"].values()]
    assert first == first[:1] * 4  # All start at the same network.
    last = [runs[0][-1]["alignment"] for runs in found["curves"].values()]
    assert len(set(last)) == 4
    assert last[3] == max(last)
    assert (tmp_path / "curves.png").is_file()

"""What the experiments on delayed generalisation share; `make test-slow` runs them."""

from __future__ import annotations

import json
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

PAPER = Path(__file__).parents[2] / "examples" / "paper"


@pytest.fixture
def grokking(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(PAPER))
    return pytest.importorskip("grokking")


def test_methods_start_at_the_same_network_and_end_at_others(grokking: Any, tmp_path: Path) -> None:
    def make(seed: int) -> Any:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2))
        x = torch.randn(12, 4)
        labels = torch.randint(2, (12,))
        return grokking.Task(
            model,
            repeat((x, labels)),
            nn.functional.cross_entropy,
            lambda: {
                "train": 1.0,
                "test": float((model(x).argmax(1) == labels).double().mean()) / 2,
            },
            probe=x,
            lr=0.01,
        )

    methods = grokking.methods(1.0, 1.0, 3.0)
    found = grokking.experiment(make, methods, range(3, 5), steps=20, every=10)
    assert list(found) == ["none", "weight decay", "Jacobian", "alignment"]
    for seed in range(2):
        first = [runs[seed][0] for runs in found.values()]
        assert first == first[:1] * 4
        last = [runs[seed][-1]["alignment"] for runs in found.values()]
        assert len(set(last)) == 4
        assert last[3] == max(last)
    assert found["none"][0][0] != found["none"][1][0]
    args = SimpleNamespace(out=tmp_path, seed=3)
    grokking.report(args, found, methods, steps=20)
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["results"]["curves"] == found
    assert record["settings"]["methods"][2]["jacobian"] == 1
    assert record["results"]["summary"]["none"]["steps_to_target"] == [None, None]
    assert (tmp_path / "figure.png").is_file()


def test_half_way_is_counted_from_where_the_training_data_are_learnt(grokking: Any) -> None:
    values = [(0.5, 0.9), (1.0, 0.2), (1.0, 0.3), (1.0, 0.5), (1.0, 0.8)]
    records = [{"step": i, "train": a, "test": b} for i, (a, b) in enumerate(values)]
    assert grokking.half_way(records, "test") == 3
    assert grokking.half_way(records[:1], "test") is None
    assert grokking.half_way(records[1::-1] + records[1:2], "test") is None
    assert grokking.first_step(records, "test", 0.85) == 0

"""Every script of `examples/paper` runs offline with `--small`, and finds what its docstring says.

`make test-slow`: outside `testpaths`, since it takes minutes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import ROOT, run_small

SCRIPTS = sorted(
    path for path in (ROOT / "examples/paper").glob("*.py") if "__main__" in path.read_text()
)


def numbers(content: Any) -> Iterator[float]:
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from numbers(value)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield content


def circuit_discovery(found: dict[str, Any]) -> None:
    # The neuron that another method finds is above the 99th percentile of the paper's.
    assert found["logit_difference"] > 0
    assert found["percentile"] > 99
    assert found["rank"] == 1 + found["top"].index(found["neuron"])


def robustness(found: dict[str, Any]) -> None:
    own = found["radii"].index(0.25)
    for n, values in found["spearman_lowest"].items():
        assert min(values) > 0.97, n
        assert max(values) == values[own]
    few, many = found["spearman_lowest"]["16"], found["spearman_lowest"]["512"]
    assert many[own] > few[own]


def taylor_error(found: dict[str, Any]) -> None:
    assert len(found) == 16  # Two models of four blocks, each with attention and MLP.
    for name, component in found.items():
        assert component["slope"] == pytest.approx(1, abs=0.02), name


def implicit_representation(found: dict[str, Any]) -> None:
    assert found["accuracy"] > 0.97
    assert found["largest_difference_within_a_pattern"] < 1e-10
    assert found["patterns"] > 100


def dino_saes(found: dict[str, Any]) -> None:
    for of in ("centroid", "input", "output"):
        assert [row["k"] for row in found[of]] == [8, 16, 32, 64]
        assert all(row["accuracy"] > 0.5 and 0 < row["live"] <= 640 for row in found[of])


def dictionary_similarity(found: dict[str, Any]) -> None:
    for name, pair in found.items():
        assert pair["correlation"] > pair["by_chance"], name


def dino_dogs(found: dict[str, Any]) -> None:
    for of in ("centroid", "output"):
        assert found[of]["same_label"]["1"] > 0.5
        assert len(found[of]["probe_accuracy"]) == 3
    assert all(0 <= p <= 1 for p in found["wilcoxon_p"].values())


def spurious_features(found: dict[str, Any]) -> None:
    # The centroid of a linear head is the prediction: a probe reads no more off it.
    for seeds in found["runs"]:
        mean = {key: sum(run[key] for run in seeds) / len(seeds) for key in seeds[0]}
        assert mean["same, head's centroid"] == pytest.approx(
            mean["same, prediction alone"], abs=0.02
        )
        assert mean["same, head's input"] >= mean["same, head's centroid"]


def grokking_digits(found: dict[str, Any]) -> None:
    steps = {name: numbers["median_steps"] for name, numbers in found["summary"].items()}
    assert steps["none"] is None
    assert steps["weight decay"] < steps["Jacobian"]
    start, end = found["summary"]["alignment"]["alignment"][0]
    assert start < 0.1 < 0.5 < end


def grokking_modular(found: dict[str, Any]) -> None:
    steps = {name: numbers["median_steps"] for name, numbers in found["summary"].items()}
    assert [name for name, step in steps.items() if step is not None] == ["weight decay"]
    assert found["summary"]["alignment"]["alignment"][0][1] > 0.9


def language_saliency(found: dict[str, Any]) -> None:
    assert all(one["completeness_error"] < 1e-5 for one in found["prompts"])
    for name in set(found["methods"]) - {"random order"}:
        for kind, sign in (("deletion", -1), ("insertion", 1)):
            means = (found["methods"][one][kind]["mean"] for one in (name, "random order"))
            assert sign * next(means) > sign * next(means), (name, kind)


def saliency_sanity(found: dict[str, Any]) -> None:
    for name, one in found.items():
        assert set(one["correlation"]) == {"position", "length of the embedding"}
        means = [sum(values) / len(values) for values in one["stages"].values()]
        assert means[-1] < means[0], name


def image_centroids(found: dict[str, Any]) -> None:
    for name in set(found) - {"random order"}:
        assert found[name]["deletion"]["mean"] < found["random order"]["deletion"]["mean"], name
    best = min(found, key=lambda name: found[name]["deletion"]["mean"])
    assert best == "IntegratedGradients"


CLAIMS: dict[str, Callable[[dict[str, Any]], None]] = {
    check.__name__: check
    for check in (
        circuit_discovery,
        robustness,
        taylor_error,
        implicit_representation,
        dino_saes,
        dictionary_similarity,
        dino_dogs,
        spurious_features,
        grokking_digits,
        grokking_modular,
        language_saliency,
        saliency_sanity,
        image_centroids,
    )
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs_and_finds_what_it_says(script: Path, tmp_path: Path) -> None:
    out, options = tmp_path / script.stem, []
    if script.stem == "truth_probes":
        if not (os.environ.get("LCH_TRUTH_DATA") and os.environ.get("LCH_MODEL")):
            pytest.skip("LCH_TRUTH_DATA and LCH_MODEL name no statements and no model to read them")
        options = ["--data", os.environ["LCH_TRUTH_DATA"], "--model", os.environ["LCH_MODEL"]]
    run_small(script, out, *options)
    record = json.loads((out / "results.json").read_text(encoding="utf-8"))
    found = list(numbers(record))
    assert found
    assert all(map(math.isfinite, found))
    assert list(out.glob("*.png"))
    if script.stem in CLAIMS:
        assert record["versions"]["lch-plugin"]
        assert record["settings"]["seed"] == 0
        assert "embedded" in record["settings"]["model"] or "ReLU" in record["settings"]["model"]
        CLAIMS[script.stem](record["results"])


def test_every_claim_has_a_script() -> None:
    assert {path.stem for path in SCRIPTS} >= set(CLAIMS)

"""`examples/lens/one_dictionary.py` runs with `--small`, and finds what must hold of any model."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.scripts import ROOT, run_small
from tests.toolkits import needs_saes


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("one_dictionary")
    script = ROOT / "examples/lens/one_dictionary.py"
    said = run_small(script, out)
    assert "one dictionary" in said
    found: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return found["results"]


@needs_saes
def test_every_number_is_finite(results: dict[str, Any]) -> None:
    for name, of in results.items():
        for key, value in of.items():
            assert math.isfinite(value["mean"]), (name, key)
            assert math.isfinite(value["error"]), (name, key)


@needs_saes
def test_rivals_have_as_many_parameters(results: dict[str, Any]) -> None:
    own = results["one dictionary"]["parameters"]["mean"]
    for name in ("one a depth", "crosscoder", "crosscoder, k a stream"):
        assert results[name]["parameters"]["mean"] == pytest.approx(own, rel=0.01), name


@needs_saes
def test_the_exact_centroid_is_the_ceiling_of_small_steps(results: dict[str, Any]) -> None:
    key = "R2 data 0.1"
    exact = results["exact centroid"][key]["mean"]
    assert exact > 0.9
    # The hook point's centroid of a span is the gradient that is taken outside of it.
    assert results["span site"][key]["mean"] == pytest.approx(exact, abs=1e-4)
    assert all(of[key]["mean"] <= exact + 1e-4 for of in results.values())


@needs_saes
def test_a_trained_dictionary_explains_more_than_random_directions(results: dict[str, Any]) -> None:
    # Of what they are trained for: in so few steps they do not yet predict responses.
    own = results["one dictionary"]["explained"]["mean"]
    assert own > results["random directions"]["explained"]["mean"]

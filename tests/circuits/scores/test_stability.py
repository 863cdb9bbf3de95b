"""Stability of neuron rankings, held to scores computed one by one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr

import lch_plugin as lch
from lch_plugin.circuits.scores.stability import stability
from tests import models

IDS = models.tokens(batch=1)
OPTIONS: dict[str, Any] = {
    "radii": (0.1, 3.0),
    "seeds": (4, 5),
    "reference_radius": 0.5,
    "n_top": 6,
}


METRIC = lch.circuits.logit_difference([[1]], [[2]])


@pytest.mark.parametrize(
    "target",
    [
        {},
        {"cotangent": torch.linspace(-1, 2, models.D_MODEL)},
        {"metric": METRIC},
        {"metric": METRIC, "linearization": "jacobian"},
    ],
)
def test_each_value_compares_two_attributions(target: dict[str, Any]) -> None:
    model = models.bridge("gpt2")

    def scores(radius: float, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return lch.circuits.neuron_attribution(
            model, IDS, 1, -2, radius, 8, generator=generator, **target
        ).scores[1]

    found = stability(model, IDS, 1, -2, 8, **OPTIONS, **target)
    reference = scores(0.5, 6)
    for i, radius in enumerate((0.1, 3.0)):
        for j, seed in enumerate((4, 5)):
            other = scores(radius, seed)
            truth = spearmanr(reference, other).statistic
            assert float(found.spearman[1][i, j]) == pytest.approx(truth, rel=1e-5)
            shared = {*reference.topk(6).indices.tolist()} & {*other.topk(6).indices.tolist()}
            assert float(found.overlap[1][i, j]) == pytest.approx(len(shared) / 6)


def test_it_runs_the_model_once_and_says_what_was_done() -> None:
    model, passes = models.bridge("llama"), []
    with model.hooks(fwd_hooks=[("embed.hook_out", lambda value, hook: passes.append(value))]):
        lch.circuits.neuron_attribution(model, IDS)
        once = len(passes)
        found = stability(model, IDS, n_samples=4, **OPTIONS)
    assert len(passes) == 2 * once
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["radii"] == [0.1, 3.0]
    assert record["seeds"] == [4, 5]
    assert (record["reference_radius"], record["n_top"]) == (0.5, 6)
    assert list(record["layers"]) == ["0", "1", "2"]
    assert record["layers"]["1"] == {
        "spearman": found.spearman[1].tolist(),
        "overlap": found.overlap[1].tolist(),
    }


def test_where_nothing_is_drawn_rankings_are_the_same() -> None:
    found = stability(
        models.bridge("gpt2"), IDS, 1, radii=[0.0], seeds=[0, 1], reference_radius=0.0
    )
    assert bool((found.spearman[1] == 1).all())
    assert bool((found.overlap[1] == 1).all())


@pytest.mark.usefixtures("as_users_run")
def test_bad_input_is_refused() -> None:
    model = models.bridge("gpt2")
    for kw in ({"radii": []}, {"seeds": []}, {"seeds": [0.5]}, {"n_top": 0}, {"radii": [-1.0]}):
        with pytest.raises(lch.InputError, match=next(iter(kw)).removesuffix("i")):
            stability(model, IDS, 0, **kw)
    with pytest.raises(lch.InputError, match=f"n_top=49: .* {models.D_MLP} neurons"):
        stability(model, IDS, 0, n_samples=2, n_top=models.D_MLP + 1)
    metric = lch.circuits.logit_difference([[1]], [[2]])
    with pytest.raises(lch.InputError, match="layer 2 all score the same"):
        stability(
            model, IDS, position=0, n_samples=2, metric=metric
        )  # The last layer at the first.

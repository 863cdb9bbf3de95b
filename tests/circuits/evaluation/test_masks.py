"""Orders of nodes that are learned from what their circuits recover."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens import NodePoint, node_points, run_edited
from lch_plugin.circuits import (
    METHODS,
    NodeScores,
    Prompts,
    faithfulness,
    learn_masks,
    logit_difference,
    node_attribution,
    task,
)
from lch_plugin.circuits.scores.attribution import activations, kept_gradients
from tests import models

F64 = torch.float64
METRIC = logit_difference([[1, 5], [2]], [[3], [4, 6, 7]])
PAIR = Prompts(models.tokens(seed=1), METRIC, models.tokens(seed=2))
SIZES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


@pytest.mark.parametrize("backend", ["gpt2", "hooked"])
@pytest.mark.parametrize("with_reference", [True, False])
def test_derivatives_in_what_is_kept_are_those_of_a_circuit(
    backend: str, with_reference: bool
) -> None:
    """Of nodes inside and outside, held to finite differences; without a reference it is zero."""
    model = models.hooked(F64) if backend == "hooked" else models.bridge(backend, F64)
    points = node_points(model, ("head", "neuron"))
    names = [point.name for point in points]
    reference = activations(model, PAIR.corrupt, names) if with_reference else {}
    seeded = torch.Generator().manual_seed(0)
    keep = {p.name: (torch.rand(p.n_nodes, generator=seeded) < 0.5).to(F64) for p in points}

    def metric(name: str, index: int, share: float) -> Tensor:
        shares = {n: k.clone() for n, k in keep.items()}
        shares[name][index] = share

        def blend(point: NodePoint, value: Tensor) -> Tensor:
            own = point.split(value)
            other = point.split(reference[point.name]) if with_reference else torch.zeros_like(own)
            kept = shares[point.name][:, None]
            return (kept * own + (1 - kept) * other).reshape(value.shape)

        with torch.no_grad():
            edits = {p.name: partial(blend, p) for p in points}
            return METRIC.of(run_edited(model, PAIR.clean, edits)).sum()

    found = kept_gradients(model, PAIR, points, reference, keep, METHODS["jacobian"])
    torch.testing.assert_close(found.metric.sum(), metric(names[0], 0, float(keep[names[0]][0])))
    for name in (names[0], names[1], names[-1]):
        for index in (0, 1, 2, 3):
            at = float(keep[name][index])
            slope = (metric(name, index, at + 1e-4) - metric(name, index, at - 1e-4)) / 2e-4
            derivative = found.nodes[name][..., index].sum()
            torch.testing.assert_close(derivative, slope, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_learned_circuits_are_nearer_to_the_model_on_other_prompts() -> None:
    """The embedded model: of every size, and from what the scores left out or overdid."""
    model = lch.load_demo_model()
    found_on, judged_on = (task(model, "greater_than", 30, split=s) for s in ("train", "test"))
    scores = node_attribution(model, found_on)
    generator = torch.Generator().manual_seed(0)
    learned = learn_masks(model, found_on, scores, generator=generator)
    judge = partial(faithfulness, model, judged_on, sizes=SIZES, n_random=1, n_bootstrap=2)
    off = [(1 - judge(one).recovered).abs() for one in (scores, learned)]
    assert bool((off[1] < off[0]).all())
    repeated = learn_masks(model, found_on, scores, generator=generator.manual_seed(0))
    assert torch.equal(repeated.values, learned.values)


@pytest.mark.usefixtures("as_users_run")
def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.hooked()
    scores = node_attribution(model, PAIR)
    for options, match in [
        ({"sizes": (0.0, 0.5)}, "two shares of the nodes"),
        ({"sizes": (0.5, 0.2)}, "two shares of the nodes"),
        ({"sizes": (0.5, 1.0)}, "two shares of the nodes"),
        ({"steps": 0}, "steps=0"),
        ({"reference": "noise"}, "reference='noise'"),
    ]:
        with pytest.raises(lch.InputError, match=match):
            learn_masks(model, PAIR, scores, **options)
    with pytest.raises(lch.InputError, match="Give corrupt twins"):
        learn_masks(model, replace(PAIR, corrupt=None), scores)
    with pytest.raises(lch.InputError, match="nothing for a circuit to recover"):
        learn_masks(model, replace(PAIR, corrupt=PAIR.clean), scores)
    # Steps that go far beyond what the derivative says.
    monkeypatch.setattr("lch_plugin.circuits.evaluation.masks._CAUTION", 1e6)
    monkeypatch.setattr("lch_plugin.circuits.evaluation.masks._STEP", 1e3)
    demo = lch.load_demo_model()
    an = task(demo, "an", 4)
    with pytest.raises(lch.InputError, match=r"the masks collapsed: at .* Keep the scores"):
        learn_masks(demo, an, node_attribution(demo, an), steps=3)


def test_values_order_all_nodes() -> None:
    model = models.hooked()
    scores = node_attribution(model, PAIR)
    learned = learn_masks(model, PAIR, scores, steps=1)
    assert isinstance(learned, NodeScores)
    assert learned.points == scores.points
    assert bool(learned.values.isfinite().all())

"""Faithfulness: curves, areas, intervals, controls, and what one circuit is worth."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import scipy
import torch
from hypothesis import given
from hypothesis import strategies as st

import lch_plugin as lch
from lch_plugin.circuits import (
    Circuit,
    Node,
    NodeScores,
    Prompts,
    logit_difference,
    node_attribution,
    task,
)
from lch_plugin.circuits.evaluation.ablation import run_circuit
from lch_plugin.circuits.evaluation.faithfulness import (
    SHARES,
    Faithfulness,
    cmd,
    cpr,
    faithfulness,
    judge,
    size_of,
    smallest_circuit,
)
from lch_plugin.circuits.reports import plots
from lch_plugin.cotangents import Metric
from tests import models

N_NODES = models.N_LAYERS * (4 + models.D_MLP)
FEW = (0.01, 0.1, 0.3, 1.0)


@pytest.fixture(scope="module")
def model():
    return models.hooked(torch.float64)


@pytest.fixture(scope="module")
def prompts(model) -> Prompts:
    """Three pairs, with the tokens for answers that the corrupt prompt speaks most against."""
    clean, corrupt = (models.tokens(batch=3, pos=5, seed=seed) for seed in (1, 2))
    with torch.no_grad():
        change = (model(clean) - model(corrupt))[:, -1]
    answers, foils = change.argmax(-1).tolist(), change.argmin(-1).tolist()
    return Prompts(clean, logit_difference([[a] for a in answers], [[f] for f in foils]), corrupt)


@pytest.fixture(scope="module")
def scores(model, prompts: Prompts) -> NodeScores:
    return node_attribution(model, prompts)


@pytest.fixture(scope="module")
def curve(model, prompts: Prompts, scores: NodeScores) -> Faithfulness:
    return faithfulness(model, prompts, scores, n_random=3, generator=seeded())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_size_is_run_and_set_against_the_full_and_the_empty_circuit(
    model, prompts: Prompts, scores: NodeScores, curve: Faithfulness
) -> None:
    # Of 156 nodes; rounded down, and no less than one.
    assert curve.shares == SHARES
    assert curve.sizes == (1, 1, 1, 1, 3, 7, 15, 31, 78, 156)
    full = run_circuit(model, prompts, scores.circuit(N_NODES))
    empty = run_circuit(model, prompts, ~scores.circuit(N_NODES))
    assert torch.equal(curve.full, full)
    assert torch.equal(curve.empty, empty)
    for size, kept, f in zip(curve.sizes, curve.kept, curve.recovered, strict=True):
        assert torch.equal(kept, run_circuit(model, prompts, scores.circuit(size)))
        share = (kept.mean() - empty.mean()) / (full.mean() - empty.mean())
        assert float(f) == pytest.approx(float(share), rel=1e-12)
    assert float(curve.recovered[-1]) == 1


def test_a_share_that_is_a_whole_number_of_nodes_is_that_number() -> None:
    for n_nodes in (100, 1000):
        assert [size_of(i / n_nodes, n_nodes) for i in range(1, n_nodes)] == list(range(1, n_nodes))
    assert (size_of(0.0999, 20), size_of(1e-9, 20), size_of(1.0, 20)) == (1, 1, 20)


@pytest.mark.parametrize("reference", ["zero", "mean"])
def test_what_nodes_are_replaced_by_is_a_choice(
    model, prompts: Prompts, scores: NodeScores, reference
) -> None:
    found = faithfulness(model, prompts, scores, reference=reference, sizes=FEW, n_random=1)
    assert found.reference == reference
    assert torch.equal(found.kept[1], run_circuit(model, prompts, scores.circuit(15), reference))


def test_nodes_are_ranked_by_score_or_by_magnitude(
    model, prompts: Prompts, scores: NodeScores
) -> None:
    found = faithfulness(model, prompts, scores, sizes=FEW, by="magnitude", n_random=1)
    assert found.to_dict()["by"] == "magnitude"
    circuit = scores.circuit(46, by="magnitude")
    assert not torch.equal(circuit.keep, scores.circuit(46).keep)
    assert torch.equal(found.kept[2], run_circuit(model, prompts, circuit))


def test_controls_have_as_many_nodes_of_each_kind_in_each_layer(
    model, prompts: Prompts, scores: NodeScores, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[Circuit, Circuit]] = []
    random = Circuit.random

    def spy(self: Circuit, generator: torch.Generator | None = None) -> Circuit:
        drawn.append((self, random(self, generator)))
        return drawn[-1][1]

    monkeypatch.setattr(Circuit, "random", spy)
    found = faithfulness(model, prompts, scores, sizes=FEW, n_random=2, generator=seeded())
    # The circuit of all nodes has no other beside it.
    assert len(drawn) == 2 * (len(FEW) - 1)
    assert found.random[-1].tolist() == [1, 1]
    for circuit, control in drawn:
        for mask, other in zip(circuit.masks().values(), control.masks().values(), strict=True):
            assert int(mask.sum()) == int(other.sum())
    gap = float((found.full - found.empty).mean())
    controls = [run_circuit(model, prompts, control) for _, control in drawn]
    f = torch.stack([(c - found.empty).mean() / gap for c in controls]).view(-1, 2)
    assert found.random[:-1].allclose(f, rtol=1e-12)
    assert not torch.equal(drawn[2][1].keep, drawn[3][1].keep)
    again = faithfulness(model, prompts, scores, sizes=FEW, n_random=2, generator=seeded())
    assert torch.equal(again.random, found.random)
    assert torch.equal(again.interval, found.interval)
    other = faithfulness(model, prompts, scores, sizes=FEW, n_random=2, generator=seeded(1))
    assert not torch.equal(other.random, found.random)


@given(
    f=st.lists(st.floats(-3, 3), min_size=2, max_size=12),
    data=st.data(),
)
def test_areas_are_those_of_the_trapezoid_rule(f: list[float], data: st.DataObject) -> None:
    distinct = st.lists(st.integers(1, 1000), min_size=len(f), max_size=len(f), unique=True)
    shares = [n / 1000 for n in sorted(data.draw(distinct))]
    recovered = torch.tensor([f, f[::-1]], dtype=torch.float64)
    area = scipy.integrate.trapezoid(recovered, shares)
    assert cpr(shares, recovered).tolist() == pytest.approx(area.tolist(), abs=1e-12)
    # As MIB's evaluator has it, interval by interval.
    steps = zip(shares, shares[1:], recovered[0].tolist(), recovered[0].tolist()[1:], strict=False)
    distance = sum((x2 - x1) * (abs(1 - a) + abs(1 - b)) / 2 for x1, x2, a, b in steps)
    assert float(cmd(shares, recovered)[0]) == pytest.approx(distance, abs=1e-12)


def test_a_perfect_method_has_the_areas_of_its_range(curve: Faithfulness) -> None:
    perfect = replace(curve, recovered=torch.ones(len(SHARES), dtype=torch.float64))
    assert (perfect.cpr, perfect.cmd) == (pytest.approx(0.999), 0)
    assert curve.random_cpr.shape == curve.random_cmd.shape == (3,)
    first = replace(curve, recovered=curve.random[:, 0])
    assert float(curve.random_cpr[0]) == pytest.approx(first.cpr, rel=1e-12)
    assert float(curve.random_cmd[0]) == pytest.approx(first.cmd, rel=1e-12)


@pytest.mark.parametrize("confidence", [0.5, 0.8])
def test_intervals_are_those_of_scipy(
    model, prompts: Prompts, scores: NodeScores, confidence: float
) -> None:
    """Of three prompts there are 27 resamples, and a quantile falls on one of ten values."""
    found = faithfulness(
        model,
        prompts,
        scores,
        sizes=FEW,
        n_random=1,
        n_bootstrap=20_000,
        confidence=confidence,
        generator=seeded(),
    )

    def statistic(rows: np.ndarray, axis: int) -> np.ndarray:
        full, empty, kept = (
            value.numpy()[..., rows].mean(-1) for value in (found.full, found.empty, found.kept)
        )
        f = (kept - empty) / (full - empty)
        areas = [scipy.integrate.trapezoid(a, FEW, axis=0) for a in (f, abs(1 - f))]
        return np.concatenate([f, areas])

    low, high = scipy.stats.bootstrap(
        (np.arange(3),),
        statistic,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        confidence_level=confidence,
        random_state=np.random.default_rng(0),
    ).confidence_interval
    truth = np.stack([low, high], axis=1)
    assert found.interval.numpy() == pytest.approx(truth[:-2], abs=1e-9)
    assert found.cpr_interval == pytest.approx(tuple(truth[-2]), abs=1e-9)
    assert found.cmd_interval == pytest.approx(tuple(truth[-1]), abs=1e-9)
    assert float(found.interval[0, 1] - found.interval[0, 0]) > 1e-3


def test_one_prompt_has_no_interval(model, prompts: Prompts, scores: NodeScores) -> None:
    one = Prompts(
        prompts.clean[:1],
        Metric(lambda logits: logits[:, -1, 1] - logits[:, -1, 5]),
        prompts.corrupt[:1],
    )
    found = faithfulness(model, one, scores, sizes=FEW, n_random=1, n_bootstrap=10)
    assert found.interval.isnan().all()
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["circuits"][0]["interval"] == [None, None]
    assert written["cpr_interval"] == [None, None]


def test_a_curve_as_json(curve: Faithfulness) -> None:
    written = json.loads(json.dumps(curve.to_dict(), allow_nan=False))
    assert written["reference"] == "resample"
    assert written["n_prompts"] == 3
    assert written["metric_full"] == pytest.approx(float(curve.full.mean()))
    assert written["metric_empty"] == pytest.approx(float(curve.empty.mean()))
    assert [row["n_nodes"] for row in written["circuits"]] == list(curve.sizes)
    assert [row["share"] for row in written["circuits"]] == list(SHARES)
    for row, kept, f, random in zip(
        written["circuits"], curve.kept, curve.recovered, curve.random, strict=True
    ):
        assert row["metric"] == pytest.approx(float(kept.mean()))
        assert row["recovered"] == pytest.approx(float(f))
        assert row["random"] == pytest.approx(random.tolist())
        assert row["interval"][0] <= row["interval"][1]
    assert (written["cpr"], written["cmd"]) == (curve.cpr, curve.cmd)
    assert written["random_cpr"] == curve.random_cpr.tolist()


def test_a_circuit_is_judged_by_interventions(model, prompts: Prompts, scores: NodeScores) -> None:
    circuit = scores.circuit(12)
    tested = circuit.nodes[:3]
    found = judge(model, prompts, circuit, nodes=tested, generator=seeded())
    scale = found.empty.mean(), (found.full - found.empty).mean()

    def f(one: Circuit) -> float:
        return float((run_circuit(model, prompts, one).mean() - scale[0]) / scale[1])

    assert torch.equal(found.kept, run_circuit(model, prompts, circuit))
    assert torch.equal(found.complement, run_circuit(model, prompts, ~circuit))
    assert found.recovered == pytest.approx(f(circuit), rel=1e-12)
    assert found.complement_recovered == pytest.approx(f(~circuit), rel=1e-12)
    assert list(found.minimality) == tested
    for node, fall in found.minimality.items():
        assert fall == pytest.approx(f(circuit) - f(circuit.without(node)), abs=1e-12)
    assert found.interval[0] < found.recovered < found.interval[1]
    assert found.complement_interval[0] < found.complement_recovered < found.complement_interval[1]
    assert (len(found.completeness), len(found.random)) == (10, 10)
    sizes = sorted(abs(fall) for fall in found.minimality.values())
    assert found.idle_share(tolerance=0.0) == 0
    assert found.idle_share(tolerance=sizes[1]) == pytest.approx(2 / 3)
    again = judge(model, prompts, circuit, nodes=tested, generator=seeded())
    assert json.dumps(again.to_dict()) == json.dumps(found.to_dict())
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert Circuit.from_dict(circuit.points, written["circuit"]).nodes == circuit.nodes
    assert written["incompleteness"]["max"] == float(found.completeness.max())
    assert written["falls"] == {str(node): fall for node, fall in found.minimality.items()}


def test_the_whole_model_is_faithful_and_complete(
    model, prompts: Prompts, scores: NodeScores
) -> None:
    found = judge(model, prompts, scores.circuit(N_NODES), nodes=[Node("head", 0)])
    assert (found.recovered, found.complement_recovered) == (1, 0)
    assert found.interval == (1, 1)
    assert not found.completeness.any()
    assert (found.random == 1).all()


def test_gaps_set_the_circuit_against_the_model_without_the_same_nodes(
    model, prompts: Prompts, scores: NodeScores
) -> None:
    """The circuit of one node has two subsets: nothing, and itself."""
    circuit = scores.circuit(1)
    found = judge(model, prompts, circuit, n_subsets=20, generator=seeded())
    gap = float((found.full - found.empty).mean())
    nothing = abs(found.recovered - 1)
    itself = abs(float((found.complement - found.empty).mean()) / gap)
    expected = [
        nothing if abs(gap - nothing) < 1e-9 else itself for gap in found.completeness.tolist()
    ]
    assert found.completeness.tolist() == pytest.approx(expected, abs=1e-12)
    assert set(expected) == {nothing, itself}
    assert list(found.minimality.values()) == [pytest.approx(found.recovered)]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_smallest_circuit_recovers_what_one_node_less_does_not(
    model, prompts: Prompts, scores: NodeScores, curve: Faithfulness, share: float
) -> None:
    circuit = smallest_circuit(model, prompts, scores, share)

    def f(size: int) -> float:
        kept = run_circuit(model, prompts, scores.circuit(size))
        return float((kept - curve.empty).mean() / (curve.full - curve.empty).mean())

    assert torch.equal(circuit.keep, scores.circuit(len(circuit)).keep)
    assert share <= f(len(circuit)) <= 2 - share
    assert len(circuit) > 1
    assert f(len(circuit) - 1) < share


def test_the_smallest_circuit_may_be_one_node_or_ranked_by_magnitude(
    model, prompts: Prompts, scores: NodeScores
) -> None:
    assert len(smallest_circuit(model, prompts, scores, 1e-4)) == 1
    found = smallest_circuit(model, prompts, scores, 0.5, by="magnitude", reference="zero")
    assert torch.equal(found.keep, scores.circuit(len(found), by="magnitude").keep)
    kept = run_circuit(model, prompts, found, "zero").mean()
    full, empty = (
        run_circuit(model, prompts, c, "zero").mean()
        for c in (scores.circuit(N_NODES), ~scores.circuit(N_NODES))
    )
    assert float((kept - empty) / (full - empty)) >= 0.5


def test_five_percent_of_the_nodes_say_an_after_apple() -> None:
    """The embedded model: nodes found on other prompts, beside random ones of their layers."""
    model = lch.load_demo_model()
    scores = node_attribution(model, task(model, "an", 12, split="train"))
    circuit = scores.circuit(len(scores.values) // 20)
    tests = task(model, "an", 12)
    found = judge(
        model, tests, circuit, nodes=circuit.nodes[:1], n_subsets=1, n_random=3, generator=seeded()
    )
    assert found.interval[0] > 0.75
    assert abs(found.complement_recovered) < 0.05
    assert float(found.random.abs().max()) < 0.1


def test_curves_are_drawn(curve: Faithfulness) -> None:
    figure = plots.faithfulness_curves({"centroids": curve, "another": curve})
    (axis,) = figure.axes
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        f"centroids: CPR {curve.cpr:.2f}, CMD {curve.cmd:.2f}",
        "random circuits: range and median",
        f"another: CPR {curve.cpr:.2f}, CMD {curve.cmd:.2f}",
    ]
    drawn = axis.get_lines()[0]
    assert drawn.get_xdata() == pytest.approx([100 * share for share in SHARES])
    assert drawn.get_ydata() == pytest.approx(curve.recovered.tolist())


@pytest.mark.usefixtures("as_users_run")
def test_bad_input_is_refused(model, prompts: Prompts, scores: NodeScores) -> None:
    circuit = scores.circuit(3)
    other = scores.top(4)[-1].node
    for options, match in [
        ({"sizes": (0.0, 1.0)}, "above 0 and up to 1"),
        ({"sizes": (0.5, 1.5)}, "above 0 and up to 1"),
        ({"sizes": (0.5, 0.5)}, "at least two"),
        ({"n_random": 0}, "n_random=0"),
        ({"n_bootstrap": 0}, "n_bootstrap=0"),
        ({"confidence": 1.0}, "confidence=1.0"),
        ({"by": "rank"}, r"by='rank' must be one of \('score', 'magnitude'\)"),
    ]:
        with pytest.raises(lch.InputError, match=match):
            faithfulness(model, prompts, scores, **options)
    for options, match in [
        ({"nodes": [*circuit.nodes, other]}, rf"\['{other}'\] are not in the circuit"),
        ({"nodes": []}, "at least one"),
        ({"nodes": 0}, "at least one"),
        ({"n_subsets": 0}, "n_subsets=0"),
        ({"n_random": 0}, "n_random=0"),
        ({"confidence": 0.0}, "confidence=0.0"),
    ]:
        with pytest.raises(lch.InputError, match=match):
            judge(model, prompts, circuit, **options)
    with pytest.raises(lch.InputError, match="circuit is empty"):
        judge(model, prompts, ~scores.circuit(N_NODES))
    with pytest.raises(lch.InputError, match=r"recovered=1.1"):
        smallest_circuit(model, prompts, scores, 1.1)
    worst_first = replace(scores, values=-scores.values)
    with pytest.raises(lch.InputError, match="no circuit recovers 90% of the metric: 155 of 156"):
        smallest_circuit(model, prompts, worst_first, 0.9)
    with pytest.raises(lch.InputError, match=r"recovers 99.99% to 100.01%|recovers 100% to 100%"):
        smallest_circuit(model, prompts, scores, 0.9999)
    for run in (faithfulness, smallest_circuit):
        with pytest.raises(lch.InputError, match="Give corrupt twins"):
            run(model, replace(prompts, corrupt=None), scores)
        with pytest.raises(lch.InputError, match="no prompts"):
            run(model, [], scores)
        same = replace(prompts, corrupt=prompts.clean)
        with pytest.raises(lch.InputError, match="nothing for a circuit to recover"):
            run(model, same, scores)

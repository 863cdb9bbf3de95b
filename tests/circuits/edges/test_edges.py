"""Edges: which there are, what they score, and the model with some of them alone.

Exactness is asked for in float64.
"""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens import node_points
from lch_plugin.circuits import (
    EdgeAblation,
    EdgeCircuit,
    EdgeScores,
    Prompts,
    edge_attribution,
    faithfulness,
    logit_difference,
    node_attribution,
    run_circuit,
    run_edges,
    save_mib,
    smallest_circuit,
)
from lch_plugin.circuits.edges.wiring import Wiring
from tests import models

F64 = torch.float64
# LayerNorm and biases in gpt2; RMS norms, rotation and grouped keys in llama; parallel blocks in
# gpt_neox; norms of queries in qwen3.
BACKENDS = ("gpt2", "llama", "gpt_neox", "hooked")
CLEAN, CORRUPT = models.tokens(3, seed=1), models.tokens(3, seed=2)
PAIR = Prompts(CLEAN, logit_difference([[1, 5], [2], [7]], [[3], [4, 6], [8]]), CORRUPT)


@cache
def ablation_of(backend: str) -> EdgeAblation:
    return EdgeAblation(models.float64(backend), PAIR)


def metric_on(model, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return PAIR.metric.of(model(tokens))


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_edges_are_the_model_and_none_the_corrupt_prompt(backend: str) -> None:
    model, ablation = models.float64(backend), ablation_of(backend)
    everything = ablation.everything()
    clean, corrupt = metric_on(model, CLEAN), metric_on(model, CORRUPT)
    torch.testing.assert_close(ablation.metric(everything), clean, rtol=0, atol=1e-6)
    torch.testing.assert_close(ablation.metric(~everything), corrupt, rtol=0, atol=1e-6)
    assert not torch.allclose(clean, corrupt, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_the_edges_out_of_nodes_it_is_the_model_without_the_nodes(backend: str) -> None:
    model, ablation = models.float64(backend), ablation_of(backend)
    points = node_points(model, ("head", "mlp"))
    nodes = node_attribution(model, PAIR, ("head", "mlp"), method="detached").circuit(7)
    assert nodes.points == points
    edges = EdgeCircuit.of_nodes(ablation.wiring, nodes)
    found, expected = ablation.metric(edges), run_circuit(model, PAIR, nodes)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(expected, metric_on(model, CLEAN), atol=1e-3)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("backend", BACKENDS)
def test_at_the_clean_prompt_scores_are_derivatives_in_what_is_kept(backend: str) -> None:
    """Of edges into readers of every kind, held to finite differences of the ablation."""
    model, ablation = models.float64(backend), ablation_of(backend)
    scores = edge_attribution(model, PAIR, places=(1.0,))
    step = 1e-3
    names = [
        "input->a0.h1.q",
        "input->a1.h0.v",
        "m0->a2.h3.k",
        "a0.h2->a1.h1.v",
        "a1.h3->a2.h2.q",
        "a0.h0->m2",
        "m1->m2",
        "a2.h1->logits",
        "m2->logits",
    ]
    scale = float(scores.values.abs().max())
    for name in names:
        moved = []
        for sign in (1, -1):
            keep = torch.ones(ablation.wiring.n_edges, dtype=F64)
            keep[ablation.wiring.mask([name])] += sign * step
            moved.append(ablation.with_shares(keep).mean())
        slope = float((moved[0] - moved[1]) / (2 * step))
        assert scores.edge(name).score == pytest.approx(slope, rel=1e-3, abs=1e-5 * scale), name


def test_places_on_the_way_are_averaged() -> None:
    model = models.float64("llama")
    apart = [edge_attribution(model, PAIR, places=(place,)).values for place in (0.4, 0.9)]
    together = edge_attribution(model, PAIR, places=(0.4, 0.9)).values
    torch.testing.assert_close(together, (apart[0] + apart[1]) / 2, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(apart[0], apart[1], atol=1e-4)


def test_a_writer_scores_what_its_node_does() -> None:
    """With the Jacobian at one place, edges out of a node add up to the node's score."""
    model = models.float64("gpt2")
    scores = edge_attribution(model, PAIR, places=(1.0,))
    nodes = node_attribution(model, PAIR, ("head", "mlp"), method="jacobian")
    by_writer: dict[str, float] = {}
    for edge, value in zip(scores.wiring.edges, scores.values.tolist(), strict=True):
        by_writer[edge.writer] = by_writer.get(edge.writer, 0) + value
    for one in nodes.top(len(nodes.values)):
        assert by_writer[str(one.node)] == pytest.approx(one.score, rel=1e-3, abs=1e-5)


def test_edges_of_a_small_model_are_counted_and_named() -> None:
    wiring = Wiring(n_layers=2, n_heads=2)
    names = [str(edge) for edge in wiring.edges]
    # Layer 0: 6 reads of the input; an MLP of 3 writers. Layer 1: 6 reads of 4; 1 of 6; logits 7.
    assert len(names) == wiring.n_edges == 6 + 3 + 24 + 6 + 7
    assert names[0] == "input->a0.h0.q"
    assert "a0.h1->m0" in names
    assert "a0.h1->m0" not in [str(e) for e in Wiring(2, 2, parallel=True).edges]
    assert names[-1] == "m1->logits"
    circuit = EdgeCircuit.of(wiring, ["a0.h0->a1.h1.k", "m1->logits"])
    assert EdgeCircuit.from_dict(wiring, json.loads(json.dumps(circuit.to_dict()))).edges == (
        circuit.edges
    )
    assert (len(circuit), len(~circuit)) == (2, wiring.n_edges - 2)
    drawn = circuit.random(torch.Generator().manual_seed(1))
    assert [e.reader.split(".")[-1][0] for e in drawn.edges] == ["k", "l"]
    assert len(circuit.without("m1->logits")) == 1
    assert repr(circuit) == "EdgeCircuit(2 of 46 edges, 4.35%)"


def test_faithfulness_of_circuits_of_edges() -> None:
    """The embedded model: few edges do it, random ones into the same readers do not."""
    model = lch.load_demo_model()
    found_on, judged_on = (lch.circuits.task(model, "an", 6, split=s) for s in ("train", "test"))
    scores = edge_attribution(model, found_on)
    assert isinstance(scores, EdgeScores)
    generator = torch.Generator().manual_seed(0)
    judge = partial(faithfulness, sizes=(0.02, 0.1, 1.0), n_random=2, n_bootstrap=10)
    found = judge(model, judged_on, scores, generator=generator)
    assert found.recovered[-1] == pytest.approx(1)
    assert float(found.recovered[1]) > 0.8
    assert float(found.random[1].max()) < 0.5
    smallest = smallest_circuit(model, judged_on, scores, 0.8)
    kept = run_edges(model, judged_on, smallest).mean()
    assert 0.8 <= float((kept - found.empty.mean()) / (found.full - found.empty).mean()) <= 1.2
    table = scores.to_dataframe()
    assert table["edge"][0] == str(scores.top(1)[0].edge)
    assert table["score"].is_monotonic_decreasing
    with pytest.raises(lch.InputError, match="reference='zero'"):
        judge(model, judged_on, scores, reference="zero")


def test_scores_of_edges_are_written_for_mib(tmp_path: Path) -> None:
    model = models.float64("gpt2")
    scores = edge_attribution(model, PAIR, places=(1.0,))
    save_mib(model, scores, tmp_path / "edges.json")
    saved = json.loads((tmp_path / "edges.json").read_text())
    assert len(saved["edges"]) == scores.wiring.n_edges
    for name, ours in [
        ("a0.h0->a1.h2<q>", "a0.h0->a1.h2.q"),
        ("input->m0", "input->m0"),
        ("m2->logits", "m2->logits"),
    ]:
        score = saved["edges"][name]["score"]
        assert score == pytest.approx(scores.edge(ours).score, rel=1e-6)
    assert set(saved["nodes"]) == {*scores.wiring.writers, "logits"}
    other = EdgeScores(Wiring(2, 2), torch.zeros(46))
    with pytest.raises(lch.InputError, match="the model has 3 layers of 4 heads"):
        save_mib(model, other, tmp_path / "other.json")


@pytest.mark.usefixtures("as_users_run")
def test_bad_input_is_refused() -> None:
    model, ablation = models.float64("gpt2"), ablation_of("gpt2")
    wiring = ablation.wiring
    for names, match in [
        (["a9.h9->logits"], r"no edges \['a9.h9->logits'\]"),
        (["a1.h0->a0.h0.q"], "no edges"),
        (["a0.h0"], "names no edge"),
        ([], "empty circuit"),
    ]:
        with pytest.raises(lch.LCHError, match=match):
            EdgeCircuit.of(wiring, names)
    with pytest.raises(lch.InputError, match="this model has"):
        ablation.metric(EdgeCircuit.of(Wiring(2, 2), ["m1->logits"]))
    alone = Prompts(CLEAN, PAIR.metric)
    for run in (partial(edge_attribution, model), partial(EdgeAblation, model)):
        with pytest.raises(lch.InputError, match="Give corrupt twins"):
            run(alone)
        with pytest.raises(lch.InputError, match="no prompts"):
            run([])
    for places in ((), (1.5,)):
        with pytest.raises(lch.InputError, match="at least one share"):
            edge_attribution(model, PAIR, places=places)

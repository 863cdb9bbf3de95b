"""Nodes: where they are, what they score, and circuits made of them."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens import (
    NodeKind,
    NodePoint,
    node_points,
    pattern_names,
    run_edited,
)
from lch_plugin.circuits import Circuit, Node, NodeScores
from lch_plugin.circuits.graphs.node_slices import SliceKind
from lch_plugin.circuits.kinds import KINDS
from lch_plugin.circuits.nodes import all_nodes
from tests import models

POINTS = tuple(
    NodePoint(kind, layer, f"{kind}{layer}", n, width)
    for layer in range(2)
    for kind, n, width in (("head", 3, 4), ("neuron", 8, 1))
)
N_NODES = sum(point.n_nodes for point in POINTS)
SCORES = st.lists(st.floats(-10, 10, width=32), min_size=N_NODES, max_size=N_NODES).map(
    lambda values: NodeScores(POINTS, torch.tensor(values))
)
KEPT = st.sets(st.integers(0, N_NODES - 1), min_size=1)


def circuit_of(kept: set[int]) -> Circuit:
    return Circuit.of(POINTS, [node for i, node in enumerate(all_nodes(POINTS)) if i in kept])


# ---------------------------------------------------------------------- where they are


@pytest.mark.parametrize("backend", ["hooked", "gpt2", "gpt_neox", "llama", "opt"])
def test_what_passes_a_node_reaches_the_output_through_the_nodes_own_weights(backend: str) -> None:
    model = models.hooked() if backend == "hooked" else models.bridge(backend)
    points = node_points(model)
    assert [(p.kind, p.layer) for p in points] == [
        (kind, layer) for layer in range(models.N_LAYERS) for kind in ("head", "neuron")
    ]
    assert {(p.kind, p.n_nodes, p.width) for p in points} == {
        ("head", 4, models.D_MODEL // 4),
        ("neuron", models.D_MLP, 1),
    }
    ids = models.tokens()
    for point, node in ((points[2], 3), (points[3], 40)):
        block = model.blocks[point.layer]

        def silence(value, point=point, node=node):
            parts = point.split(value).clone()
            parts[:, :, node] = 0
            return parts.reshape(value.shape)

        with torch.no_grad():
            edited = run_edited(model, ids, {point.name: silence})
            weight = block.attn.W_O[node] if point.kind == "head" else block.mlp.W_out[node]
            kept = weight.clone()
            weight.zero_()
            expected = model(ids)
            weight.copy_(kept)
        torch.testing.assert_close(edited, expected, rtol=1e-4, atol=1e-4)


def test_whole_mlps_stand_where_their_neurons_do() -> None:
    model = models.bridge("gpt2")
    neurons, mlps = (node_points(model, (kind,)) for kind in ("neuron", "mlp"))
    assert [p.name for p in neurons] == [p.name for p in mlps]
    assert {(p.n_nodes, p.width) for p in mlps} == {(1, models.D_MLP)}


@pytest.mark.parametrize("backend", ["hooked", "llama"])
def test_patterns_are_distributions_over_earlier_positions(backend: str) -> None:
    model, seen = models.hooked() if backend == "hooked" else models.bridge(backend), {}
    names = pattern_names(model)
    with torch.no_grad():
        run_edited(
            model, models.tokens(), {n: lambda value, n=n: seen.update({n: value}) for n in names}
        )
    assert len(seen) == models.N_LAYERS
    for pattern in seen.values():
        assert pattern.shape == (2, 4, 7, 7)
        torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, 7))
        assert not pattern.triu(1).any()


@pytest.mark.usefixtures("as_users_run")
def test_models_and_kinds_without_nodes_are_refused() -> None:
    model = models.bridge("gpt2")
    for kinds in ((), ("neurons",), ("neuron", "mlp"), "head"):
        with pytest.raises(lch.InputError, match="either neurons or whole MLPs"):
            node_points(model, kinds)
    with pytest.raises(lch.InputError, match="not Linear"):
        node_points(torch.nn.Linear(2, 2))
    del model.blocks[1]._modules["attn"]
    with pytest.raises(lch.SiteError, match=r"blocks\.1 has no attention"):
        node_points(model)
    with pytest.raises(lch.SiteError, match=r"blocks\.1 has no attention"):
        pattern_names(model)
    assert len(node_points(model, ("mlp",))) == models.N_LAYERS


# --------------------------------------------------------------------- what they score


@settings(max_examples=25, deadline=None)
@given(scores=SCORES)
def test_rank_and_percentile_are_among_nodes_of_a_kind(scores: NodeScores) -> None:
    nodes = list(all_nodes(POINTS))
    for node, value in zip(nodes, scores.values.tolist(), strict=True):
        found = scores.node(node)
        peers = [
            other
            for peer, other in zip(nodes, scores.values.tolist(), strict=True)
            if peer.kind == node.kind
        ]
        assert found.score == value
        assert found.rank == 1 + sum(other > value for other in peers)
        assert found.percentile == pytest.approx(
            100 * sum(other < value for other in peers) / len(peers)
        )
        assert scores.of(node.kind, node.layer)[node.index] == value


@settings(max_examples=25, deadline=None)
@given(scores=SCORES, size=st.integers(1, N_NODES), by=st.sampled_from(["score", "magnitude"]))
def test_a_circuit_is_made_of_the_top_nodes(scores: NodeScores, size: int, by: str) -> None:
    top = scores.top(size, by=by)
    keys = [n.score if by == "score" else abs(n.score) for n in top]
    assert keys == sorted(keys, reverse=True)
    assert set(scores.circuit(size, by=by).nodes) == {n.node for n in top}
    heads = scores.top(size, kind="head", by=by)
    assert [n for n in scores.top(N_NODES, by=by) if n.node.kind == "head"][:size] == heads


def test_magnitude_and_score_are_two_orders() -> None:
    scores = NodeScores(POINTS, torch.linspace(-2, 1, N_NODES))
    assert scores.top(1, by="magnitude")[0].score == -2
    assert scores.top(1)[0].score == 1


@pytest.mark.usefixtures("as_users_run")
def test_nodes_that_were_not_scored_are_refused() -> None:
    scores = NodeScores(POINTS, torch.zeros(N_NODES))
    for node in (Node("mlp", 0), Node("head", 2), Node("head", -1)):
        with pytest.raises(lch.SiteError, match="no scores of kind"):
            scores.node(node)
    for index in (3, -1):
        with pytest.raises(lch.SiteError, match="indices are 0 to 2"):
            scores.node(Node("head", 0, index))
    for size in (0, N_NODES + 1):
        with pytest.raises(lch.InputError, match=f"1 to {N_NODES} nodes"):
            scores.circuit(size)


# --------------------------------------------------------------------------- circuits


@settings(max_examples=50, deadline=None)
@given(kept=KEPT)
def test_a_circuit_survives_its_dictionary(kept: set[int]) -> None:
    circuit = circuit_of(kept)
    again = Circuit.from_dict(POINTS, circuit.to_dict())
    assert torch.equal(again.keep, circuit.keep)
    assert len(circuit) == len(circuit.nodes) == len(kept)
    assert circuit.share == pytest.approx(len(kept) / N_NODES)


@settings(max_examples=25, deadline=None)
@given(kept=KEPT)
def test_complements_and_removals(kept: set[int]) -> None:
    circuit = circuit_of(kept)
    assert set(circuit.nodes) | set((~circuit).nodes) == set(all_nodes(POINTS))
    assert not set(circuit.nodes) & set((~circuit).nodes)
    gone = circuit.nodes[0]
    assert circuit.without(gone).nodes == circuit.nodes[1:]
    masks = circuit.masks()
    assert torch.equal(torch.cat([masks[p.name] for p in POINTS]), circuit.keep)


@settings(max_examples=25, deadline=None)
@given(kept=KEPT, seed=st.integers(0, 2**31))
def test_random_circuits_have_as_many_nodes_of_each_kind_in_each_layer(
    kept: set[int], seed: int
) -> None:
    circuit = circuit_of(kept)

    def drawn() -> Circuit:
        return circuit.random(torch.Generator().manual_seed(seed))

    ours, theirs = circuit.masks(), drawn().masks()
    assert {name: int(m.sum()) for name, m in ours.items()} == {
        name: int(m.sum()) for name, m in theirs.items()
    }
    assert torch.equal(drawn().keep, drawn().keep)


def test_random_circuits_differ() -> None:
    circuit, generator = circuit_of({0, 5, 6, 15}), torch.Generator().manual_seed(0)
    drawn = [circuit.random(generator).keep for _ in range(10)]
    assert any(not torch.equal(a, b) for a, b in pairwise(drawn))


def test_names() -> None:
    assert list(map(str, (Node("head", 3, 1), Node("neuron", 0, 47), Node("mlp", 2)))) == [
        "a3.h1",
        "m0.n47",
        "m2",
    ]


@pytest.mark.usefixtures("as_users_run")
def test_circuits_of_nothing_and_of_unknown_nodes_are_refused() -> None:
    with pytest.raises(lch.InputError, match="empty circuit"):
        Circuit.of(POINTS, [])
    with pytest.raises(lch.InputError, match="empty circuit"):
        Circuit.from_dict(POINTS, {})
    for node in (Node("mlp", 0), Node("head", 0, 3), Node("neuron", 5, 0)):
        with pytest.raises(lch.SiteError, match="no nodes"):
            Circuit.of(POINTS, [node])
        with pytest.raises(lch.SiteError, match="no nodes"):
            circuit_of({1}).without(node)
    for found in (
        {"head": {"0": [1.5]}},
        {"head": {"first": [1]}},
        {"neuron": {"1": "ab"}},
        {"head": [1]},
    ):
        with pytest.raises(lch.InputError, match="should be indices"):
            Circuit.from_dict(POINTS, found)


# ------------------------------------------------------------------ results you can hold


@settings(max_examples=30)
@given(SCORES)
def test_the_table_says_what_single_nodes_do(scores: NodeScores) -> None:
    table = scores.to_dataframe()
    assert list(table.columns) == ["node", "kind", "layer", "index", "score", "rank", "percentile"]
    assert len(table) == N_NODES
    assert table["score"].is_monotonic_decreasing
    for row in table.itertuples(index=False):
        node = Node(row.kind, row.layer, row[3])
        assert row.node == str(node)
        peers = torch.cat([scores.of(row.kind, layer) for layer in range(2)])
        assert row.rank == 1 + int((peers > row.score).sum())
        assert row.percentile == pytest.approx(100 * float((peers < row.score).double().mean()))
        assert (scores.node(node).rank, scores.node(node).score) == (row.rank, row.score)
    assert [one.node for one in scores.top(4)] == [
        Node(r.kind, r.layer, r[3]) for r in table.head(4).itertuples(index=False)
    ]


def test_results_show_themselves_in_a_line_and_in_a_notebook() -> None:
    scores = NodeScores(POINTS, torch.arange(N_NODES) / 10)
    assert repr(Node("head", 23, 4)) == str(Node("head", 23, 4)) == "a23.h4"
    assert repr(Node("neuron", 5, 31)) == "m5.n31"
    assert repr(Node("mlp", 5)) == "m5"
    assert repr(scores) == (
        "NodeScores(22 nodes: heads, neurons; highest m1.n7 +2.1, m1.n6 +2, m1.n5 +1.9)"
    )
    assert repr(scores.top(1)) == "[m1.n7 +2.1 (rank 1)]"
    circuit = scores.circuit(2)
    assert repr(circuit) == "Circuit(2 of 22 nodes: heads, neurons, 9.09%)"
    assert "m1.n7" in scores._repr_html_()
    assert "<td>2</td>" in circuit._repr_html_()


def test_every_kind_of_node_that_a_circuit_can_hold_has_a_record() -> None:
    assert set(get_args(NodeKind)) <= KINDS.keys()
    assert set(get_args(NodeKind)) <= set(get_args(SliceKind)) <= KINDS.keys()
    parts = {"head": "attn", "neuron": "mlp", "mlp": "mlp"}
    assert {kind: KINDS[kind].component for kind in get_args(NodeKind)} == parts

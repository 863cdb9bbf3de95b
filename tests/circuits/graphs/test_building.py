"""Attribution graphs: a flow, exact for the frozen experts, held to interventions in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lch_plugin.adapters.transformer_lens import node_points
from lch_plugin.adapters.transformer_lens.hook_points import hook_points
from lch_plugin.adapters.transformer_lens.residual import components
from lch_plugin.circuits import Circuit, Node, Prompts, logit_difference
from lch_plugin.circuits.graphs import attribution_graph, prune
from lch_plugin.circuits.scores.attribution import activations, contributions, embedding_name
from lch_plugin.cotangents import Metric
from lch_plugin.errors import InputError, SiteError
from lch_plugin.linearization import DetachedMode
from tests import models

BACKENDS: dict[str, Callable[[], Any]] = {
    **{
        family: lambda family=family: models.bridge(family, torch.float64)
        for family in ("gpt2", "gpt_neox", "llama")
    },
    "hooked": lambda: models.hooked(torch.float64),
}
# HuggingFace's RMS norm computes in float32, whatever the model does.
EXACT = {"llama": 1e-5}
CLEAN, CORRUPT = models.tokens(1, 6), models.tokens(1, 6, seed=5)
METRIC = logit_difference([[3, 5]], [[4, 6, 7]])
PROMPT = Prompts(CLEAN, METRIC)
PAIR = Prompts(CLEAN, METRIC, CORRUPT)


@dataclass
class Case:
    """A model, its graph, and what it is held to.

    Attributes:
        recorded: factors held fixed.
        metric: of the frozen model.
        points: where nodes are, by component.
        values: what passes there and at the embedding.
    """

    name: str
    model: Any
    graph: nx.DiGraph
    recorded: list[Tensor]
    metric: float
    points: dict[tuple[str, int], Any]
    values: dict[str, Tensor]

    @property
    def tolerance(self) -> float:
        return EXACT.get(self.name, 1e-9)


@pytest.fixture(scope="module", params=BACKENDS)
def case(request: pytest.FixtureRequest) -> Case:
    model = BACKENDS[request.param]()
    graph = attribution_graph(model, PROMPT, max_nodes=80)
    mode = DetachedMode()
    metric = run_frozen(model, mode, {})
    points = {("attn" if p.kind == "head" else "mlp", p.layer): p for p in node_points(model)}
    names = [embedding_name(model), *(point.name for point in points.values())]
    values = activations(model, CLEAN, names)
    return Case(request.param, model, graph, mode.recorded, metric, points, values)


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return BACKENDS["gpt2"]()


def run_frozen(
    model: Any,
    mode: DetachedMode,
    edits: Mapping[str, Callable[[Tensor], Tensor]],
    reads: Mapping[tuple[str, int], Callable[[Tensor], Tensor]] | None = None,
) -> float:
    """The metric of the frozen model with the values of hook points, and what components read,
    edited; all by TransformerLens' own hooks and the locators of reads."""

    def follow(value: Tensor, hook: Any) -> Tensor:
        return mode.follow(value.detach().requires_grad_())

    hooks = [
        (embedding_name(model), follow),
        *((name, lambda value, hook, edit=edit: edit(value)) for name, edit in edits.items()),
    ]
    gates = [
        (component.read, reads[component.kind, component.layer])
        for component in components(model)
        if (component.kind, component.layer) in (reads or {})
    ]
    try:
        for gate, edit in gates:
            gate.install(lambda: True, edit)
        with mode:
            logits = model.run_with_hooks(CLEAN, return_type="logits", fwd_hooks=hooks)
            return float(METRIC.fn(logits))
    finally:
        for gate, _ in gates:
            gate.remove()


def frozen_metric(case: Case, *args: Any) -> float:
    return run_frozen(case.model, DetachedMode(replay=case.recorded), *args)


def flows(graph: nx.DiGraph) -> tuple[float, float, float]:
    """The largest errors of: what enters a node, what leaves it, and all offsets together."""
    into = dict(graph.in_degree(weight="weight"))
    out = dict(graph.out_degree(weight="weight"))
    nodes = graph.nodes(data=True)
    scale = max(abs(data["contribution"]) for _, data in nodes)
    entering = max(abs(into[n] + d["offset"] - d["contribution"]) for n, d in nodes)
    leaving = max(abs(out[n] - d["contribution"]) for n, d in nodes if n != "metric")
    total = sum(d["offset"] for _, d in nodes) - graph.nodes["metric"]["contribution"]
    return entering / scale, leaving / scale, abs(total) / scale


# ---------------------------------------------------------------------------- the flow


def test_what_enters_a_node_leaves_it_and_offsets_are_the_metric(case: Case) -> None:
    for error in flows(case.graph):
        assert error < 1e-9
    logits = case.model(CLEAN, return_type="logits")
    assert case.graph.nodes["metric"]["contribution"] == pytest.approx(float(METRIC.fn(logits)))


@pytest.mark.parametrize("linearization", ["detached", "jacobian"])
@pytest.mark.parametrize("kinds", [("head", "neuron"), ("head", "mlp"), ("head",)], ids=str)
def test_it_is_a_flow_of_any_kind(gpt2: Any, kinds: Any, linearization: Any) -> None:
    for prompt in (PROMPT, PAIR):
        graph = attribution_graph(
            gpt2, prompt, kinds=kinds, linearization=linearization, max_nodes=40
        )
        for error in flows(graph):
            assert error < 1e-9
        found = {kind for _, kind in graph.nodes(data="kind")}
        assert set(kinds) <= found
        assert ("position" in found) == (prompt is PROMPT)
        assert graph.graph["linearization"] == linearization


def test_norms_after_components_and_soft_caps() -> None:
    graph = attribution_graph(models.bridge("gemma2", torch.float64), PROMPT, max_nodes=40)
    for error in flows(graph):
        assert error < 1e-5


def test_half_precision() -> None:
    graph = attribution_graph(models.bridge("gpt2", torch.bfloat16), PROMPT, max_nodes=40)
    for error in flows(graph):
        assert error < 0.1


def test_all_paths_together_are_the_output_of_the_frozen_model(case: Case) -> None:
    """What starts at embeddings, positions and offsets, handed on in the edges' proportions."""
    graph, amount = case.graph, dict.fromkeys(case.graph, 0.0)
    for node in nx.topological_sort(graph):
        amount[node] += graph.nodes[node]["offset"]
        if abs(graph.nodes[node]["contribution"]) < 1e-15:  # A rest of which nothing is left.
            continue
        for _, target, weight in graph.out_edges(node, data="weight"):
            amount[target] += amount[node] * weight / graph.nodes[node]["contribution"]
    assert amount["metric"] == pytest.approx(case.metric, rel=max(1e-6, case.tolerance))


# ------------------------------------------------------------------------ interventions


def place(graph: nx.DiGraph, name: str) -> tuple[tuple[str, int], int, int]:
    """Component, position and index of a head or neuron."""
    node = graph.nodes[name]
    part = "attn" if node["kind"] == "head" else "mlp"
    return (part, node["layer"]), node["position"], node["index"]


def write_of(case: Case, name: str) -> Tensor:
    """What a node writes to the residual stream, from the weights."""
    node = case.graph.nodes[name]
    if node["kind"] == "embedding":
        return case.values[embedding_name(case.model)][0, node["position"]]
    key, position, index = place(case.graph, name)
    point = case.points[key]
    value = point.split(case.values[point.name])
    block = case.model.blocks[node["layer"]]
    rows = block.attn.W_O[index] if point.kind == "head" else block.mlp.W_out[index][None]
    return (value[0, position, index] @ rows).detach()


def without(vector: Tensor, position: int) -> Callable[[Tensor], Tensor]:
    def edit(value: Tensor) -> Tensor:
        change = torch.zeros_like(value)
        change.view(-1, value.shape[-1])[position] = vector
        return value - change

    return edit


def strongest_edges(graph: nx.DiGraph) -> list[tuple[str, str]]:
    """Of each pair of kinds that the weights tell of, the strongest edge."""
    kinds = ("embedding", "head", "neuron")
    best: dict[tuple[str, str], tuple[str, str]] = {}
    edges = sorted(graph.edges(data="weight"), key=lambda edge: abs(edge[2]))
    for source, target, _ in edges:
        pair = graph.nodes[source]["kind"], graph.nodes[target]["kind"]
        if pair[0] in kinds and pair[1] in kinds[1:]:
            best[pair] = source, target
    assert len(best) == 6
    return list(best.values())


def test_an_edge_is_what_removing_the_source_from_the_targets_read_takes(case: Case) -> None:
    for source, target in strongest_edges(case.graph):
        key, position, index = place(case.graph, target)
        point = case.points[key]
        seen: dict[str, Tensor] = {}

        def see(value: Tensor, seen: Any = seen) -> Tensor:
            seen["value"] = value
            return value

        removal = without(write_of(case, source), case.graph.nodes[source]["position"])
        frozen_metric(case, {point.name: see}, {key: removal})

        def put(value: Tensor, seen: Any = seen) -> Tensor:
            new = point.split(value).clone()  # noqa: B023
            new[0, position, index] = point.split(seen["value"])[0, position, index]  # noqa: B023
            return new.reshape(value.shape)

        taken = case.metric - frozen_metric(case, {point.name: put})
        weight = case.graph.edges[source, target]["weight"]
        assert taken == pytest.approx(weight, rel=1e-6, abs=case.tolerance)


def test_no_edge_where_removing_the_source_does_nothing(case: Case) -> None:
    """Heads read what is before them, neurons their own position; nobody reads what is later."""
    for source, target in case.graph.edges:
        s, t = case.graph.nodes[source], case.graph.nodes[target]
        assert s["layer"] <= t["layer"]
        if t["kind"] in ("head", "attn_rest"):
            assert s["position"] <= t["position"]
        elif t["kind"] in ("neuron", "mlp_rest"):
            assert s["position"] == t["position"]


def remove(case: Case, name: str, other: Mapping[str, Tensor] | None = None) -> float:
    """What setting a node to zero, or to other values, takes from the frozen model's metric."""
    key, position, index = place(case.graph, name)
    point = case.points[key]

    def edit(value: Tensor) -> Tensor:
        new = point.split(value).clone()
        new[0, position, index] = (
            0 if other is None else point.split(other[point.name])[0, position, index]
        )
        return new.reshape(value.shape)

    return case.metric - frozen_metric(case, {point.name: edit})


def largest(graph: nx.DiGraph, kind: str) -> str:
    names = [name for name, data in graph.nodes(data=True) if data["kind"] == kind]
    return max(names, key=lambda name: abs(graph.nodes[name]["contribution"]))


@pytest.mark.parametrize("kind", ["head", "neuron"])
def test_a_contribution_is_what_removing_the_node_takes(case: Case, kind: str) -> None:
    name = largest(case.graph, kind)
    expected = case.graph.nodes[name]["contribution"]
    assert remove(case, name) == pytest.approx(expected, rel=1e-6, abs=case.tolerance)


def test_relative_to_a_corrupt_prompt(case: Case) -> None:
    graph = attribution_graph(case.model, PAIR, max_nodes=80)
    for error in flows(graph):
        assert error < 1e-9
    other = activations(case.model, CORRUPT, [p.name for p in case.points.values()])
    paired = replace(case, graph=graph)
    for name in (largest(graph, "head"), largest(graph, "neuron")):
        expected = graph.nodes[name]["contribution"]
        assert remove(paired, name, other) == pytest.approx(expected, rel=1e-6, abs=case.tolerance)
    clean, corrupt = (
        float(METRIC.fn(case.model(ids, return_type="logits"))) for ids in (CLEAN, CORRUPT)
    )
    assert graph.nodes["metric"]["contribution"] == pytest.approx(clean - corrupt)
    assert graph.graph["metric"] == {
        "name": "logit_difference",
        "value": pytest.approx(clean),
        "reference": pytest.approx(corrupt),
        # For `intervene`, which measures it again.
        **{"answers": [3, 5], "foils": [4, 6, 7], "position": -1},
    }
    assert graph.graph["clean_ids"] == CLEAN[0].tolist()
    assert graph.graph["corrupt_ids"] == CORRUPT[0].tolist()


def test_contributions_are_those_of_the_whole_model(case: Case) -> None:
    found = contributions(case.model, PROMPT, tuple(case.points.values()))
    for name, node in case.graph.nodes(data=True):
        if node["kind"] in ("head", "neuron"):
            key, position, index = place(case.graph, name)
            expected = float(found.nodes[case.points[key].name][0, position, index])
        elif node["kind"] == "embedding":
            expected = float(found.embeddings[0, node["position"]])
        else:
            continue
        assert node["contribution"] == pytest.approx(expected, rel=1e-6, abs=case.tolerance)


# ------------------------------------------------------------------- what is in a graph


def test_names_and_attributes(gpt2: Any) -> None:
    graph = attribution_graph(gpt2, PROMPT, max_nodes=30)
    tokens = [gpt2.to_string([i]) for i in CLEAN[0].tolist()]
    assert graph.graph["tokens"] == tokens
    own = [d for _, d in graph.nodes(data=True) if d["kind"] in ("head", "neuron")]
    assert len(own) == 30
    name = largest(graph, "neuron")
    node = graph.nodes[name]
    assert name == f"m{node['layer']}.n{node['index']}@{node['position']}"
    point = f"blocks.{node['layer']}.mlp.out.hook_in"
    value = activations(gpt2, CLEAN, [point])[point][0, node["position"], node["index"]]
    assert node["activation"] == pytest.approx(float(value))
    assert node["token"] == tokens[node["position"]]
    assert graph.nodes["metric"]["layer"] == models.N_LAYERS
    for name in ("embedding@0", "position@5", "rest a0@2", "rest m2@5"):
        assert name in graph
        assert graph.nodes[name]["activation"] is None
    assert all(weight != 0 for *_, weight in graph.edges(data="weight"))


def test_the_largest_contributions_are_kept(gpt2: Any) -> None:
    few, many = (attribution_graph(gpt2, PROMPT, max_nodes=n) for n in (10, 40))

    def sizes(graph: nx.DiGraph) -> list[float]:
        nodes = graph.nodes(data=True)
        return sorted(
            (abs(d["contribution"]) for _, d in nodes if d["kind"] in ("head", "neuron")),
            reverse=True,
        )

    assert sizes(few) == pytest.approx(sizes(many)[:10])


def test_a_given_circuit(gpt2: Any) -> None:
    nodes = [Node("head", 1, 2), Node("neuron", 0, 7)]
    graph = attribution_graph(gpt2, PROMPT, circuit=Circuit.of(node_points(gpt2), nodes))
    own = {n for n, kind in graph.nodes(data="kind") if kind in ("head", "neuron")}
    assert own == {f"{node}@{position}" for node in nodes for position in range(6)}


def test_linearizations_differ(gpt2: Any) -> None:
    graphs = [attribution_graph(gpt2, PROMPT, linearization=l) for l in ("detached", "jacobian")]
    values = [graph.nodes["embedding@1"]["contribution"] for graph in graphs]
    assert values[0] != pytest.approx(values[1], rel=1e-3)


def test_the_model_stays_as_it_was(gpt2: Any) -> None:
    def state() -> tuple[int, Tensor, list[bool]]:
        hooks = sum(len(point._forward_hooks) for point in hook_points(gpt2))
        logits = gpt2(CLEAN, return_type="logits").detach()
        return hooks, logits, [p.requires_grad for p in gpt2.parameters()]

    before = state()
    attribution_graph(gpt2, PAIR, max_nodes=10)
    after = state()
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])
    assert before[2] == after[2]


def test_a_metric_is_differentiated_as_it_is(gpt2: Any) -> None:
    """A softmax that a metric takes is no part of the model to hold fixed."""

    def probability(logits: Tensor) -> Tensor:
        return logits[:, -1].softmax(-1)[:, 5]

    logits = gpt2(CLEAN, return_type="logits").detach().requires_grad_()
    (slope,) = torch.autograd.grad(probability(logits).sum(), logits)
    metrics = (Metric(probability), Metric(lambda y: (y * slope).sum((1, 2))))
    curved, straight = (
        attribution_graph(gpt2, Prompts(CLEAN, metric), max_nodes=10) for metric in metrics
    )
    for source, target, weight in straight.edges(data="weight"):
        assert curved.edges[source, target]["weight"] == pytest.approx(weight, abs=1e-12)


def test_what_a_metric_differs_by_from_its_tangent_is_its_own_offset(gpt2: Any) -> None:
    straight = attribution_graph(gpt2, PROMPT, max_nodes=10)
    bent = Metric(lambda logits: METRIC.fn(logits) + METRIC.fn(logits).square())
    graph = attribution_graph(gpt2, Prompts(CLEAN, bent), max_nodes=10)
    value, offset = (straight.nodes["metric"][name] for name in ("contribution", "offset"))
    slope = 1 + 2 * value
    assert graph.edges["rest m2@5", "metric"]["weight"] == pytest.approx(
        slope * straight.edges["rest m2@5", "metric"]["weight"], rel=1e-9
    )
    left = value + value**2 - slope * (value - offset)
    assert graph.nodes["metric"]["offset"] == pytest.approx(left, rel=1e-9)
    for error in flows(graph):
        assert error < 1e-9


def test_gradient_modes_make_no_difference(gpt2: Any) -> None:
    expected = attribution_graph(gpt2, PAIR, max_nodes=10)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = attribution_graph(gpt2, replace(PAIR, clean=CLEAN.clone()), max_nodes=10)
            assert not torch.is_grad_enabled()
        assert nx.utils.graphs_equal(found, expected)


# -------------------------------------------------------------------------------- errors


def test_bad_input(gpt2: Any) -> None:
    with pytest.raises(InputError, match="2 prompts"):
        attribution_graph(gpt2, Prompts(models.tokens(2), METRIC))
    with pytest.raises(InputError, match="max_nodes=0"):
        attribution_graph(gpt2, PROMPT, max_nodes=0)
    circuit = Circuit.of(node_points(gpt2, ("head",)), [Node("head", 0, 0)])
    with pytest.raises(InputError, match="other nodes than kinds"):
        attribution_graph(gpt2, PROMPT, circuit=circuit)


def test_a_residual_stream_that_is_no_sum_is_refused() -> None:
    model = models.bridge("gpt2", torch.float64)
    model.add_hook("blocks.1.hook_in", lambda value, hook: 2 * value)
    with pytest.raises(SiteError, match="attn of layer 1 reads is not the sum"):
        attribution_graph(model, PROMPT)


def test_inputs_split_by_head_are_refused() -> None:
    model = models.hooked(torch.float64)
    model.set_use_split_qkv_input(True)
    with pytest.raises(SiteError, match="a norm reads several things"):
        attribution_graph(model, PROMPT, max_nodes=5)


def test_paths_outside_the_residual_stream_are_refused() -> None:
    """A path that changes no value, from the neurons of block 0 into what block 1 writes."""
    model, seen = models.bridge("gpt2", torch.float64), {}

    def see(value: Tensor, hook: Any) -> Tensor:
        seen["value"] = value
        return value

    def add(value: Tensor, hook: Any) -> Tensor:
        x = seen["value"].sum()
        return value + (x - x.detach()) * torch.arange(models.D_MODEL)

    model.add_hook("blocks.0.mlp.out.hook_in", see)
    model.add_hook("blocks.1.attn.hook_out", add)
    with pytest.raises(SiteError, match="differ from those by the gradient of the whole model"):
        attribution_graph(model, PROMPT)


# ------------------------------------------------------------------------------- pruning


@st.composite
def graphs(draw: st.DrawFn) -> nx.DiGraph:
    """Random graphs without cycles, some nodes of which reach nothing."""
    n = draw(st.integers(2, 14))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    names = [*(f"node{i}" for i in range(n - 1)), "metric"]
    present = rng.random((n, n)) < draw(st.floats(0.1, 1))
    graph = nx.DiGraph(tokens=["a"])
    for i, name in enumerate(names):
        graph.add_node(name, kind="embedding" if i < 2 and i < n - 1 else "neuron")
    for t in range(n):
        for s in range(t):
            if present[t, s] and graph.nodes[names[t]]["kind"] != "embedding":
                graph.add_edge(names[s], names[t], weight=float(rng.normal()))
    return graph


def by_matrices(graph: nx.DiGraph, nodes: float, edges: float) -> tuple[set[str], set[Any], Any]:
    """Pruning as circuit tracing states it, in matrices."""
    names = [n for n in graph if n != "metric"] + ["metric"]
    n, free = len(names), [n for n in graph if graph.nodes[n]["kind"] != "embedding"]

    def influence(A: Any) -> tuple[Any, Any]:
        shares = np.abs(A)
        total = shares.sum(1, keepdims=True)
        shares = np.divide(shares, total, out=np.zeros_like(A), where=total > 0)
        return shares, (np.linalg.inv(np.eye(n) - shares) - np.eye(n))[-1]

    def top(values: Any, threshold: float) -> Any:
        if threshold == 1:
            return values > 0
        order = np.argsort(-values.ravel(), kind="stable")
        reached = np.cumsum(values.ravel()[order])
        keep = np.zeros(values.size, dtype=bool)
        if reached[-1] > 0 and threshold > 0:
            last = np.searchsorted(reached / reached[-1], threshold - 1e-12)
            keep[order[: last + 1]] = True
            # Among equals, as along a chain of single edges, rounding would decide.
            best, next_best = np.append(values.ravel()[order], 0)[last : last + 2]
            assume(next_best == 0 or best - next_best > 1e-9)
        return keep.reshape(values.shape) & (values > 0)

    A = nx.to_numpy_array(graph, nodelist=names).T
    _, whole = influence(A)
    kept = top(whole, nodes) | np.array([name not in free or name == "metric" for name in names])
    A = A * kept[:, None] * kept[None]
    shares, rest = influence(A)
    rest[-1] = 1
    chosen = top(shares * rest[:, None], edges)
    reduced = nx.DiGraph([(names[s], names[t]) for t, s in np.argwhere(chosen)])
    reduced.add_node("metric")
    left = nx.ancestors(reduced, "metric") | {"metric"}
    always = set(graph) - set(free)
    return (
        left | always,
        {e for e in reduced.edges if set(e) <= left},
        dict(zip(names, whole, strict=True)),
    )


# None that a share meets exactly, where rounding would decide.
THRESHOLDS = st.sampled_from([0.0, 1.0]) | st.integers(0, 2**32 - 1).map(
    lambda seed: float(np.random.default_rng(seed).random())
)


@settings(max_examples=60, deadline=None)
@given(graphs(), THRESHOLDS, THRESHOLDS)
def test_pruning_keeps_what_circuit_tracing_does(
    graph: nx.DiGraph, node_threshold: float, edge_threshold: float
) -> None:
    pruned = prune(graph, node_threshold, edge_threshold)
    nodes, edges, influence = by_matrices(graph, node_threshold, edge_threshold)
    assert set(pruned) == nodes
    assert set(pruned.edges) == edges
    for name, value in pruned.nodes(data="influence"):
        assert value == pytest.approx(influence[name], abs=1e-12)
    for name in pruned:
        if pruned.nodes[name]["kind"] != "embedding":
            assert nx.has_path(pruned, name, "metric")
    for edge in pruned.edges:
        assert pruned.edges[edge] == graph.edges[edge]


def test_shares_that_are_kept(gpt2: Any) -> None:
    graph = attribution_graph(gpt2, PROMPT, max_nodes=80)
    pruned = prune(graph, 0.9, 0.95)
    record = pruned.graph["pruning"]
    assert 0.85 < record["node_share"] < 1
    assert 0.9 < record["edge_share"] < 1
    assert (record["node_threshold"], record["edge_threshold"]) == (0.9, 0.95)
    assert record["n_nodes"] == len(graph) > len(pruned)
    assert record["n_edges"] == len(graph.edges) > len(pruned.edges)
    assert {f"embedding@{i}" for i in range(6)} <= set(pruned)
    ordered = sorted(graph, key=lambda n: -pruned.nodes[n]["influence"] if n in pruned else 0)
    shares = [pruned.nodes[n]["cumulative_influence"] for n in ordered if n in pruned]
    assert shares == sorted(shares)
    assert "pruning" not in graph.graph
    whole = prune(graph, 1.0, 1.0)
    assert whole.graph["pruning"]["node_share"] == pytest.approx(1)


def test_pruning_refuses() -> None:
    graph = nx.DiGraph([("a", "metric")])
    with pytest.raises(InputError, match=r"node_threshold=1\.5"):
        prune(graph, 1.5)
    with pytest.raises(InputError, match=r"edge_threshold=-1\.0"):
        prune(graph, 1.0, -1.0)
    with pytest.raises(InputError, match="no node 'metric'"):
        prune(nx.DiGraph([("a", "b")]))
    with pytest.raises(InputError, match="cycles"):
        prune(nx.DiGraph([("a", "metric"), ("metric", "a")]))

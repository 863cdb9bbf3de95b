"""Ablation: what nodes are replaced by, and the causal check of neurons."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens import node_points
from lch_plugin.circuits import Circuit, Node, Prompts, logit_difference
from lch_plugin.circuits.evaluation.ablation import Ablation, run_circuit
from tests import models
from tests.toolkits import HAS_SAES, needs_saes

if HAS_SAES:
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

IDS = models.tokens(batch=3)
BACKENDS = {
    "bridge": lambda: models.bridge("gpt2"),
    "hooked": models.hooked,
    "sae": models.sae_bridge,
}


def difference(model, answer, foil) -> float:
    logits = model(IDS)[:, -1].double()
    rows = torch.arange(3)
    return float((logits[rows, answer] - logits[rows, foil]).mean())


@pytest.mark.parametrize("backend", BACKENDS)
def test_removing_equals_zeroing_the_output_weights(backend: str) -> None:
    model, neurons = BACKENDS[backend](), {0: [3, 5], 2: [7]}
    answer, foil = [1, 2, 3], [4, 5, 6]
    check = lch.circuits.ablation_check(
        model, IDS, answer, foil, neurons, n_random=5, generator=torch.Generator().manual_seed(0)
    )
    assert check.clean == pytest.approx(difference(model, answer, foil))
    for layer, indices in neurons.items():
        with torch.no_grad():
            model.blocks[layer].mlp.W_out[indices] = 0
    removed = difference(model, answer, foil)
    assert check.ablated == pytest.approx(removed, abs=1e-5)
    assert check.effect == pytest.approx(check.clean - removed, abs=1e-5)
    assert len(check.random) == 5
    assert len(set(check.random)) > 1


def test_random_sets_repeat_with_the_seed() -> None:
    model = models.bridge("gpt2")
    checks = [
        lch.circuits.ablation_check(
            model, IDS, 1, 2, {1: [0]}, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (0, 0, 1)
    ]
    assert checks[0] == checks[1]
    assert checks[0].random != checks[2].random
    assert len(checks[0].random) == 20


def test_random_sets_are_drawn_from_the_other_neurons() -> None:
    """With half of the neurons removed, the other half is the only set there is to draw."""
    model, half = models.bridge("gpt2"), models.D_MLP // 2
    checks = [
        lch.circuits.ablation_check(model, IDS, 1, 2, {-1: neurons}, n_random=3)
        for neurons in (range(half), range(half, models.D_MLP))
    ]
    assert checks[0].neurons == {models.N_LAYERS - 1: tuple(range(half))}
    assert checks[0].random == pytest.approx([checks[1].ablated] * 3)


@needs_saes
def test_a_hook_point_that_does_not_fire_is_no_null_effect() -> None:
    model = models.sae_bridge()
    metadata = SAEMetadata(hook_name="blocks.1.mlp.out.hook_in")
    model.add_sae(StandardSAE(StandardSAEConfig(d_in=models.D_MLP, d_sae=8, metadata=metadata)))
    with pytest.raises(lch.SiteError, match="reset_saes"):
        lch.circuits.ablation_check(model, IDS, 1, 2, {1: [0]})


def test_p_value_counts_random_sets_with_at_least_the_effect_either_way() -> None:
    check = lch.circuits.AblationCheck(
        {0: (1,)}, clean=3.0, ablated=1.0, random=(3.0, 0.5, 1.5, 5.5)
    )
    assert check.effect == 2.0
    assert check.random_effects.tolist() == [0.0, 2.5, 1.5, -2.5]
    assert check.p_value == 3 / 5


def test_centered_weights_are_no_obstacle_to_ablation() -> None:
    model = models.bridge("gpt2")
    plain = lch.circuits.ablation_check(model, IDS, 1, 2, {1: [0, 4]}, n_random=1)
    model.enable_compatibility_mode(disable_warnings=True)
    processed = lch.circuits.ablation_check(model, IDS, 1, 2, {1: [0, 4]}, n_random=1)
    assert processed.effect == pytest.approx(plain.effect, abs=1e-4)


def test_a_layer_is_not_given_twice() -> None:
    with pytest.raises(lch.InputError, match=r"layer 1 are given twice, .* as layer -2"):
        lch.circuits.ablation_check(models.bridge("gpt2"), IDS, 1, 2, {1: [0], -2: [1]})


@pytest.mark.usefixtures("as_users_run")
def test_bad_input_is_refused() -> None:
    model = models.bridge("gpt2")
    check = lch.circuits.ablation_check
    for args, match in [
        ((1, 2, {}), "empty"),
        ((1, 2, {0: [models.D_MLP]}), "0 to 47"),
        ((1, 2, {0: [1, 1]}), "distinct"),
        ((1, 2, {0: list(range(30))}), "at most half"),
        (([1, 2], 2, {0: [1]}), "for 3 prompts"),
        ((1.5, 2, {0: [1]}), "give one"),
        ((1, 2, {0: []}), "at least one"),
        ((1, 2, {0: [1.5]}), "distinct indices"),
        ((models.D_VOCAB, 2, {0: [1]}), "vocabulary"),
    ]:
        with pytest.raises(lch.InputError, match=match):
            check(model, IDS, *args)
    with pytest.raises(lch.InputError, match="n_random"):
        check(model, IDS, 1, 2, {0: [1]}, n_random=0)
    with pytest.raises(lch.SiteError, match=r"\[5\]"):
        check(model, IDS, 1, 2, {5: [1]})


def batch(seed: int, pos: int, *, twins: bool = True) -> Prompts:
    clean, corrupt = (models.tokens(batch=3, pos=pos, seed=seed + i) for i in range(2))
    metric = logit_difference([[1], [2, 3], [4]], [[5], [6], [7, 8]])
    return Prompts(clean, metric, corrupt if twins else None)


BATCHES = [batch(1, 5), batch(3, 7)]
FAMILIES: dict[str, Callable] = {
    "hooked": lambda dtype: models.hooked(dtype),
    "gpt2": lambda dtype: models.bridge("gpt2", dtype),
    "gpt_neox": lambda dtype: models.bridge("gpt_neox", dtype),
    "llama": lambda dtype: models.bridge("llama", dtype),
    "qwen2": lambda dtype: models.bridge("qwen2", dtype),
}
POINTS = {"head": "attn.hook_z", "neuron": "mlp.hook_post"}
NODES = [Node("head", 0, 2), Node("head", 2, 0), Node("neuron", 0, 5), Node("neuron", 1, 47)]


def by_hand(model, one: Prompts, other: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """The metric with all but `NODES` replaced, at the hook points that TransformerLens names."""

    def hook(value, hook):
        layer = int(hook.name.split(".")[1])
        kind = "head" if value.ndim == 4 else "neuron"
        new = other(f"blocks.{layer}.{POINTS[kind]}").expand_as(value).clone()
        for node in NODES:
            if (node.kind, node.layer) == (kind, layer):
                new[:, :, node.index] = value[:, :, node.index]
        return new

    names = [f"blocks.{layer}.{name}" for layer in range(3) for name in POINTS.values()]
    with torch.no_grad():
        logits = model.run_with_hooks(one.clean, fwd_hooks=[(name, hook) for name in names])
    return one.metric.fn(logits)


def cached(model, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return model.run_with_cache(tokens)[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_circuit_is_run_as_one_would_by_hand(family: str) -> None:
    model = FAMILIES[family](torch.float64)
    circuit = Circuit.of(node_points(model), NODES)

    def check(batches: list[Prompts], reference: str, other: Callable) -> None:
        truth = torch.cat([by_hand(model, one, other(one)) for one in batches])
        assert run_circuit(model, batches, circuit, reference).allclose(truth, rtol=0, atol=1e-12)

    check(BATCHES, "zero", lambda one: lambda name: torch.zeros(1, dtype=torch.float64))
    check(BATCHES, "resample", lambda one: cached(model, one.corrupt).__getitem__)
    for twins in (True, False):
        batches = [batch(1, 5, twins=twins), batch(3, 7, twins=twins)]
        caches = [cached(model, one.corrupt if twins else one.clean) for one in batches]

        def mean(name: str, caches: list = caches) -> torch.Tensor:
            return torch.cat([cache[name].flatten(0, 1) for cache in caches]).mean(0)

        check(batches, "mean", lambda one, mean=mean: mean)


def test_whole_mlps_are_nodes_as_well() -> None:
    model = models.bridge("llama", torch.float64)
    points = node_points(model, ("head", "mlp"))
    circuit = Ablation(model, BATCHES, points, "zero").everything().without(Node("mlp", 1))
    found = run_circuit(model, BATCHES[0], circuit, "zero")
    with torch.no_grad():
        model.blocks[1].mlp.W_out.zero_()
        truth = BATCHES[0].metric.fn(model(BATCHES[0].clean))
    assert found.allclose(truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["hooked", "gpt2"])
def test_full_and_empty_circuits(family: str) -> None:
    """All nodes: the model as it is. None: the corrupt run, but for what embeddings add."""
    model = FAMILIES[family](torch.float64)
    ablation = Ablation(model, BATCHES, node_points(model))
    full, empty = ablation.everything(), ~ablation.everything()
    assert (len(full), len(empty)) == (3 * (4 + models.D_MLP), 0)
    with torch.no_grad():
        clean = torch.cat([one.metric.fn(model(one.clean)) for one in BATCHES])
        assert ablation.metric(full).allclose(clean, rtol=0, atol=1e-12)
        # With the corrupt embeddings too, nothing of the clean prompt is left.
        embeddings = cached(model, BATCHES[0].corrupt)["hook_embed"]
        with model.hooks([("hook_embed", lambda value, hook: embeddings)]):
            found = run_circuit(model, BATCHES[0], empty)
        corrupt = BATCHES[0].metric.fn(model(BATCHES[0].corrupt))
    assert found.allclose(corrupt, rtol=0, atol=1e-12)


def test_a_model_in_half_precision_keeps_its_metric_in_full() -> None:
    model = models.bridge("gpt2", torch.bfloat16)
    circuit = Circuit.of(node_points(model), NODES)
    wide = models.bridge("gpt2", torch.float32)
    with torch.no_grad():
        for own, other in zip(
            wide.original_model.parameters(), model.original_model.parameters(), strict=True
        ):
            own.copy_(other)
    for reference in ("zero", "mean", "resample"):
        found = run_circuit(model, BATCHES, circuit, reference)
        truth = run_circuit(wide, BATCHES, circuit, reference)
        assert found.allclose(truth, rtol=0, atol=0.05 * float(truth.abs().max()))
        # Not rounded to the eight bits of the logits once more.
        assert not torch.equal(found, found.bfloat16().double())


@pytest.mark.parametrize("family", ["hooked", "gpt2"])
def test_the_hooks_of_the_user_act(family: str) -> None:
    model = FAMILIES[family](torch.float64)
    circuit = Circuit.of(node_points(model), NODES)
    plain = run_circuit(model, BATCHES, circuit)
    model.add_hook("blocks.0.attn.hook_z", lambda value, hook: value * 2)
    truth = torch.cat([by_hand(model, o, cached(model, o.corrupt).__getitem__) for o in BATCHES])
    found = run_circuit(model, BATCHES, circuit)
    assert found.allclose(truth, rtol=0, atol=1e-12)
    assert not found.allclose(plain, atol=1e-3)


@pytest.mark.parametrize("family", ["hooked", "gpt2"])
def test_the_model_is_as_it_was(family: str) -> None:
    """In training mode too: dropout is off meanwhile, and on again afterwards."""
    model = FAMILIES[family](torch.float32)
    circuit = Circuit.of(node_points(model), NODES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluated = run_circuit(model, BATCHES, circuit)
    model.train()
    assert torch.equal(run_circuit(model, BATCHES, circuit), evaluated)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p.fwd_hooks or p._forward_hooks for p in model.hook_dict.values())


@pytest.mark.usefixtures("as_users_run")
def test_circuits_that_cannot_be_run() -> None:
    model = models.bridge("gpt2")
    circuit = Circuit.of(node_points(model), NODES)
    alone = [BATCHES[0], batch(1, 5, twins=False)]
    with pytest.raises(lch.InputError, match="no prompts"):
        run_circuit(model, [], circuit)
    with pytest.raises(lch.InputError, match="Give corrupt twins"):
        run_circuit(model, alone, circuit)
    with pytest.raises(lch.InputError, match="reference='clean'"):
        run_circuit(model, alone, circuit, "clean")
    with pytest.raises(lch.InputError, match="other nodes"):
        Ablation(model, BATCHES, node_points(model, ("head",))).metric(circuit)

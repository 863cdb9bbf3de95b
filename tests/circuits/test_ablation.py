"""The causal check: what it removes, what it compares with, what it refuses."""

from __future__ import annotations

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

import lch_plugin as lch
from tests import models
from tests.adapters.test_transformer_lens import sae_bridge

IDS = models.tokens(batch=3)
METADATA = SAEMetadata(hook_name="blocks.1.mlp.out.hook_in")
BACKENDS = {"bridge": lambda: models.bridge("gpt2"), "hooked": models.hooked, "sae": sae_bridge}


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


def test_a_hook_point_that_does_not_fire_is_no_null_effect() -> None:
    model = sae_bridge()
    model.add_sae(StandardSAE(StandardSAEConfig(d_in=models.D_MLP, d_sae=8, metadata=METADATA)))
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

"""MLPs of every toolkit, against gradients taken outside the package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lch_plugin as lch
from tests import models
from tests.adapters.transformer_lens.common import BACKENDS, IDS, NAMES, cached


@pytest.mark.parametrize("family", models.FAMILIES)
def test_equals_autograd_through_huggingface_in_float64(family: str) -> None:
    model = models.bridge(family, torch.float64)
    # Rotary families differ in the ninth digit before the MLP, so compare at the same input.
    mlp_in = "mlp.in.hook_in" if models.FAMILIES[family].mlp == "fc1" else "mlp.hook_in"
    inputs = [f"blocks.{layer}.{mlp_in}" for layer in range(models.N_LAYERS)]
    v = torch.linspace(-1, 2, models.D_MODEL, dtype=torch.float64)
    for cotangent in (None, v):
        with lch.attach(model, cotangent=cotangent):
            cache = cached(model, inputs + NAMES)
        truth = models.autograd_centroids(family, [cache[i] for i in inputs], cotangent)
        for name, mu in zip(NAMES, truth, strict=True):
            assert cache[name].shape == (*IDS.shape, models.D_MODEL)
            assert models.relative_error(cache[name], mu) < 1e-10


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.08)])
def test_equals_float64_end_to_end(family: str, dtype: torch.dtype, tolerance: float) -> None:
    model = models.bridge(family, dtype)
    truth = models.autograd_centroids(family, models.mlp_inputs(family, IDS))
    with lch.attach(model):
        cache = cached(model)
    for name, mu in zip(NAMES, truth, strict=True):
        assert cache[name].dtype == torch.float32
        assert models.relative_error(cache[name], mu) < tolerance


def test_every_backend_gives_the_same_numbers() -> None:
    truth = models.autograd_centroids("gpt2", models.mlp_inputs("gpt2", IDS))
    for backend, build in BACKENDS.items():
        model = build(dtype=torch.float64)
        with lch.attach(model):
            cache = cached(model)
        for name, mu in zip(NAMES, truth, strict=True):
            assert models.relative_error(cache[name], mu) < 1e-10, backend


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_mode_of_the_caller_is_kept(model: Any, mode: type) -> None:
    with lch.attach(model):
        reference = cached(model)
        with mode():
            before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            cache = cached(model)
            assert before == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        for name in NAMES:
            assert torch.equal(cache[name], reference[name])
            assert not cache[name].requires_grad


def test_dropout_is_no_part_of_a_centroid(model: Any) -> None:
    with lch.attach(model):
        expected = cached(model, NAMES[0])[NAMES[0]]
        model.blocks[0].mlp.train()
        for module in model.blocks[0].mlp.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        torch.testing.assert_close(cached(model, NAMES[0])[NAMES[0]], expected)


def test_under_autocast_the_closed_form_stays_in_float32(model: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), lch.attach(model):
        mu = cached(model, NAMES[0])[NAMES[0]]
    assert mu.dtype == torch.float32
    with lch.attach(model):
        assert models.relative_error(mu, cached(model, NAMES[0])[NAMES[0]]) < 0.05


def test_the_cotangent_is_a_copy(model: Any) -> None:
    v = torch.linspace(-1, 1, models.D_MODEL, requires_grad=True)
    with lch.attach(model, cotangent=v * 2):
        expected = cached(model)
        with torch.no_grad():
            v.mul_(0)
        assert torch.equal(cached(model)[NAMES[1]], expected[NAMES[1]])


def test_neurons_that_are_all_off_have_a_centroid_of_zero() -> None:
    model = models.bridge("opt")
    with torch.no_grad():
        getattr(model.blocks[1].mlp, "in").bias.fill_(-1e4)
    with lch.attach(model):
        assert not cached(model)[NAMES[1]].any()
    scores = lch.circuits.neuron_attribution(model, IDS, n_samples=4).scores
    assert not scores[1].any()
    assert scores[0].any()


def test_gated_mlps_of_hooked_transformers_equal_autograd() -> None:
    model = models.lens_model(act_fn="silu", gated_mlp=True, normalization_type="RMS")
    ids, inputs = torch.arange(6)[None], []
    model.blocks[1].mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with lch.attach(model, layers=1):
        del inputs[:]
        mu = cached(model, NAMES[1], ids)[NAMES[1]]
    truth = lch.centroid(model.blocks[1].mlp, inputs[0])
    assert models.relative_error(mu, truth) < 1e-10


def test_an_mlp_with_a_layer_norm_for_an_activation_is_differentiated() -> None:
    model = models.lens_model(act_fn="solu_ln", normalization_type="LN")
    inputs: list[Tensor] = []
    model.blocks[0].mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with lch.attach(model) as handle:
        assert set(handle.methods.values()) == {"VJP"}
        inputs.clear()
        cache = cached(model, ids=IDS % model.cfg.d_vocab)
    x = inputs[0].detach().requires_grad_()
    y = model.blocks[0].mlp(x)
    (truth,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(cache[NAMES[0]], truth)

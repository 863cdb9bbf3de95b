"""Predicted responses, held to forward-mode derivatives and to the component itself, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_lens import TopKTrainingSAEConfig, TrainingSAE
from torch import Tensor, nn

import lch_plugin as lch
from lch_plugin.saes.evaluation.functional import (
    EXACT,
    MEAN,
    CapturedComponent,
    ResponseFit,
    _perturbations,
    predicted_responses,
    reconstructed_centroids,
)
from tests import families, models

D_IN = 6
COMPONENTS = {"blocks.1.mlp": "mlp", "blocks.1.attn": "attn", "blocks.1": "block"}
MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: models.bridge("gpt2", torch.float64),
    "gemma3_text": lambda: models.bridge("gemma3_text", torch.float64),
    "HookedTransformer": lambda: models.hooked(torch.float64),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(n: int = 50) -> Tensor:
    return torch.randn(n, D_IN, dtype=torch.float64, generator=seeded())


@pytest.fixture(scope="module")
def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D_IN, 20), nn.GELU(), nn.Linear(20, 4)).double()


def by_size(fits: list[ResponseFit]) -> dict[tuple[str, float | None], ResponseFit]:
    return {(fit.perturbation, fit.size): fit for fit in fits}


def test_first_order_responses_are_forward_mode_derivatives(mlp: nn.Module) -> None:
    """What predictions are compared with is ``v . J d``, found without any centroid."""
    x, v = rows(), torch.randn(4, dtype=torch.float64)
    prediction = torch.randn_like(x)
    fits = by_size(predicted_responses(mlp, x, {"p": prediction}, cotangent=v, generator=seeded(3)))
    generator = seeded(3)
    for kind in ("isotropic", "data"):
        ds = list(_perturbations(kind, x, 8, False, generator))  # type: ignore[arg-type]
        truth = torch.cat([torch.func.jvp(mlp, (x,), (d,))[1] @ v for d in ds])
        predicted = torch.cat([(prediction * d).sum(-1) for d in ds])
        r_squared = 1 - (truth - predicted).square().sum() / (truth - truth.mean()).square().sum()
        fit = fits[kind, None]
        assert fit.r_squared["p"] == pytest.approx(float(r_squared), rel=1e-10)
        assert fit.r_squared[EXACT] == pytest.approx(1, abs=1e-12)
        assert fit.n == 8 * len(x)


def test_finite_responses_are_the_components_own(mlp: nn.Module) -> None:
    x = rows()
    fits = by_size(predicted_responses(mlp, x, {}, sizes=[0.3], generator=seeded(3)))
    ds = list(_perturbations("isotropic", x, 8, False, seeded(3)))
    with torch.no_grad():
        truth = torch.cat([(mlp(x + 0.3 * d) - mlp(x)).sum(-1) for d in ds])
    predicted = torch.cat([(lch.centroid(mlp, x) * 0.3 * d).sum(-1) for d in ds])
    r_squared = 1 - (truth - predicted).square().sum() / (truth - truth.mean()).square().sum()
    assert fits["isotropic", 0.3].r_squared[EXACT] == pytest.approx(float(r_squared), rel=1e-10)


def test_isotropic_first_order_fits_measure_the_error_of_the_centroid(mlp: nn.Module) -> None:
    x = rows(400)
    mu = lch.centroid(mlp, x)
    noisy = mu + 0.3 * mu.norm(dim=-1, keepdim=True) * rows(400).flip(0) / D_IN**0.5
    fits = predicted_responses(mlp, x, {"noisy": noisy}, n_perturbations=50, generator=seeded())
    norms = x.norm(dim=-1, keepdim=True)
    expected = 1 - ((noisy - mu) * norms).square().sum() / (mu * norms).square().sum()
    assert by_size(fits)["isotropic", None].r_squared["noisy"] == pytest.approx(
        float(expected), abs=0.02
    )


def test_small_perturbations_are_predicted_better_than_large_ones(mlp: nn.Module) -> None:
    fits = by_size(predicted_responses(mlp, rows(), {}, sizes=[0.01, 0.1, 1.0]))
    for kind in ("isotropic", "data"):
        r = [fits[kind, size].r_squared for size in (None, 0.01, 0.1, 1.0)]
        assert r[0][EXACT] > r[1][EXACT] > r[2][EXACT] > r[3][EXACT]
        assert r[1][EXACT] > 0.999
        assert r[0][MEAN] < 0.9


def test_of_a_linear_component_the_mean_centroid_is_exact() -> None:
    linear = nn.Linear(D_IN, 4).double()
    for fit in predicted_responses(linear, rows(), {}):
        assert fit.r_squared[MEAN] == pytest.approx(1)
        assert fit.rank_correlation[MEAN] == pytest.approx(1)


def test_a_wrong_scale_lowers_r_squared_and_not_the_rank_correlation(mlp: nn.Module) -> None:
    x = rows()
    mu = lch.centroid(mlp, x)
    fit = predicted_responses(mlp, x, {"half": mu / 2, "nothing": mu * 0})[0]
    assert fit.r_squared["half"] == pytest.approx(0.75, abs=0.02)
    assert fit.rank_correlation["half"] == pytest.approx(1)
    assert fit.rank_correlation["nothing"] == 0


def test_perturbations_have_the_norm_of_the_input_and_the_directions_they_should() -> None:
    x = rows(20)
    for kind in ("isotropic", "data"):
        for d in _perturbations(kind, x, 3, False, seeded()):  # type: ignore[arg-type]
            torch.testing.assert_close(d.norm(dim=-1), x.norm(dim=-1))
    differences = torch.nn.functional.normalize(x[None] - x[:, None], dim=-1)
    d = torch.nn.functional.normalize(next(_perturbations("data", x, 1, False, seeded())), dim=-1)
    cosines = (differences * d[:, None]).sum(-1)
    torch.testing.assert_close(cosines.amax(-1), torch.ones(20, dtype=torch.float64))


def test_the_same_seed_gives_the_same_fits(mlp: nn.Module) -> None:
    a, b, c = (predicted_responses(mlp, rows(), {}, generator=seeded(s)) for s in (0, 0, 1))
    assert a == b != c


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("module", COMPONENTS)
def test_captured_components_have_the_centroids_of_hook_points(name: str, module: str) -> None:
    """Run alone, a component is what it is within the model."""
    model, ids, v = MODELS[name](), models.tokens(batch=4), lch.cotangents.Random(0)
    with lch.attach(model, layers=1, site=COMPONENTS[module], cotangent=v) as handle:  # type: ignore[arg-type]
        _, cache = model.run_with_cache(ids, names_filter=handle.hook_names)
    component = CapturedComponent(model, ids.split(3), module)
    assert component.mixes_positions == (COMPONENTS[module] != "mlp")
    mu = lch.centroid(component, component.x, v)
    torch.testing.assert_close(mu, cache[handle.hook_names[0]], rtol=1e-8, atol=1e-10)
    fits = predicted_responses(
        component,
        component.x,
        {"a": mu},
        cotangent=v,
        sizes=[1e-4],
        mixes_positions=component.mixes_positions,
        generator=seeded(),
    )
    for fit in fits:
        assert fit.r_squared["a"] == fit.r_squared[EXACT] == pytest.approx(1, abs=1e-4)
        assert fit.n == 8 * (4 if component.mixes_positions else 4 * 7)


def test_chosen_positions_of_a_vision_model() -> None:
    vit = families.huggingface("vit_base", torch.float64)
    x = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    patches = slice(1, None)
    for module, mixes in (("layers.1.mlp", False), ("layers.1.attention", True)):
        whole = CapturedComponent(vit, [x], module)
        component = CapturedComponent(vit, [x], module, positions=patches)
        assert component.mixes_positions == mixes
        assert torch.equal(component.x, whole.x[:, patches])
        mu = lch.centroid(component, component.x)
        torch.testing.assert_close(mu, lch.centroid(whole, whole.x)[:, patches])


def test_the_model_is_left_as_it_was() -> None:
    model = models.bridge("gpt2")
    model.train()
    ids = models.tokens()
    model(ids)  # A bridge finishes its own hooks in its first pass.
    before = [(m, m.training, len(m._forward_pre_hooks)) for m in model.modules()]
    component = CapturedComponent(model, [ids], "blocks.1.attn")
    lch.centroid(component, component.x)
    assert [(m, m.training, len(m._forward_pre_hooks)) for m in model.modules()] == before


def test_saes_on_centroids_and_on_inputs() -> None:
    model, ids = models.bridge("gpt2", torch.float64), models.tokens()
    component = CapturedComponent(model, [ids], "blocks.1.mlp")
    x, mu = component.x, lch.centroid(component, component.x)
    config = TopKTrainingSAEConfig(d_in=models.D_MODEL, d_sae=64, k=4, dtype="float64")
    torch.manual_seed(0)
    sae: Any = TrainingSAE.from_dict(config.to_dict())
    with torch.no_grad():
        torch.testing.assert_close(reconstructed_centroids(sae, component), sae(mu))
        x_hat = sae(x)
    of_inputs = reconstructed_centroids(sae, component, "input")
    torch.testing.assert_close(of_inputs, lch.centroid(component, x_hat))
    assert lch.saes.predicted_responses is predicted_responses


def padded() -> Any:
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    return [{"input_ids": models.tokens(), "attention_mask": mask}]


GPT2 = "transformer.h.1.mlp"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: predicted_responses(f, rows(1), {}), "at least two"),
        (lambda f: predicted_responses(f, rows(), {"a": rows(3)}), "'a' has shape"),
        (lambda f: predicted_responses(f, rows(), {}, sizes=[0.1, 0]), "above zero"),
        (lambda f: predicted_responses(f, rows(), {}, n_perturbations=0), "at least 1"),
        (lambda f: predicted_responses(f, rows(), {}, mixes_positions=True), "mixes"),
        (lambda f: predicted_responses(f, rows() * 0, {}), "all the same"),
        (lambda f: predicted_responses(f, rows(), {"a": rows() / 0}), "NaN or infinite"),
        (lambda f: CapturedComponent(gpt2(), [], GPT2), "0 batches"),
        (lambda f: CapturedComponent(gpt2(), padded(), GPT2), "padding"),
        (lambda f: CapturedComponent(gpt2(), unequal(), GPT2), "same pos"),
        (lambda f: CapturedComponent(gpt2(), [models.tokens()], f"{GPT2}:{GPT2}.c_proj"), "single"),
        (lambda f: captured(positions=slice(9, None)), "leave nothing"),
        (lambda f: reconstructed_centroids(sae(), captured(), "output"), "of='output'"),  # type: ignore[arg-type]
        (lambda f: reconstructed_centroids(sae(), captured()), r"\(n, 31\)"),
    ],
)
def test_bad_input_is_refused(
    mlp: nn.Module, make: Callable[[Any], Any], message: str, as_users_run: None
) -> None:
    with pytest.raises(lch.LCHError, match=message):
        make(mlp)


def gpt2() -> Any:
    return models.huggingface("gpt2")


def captured(**changes: Any) -> CapturedComponent:
    return CapturedComponent(gpt2(), [models.tokens()], GPT2, **changes)


def unequal() -> list[Tensor]:
    return [models.tokens(), models.tokens(pos=5)]


def sae() -> Any:
    return TrainingSAE.from_dict(TopKTrainingSAEConfig(d_in=31, d_sae=64, k=4).to_dict())

"""Neuron scores of whole models, held to removing one neuron at a time."""

from __future__ import annotations

import pytest
import torch

import lch_plugin as lch
from tests import models

IDS = models.tokens(batch=1)


def scores_by_ablation(
    family: str, x: torch.Tensor, layer: int, cotangent: torch.Tensor | None
) -> torch.Tensor:
    """The paper's recipe: remove each neuron of HuggingFace's own MLP and recompute by autograd."""
    mlp = (
        models.huggingface(family, torch.float64)
        .get_submodule(models.FAMILIES[family].layers)[layer]
        .mlp
    )
    out = mlp.c_proj.weight if family == "gpt2" else mlp.down_proj.weight.T
    full = lch.centroid(mlp, x, cotangent)
    scores = []
    for j in range(models.D_MLP):
        with torch.no_grad():
            row, out[j] = out[j].clone(), 0.0
        scores.append((lch.centroid(mlp, x, cotangent) - full).square().mean() / full.norm())
        with torch.no_grad():
            out[j] = row
    return torch.stack(scores)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("own_cotangent", [False, True])
def test_scores_equal_removing_neurons_one_at_a_time(family: str, own_cotangent: bool) -> None:
    model = models.bridge(family, torch.float64)
    v = torch.linspace(-1, 2, models.D_MODEL, dtype=torch.float64) if own_cotangent else None
    result = lch.circuits.neuron_attribution(
        model,
        IDS,
        position=-2,
        n_samples=16,
        cotangent=v,
        generator=torch.Generator().manual_seed(3),
    )
    generator = torch.Generator().manual_seed(3)
    inputs = [
        model.run_with_cache(IDS)[1][f"blocks.{layer}.mlp.hook_in"]
        for layer in range(models.N_LAYERS)
    ]
    for layer, x in enumerate(inputs):
        samples = lch.sample_neighbourhood(
            x[0, -2][None], radius=0.25, n_samples=16, generator=generator
        )[:, 0]
        truth = scores_by_ablation(family, samples, layer, v)
        torch.testing.assert_close(result.scores[layer], truth, rtol=1e-6, atol=0)


def test_a_batch_averages_over_prompts_and_attachment_makes_no_difference() -> None:
    model, ids = models.bridge("gpt2", torch.float64), models.tokens(batch=3)
    options = {"radius": 0.0, "n_samples": 1}
    together = lch.circuits.neuron_attribution(model, ids, **options).scores[1]
    with lch.attach(model):
        apart = [
            lch.circuits.neuron_attribution(model, row, layers=1, **options).scores[1]
            for row in ids
        ]
    torch.testing.assert_close(together, torch.stack(apart).mean(0))


def test_ranks_and_percentiles() -> None:
    scores = {0: torch.tensor([1.0, 5.0, 3.0, 3.0]), 2: torch.tensor([9.0, 0.0, 2.0, 4.0])}
    result = lch.circuits.NeuronAttribution(scores, position=0, radius=0.25, n_samples=1)
    assert [(n.layer, n.index) for n in result.top(3)] == [(2, 0), (0, 1), (2, 3)]
    assert [n.index for n in result.top(9, layer=0)][:1] == [1]
    assert result.neuron(0, 2) == lch.circuits.Neuron(0, 2, 3.0, rank=2, percentile=25.0)
    assert result.neuron(2, 0).percentile == 75.0
    with pytest.raises(lch.SiteError, match="layer 1 was not scored"):
        result.top(1, layer=1)
    with pytest.raises(lch.SiteError, match="neurons 0 to 3"):
        result.neuron(0, 4)


def test_every_backend_scores_alike() -> None:
    options = {"radius": 0.1, "n_samples": 8}
    one, other = (
        lch.circuits.neuron_attribution(
            model, IDS, generator=torch.Generator().manual_seed(0), **options
        ).scores
        for model in (models.bridge("gpt2", torch.float64), models.hooked(torch.float64))
    )
    for layer in range(models.N_LAYERS):
        torch.testing.assert_close(one[layer], other[layer], rtol=1e-9, atol=0)


def test_interventions_of_the_user_are_part_of_the_pass() -> None:
    model, options = models.bridge("gpt2"), {"radius": 0.0, "n_samples": 1, "layers": 1}
    plain = lch.circuits.neuron_attribution(model, IDS, **options).scores[1]
    with model.hooks(fwd_hooks=[("blocks.1.mlp.hook_in", lambda value, hook: value * 0 + 1)]):
        edited = lch.circuits.neuron_attribution(model, IDS, **options).scores[1]
    truth = scores_by_ablation("gpt2", torch.ones(1, models.D_MODEL).double(), 1, None)
    torch.testing.assert_close(edited.double(), truth, rtol=1e-4, atol=1e-9)
    assert not torch.allclose(edited, plain)


def test_an_mlp_that_computes_something_else_is_refused() -> None:
    model = models.bridge("gpt2")
    inner = model.blocks[1].mlp.original_component
    original = inner.forward
    inner.forward = lambda x: original(torch.tanh(x))
    with pytest.raises(lch.SiteError, match="self-check"):
        lch.circuits.neuron_attribution(model, IDS)


@pytest.mark.usefixtures("as_users_run")
def test_bad_input_is_refused() -> None:
    model = models.bridge("gpt2")
    attribute = lch.circuits.neuron_attribution
    for tokens, match in [
        (torch.tensor([0, models.D_VOCAB]), "vocabulary, 0 to 49"),
        (torch.tensor([-1]), "vocabulary"),
        (torch.zeros(models.N_CTX + 1, dtype=torch.long), "context of 16"),
        (torch.zeros(2, 0, dtype=torch.long), "at least one"),
        (torch.zeros(2, 3), "float32"),
        (torch.ones(3, dtype=torch.bool), "bool"),
        ([1, 2], r"\[1, 2\]"),
        (None, "None"),
    ]:
        with pytest.raises(lch.InputError, match=match):
            attribute(model, tokens)
    for kw in ({"position": 7}, {"position": -8}, {"radius": -1.0}, {"n_samples": 0}):
        with pytest.raises(lch.InputError, match=next(iter(kw))):
            attribute(model, IDS, **kw)
    with pytest.raises(lch.InputError, match="boot_transformers"):
        attribute(models.huggingface("gpt2"), IDS)
    model.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(lch.VanishingCentroidError):
        attribute(model, IDS)

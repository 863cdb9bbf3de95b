"""The quantities of the paper's own code, computed here in plain PyTorch, against the package.

Which settings make the two agree is what `docs/explanation/conventions.md` says. The
functions of the first part use nothing of the package, and copy nothing of the paper's code: they
are its formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import lch_plugin as lch
from lch_plugin.circuits import neuron_attribution
from lch_plugin.demo import DEMO_MODEL_DIR
from lch_plugin.demo.tasks import pear_apple
from tests import models
from tests.toolkits import HAS_SAES, needs_saes

if HAS_SAES:
    from lch_plugin.saes.sources.hook_points import provenance

F64 = torch.float64
RADIUS, SEED = 0.25, 3
# Of the largest value: what sums of a few thousand products in float64 leave.
EXACT = 1e-12


# ------------------------------------------------------------------- what the paper's code computes


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def centroids(fn: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Gradient of the sum of all outputs, at each point."""
    points = points.clone().requires_grad_()
    (mu,) = torch.autograd.grad(fn(points).sum(), points)
    return mu


def ball(x: Tensor, radius: float, n: int) -> Tensor:
    """``x`` itself, and ``n - 1`` points uniform in the ball around it."""
    draw = generator()
    directions = torch.randn(n - 1, len(x), dtype=x.dtype, generator=draw)
    directions /= directions.norm(dim=1, keepdim=True)
    distances = radius * torch.rand(n - 1, 1, dtype=x.dtype, generator=draw) ** (1 / len(x))
    return torch.cat([x[None], x + distances * directions])


def noisy(x: Tensor, sigma: float, n: int) -> Tensor:
    """``n`` points with Gaussian noise, of one sigma in every coordinate."""
    return x + sigma * torch.randn(n, *x.shape, dtype=x.dtype, generator=generator())


def without(mlp: nn.Sequential, neuron: int) -> nn.Sequential:
    """A copy of an MLP that never had the neuron."""
    first, act, last = mlp
    kept = [j for j in range(first.out_features) if j != neuron]
    smaller = nn.Sequential(
        nn.Linear(first.in_features, len(kept), dtype=F64),
        act,
        nn.Linear(len(kept), last.out_features, dtype=F64),
    )
    with torch.no_grad():
        smaller[0].weight.copy_(first.weight[kept])
        smaller[0].bias.copy_(first.bias[kept])
        smaller[2].weight.copy_(last.weight[:, kept])
        smaller[2].bias.copy_(last.bias)
    return smaller


def neuron_scores(mlp: nn.Sequential, points: Tensor) -> Tensor:
    """Each neuron removed in turn: the mean squared move, over the norm of all the centroids."""
    whole = centroids(mlp, points)
    moves = [centroids(without(mlp, j), points) - whole for j in range(mlp[0].out_features)]
    return torch.stack([move.square().mean() / whole.norm() for move in moves])


def percentile(scores: Tensor, neuron: int) -> float:
    """Share of the neurons that score as high or lower, the neuron itself among them."""
    return 100 * float((scores <= scores[neuron]).double().mean())


def answer_log_probability(model: Any, ids: Tensor, n_answer: int) -> Callable[[Tensor], Tensor]:
    """Of the last tokens together, given all before them, from token embeddings."""

    def fn(embeddings: Tensor) -> Tensor:
        log_p = model(inputs_embeds=embeddings).logits.log_softmax(-1)[:, -n_answer - 1 : -1]
        return log_p.gather(-1, ids[-n_answer:].expand(len(log_p), -1)[..., None]).sum((1, 2))

    return fn


def saliency(
    model: Any, ids: Tensor, n_answer: int, *, spread: float = 0.05, n: int = 24
) -> tuple[Tensor, Tensor]:
    """Local centroid of the answer's log-probability, and its norm at each token."""
    embeddings = model.get_input_embeddings()(ids).detach()
    noise = torch.randn(n - 1, *embeddings.shape, dtype=F64, generator=generator())
    noise = torch.cat([torch.zeros_like(noise[:1]), spread * embeddings.std() * noise])
    mu = centroids(answer_log_probability(model, ids, n_answer), embeddings + noise).mean(0)
    return mu, mu.norm(dim=-1)


# ------------------------------------------------------------------------------------- the models


@dataclass(frozen=True)
class Case:
    """A GPT-2 as the paper's code has it, and as the package has it."""

    plain: Any
    bridge: Any
    ids: Tensor

    def mlp(self, layer: int) -> tuple[nn.Sequential, Tensor]:
        """An MLP on its own, and what it reads at the last token."""
        module, read = self.plain.transformer.h[layer].mlp, []
        hook = module.register_forward_pre_hook(lambda _, args: read.append(args[0][0, -1]))
        with torch.no_grad():
            self.plain(self.ids[None])
        hook.remove()
        parts = []
        for conv in (module.c_fc, module.c_proj):
            linear = nn.Linear(*conv.weight.shape, dtype=F64)
            linear.weight = nn.Parameter(conv.weight.detach().T)
            linear.bias = nn.Parameter(conv.bias.detach())
            parts.append(linear)
        return nn.Sequential(parts[0], module.act, parts[1]), read[0]


@cache
def case(name: str) -> Case:
    if name == "demo":
        plain = AutoModelForCausalLM.from_pretrained(DEMO_MODEL_DIR, dtype=F64).eval()
        bridge = lch.load_demo_model(dtype=F64)
        # Without a token for the beginning, which GPT-2's own tokenizer does not add.
        return Case(plain, bridge, bridge.to_tokens(pear_apple().prompt, prepend_bos=False)[0])
    # The paper's copy of GPT-2 has the exact GELU; GPT-2's own is an approximation with tanh.
    act = name.removeprefix("tiny ")

    def build() -> Any:
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "gpt2", **{**models.FAMILIES["gpt2"].config, "activation_function": act}
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        model.config.architectures = ["GPT2LMHeadModel"]
        return model.to(F64).eval()

    return Case(build(), models.boot(build(), F64), models.tokens(batch=1)[0])


CASES = ["tiny gelu", "tiny gelu_new", "demo"]


def close(value: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(value, truth, rtol=0, atol=EXACT * float(truth.abs().max()))


# ---------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("name", CASES)
def test_a_centroid_is_the_gradient_of_the_sum(name: str) -> None:
    mlp, x = case(name).mlp(1)
    close(lch.centroid(mlp, x), centroids(mlp, x))


@pytest.mark.parametrize("name", CASES)
def test_neuron_scores_and_percentiles(name: str) -> None:
    layer, n = 2, 32
    mlp, x = case(name).mlp(layer)
    truth = neuron_scores(mlp, ball(x, RADIUS, n))
    found = neuron_attribution(
        case(name).bridge,
        case(name).ids,
        layers=layer,
        radius=RADIUS,
        n_samples=n,
        centre=True,
        generator=generator(),
    )
    scores = found.scores[layer]
    close(scores, truth)
    for j in range(0, len(truth), 7):
        assert percentile(scores, j) == percentile(truth, j)
        # Ours counts those that score lower: among neurons that differ, one fewer.
        assert found.neuron(layer, j).percentile == pytest.approx(
            percentile(truth, j) - 100 / len(truth)
        )
        assert found.neuron(layer, j).rank == int((truth > truth[j]).sum()) + 1


def test_ties_count_for_the_papers_percentile_and_not_for_ours() -> None:
    scores = torch.tensor([1.0, 2.0, 2.0, 3.0])
    found = lch.circuits.NeuronAttribution({0: scores}, (-1,), RADIUS, 1)
    assert percentile(scores, 1) == 75
    assert found.neuron(0, 1).percentile == 25


@pytest.mark.parametrize("name", CASES)
def test_local_centroids_in_a_ball_with_its_centre(name: str) -> None:
    mlp, x = case(name).mlp(1)
    found = lch.local_centroid(
        mlp, x, radius=RADIUS, n_samples=16, centre=True, generator=generator()
    )
    close(found, centroids(mlp, ball(x, RADIUS, 16)).mean(0))


@pytest.mark.parametrize("images", ["a convolution", "demo"])
def test_local_centroids_of_images(images: str) -> None:
    """The noise's sigma is a share of the range of the image, the same in every coordinate."""
    torch.manual_seed(0)
    if images == "demo":
        vit = lch.load_demo_vision_model().to(F64)
        fn, x = (lambda image: vit(image).last_hidden_state), torch.rand(1, 32, 32, dtype=F64)
    else:
        fn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 5)).to(F64)
        x = torch.rand(3, 8, 8, dtype=F64)
    sigma = 0.15 * float(x.max() - x.min())
    found = lch.local_centroid(
        fn, x, neighbourhood="gaussian", sigma=sigma, n_samples=30, generator=generator()
    )
    close(found, centroids(fn, noisy(x, sigma, 30)).mean(0))


@needs_saes
@pytest.mark.parametrize("name", CASES)
def test_local_centroids_at_hook_points(name: str) -> None:
    bridge, ids, draws = case(name).bridge, case(name).ids, generator()
    site = lch.Site(
        "mlp", 1, neighbourhood="gaussian", sigma=0.1, centre=True, n_samples=16, generator=draws
    )
    with lch.attach(bridge, site=site) as handle:
        draws.manual_seed(SEED)
        _, cache = bridge.run_with_cache(ids)
        record = provenance(bridge, handle.hook_names[0])
    mlp, _ = case(name).mlp(1)
    x = cache["blocks.1.mlp.hook_in"]
    noise = 0.1 * torch.randn(15, *x.shape, dtype=F64, generator=generator())
    points = torch.cat([x[None], x + noise])
    mu = centroids(mlp, points)
    close(cache["blocks.1.mlp.hook_centroid"], mu.mean(0))
    close(cache["blocks.1.mlp.hook_centroid_variance"], mu.var(0))
    settings = {"sigma": 0.1, "neighbourhood": "gaussian", "n_samples": 16, "centre": True}
    assert settings.items() <= record.items()
    assert "radius" not in record


@pytest.mark.parametrize("name", CASES)
def test_language_saliency(name: str) -> None:
    """Of two answer tokens, in the embeddings of the whole text."""
    model, ids = case(name).plain, case(name).ids
    truth, norms = saliency(model, ids, n_answer=2)
    embeddings = model.get_input_embeddings()(ids)
    found = lch.local_centroid(
        answer_log_probability(model, ids, n_answer=2),
        embeddings,
        neighbourhood="gaussian",
        sigma=0.05 * embeddings.std(),
        n_samples=24,
        centre=True,
        generator=generator(),
    )
    close(found, truth)
    close(found.norm(dim=-1), norms)


def test_alignment_is_of_flattened_inputs() -> None:
    torch.manual_seed(0)
    fn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 5)).to(F64)
    x = torch.rand(2, 3, 8, 8, dtype=F64)
    truth = [
        (mu * image).sum() / (mu.norm() * image.norm())
        for mu, image in zip(centroids(fn, x), x, strict=True)
    ]
    found = lch.affine_expert(lambda rows: fn(rows.unflatten(-1, x.shape[1:])), x.flatten(1))
    close(found.alignment, torch.stack(truth))


@pytest.mark.parametrize("name", CASES)
def test_effective_dimension(name: str) -> None:
    mlp, x = case(name).mlp(1)
    points = centroids(mlp, ball(x, 4.0, 300))
    eigenvalues = torch.linalg.eigvalsh(points.T.cov()).clamp_min(1e-12)
    p = eigenvalues / eigenvalues.sum()
    truth = float((-(p * p.log()).sum()).exp())
    assert lch.diagnostics.effective_dimension(points) == pytest.approx(truth, rel=1e-10)

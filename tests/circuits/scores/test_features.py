"""Features of centroid SAEs, scored by what removing their directions from an MLP's input takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens import locate_mlps, mlp_inputs
from lch_plugin.circuits import Prompts, logit_difference
from lch_plugin.circuits.graphs import attribution_graph
from lch_plugin.circuits.scores.attribution import embedding_name
from lch_plugin.circuits.scores.features import active_features, feature_attribution
from lch_plugin.cotangents import Metric
from lch_plugin.errors import InputError
from lch_plugin.linearization import DetachedMode
from tests import models
from tests.toolkits import HAS_SAES, needs_saes

if HAS_SAES:
    from sae_lens import StandardSAE, StandardSAEConfig, Transcoder, TranscoderConfig
    from sae_lens.saes.sae import SAEMetadata

    from lch_plugin.steering import edited_input

pytestmark = needs_saes

BACKENDS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: models.bridge("gpt2", torch.float64),
    "gpt_neox": lambda: models.bridge("gpt_neox", torch.float64),
    "qwen2": lambda: models.bridge("qwen2", torch.float64),
    "hooked": lambda: models.hooked(torch.float64),
}
# HuggingFace's RMS norm computes in float32, whatever the model does.
EXACT = {"qwen2": 1e-5}
CLEAN, CORRUPT = models.tokens(2, 6), models.tokens(2, 6, seed=5)
ANSWERS, FOILS = [[3, 7], [5]], [[4], [6, 8]]
METRIC = logit_difference(ANSWERS, FOILS)
D_SAE, HOOK = 24, "blocks.1.mlp.hook_centroid"


def make_sae(hook: str = HOOK, d_in: int = models.D_MODEL) -> StandardSAE:
    torch.manual_seed(0)
    sae = StandardSAE(
        StandardSAEConfig(
            d_in=d_in, d_sae=D_SAE, dtype="float64", metadata=SAEMetadata(hook_name=hook)
        )
    )
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn_like(sae.W_dec))  # Of any length: a feature is a direction.
        sae.W_enc.copy_(torch.randn_like(sae.W_enc))
    return sae


if HAS_SAES:
    SAE = make_sae()
    DIRECTIONS = normalize(SAE.W_dec.detach(), dim=-1)


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, BACKENDS[request.param]()


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return BACKENDS["gpt2"]()


def frozen_metric(model: Any, mode: DetachedMode, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """The metric of the frozen model with what the MLP of block 1 reads edited."""

    def follow(value: Tensor, hook: Any) -> Tensor:
        return mode.follow(value.detach().requires_grad_())

    with mode, edited_input(model, "blocks.1.mlp", edit):
        logits = model.run_with_hooks(
            CLEAN, return_type="logits", fwd_hooks=[(embedding_name(model), follow)]
        )
        return METRIC.fn(logits).detach()


@pytest.mark.parametrize("paired", [False, True], ids=["zero", "corrupt"])
def test_a_score_is_what_removing_the_direction_takes(
    backend: tuple[str, Any], paired: bool
) -> None:
    name, model = backend
    prompts = Prompts(CLEAN, METRIC, CORRUPT if paired else None)
    scores = feature_attribution(model, prompts, SAE)
    feature_acts = active_features(model, prompts, SAE).feature_acts
    other = mlp_inputs(model, CORRUPT, locate_mlps(model, 1))[0] if paired else None
    mode = DetachedMode()
    whole = frozen_metric(model, mode, lambda x: x)
    for feature in [one.index for one in scores.top(3, by="magnitude")]:
        d, active = DIRECTIONS[feature], (feature_acts[..., feature] != 0)[..., None]

        def remove(x: Tensor, d: Tensor = d, active: Tensor = active) -> Tensor:
            along = x @ d if other is None else x @ d - other @ d
            return x - torch.where(active, along[..., None], 0) * d

        taken = whole - frozen_metric(model, DetachedMode(replay=mode.recorded), remove)
        expected = scores.feature(feature).score
        assert float(taken.mean()) == pytest.approx(expected, rel=1e-5, abs=EXACT.get(name, 1e-9))


def test_the_jacobian_is_the_change_to_first_order(gpt2: Any) -> None:
    prompts, step = Prompts(CLEAN, METRIC), 1e-5
    scores = feature_attribution(gpt2, prompts, SAE, linearization="jacobian")
    feature_acts = active_features(gpt2, prompts, SAE).feature_acts
    (top,) = scores.top(1, by="magnitude")
    d, active = DIRECTIONS[top.index], (feature_acts[..., top.index] != 0)[..., None]

    def metric(size: float) -> float:
        def edit(x: Tensor) -> Tensor:
            return x - size * torch.where(active, (x @ d)[..., None], 0) * d

        with torch.no_grad(), edited_input(gpt2, "blocks.1.mlp", edit):
            return float(METRIC.fn(gpt2(CLEAN, return_type="logits")).mean())

    slope = (metric(-step) - metric(step)) / (2 * step)
    assert top.score == pytest.approx(slope, rel=1e-5)
    assert top.score != pytest.approx(feature_attribution(gpt2, prompts, SAE).values[top.index])


def test_features_count_where_they_are_active_on_the_centroid(backend: tuple[str, Any]) -> None:
    _, model = backend
    with lch.attach(model, 1), torch.no_grad():
        _, cache = model.run_with_cache(CLEAN, names_filter=[HOOK])
        feature_acts = SAE.encode(cache[HOOK].to(torch.float64))
    scores = feature_attribution(model, Prompts(CLEAN, METRIC), SAE)
    assert torch.equal(scores.n_active, (feature_acts != 0).sum((0, 1)))
    found = active_features(model, Prompts(CLEAN, METRIC), SAE)
    assert bool((found.contributions[feature_acts == 0] == 0).all())
    assert bool((found.contributions[feature_acts != 0] != 0).all())
    assert scores.hook_name == HOOK


def test_means_over_prompts_ranks_and_percentiles(gpt2: Any) -> None:
    whole = feature_attribution(gpt2, Prompts(CLEAN, METRIC), SAE)
    halves = [
        Prompts(CLEAN[i : i + 1], logit_difference(ANSWERS[i : i + 1], FOILS[i : i + 1]))
        for i in range(2)
    ]
    assert torch.allclose(whole.values, feature_attribution(gpt2, halves, SAE).values, atol=1e-6)
    order = [feature.index for feature in whole.top(D_SAE)]
    assert order == whole.values.argsort(descending=True, stable=True).tolist()
    first = whole.feature(order[0])
    assert (first.rank, first.score) == (1, float(whole.values.max()))
    assert first.percentile == pytest.approx(100 * (D_SAE - 1) / D_SAE)
    sizes = [abs(feature.score) for feature in whole.top(5, by="magnitude")]
    assert sizes == whole.values.abs().sort(descending=True).values[:5].tolist()


def test_a_metric_is_differentiated_as_it_is(gpt2: Any) -> None:
    """A softmax that a metric takes is no part of the model to hold fixed."""

    def probability(logits: Tensor) -> Tensor:
        return logits[:, -1].softmax(-1)[:, 5]

    logits = gpt2(CLEAN, return_type="logits").detach().requires_grad_()
    (slope,) = torch.autograd.grad(probability(logits).sum(), logits)
    curved, straight = (
        feature_attribution(gpt2, Prompts(CLEAN, Metric(fn)), SAE).values
        for fn in (probability, lambda y: (y * slope).sum((1, 2)))
    )
    torch.testing.assert_close(curved, straight)


def test_gradient_modes_and_training_make_no_difference() -> None:
    model = models.bridge("gpt2", torch.float64)  # With dropout, in training.
    prompts = [Prompts(CLEAN, METRIC, CORRUPT)]
    expected = feature_attribution(model, prompts, SAE).values
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(feature_attribution(model, prompts, SAE).values, expected)
    model.train()
    assert torch.equal(feature_attribution(model, prompts, SAE).values, expected)
    assert model.training


# ------------------------------------------------------------------------ in the graph

ONE = Prompts(CLEAN[:1], logit_difference([[3]], [[4]]))


def test_features_are_nodes_of_the_flow(backend: tuple[str, Any]) -> None:
    name, model = backend
    graph = attribution_graph(model, ONE, sae=SAE, max_nodes=120)
    found = active_features(model, ONE, SAE)
    nodes = graph.nodes(data=True)
    into, out = (dict(d(weight="weight")) for d in (graph.in_degree, graph.out_degree))
    for node, data in nodes:
        assert into[node] + data["offset"] == pytest.approx(data["contribution"], abs=1e-9)
        assert node == "metric" or out[node] == pytest.approx(data["contribution"], abs=1e-9)
    features = [data for _, data in nodes if data["kind"] == "feature"]
    assert len(features) >= 5
    for data in features:
        at = 0, data["position"], data["index"]
        expected = float(found.contributions[at])
        assert data["contribution"] == pytest.approx(expected, rel=1e-6, abs=EXACT.get(name, 1e-9))
        assert data["activation"] == pytest.approx(float(found.feature_acts[at]))
        assert f"m1.f{data['index']}@{data['position']}" in graph
    assert {data["layer"] for _, data in nodes if data["kind"] == "neuron"} == {0, 2}
    assert graph.graph["sae"] == HOOK


def test_they_are_kept_by_size_beside_other_nodes(gpt2: Any) -> None:
    graph = attribution_graph(gpt2, ONE, sae=SAE, max_nodes=25)
    own = [d for _, d in graph.nodes(data=True) if d["kind"] in ("head", "neuron", "feature")]
    assert len(own) == 25
    assert {data["kind"] for data in own} == {"head", "neuron", "feature"}


# ------------------------------------------------------------------------------ errors


def test_bad_saes(gpt2: Any, as_users_run: None) -> None:
    prompts = Prompts(CLEAN, METRIC)
    with pytest.raises(InputError, match="there are no prompts"):
        feature_attribution(gpt2, [], SAE)
    with pytest.raises(InputError, match=r"reads 'blocks\.1\.hook_centroid'"):
        feature_attribution(gpt2, prompts, make_sae("blocks.1.hook_centroid"))
    with pytest.raises(InputError, match="trained on another model"):
        feature_attribution(gpt2, prompts, make_sae(d_in=8))
    transcoder = Transcoder(
        TranscoderConfig(d_in=32, d_sae=4, d_out=32, apply_b_dec_to_input=False)
    )
    with pytest.raises(InputError, match="sae is a Transcoder"):
        feature_attribution(gpt2, prompts, transcoder)
    with pytest.raises(InputError, match="features 0 to 23"):
        feature_attribution(gpt2, prompts, SAE).feature(24)

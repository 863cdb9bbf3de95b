"""Under autocast no public value is less precise than float32, and circuits are as without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import networkx as nx
import pytest
import torch
from nnsight import NNsight
from torch import Tensor, nn

import lch_plugin as lch
from lch_plugin import Site, circuits
from lch_plugin.cotangents import Logit, logit_difference
from tests import models
from tests.toolkits import HAS_SAES, needs_saes

if HAS_SAES:
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

IDS = models.tokens(2, 6)
TWINS = models.tokens(2, 6, seed=2)
SITES = (
    *(Site(kind) for kind in ("mlp", "attn", "block", "model")),
    *(Site("span", (0, 2)), Site("neuron", 1, 3), Site("head", 1, 0)),
    Site("head", 1, [0, 1], linearization="detached", expert=True),
    Site("mlp", 1, expert=True, label="expert"),
    Site("block", 1, expert=True, label="expert"),
    Site("mlp", 1, radius=0.1, n_samples=3, label="local"),
    Site("block", 1, radius=0.1, n_samples=3, label="local"),
    Site("mlp", cotangent=logit_difference(3, 4), label="metric"),
    Site("head", 1, 1, linearization="detached", cotangent=logit_difference(3, 4), label="metric"),
    Site("head", 1, 1, linearization="detached", cotangent=Logit(3), label="logit"),
    Site("block", cotangent=Logit(3, 4), label="logit"),
)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["bridge", "hooked"])
def test_transformer_lens(name: str) -> None:
    model = models.bridge("gpt2") if name == "bridge" else models.hooked()
    with lch.attach(model, site=SITES) as handle, torch.no_grad():
        names = handle.hook_names
        exact = model.run_with_cache(IDS, names_filter=names)[1]
        with autocast():
            cast = model.run_with_cache(IDS, names_filter=names)[1]
    for point in names:
        assert cast[point].dtype == torch.float32, point
        # As exact as what the model computes in half precision, values of large sums aside.
        if not point.endswith(("_offset", "_radius", "_variance", "_error")):
            assert models.relative_error(cast[point], exact[point]) < 0.1, point


def test_closed_forms_are_exact_given_what_the_model_computed() -> None:
    """The rounding of a head's centroid under autocast is that of its pattern alone."""
    model = models.bridge("gpt2")
    site = Site("head", 1, 0, linearization="detached")
    with lch.attach(model, site=site) as handle, torch.no_grad(), autocast():
        (name,) = handle.hook_names
        pattern = "blocks.1.attn.hook_pattern"
        found = model.run_with_cache(IDS, names_filter=[name, pattern])[1]
    attn = model.blocks[1].attn
    u = torch.ones(2, 6, models.D_MODEL) @ attn.W_O[0].T
    expected = found[pattern][:, 0].float().mT @ u @ attn.W_V[0].T
    torch.testing.assert_close(found[name], expected.detach(), rtol=1e-5, atol=1e-5)


def test_huggingface_and_nnsight() -> None:
    model = models.huggingface("llama")
    with lch.huggingface.attach(model, ["model.layers.1", "model.layers.1.mlp"]) as handle:
        with torch.no_grad(), autocast():
            model(IDS)
    traced = NNsight(model)
    with torch.no_grad(), autocast(), traced.trace(IDS):
        block = lch.nnsight.centroid(traced.model.layers[1]).save()
        mlp = lch.nnsight.centroid(traced.model.layers[1].mlp).save()
    for value in (*handle.cache.values(), block, mlp):
        assert value.dtype == torch.float32


def edges(graph: nx.DiGraph) -> Tensor:
    return torch.tensor([weight for _, _, weight in graph.edges.data("weight")])


BATCH = [circuits.Prompts(IDS, circuits.logit_difference([[3]] * 2, [[4]] * 2), TWINS)]


def features(model: Any) -> Tensor:
    metadata = SAEMetadata(hook_name="blocks.1.mlp.hook_centroid")
    sae = StandardSAE(StandardSAEConfig(d_in=models.D_MODEL, d_sae=8, metadata=metadata))
    for weight in (sae.W_enc, sae.W_dec):
        nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    return circuits.feature_attribution(model, BATCH, sae).values


CIRCUITS: dict[str, Callable[[Any], Tensor]] = {
    "nodes": lambda m: circuits.node_attribution(m, BATCH).values,
    "through patterns": lambda m: circuits.node_attribution(m, BATCH, method="patterns").values,
    "mlps": lambda m: circuits.node_attribution(m, BATCH, ("head", "mlp")).values,
    "patterns": lambda m: circuits.pattern_attribution(m, BATCH).values,
    "tokens": lambda m: circuits.contributions(m, BATCH[0]).embeddings,
    "neurons": lambda m: circuits.neuron_attribution(
        m, IDS, layers=1, generator=torch.Generator().manual_seed(0)
    ).scores[1],
    "targeted": lambda m: circuits.neuron_attribution(
        m, IDS, layers=1, metric=BATCH[0].metric, radius=0.0
    ).scores[1],
    "graph": lambda m: edges(
        circuits.attribution_graph(
            m, circuits.Prompts(IDS[:1], circuits.logit_difference([[3]], [[4]]), TWINS[:1])
        )
    ),
    "features": features,
    "faithfulness": lambda m: (
        circuits.faithfulness(m, BATCH, circuits.node_attribution(m, BATCH)).recovered
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[needs_saes] * (n == "features")) for n in CIRCUITS]
)
def test_circuits(name: str) -> None:
    model = models.bridge("gpt2")
    exact = CIRCUITS[name](model)
    with autocast():
        cast = CIRCUITS[name](model)
    assert torch.equal(cast, exact)


@needs_saes
def test_evaluation() -> None:
    sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=8))
    for weight in (sae.W_enc, sae.W_dec):
        nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    exact = lch.saes.evaluate(sae, [rows])
    with autocast():
        cast = lch.saes.evaluate(sae, [rows])
    assert cast.to_dict() == exact.to_dict()

"""Trained SAEs on centroid hook points, attached by SAELens' own models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens import SAE
from torch import Tensor

import lch_plugin as lch
from tests import models
from tests.adapters.transformer_lens.common import BACKENDS
from tests.saes.training.test_train import DATA, config

LAYERS = (0, 1)
NAMES = [f"blocks.{layer}.mlp.hook_centroid" for layer in LAYERS]
IDS = models.tokens(4, 12)

pytestmark = pytest.mark.parametrize("backend", ["SAETransformerBridge", "HookedSAETransformer"])
SAEs = list[SAE[Any]]


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> SAEs:
    """Of both layers, trained, saved and loaded."""
    paths = [tmp_path_factory.mktemp("saes") / name for name in NAMES]
    for path, name in zip(paths, NAMES, strict=True):
        settings = config(hook_name=name, output_path=str(path), training_tokens=512)
        lch.saes.train(models.bridge("gpt2"), DATA, settings)
    return [SAE.load_from_disk(path) for path in paths]


def centroids(model: Any) -> dict[str, Tensor]:
    return dict(model.run_with_cache(IDS, names_filter=NAMES)[1])


def test_saes_of_several_layers_read_their_centroids(backend: str, saes: SAEs) -> None:
    model = BACKENDS[backend]()
    with lch.attach(model, LAYERS), torch.no_grad():
        logits, mu = model(IDS), centroids(model)
        out, cache = model.run_with_cache_with_saes(IDS, saes=saes)
        assert torch.equal(out, logits)
        for sae, name in zip(saes, NAMES, strict=True):
            feature_acts = cache[f"{name}.hook_sae_acts_post"]
            torch.testing.assert_close(feature_acts, sae.encode(mu[name]))
            torch.testing.assert_close(cache[f"{name}.hook_sae_recons"], sae(mu[name]))
            assert bool((feature_acts > 0).any())
        assert not model.acts_to_saes


def test_the_error_term_makes_up_for_what_the_sae_misses(backend: str, saes: SAEs) -> None:
    model = BACKENDS[backend]()
    with lch.attach(model, LAYERS), torch.no_grad():
        logits, mu = model(IDS), centroids(model)
        out, cache = model.run_with_cache_with_saes(IDS, saes=saes, use_error_term=True)
        assert torch.equal(out, logits)
        for sae, name in zip(saes, NAMES, strict=True):
            error = cache[f"{name}.hook_sae_error"]
            torch.testing.assert_close(error, mu[name] - sae(mu[name]), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(cache[f"{name}.hook_sae_output"], mu[name])
            assert float(error.norm()) > 0


def test_after_a_reset_the_hook_points_are_what_they_were(backend: str, saes: SAEs) -> None:
    model, seen = BACKENDS[backend](), []
    hooks = [(name, lambda value, hook: seen.append(value)) for name in NAMES]
    with lch.attach(model, LAYERS), torch.no_grad():
        mu = centroids(model)
        first, second = saes
        for _ in range(2):  # SAELens puts a hook point of its own in the place each time.
            model.add_sae(first, use_error_term=True)
            model.add_sae(second)
            assert set(model.acts_to_saes) == set(NAMES)
            model(IDS)
            model.reset_saes(NAMES[0])
            assert set(model.acts_to_saes) == {NAMES[1]}
            assert torch.equal(model.run_with_cache(IDS)[1][NAMES[0]], mu[NAMES[0]])
            model.reset_saes()
            again = centroids(model)
            assert all(torch.equal(again[name], mu[name]) for name in NAMES)
            seen.clear()
            model.run_with_hooks(IDS, fwd_hooks=hooks)
            assert len(seen) == len(NAMES)


def test_saes_for_a_while(backend: str, saes: SAEs) -> None:
    model = BACKENDS[backend]()
    with lch.attach(model, LAYERS), torch.no_grad():
        mu = centroids(model)
        with model.saes(saes=saes):
            _, cache = model.run_with_cache(IDS)
            assert all(f"{name}.hook_sae_acts_post" in cache for name in NAMES)
        assert torch.equal(centroids(model)[NAMES[1]], mu[NAMES[1]])
    assert not any(name in model.hook_dict for name in NAMES)


def test_editing_codes_leaves_the_model_alone(backend: str, saes: SAEs) -> None:
    """A centroid is a read-out: what stands in its place goes nowhere."""
    model = BACKENDS[backend]()
    with lch.attach(model, LAYERS), torch.no_grad():
        logits, point = model(IDS), f"{NAMES[0]}.hook_sae_acts_post"
        edited: list[Tensor] = []

        def double(feature_acts: Tensor, hook: Any) -> Tensor:
            edited.append(feature_acts)
            return 2 * feature_acts

        out = model.run_with_hooks_with_saes(IDS, saes=saes[:1], fwd_hooks=[(point, double)])
        assert len(edited) == 1
        assert torch.equal(out, logits)


def test_circuitsvis_draws_the_codes_of_an_attached_sae(backend: str, saes: SAEs) -> None:
    tokens = pytest.importorskip("circuitsvis.tokens", reason="needs the extra `dashboards`")
    model = BACKENDS[backend]()
    with lch.attach(model, LAYERS), torch.no_grad():
        sae = saes[0]
        _, cache = model.run_with_cache_with_saes(IDS[:1], saes=[sae])
        feature_acts = cache[f"{NAMES[0]}.hook_sae_acts_post"][0]
    chosen = feature_acts.sum(0).topk(3).indices.tolist()
    text = [f"w{i}" for i in IDS[0]]
    html = tokens.colored_tokens_multi(
        text, feature_acts[:, chosen], list(map(str, chosen))
    ).local_src
    assert "ColoredTokensMulti" in html
    assert all(f'"{word}"' in html for word in text)

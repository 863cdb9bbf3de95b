"""Mean centroids of a neighbourhood."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import lch_plugin as lch
from lch_plugin.cotangents import Logit, logit_difference
from lch_plugin.sites import Site
from tests import models
from tests.adapters.transformer_lens.sites.common import (
    BUILDS,
    F64,
    IDS,
    assert_close,
    built,
    causal_block,
    gradient,
    graph,
    names,
    read,
    tolerance,
)

pytestmark = pytest.mark.filterwarnings("ignore:run_with_hooks")


LAYERS: dict[str, Any] = {"span": (0, 1), "model": None}


@pytest.mark.parametrize("kind", ["mlp", "neuron", "attn", "block", "span", "model"])
def test_local_centroids_approach_plain_ones_as_the_radius_shrinks(gpt2: Any, kind: Any) -> None:
    index, layers = 3 if kind == "neuron" else None, LAYERS.get(kind, 1)
    radii = (1.0, 1e-2, 1e-4, 0.0)
    local = [
        Site(kind, layers, index, radius=r, n_samples=6, label=f"r{i}") for i, r in enumerate(radii)
    ]
    mus = read(gpt2, Site(kind, layers, index), *local)
    (plain,) = (v for n, v in mus.items() if not n.rpartition("_r")[2][0].isdigit())
    errors = [
        models.relative_error(v, plain)
        for n, v in mus.items()
        if n.rpartition("_r")[2] in ("0", "1", "2", "3")
    ]
    assert errors[0] > 1e-2 > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-12


@pytest.mark.parametrize("kind", ["mlp", "block"])
def test_local_centroids_equal_those_of_a_callable(gpt2: Any, kind: str) -> None:
    hf = models.huggingface("gpt2", F64).transformer.h[1]
    component = hf.mlp if kind == "mlp" else causal_block()
    with torch.no_grad():
        _, cache = gpt2.run_with_cache(IDS)
    x = cache["blocks.1.mlp.hook_in" if kind == "mlp" else "blocks.1.hook_in"]

    def apart(samples: Tensor) -> Tensor:
        """Each sample is a batch of its own."""
        flat = samples.reshape(-1, *x.shape[-2:])
        return component(flat).reshape(samples.shape)

    truth = lch.local_centroid(
        apart,
        x,
        radius=0.3,
        n_samples=9,
        neighbourhood="gaussian",
        generator=torch.Generator().manual_seed(5),
        statistics=True,
    )
    generator = torch.Generator().manual_seed(5)
    site = Site(
        kind,
        1,
        radius=0.3,
        n_samples=9,
        neighbourhood="gaussian",
        generator=generator,  # type: ignore[arg-type]
    )
    with lch.attach(gpt2, site=site) as handle:
        with torch.no_grad():
            _, cache = gpt2.run_with_cache(IDS, names_filter=lambda n: "centroid" in n)
    (name,) = handle.centroid_names
    assert_close(cache[name], truth.mean)
    assert_close(cache[name + "_variance"], truth.variance, 1e-9)
    assert_close(cache[name + "_standard_error"], truth.standard_error, 1e-9)


@pytest.mark.parametrize("cotangent", ["ones", "metric"])
@pytest.mark.parametrize("kind", ["block", "span", "model"])
@pytest.mark.parametrize("build", BUILDS)
def test_what_runs_again_has_the_mean_gradient_of_edited_passes(
    build: str, kind: Any, cotangent: str
) -> None:
    """The cotangent is that of the pass itself, and the model runs on from each sample."""
    model, layers = built(build), LAYERS.get(kind, 1)
    v: Any = None if cotangent == "ones" else logit_difference(3, 4)
    point = names(model)
    first = 1 if kind == "block" else 0
    entry = point["embed"] if kind == "model" else point["resid_pre"].format(first)
    values, logits = graph(model)
    y = logits if kind == "model" else values[point["resid_post"].format(1)]
    weight = torch.ones_like(y) if v is None else gradient(v.value(logits, None), y)
    samples = lch.sample_neighbourhood(
        values[entry].detach(), radius=0.3, n_samples=3, generator=torch.Generator().manual_seed(0)
    )
    mus = []
    for sample in samples:
        leaf = sample.clone().requires_grad_()
        found: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Any, found: dict[str, Tensor] = found) -> None:
            found[hook.name] = value

        hooks = [(entry, lambda value, hook, leaf=leaf: leaf), (lambda name: True, keep)]
        with torch.enable_grad():
            logits = model.run_with_hooks(IDS, fwd_hooks=hooks)
        out = logits if kind == "model" else found[point["resid_post"].format(1)]
        mus.append(gradient(out, leaf, weight.detach()))
    local = read(model, Site(kind, layers, cotangent=v, radius=0.3, n_samples=3))
    (name,) = [n for n in local if not n.endswith(("_variance", "_standard_error"))]
    assert_close(local[name], torch.stack(mus).mean(0), tolerance(model))
    assert_close(local[f"{name}_variance"], torch.stack(mus).var(0), 10 * tolerance(model))


def test_of_a_span_to_the_end_a_logit_is_the_metric(gpt2: Any) -> None:
    v = {"logit": Logit(3, 4, position=-1), "metric": logit_difference(3, 4)}
    kw: Any = {"layers": (1, 2), "radius": 0.3, "n_samples": 3}
    sites = [Site("span", cotangent=c, label=label, **kw) for label, c in v.items()]
    with lch.attach(gpt2, site=sites) as handle, torch.no_grad():
        _, cache = gpt2.run_with_cache(IDS, names_filter=handle.hook_names)
    logit, metric = (cache[name] for name in handle.centroid_names)
    assert_close(logit, metric)


@pytest.mark.parametrize("kind", ["span", "model"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_part_of_what_runs_again(gpt2: Any, kind: Any, side: str) -> None:
    ids = IDS.clone()
    mask = torch.ones_like(ids)
    mask[0, slice(0, 2) if side == "left" else slice(-2, None)] = 0
    sites = [
        Site(kind, LAYERS[kind]),
        Site(kind, LAYERS[kind], radius=0.0, n_samples=2, label="local"),
    ]
    with lch.attach(gpt2, site=sites) as handle, torch.no_grad():
        _, cache = gpt2.run_with_cache(
            ids, attention_mask=mask, names_filter=lambda n: n in handle.hook_names
        )
    plain, local = (cache[name] for name in handle.centroid_names)
    assert_close(local, plain)
    assert not bool(local[mask == 0].any())


def test_a_span_that_runs_again_leaves_caches_and_the_model_alone(gpt2: Any) -> None:
    with torch.no_grad():
        logits = gpt2(IDS)
        with lch.attach(gpt2, site=Site("span", (0, 1), radius=0.2, n_samples=2)) as handle:
            seen: list[Tensor] = []
            again = gpt2.run_with_hooks(
                IDS, fwd_hooks=[(handle.centroid_names[0], lambda value, hook: seen.append(value))]
            )
    assert torch.equal(logits, again)
    assert len(seen) == 1
    copy.deepcopy(gpt2)  # Nothing that has a graph is left on it.


def test_the_default_neighbourhood_is_the_ball(gpt2: Any) -> None:
    kw: dict[str, Any] = {"layers": 1, "radius": 0.5, "n_samples": 8}
    mus = read(
        gpt2,
        Site("mlp", **kw),
        Site("mlp", neighbourhood="ball", label="ball", **kw),
        Site("mlp", neighbourhood="gaussian", label="gaussian", **kw),
    )
    plain, ball, gaussian = (
        mus[f"blocks.1.mlp.hook_centroid{label}"] for label in ("", "_ball", "_gaussian")
    )
    assert torch.equal(plain, ball)
    assert models.relative_error(gaussian, plain) > 1e-4


@pytest.mark.parametrize("kind", ["mlp", "attn", "block"])
def test_in_training_mode_local_centroids_leave_dropout_and_random_state_alone(kind: Any) -> None:
    model = models.bridge("gpt2").train()
    modes = [m.training for m in model.original_model.modules()]

    def logits() -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return model(IDS)

    expected = logits()
    with lch.attach(model, site=Site(kind, radius=0.1, n_samples=2)) as handle:
        assert torch.equal(logits(), expected)
        with model.hooks([(name, lambda value, hook: None) for name in handle.hook_names]):
            assert torch.equal(logits(), expected)
    assert [m.training for m in model.original_model.modules()] == modes


def test_without_a_generator_the_same_points_are_drawn_and_the_global_state_is_left(
    gpt2: Any,
) -> None:
    state = torch.get_rng_state()
    site = Site("block", 1, radius=0.3, n_samples=3)
    first, second = read(gpt2, site), read(gpt2, site)
    for name, value in first.items():
        assert torch.equal(value, second[name])
    assert torch.equal(torch.get_rng_state(), state)
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    with lch.attach(gpt2, site=Site("mlp", radius=0.3, n_samples=3, generator=generator)):
        assert torch.equal(generator.get_state(), before)


def test_local_centroids_see_interventions_before_and_run_no_hook_twice(gpt2: Any) -> None:
    calls = []

    def scale(x: Tensor, hook: Any) -> Tensor:
        calls.append(hook.name)
        return 0.5 * x

    with (
        lch.attach(gpt2, site=Site("block", 1, radius=0.0, n_samples=2)) as handle,
        torch.no_grad(),
    ):
        (name,) = handle.centroid_names
        inner = ("blocks.1.ln1.hook_in", lambda x, hook: calls.append(hook.name))
        with gpt2.hooks([("blocks.1.hook_in", scale), inner]):
            local = gpt2.run_with_cache(IDS, names_filter=name)[1][name]
    assert calls == ["blocks.1.hook_in", "blocks.1.ln1.hook_in"]
    with lch.attach(gpt2, site=Site("block", 1)) as handle, torch.no_grad():
        with gpt2.hooks([("blocks.1.hook_in", scale)]):
            plain = gpt2.run_with_cache(IDS, names_filter=name)[1][name]
    assert_close(local, plain)


def test_local_centroids_refuse_a_cache_with_earlier_tokens(gpt2: Any) -> None:
    with lch.attach(gpt2, site=Site("block", 1, radius=0.1, n_samples=2)) as handle:
        with gpt2.hooks([(handle.hook_names[0], lambda value, hook: None)]):
            with pytest.raises(lch.SiteError, match="key-value cache"):
                gpt2.generate(IDS[:1], max_new_tokens=2, verbose=False, do_sample=False)

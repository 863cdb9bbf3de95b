"""Every way to run a model, and runs within runs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
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
    SITES,
    assert_close,
    read,
    read_names,
)

pytestmark = pytest.mark.filterwarnings("ignore:run_with_hooks")


@contextmanager
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-gpt2"])
def test_every_way_to_run_a_model_fires_every_site(name: str) -> None:
    model = BUILDS[name]()
    sites = (
        *SITES,
        *(Site("head", index=0), Site("neuron", index=0), Site("mlp", cotangent=Logit(3))),
        Site("block", cotangent=logit_difference(3, 4)),
    )
    with lch.attach(model, site=sites) as handle, torch.no_grad():
        expected = read_names(model, handle.hook_names)
        seen: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Any) -> None:
            seen[hook.name] = value

        listening = [(n, keep) for n in handle.hook_names]

        def run_with_hooks() -> None:
            model.run_with_hooks(IDS, fwd_hooks=listening)

        def call() -> None:
            with model.hooks(listening):
                model(IDS)

        def forward() -> None:
            with model.hooks(listening):
                model.forward(IDS)

        for run in (run_with_hooks, call, forward):
            seen.clear()
            run()
            assert seen.keys() == expected.keys(), run.__name__
            assert all(torch.equal(seen[n], expected[n]) for n in expected)


@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-gpt2"])
@pytest.mark.parametrize("point", ["blocks.1.attn.hook_pattern", "ln_final.hook_scale"])
def test_a_pass_within_a_pass_disturbs_no_site(name: str, point: str) -> None:
    model = BUILDS[name]()
    other = models.tokens(1, 4, seed=9)

    def nest(x: Tensor, hook: Any) -> None:
        if x.shape[0] != 1:
            model(other)

    sites = (
        *SITES,
        Site("mlp", cotangent=Logit(3)),
        Site("attn", cotangent=logit_difference(3, 4)),
    )
    expected = read(model, *sites)
    found: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        if value.shape[0] == 2:  # Of the outer pass: the inner one fires its own.
            found[hook.name] = value

    with lch.attach(model, site=sites), torch.no_grad():
        with model.hooks([(point, nest), *((n, keep) for n in expected)]):
            model(IDS)
    for hook, value in expected.items():
        assert_close(found[hook], value, 1e-9)


def test_stop_at_layer_returns_a_tensor_without_a_graph(gpt2: Any) -> None:
    with lch.attach(gpt2, site=SITES) as handle, torch.no_grad():
        out, cache = gpt2.run_with_cache(IDS, names_filter=handle.hook_names, stop_at_layer=1)
        assert not torch.is_grad_enabled()
    assert not out.requires_grad
    assert set(cache) == {f"blocks.0.{p}hook_centroid" for p in ("", "attn.", "mlp.")}


@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-gpt2"])
def test_inference_mode_is_refused_with_the_cure_and_closed_forms_work_in_it(name: str) -> None:
    model = BUILDS[name]()
    with lch.attach(model, site=("mlp", "block")) as handle, inference():
        model.run_with_cache(IDS, names_filter=handle.hook_names[0])
        with pytest.raises(lch.SiteError, match=r"no_grad\(\)"):
            model.run_with_cache(IDS, names_filter=handle.hook_names[-1])


def test_a_block_called_by_itself_has_a_centroid_and_a_span_waits(gpt2: Any) -> None:
    x = torch.randn(1, 4, models.D_MODEL, dtype=F64)
    seen: list[str] = []
    with lch.attach(gpt2, site=(Site("block", 1), Site("span", (1, 2)))) as handle:
        hooks = [(n, lambda v, hook: seen.append(hook.name)) for n in handle.hook_names]
        with gpt2.hooks(hooks), torch.no_grad():
            gpt2.blocks[1](x)
            assert not torch.is_grad_enabled()
    assert seen == ["blocks.1.hook_centroid"]


def test_no_graph_outlives_the_pass(gpt2: Any) -> None:
    inside: list[Any] = []

    def watch(x: Tensor, hook: Any) -> None:
        assert x.grad_fn is not None
        inside.append(weakref.ref(x))

    sites = (*SITES, Site("block", cotangent=logit_difference(3, 4), label="m"))
    with lch.attach(gpt2, site=sites) as handle, torch.no_grad():
        cached = [(name, lambda value, hook: None) for name in handle.hook_names]
        gpt2.run_with_hooks(IDS, fwd_hooks=[*cached, ("blocks.1.mlp.hook_out", watch)])
        gc.collect()
        assert inside[0]() is None


def test_generation_works_and_its_cache_keeps_no_graph(gpt2: Any) -> None:
    plain = gpt2.generate(IDS[:1], max_new_tokens=3, verbose=False, do_sample=False)
    shapes: list[torch.Size] = []
    with lch.attach(gpt2, site=("attn", "block", "model")) as handle:
        hooks = [(n, lambda v, hook: shapes.append(v.shape)) for n in handle.hook_names]
        with gpt2.hooks(hooks):
            out = gpt2.generate(IDS[:1], max_new_tokens=3, verbose=False, do_sample=False)
    assert torch.equal(out, plain)
    assert len(shapes) == 3 * 7


def test_hidden_graphs_do_not_leak_into_a_cache_of_keys_and_values(gpt2: Any) -> None:
    with lch.attach(gpt2, site="model") as handle, torch.no_grad():
        with gpt2.hooks([(handle.hook_names[0], lambda v, hook: None)]):
            output = gpt2.original_model(IDS, use_cache=True)
    for layer in output.past_key_values.layers:
        assert not layer.keys.requires_grad
    assert not output.logits.requires_grad

"""Every kind of site against gradients taken outside the package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens.toolkit import HookedTransformer
from lch_plugin.sites import Site
from tests import models
from tests.adapters.transformer_lens.sites.common import (
    F64,
    IDS,
    assert_close,
    causal_block,
    gradient,
    graph,
    held,
    names,
    read,
    tolerance,
)
from tests.slow import all_but

pytestmark = pytest.mark.filterwarnings("ignore:run_with_hooks")

MANY_KINDS = (
    *(Site("attn"), Site("block"), Site("model")),
    *(Site("head", index=1), Site("neuron", 1, 3)),
)


def test_attention_blocks_and_spans_equal_autograd(model: Any) -> None:
    values, _ = graph(model)
    at = names(model)
    mus = read(model, Site("block"), Site("span", (0, 2)), Site("span", (1, 2)), Site("attn"))
    for layer in range(3):
        x, y = values[at["resid_pre"].format(layer)], values[at["resid_post"].format(layer)]
        assert_close(mus[f"blocks.{layer}.hook_centroid"], gradient(y, x), tolerance(model))
    end = values[at["resid_post"].format(2)]
    for first in (0, 1):
        truth = gradient(end, values[at["resid_pre"].format(first)])
        assert_close(mus[f"blocks.2.hook_centroid_from_{first}"], truth, tolerance(model))
    if not isinstance(model, HookedTransformer):  # Whose attention has no hook at its input.
        for layer in range(3):
            x, y = (values[f"blocks.{layer}.attn.hook_{e}"] for e in ("in", "out"))
            assert_close(mus[f"blocks.{layer}.attn.hook_centroid"], gradient(y, x))


def test_every_backend_gives_the_same_numbers() -> None:
    bridge, hooked = models.bridge("gpt2", F64), models.hooked(F64)
    first, second = read(bridge, *MANY_KINDS), read(hooked, *MANY_KINDS)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert_close(value, second[name], 1e-9)


def test_the_model_equals_autograd(model: Any) -> None:
    values, logits = graph(model)
    v = torch.randn(models.D_VOCAB, dtype=F64, generator=torch.Generator().manual_seed(0))
    mus = read(model, Site("model"), Site("model", cotangent=v, label="v"))
    x = values[names(model)["embed"]]
    assert_close(mus["hook_centroid"], gradient(logits, x), tolerance(model))
    assert_close(mus["hook_centroid_v"], gradient(logits, x, v), tolerance(model))


def test_small_sizes_equal_the_row_sum_of_the_whole_jacobian(gpt2: Any) -> None:
    ids = IDS[:1, :3]
    block = causal_block()
    with torch.no_grad():
        _, cache = gpt2.run_with_cache(ids)
    x = cache["blocks.1.hook_in"]
    jacobian = torch.autograd.functional.jacobian(block, x)
    rows = jacobian.reshape(x.numel(), x.numel()).sum(0).reshape(x.shape)
    assert_close(read(gpt2, Site("block", 1), ids=ids)["blocks.1.hook_centroid"], rows)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06), (torch.float16, 5e-3)]
)
def test_lower_precision_stays_near_float64(dtype: torch.dtype, limit: float) -> None:
    truth = read(models.bridge("gpt2", F64), *MANY_KINDS)
    mus = read(models.bridge("gpt2", dtype), *MANY_KINDS)
    for name, value in mus.items():
        assert value.dtype == torch.float32
        assert models.relative_error(value, truth[name]) < limit


def test_under_autocast_vjps_differentiate_what_it_computes() -> None:
    model = models.bridge("gpt2")
    truth = read(model, Site("attn"), Site("block"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mus = read(model, Site("attn"), Site("block"))
    for name, value in mus.items():
        assert value.dtype == torch.float32
        assert 1e-6 < models.relative_error(value, truth[name]) < 0.06


@pytest.mark.usefixtures("as_users_run")  # The compiler cannot trace run-time type checks.
@pytest.mark.parametrize("which", all_but(["module"], ["module", "model"]))
def test_compiled_models_give_the_same_centroids(which: str) -> None:
    model = models.bridge("gpt2")
    truth = read(model, Site("mlp"), Site("block"))
    if which == "module":
        for block in model.blocks:
            block.original_component.mlp.compile(backend="eager")
    with lch.attach(model, site=("mlp", "block")), torch.no_grad():
        found: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Any) -> None:
            found[hook.name] = value

        run = torch.compile(model, backend="eager") if which == "model" else model
        with model.hooks([(name, keep) for name in truth]):
            run(IDS)
        assert not torch.is_grad_enabled()
    for name, value in truth.items():
        assert_close(found[name], value, 1e-5)


def test_compute_dtype_is_that_of_the_centroid() -> None:
    model = models.bridge("gpt2", torch.bfloat16)
    mus = read(
        model,
        Site("mlp", compute_dtype=torch.bfloat16, label="half"),
        Site("mlp", compute_dtype=F64, label="double"),
        Site("mlp"),
        held(compute_dtype=F64),
    )
    assert mus["blocks.0.mlp.hook_centroid_half"].dtype == torch.bfloat16
    assert mus["blocks.0.mlp.hook_centroid_double"].dtype == F64
    assert mus["blocks.0.attn.hook_centroid_head_0"].dtype == F64
    double, single = (mus[f"blocks.1.mlp.hook_centroid{e}"] for e in ("_double", ""))
    assert models.relative_error(single, double) < 1e-5

"""Heads, with their patterns live and held, and neurons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lch_plugin as lch
from lch_plugin.cotangents import Logit, logit_difference
from lch_plugin.sites import Site
from tests import models
from tests.adapters.transformer_lens.sites.common import (
    F64,
    IDS,
    assert_close,
    gradient,
    graph,
    held,
    read,
    tolerance,
)

pytestmark = pytest.mark.filterwarnings("ignore:run_with_hooks")


def test_neurons_equal_autograd_through_huggingface() -> None:
    model, hf = models.bridge("gpt2", F64), models.huggingface("gpt2", F64)
    w = torch.tensor([2.0, -1.0], dtype=F64)
    mus = read(model, Site("neuron", 1, 3), Site("neuron", 1, (3, 40), cotangent=w), Site("mlp", 1))
    with torch.no_grad():
        x = model.run_with_cache(IDS)[1]["blocks.1.mlp.hook_in"].clone().requires_grad_()
    mlp = hf.transformer.h[1].mlp
    post = mlp.act(mlp.c_fc(x))
    assert_close(mus["blocks.1.mlp.hook_centroid_neuron_3"], gradient(post[..., 3], x))
    truth = gradient(post[..., [3, 40]], x, w)
    assert_close(mus["blocks.1.mlp.hook_centroid_neuron_3_40"], truth)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_all_neurons_and_all_heads_make_the_whole(family: str) -> None:
    model = models.bridge(family, F64)
    d_mlp, n_heads = models.D_MLP, 4
    s = model.blocks[1].mlp.W_out.sum(-1).detach()
    group = Site("neuron", 1, range(d_mlp), cotangent=s, label="all")
    heads = [Site("head", 1, h) for h in range(n_heads)]
    fixed = [held(1, h, label="held") for h in range(n_heads)]
    together = Site("head", 1, (0, 1, 2, 3)), held(1, (0, 1, 2, 3), label="held")
    mus = read(model, group, Site("mlp", 1), Site("attn", 1), *together, *heads, *fixed)
    whole = mus["blocks.1.mlp.hook_centroid"]
    assert_close(mus["blocks.1.mlp.hook_centroid_neurons_all"], whole)
    name = "blocks.1.attn.hook_centroid"
    for tail in ("", "_held"):
        parts = sum(mus[f"{name}_head_{h}{tail}"] for h in range(n_heads))
        assert_close(mus[f"{name}_head_0_1_2_3{tail}"], parts)
    assert_close(mus[f"{name}_head_0_1_2_3"], mus[name])  # Attention is its heads, and a bias.
    assert models.relative_error(mus[f"{name}_head_0_1_2_3_held"], mus[name]) > 0.01


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("cotangent", [None, "logit", "metric", "own"])
def test_heads_equal_autograd_through_their_patterns(family: str, cotangent: Any) -> None:
    """For each kind of cotangent: of the residual stream, a head is its write, `W_O` included."""

    class Itself:
        name = "itself"

        def at(self, y: Tensor) -> Tensor:
            return y

    model = models.bridge(family, F64)
    given = {"logit": Logit(3, 4), "metric": logit_difference(3, 4), "own": Itself()}.get(cotangent)
    sites = [Site("head", 1, h, cotangent=given) for h in (0, 3)]
    tail = (
        "hook_centroid_head_1_{}"
        if cotangent in ("logit", "metric")
        else ("blocks.1.attn.hook_centroid_head_{}")
    )
    mus = read(model, *sites)
    values, logits = graph(model)
    x, z = values["blocks.1.attn.hook_in"], values["blocks.1.attn.o.hook_in"]
    W_O = model.blocks[1].attn.W_O
    for h in (0, 3):
        y = z.reshape(*z.shape[:2], 4, 8)[:, :, h] @ W_O[h]
        if cotangent == "metric":
            (v,) = torch.autograd.grad(
                (logits[:, -1, 3] - logits[:, -1, 4]).sum(),
                values["blocks.1.attn.hook_out"],
                retain_graph=True,
            )
        elif cotangent == "logit":
            end = values["ln_final.hook_in"]
            v = gradient(values["ln_final.hook_out"], end, model.W_U[:, 3] - model.W_U[:, 4])
        else:
            v = y.detach() if cotangent == "own" else torch.ones_like(y)
        assert_close(mus[tail.format(h)], gradient(y, x, v.detach()), tolerance(model))


def test_heads_equal_autograd_with_the_pattern_fixed() -> None:
    model = models.bridge("llama", F64)  # Two heads share each W_V.
    with torch.no_grad():
        _, cache = model.run_with_cache(IDS)
    attn = models.huggingface("llama", F64).model.layers[1].self_attn
    x = cache["blocks.1.attn.hook_in"].clone().requires_grad_()
    pattern = cache["blocks.1.attn.hook_pattern"]
    values = attn.v_proj(x).view(*x.shape[:2], 2, 8)
    mus = read(model, *(held(1, h) for h in range(4)))
    for h in range(4):
        z = torch.einsum("bts,bse->bte", pattern[:, h], values[:, :, h // 2])
        y = z @ attn.o_proj.weight[:, 8 * h : 8 * h + 8].T
        assert_close(mus[f"blocks.1.attn.hook_centroid_head_{h}"], gradient(y, x))


@pytest.mark.parametrize("flag", ["use_split_qkv_input", "use_attn_in"])
@pytest.mark.parametrize("kind", ["attn", "head"])
def test_attention_that_reads_by_head_is_refused(flag: str, kind: Any) -> None:
    model = models.hooked(F64)
    getattr(model, f"set_{flag}")(True)
    with pytest.raises(lch.SiteError, match="Turn off"):
        lch.attach(model, site=Site(kind, index=0 if kind == "head" else None))


def test_heads_with_held_patterns_have_no_offset_under_a_cache(gpt2: Any) -> None:
    with lch.attach(gpt2, site=held(1, expert=True)) as handle:
        with gpt2.hooks([(handle.hook_names[0], lambda value, hook: None)]):
            with pytest.raises(lch.SiteError, match="key-value cache"):
                gpt2.generate(IDS[:1], max_new_tokens=2, verbose=False, do_sample=False)

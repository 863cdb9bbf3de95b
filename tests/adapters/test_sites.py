"""Every kind of site against gradients taken outside the package."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens.toolkit import HookedTransformer
from lch_plugin.cotangents import Logit, Metric, Random, Vector, decoder_row, logit_difference
from lch_plugin.sites import Site
from tests import models
from tests.toolkits import needs_saes

pytestmark = pytest.mark.filterwarnings("ignore:run_with_hooks")

IDS = models.tokens(batch=2, pos=6)
F64 = torch.float64
BUILDS: dict[str, Callable[[], Any]] = {
    "bridge-gpt2": lambda: models.bridge("gpt2", F64),
    "hooked-gpt2": lambda: models.hooked(F64),
    "bridge-llama": lambda: models.bridge("llama", F64),
    "bridge-gemma2": lambda: models.bridge("gemma2", F64),
    "bridge-gpt_neox": lambda: models.bridge("gpt_neox", F64),
}
MANY_KINDS = (
    *(Site("attn"), Site("block"), Site("model")),
    *(Site("head", index=1), Site("neuron", 1, 3)),
)
_BUILT: dict[str, Any] = {}


@pytest.fixture(params=BUILDS)
def model(request: pytest.FixtureRequest) -> Any:
    """Built once: every test leaves a model as it found it."""
    if request.param not in _BUILT:
        _BUILT[request.param] = BUILDS[request.param]()
    return _BUILT[request.param]


@pytest.fixture
def gpt2() -> Any:
    return _BUILT.setdefault("bridge-gpt2", BUILDS["bridge-gpt2"]())


def read(model: Any, *sites: Site, ids: Tensor = IDS, **kw: Any) -> dict[str, Tensor]:
    """Centroids of sites by hook name, as a user without gradients gets them."""
    with lch.attach(model, site=sites), torch.no_grad():
        return dict(model.run_with_cache(ids, names_filter=lambda n: "hook_centroid" in n, **kw)[1])


def names(model: Any) -> dict[str, str]:
    """Hook points of a component's input and output."""
    if isinstance(model, HookedTransformer):
        return {
            "resid_pre": "blocks.{}.hook_resid_pre",
            "resid_post": "blocks.{}.hook_resid_post",
            "attn_out": "blocks.{}.hook_attn_out",
            "mlp_out": "blocks.{}.hook_mlp_out",
            "embed": "hook_embed",
        }
    return {
        "resid_pre": "blocks.{}.hook_in",
        "resid_post": "blocks.{}.hook_out",
        "attn_out": "blocks.{}.attn.hook_out",
        "mlp_out": "blocks.{}.mlp.hook_out",
        "embed": "embed.hook_out",
    }


def graph(model: Any, ids: Tensor = IDS, **kw: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Every hook point's value within one graph, and the logits: the truth to differentiate."""
    values: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        values[hook.name] = value

    with torch.enable_grad():
        logits = model.run_with_hooks(ids, fwd_hooks=[(lambda name: True, keep)], **kw)
    return values, logits


def gradient(y: Tensor, x: Tensor, v: Tensor | None = None) -> Tensor:
    v = torch.ones_like(y) if v is None else v.to(y).expand_as(y)
    return torch.autograd.grad(y, x, v, retain_graph=True)[0]


def assert_close(value: Tensor, truth: Tensor, tolerance: float = 1e-10) -> None:
    assert value.shape == truth.shape
    assert models.relative_error(value, truth) < tolerance


def tolerance(model: Any) -> float:
    """HuggingFace's RMS norms compute in float32, and so do their gradients."""
    return 1e-6 if "RMS" in type(getattr(model, "ln_final", None)).__name__ else 1e-10


def held(layers: Any = None, index: Any = 0, **kw: Any) -> Site:
    """Heads with their patterns held."""
    return Site("head", layers, index, linearization="detached", **kw)


# ---------------------------------------------------------------- the numbers


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


def causal_block() -> Callable[[Tensor], Tensor]:
    """Block 1 of the HuggingFace model, with the mask that the whole model would give it."""
    block = models.huggingface("gpt2", F64).transformer.h[1]

    def run(x: Tensor) -> Tensor:
        later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        mask = torch.zeros(later.shape, dtype=F64).masked_fill(later, torch.finfo(F64).min)
        return block(x, attention_mask=mask[None, None])

    return run


def test_small_sizes_equal_the_row_sum_of_the_whole_jacobian(gpt2: Any) -> None:
    ids = IDS[:1, :3]
    block = causal_block()
    with torch.no_grad():
        _, cache = gpt2.run_with_cache(ids)
    x = cache["blocks.1.hook_in"]
    jacobian = torch.autograd.functional.jacobian(block, x)
    rows = jacobian.reshape(x.numel(), x.numel()).sum(0).reshape(x.shape)
    assert_close(read(gpt2, Site("block", 1), ids=ids)["blocks.1.hook_centroid"], rows)


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
@pytest.mark.parametrize("which", ["module", "model"])
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


# ---------------------------------------------------------------- cotangents


def test_cotangents_equal_autograd(model: Any) -> None:
    values, _ = graph(model)
    at = names(model)
    v = torch.linspace(-1, 2, models.D_MODEL, dtype=F64)

    class Itself:
        name = "itself"

        def at(self, y: Tensor) -> Tensor:
            return y

    mus = read(
        model,
        Site("block", 1, cotangent=v, label="v"),
        Site("block", 1, cotangent=Random(3), label="r"),
        Site("block", 1, cotangent=Itself(), label="y"),
        Site("mlp", 1, cotangent=Itself(), label="y"),
    )
    x, y = values[at["resid_pre"].format(1)], values[at["resid_post"].format(1)]
    assert_close(mus["blocks.1.hook_centroid_v"], gradient(y, x, v), tolerance(model))
    r = Random(3).at(y)
    assert_close(mus["blocks.1.hook_centroid_r"], gradient(y, x, r), tolerance(model))
    assert_close(mus["blocks.1.hook_centroid_y"], gradient(y, x, y.detach()), tolerance(model))
    if "blocks.1.mlp.hook_in" in values:
        x, y = values["blocks.1.mlp.hook_in"], values["blocks.1.mlp.hook_out"]
        assert_close(mus["blocks.1.mlp.hook_centroid_y"], gradient(y, x, y.detach()))


def test_a_metric_of_the_logits_reaches_every_component(model: Any) -> None:
    values, logits = graph(model)
    at = names(model)
    metric = logit_difference(3, 4)
    total = metric.fn(logits).sum()
    mus = read(
        model,
        *(Site(kind, cotangent=metric) for kind in ("mlp", "attn", "block", "model")),
        Site("span", (0, 1), cotangent=metric),
        Site("head", 1, 0, cotangent=metric),
        Site("neuron", 1, 3, cotangent=metric),
    )
    for layer in range(3):
        x, y = values[at["resid_pre"].format(layer)], values[at["resid_post"].format(layer)]
        truth = gradient(y, x, gradient(total, y))
        assert_close(mus[f"hook_centroid_block_{layer}"], truth, tolerance(model))
    x, y = values[at["resid_pre"].format(0)], values[at["resid_post"].format(1)]
    truth = gradient(y, x, gradient(total, y))
    assert_close(mus["hook_centroid_span_1_from_0"], truth, tolerance(model))
    truth = gradient(total, values[at["embed"]])
    assert_close(mus["hook_centroid"], truth, tolerance(model))
    assert {"hook_centroid_head_1_0", "hook_centroid_neuron_1_3"} <= mus.keys()
    if "blocks.1.mlp.hook_in" in values:
        for kind in ("mlp", "attn"):
            x, y = (values[f"blocks.1.{kind}.hook_{e}"] for e in ("in", "out"))
            truth = gradient(y, x, gradient(total, y))
            assert_close(mus[f"hook_centroid_{kind}_1"], truth, tolerance(model))


def test_a_logit_is_linearised_through_the_final_norm(model: Any) -> None:
    values, _ = graph(model)
    at = names(model)
    mus = read(
        model,
        Site("block", cotangent=Logit(3, 4)),
        Site("mlp", cotangent=Logit(3)),
        Site("block", 2, cotangent=Logit(3, 4, position=-1), label="last"),
    )
    end = values[at["resid_post"].format(2)]
    normed = values.get("unembed.hook_in", None)
    direct = model.W_U[:, 3] - model.W_U[:, 4]
    if normed is None:
        normed = model.ln_final(end)
    v = gradient(normed, end, direct)
    for layer in range(3):
        x, y = values[at["resid_pre"].format(layer)], values[at["resid_post"].format(layer)]
        truth = gradient(y, x, v)
        assert_close(mus[f"hook_centroid_block_{layer}"], truth, tolerance(model))
    last = torch.zeros(1, 6, 1, dtype=F64)
    last[:, -1] = 1
    truth = gradient(end, values[at["resid_pre"].format(2)], v * last)
    assert_close(mus["hook_centroid_block_2_last"], truth, tolerance(model))
    # An MLP's path to the residual stream leads through its post norm, where there is one.
    if "blocks.1.mlp.hook_in" in values:
        x, y = values["blocks.1.mlp.hook_in"], values["blocks.1.mlp.hook_out"]
        post = "blocks.1.ln2_post.hook_out"
        v = gradient(normed, end, model.W_U[:, 3])
        v = gradient(values[post], y, v) if post in values else v
        assert_close(mus["hook_centroid_mlp_1"], gradient(y, x, v), tolerance(model))


def test_in_the_last_block_a_logit_and_its_metric_agree() -> None:
    model = models.bridge("gpt2", F64)
    metric = Metric(lambda logits: (logits[..., 3] - logits[..., 4]).sum(-1), "difference")
    mus = read(
        model,
        Site("block", 2, cotangent=Logit(3, 4), label="direct"),
        Site("block", 2, cotangent=metric, label="all_paths"),
    )
    assert_close(mus["hook_centroid_block_2_direct"], mus["hook_centroid_block_2_all_paths"])


@needs_saes
def test_decoder_rows_are_vectors_of_the_output_space() -> None:
    from sae_lens import StandardSAE, StandardSAEConfig

    sae = StandardSAE(StandardSAEConfig(d_in=models.D_MODEL, d_sae=8))
    nn.init.normal_(sae.W_dec)
    model = models.bridge("gpt2")
    mus = read(
        model,
        Site("mlp", 1, cotangent=decoder_row(sae, 5), label="a"),
        Site("mlp", 1, cotangent=sae.W_dec[5].detach(), label="b"),
    )
    first, second = mus.values()
    assert torch.equal(first, second)
    with pytest.raises(lch.InputError, match="0 to 7"):
        decoder_row(sae, 8)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(a=st.floats(-3, 3), b=st.floats(-3, 3), seed=st.integers(0, 999))
@pytest.mark.parametrize("kind", ["mlp", "attn", "block"])
def test_centroids_are_linear_in_the_cotangent(kind: Any, a: float, b: float, seed: int) -> None:
    model = _BUILT.setdefault("bridge-gpt2", BUILDS["bridge-gpt2"]())
    u, v = (Random(seed + i).at(torch.empty(1, 32, dtype=F64)) for i in (0, 1))
    combined = a * u + b * v
    if float(combined.norm()) < 0.1:
        return
    sites = [Site(kind, 1, cotangent=c, label=str(i)) for i, c in enumerate((u, v, combined))]
    first, second, both = read(model, *sites).values()
    assert models.relative_error(both, a * first + b * second) < 1e-9


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), first=st.integers(0, 1), ids_seed=st.integers(0, 99))
def test_adjacent_spans_obey_the_chain_rule(seed: int, first: int, ids_seed: int) -> None:
    model = _BUILT.setdefault("bridge-gpt2", BUILDS["bridge-gpt2"]())
    ids = models.tokens(2, 5, ids_seed)
    v = Random(seed).at(torch.empty(1, 32, dtype=F64))

    class Given:
        """A cotangent of one's own: whatever the later span's centroid was."""

        name = "given"

        def at(self, y: Tensor) -> Tensor:
            return later

    whole = read(model, Site("span", (first, 2), cotangent=v), ids=ids)
    (later,) = read(model, Site("span", (2, 2), cotangent=v), ids=ids).values()
    (chained,) = read(model, Site("span", (first, 1), cotangent=Given()), ids=ids).values()
    assert_close(chained, whole[f"blocks.2.hook_centroid_from_{first}"])


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(4)))
def test_the_order_of_a_batch_does_not_matter(order: list[int]) -> None:
    model = _BUILT.setdefault("bridge-gpt2", BUILDS["bridge-gpt2"]())
    ids = models.tokens(4, 5)
    sites = (Site("mlp"), Site("attn"), Site("block"), Site("model"), Site("head", index=0))
    straight, shuffled = read(model, *sites, ids=ids), read(model, *sites, ids=ids[order])
    for name, value in straight.items():
        assert_close(shuffled[name], value[order])


# ---------------------------------------------------------------- token mixing


def test_output_positions_choose_what_counts(model: Any) -> None:
    values, _ = graph(model)
    at = names(model)
    x, y = values[at["resid_pre"].format(1)], values[at["resid_post"].format(1)]
    mus = read(
        model,
        Site("block", 1, output_positions=-1, label="last"),
        Site("block", 1, output_positions=[0, 3], label="two"),
        held(1, output_positions=-1, label="last"),
        held(1),
    )
    truth = gradient(y[:, -1], x)
    assert_close(mus["blocks.1.hook_centroid_last"], truth, tolerance(model))
    truth = gradient(y[:, [0, 3]], x)
    assert_close(mus["blocks.1.hook_centroid_two"], truth, tolerance(model))
    pattern = values["blocks.1.attn.hook_pattern"][:, 0]
    whole, last = (mus[f"blocks.1.attn.hook_centroid_head_0{e}"] for e in ("", "_last"))
    # All ones read every position alike, so a source counts by how much of it is attended to.
    ratio = (pattern[:, -1] / pattern.sum(1))[..., None]
    assert_close(last, (whole * ratio).detach())


@pytest.mark.parametrize("cotangent", [Logit(3, 4), logit_difference(3, 4, position=2)])
def test_output_positions_choose_among_late_cotangents_too(gpt2: Any, cotangent: Any) -> None:
    mus = read(
        gpt2,
        *(
            Site(k, 1, cotangent=cotangent, output_positions=2, label="o")
            for k in ("attn", "block")
        ),
        Site("head", 1, 0, cotangent=cotangent, output_positions=2, label="o"),
        Site("block", 1, cotangent=cotangent),
    )
    whole = mus.pop("hook_centroid_block_1")
    assert whole[:, 3:].any() == isinstance(cotangent, Logit)
    for mu in mus.values():
        assert mu[:, :3].any()
        assert not mu[:, 3:].any()


def test_the_first_position_does_not_see_outputs_before_a_token(gpt2: Any) -> None:
    mu = read(gpt2, Site("block", 1, output_positions=2))["blocks.1.hook_centroid"]
    assert not mu[:, 3:].any()
    assert mu[:, :3].any(-1).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-gpt2", "bridge-llama", "compat-gpt2"])
def test_centroids_do_not_depend_on_what_a_prompt_is_batched_with(name: str, side: str) -> None:
    if name == "compat-gpt2":
        model = models.bridge("gpt2", F64)
        model.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    elif name == "bridge-llama":
        # In float64 HuggingFace's mask overflows to minus infinity, and its own logits to NaN.
        model = models.bridge("llama")
    else:
        model = BUILDS[name]()
    long, short = models.tokens(1, 7, seed=3), models.tokens(1, 4, seed=4)
    pad, mask = torch.zeros(1, 3, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)
    parts = (pad, short) if side == "left" else (short, pad)
    where = slice(3, 7) if side == "left" else slice(0, 4)
    mask[1] = 0
    mask[1, where] = 1
    ids = torch.cat([long, torch.cat(parts, 1)])
    sites = (
        *(Site(kind) for kind in ("mlp", "attn", "block", "model")),
        *(Site("span", (0, 2)), Site("head", index=1)),
        Site("block", cotangent=Logit(3, 4), label="logit"),
    )
    batched = read(model, *sites, ids=ids, attention_mask=mask)
    for row, alone in enumerate((read(model, *sites, ids=long), read(model, *sites, ids=short))):
        for hook, value in alone.items():
            found = batched[hook][row : row + 1]
            assert_close(found if row == 0 else found[:, where], value, 1e-5)
    for hook in ("blocks.1.hook_centroid", "blocks.2.hook_centroid_from_0"):
        padding = batched[hook][1][mask[1] == 0]
        assert not padding.any(), "outputs at padding must not count"


def test_strings_of_different_lengths_are_padded_and_do_not_leak() -> None:
    model = models.bridge("gpt2", F64)
    prompts = ["w1 w2 w3 w4 w5", "w6 w7"]
    with lch.attach(model, site="block"), torch.no_grad():
        name = "blocks.1.hook_centroid"
        batched = model.run_with_cache(prompts, names_filter=name, padding_side="left")[1][name]
        alone = model.run_with_cache(prompts[1], names_filter=name)[1][name]
    n = alone.shape[1]
    assert_close(batched[1:, -n:], alone, 1e-6)


# ---------------------------------------------------------------- local centroids, experts


@pytest.mark.parametrize("kind", ["mlp", "neuron", "attn", "block"])
def test_local_centroids_approach_plain_ones_as_the_radius_shrinks(gpt2: Any, kind: Any) -> None:
    index = 3 if kind == "neuron" else None
    radii = (1.0, 1e-2, 1e-4, 0.0)
    local = [
        Site(kind, 1, index, radius=r, n_samples=6, label=f"r{i}") for i, r in enumerate(radii)
    ]
    mus = read(gpt2, Site(kind, 1, index), *local)
    (plain,) = (v for n, v in mus.items() if not n.rpartition("_r")[2][0].isdigit())
    errors = [
        models.relative_error(v, plain)
        for n, v in mus.items()
        if n.rpartition("_r")[2] in ("0", "1", "2", "3")
    ]
    assert errors[0] > 1e-3 > errors[1] > errors[2] > errors[3]
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


def test_experts_reproduce_the_output(model: Any) -> None:
    v = torch.linspace(-1, 2, models.D_MODEL, dtype=F64)
    with torch.no_grad():
        _, cache = model.run_with_cache(IDS)
    for kind in ("mlp", "block"):
        mus = read(model, Site(kind, 1, cotangent=v, expert=True))
        path = "blocks.1.mlp.hook_centroid" if kind == "mlp" else "blocks.1.hook_centroid"
        mu, offset, radius, alignment = (
            mus[path + e] for e in ("", "_offset", "_radius", "_alignment")
        )
        at = names(model)
        if kind == "mlp" and isinstance(model, HookedTransformer):
            x = model.blocks[1].ln2(cache["blocks.1.hook_resid_mid"]).detach()
            y = cache[at["mlp_out"].format(1)]
        elif kind == "mlp":
            x, y = cache["blocks.1.mlp.hook_in"], cache["blocks.1.mlp.hook_out"]
        else:
            x, y = cache[at["resid_pre"].format(1)], cache[at["resid_post"].format(1)]
        total = partial(
            torch.sum, **({"dim": -1, "keepdim": True} if kind == "mlp" else {"dim": (-2, -1)})
        )
        torch.testing.assert_close(total(mu * x) + offset, total(v * y))
        torch.testing.assert_close(radius, total(mu.square()) + 2 * offset)
        torch.testing.assert_close(alignment[..., 0], torch.cosine_similarity(mu, x, dim=-1))


@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-gpt2", "opt"])
def test_values_beside_a_centroid_are_sliced_as_transformer_lens_slices(name: str) -> None:
    """Positions are the last dimension but one of whatever has them; a sequence's number has none.

    OPT joins batch and position where its MLPs are.
    """
    model = models.bridge("opt", F64) if name == "opt" else BUILDS[name]()
    ids = models.tokens(3, 5, seed=2)
    site = [Site(k, 1, expert=True) for k in ("mlp", "block")]
    with lch.attach(model, site=site) as handle, torch.no_grad():
        names = handle.hook_names
        whole = model.run_with_cache(ids, names_filter=names)[1]
        last = model.run_with_cache(ids, names_filter=names, pos_slice=-1)[1]
        alone = model.run_with_cache(ids[:1], names_filter=names)[1]
        flat = model.run_with_cache(ids[:1], names_filter=names, remove_batch_dim=True)[1]
    assert sorted(whole) == sorted(names)
    for point, value in whole.items():
        of_sequence = point in ("blocks.1.hook_centroid_offset", "blocks.1.hook_centroid_radius")
        assert value.shape[:2] == ((3,) if of_sequence else (3, 5))
        torch.testing.assert_close(last[point], value if of_sequence else value[:, -1:])
        assert torch.equal(flat[point], alone[point][0])


def test_names_of_all_hook_points_and_of_the_centroids_alone(gpt2: Any) -> None:
    site = [Site("mlp", 1, expert=True), Site("block", 1, radius=0.1, n_samples=2)]
    with lch.attach(gpt2, site=site) as handle:
        assert handle.centroid_names == ["blocks.1.mlp.hook_centroid", "blocks.1.hook_centroid"]
        endings = ("", "_offset", "_radius", "_alignment"), ("", "_variance", "_standard_error")
        assert handle.hook_names == [
            name + ending
            for name, own in zip(handle.centroid_names, endings, strict=True)
            for ending in own
        ]
        assert handle.methods.keys() == set(handle.centroid_names)


def relu_model() -> HookedTransformer:
    from tests.adapters.test_transformer_lens import lens_model

    model = lens_model(act_fn="relu", normalization_type="LN")
    return model.to(F64)


def test_a_relu_mlp_is_its_expert_within_a_region() -> None:
    model = relu_model()
    ids = IDS % model.cfg.d_vocab
    inputs: list[Tensor] = []
    mlp = model.blocks[0].mlp
    hook = mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    mus = read(model, Site("mlp", 0, expert=True), ids=ids)
    hook.remove()
    x = inputs[-1].detach()
    name = "blocks.0.mlp.hook_centroid"
    region = mus[name + "_region"]
    z = x @ mlp.W_in + mlp.b_in
    assert torch.equal(region, z > 0)
    # The nearest boundary of the region is the nearest zero of a pre-activation.
    distance = (z.abs() / mlp.W_in.norm(dim=0)).min(-1).values[..., None]
    direction = torch.randn(x.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    moved = x + 0.99 * distance * direction / direction.norm(dim=-1, keepdim=True)
    with torch.no_grad():
        total = mlp(moved).sum(-1)
    # b_out is part of the module's output, and of the offset.
    torch.testing.assert_close(
        total, (mus[name] * moved).sum(-1) + mus[name + "_offset"].squeeze(-1)
    )


def test_smooth_activations_have_no_region_code(gpt2: Any) -> None:
    assert "blocks.1.mlp.hook_centroid_region" not in read(gpt2, Site("mlp", 1, expert=True))


# ---------------------------------------------------------------- detached linearisation


def without_biases(family: str = "gpt2") -> Any:
    hf = models.huggingface(family, F64)
    for name, parameter in hf.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return models.boot(hf, F64)


@pytest.mark.parametrize("kind", ["mlp", "attn", "block", "span", "model"])
def test_without_biases_the_detached_expert_is_the_component(kind: Any) -> None:
    model = without_biases()
    if kind == "model":  # Position embeddings come after the token embeddings: a bias of a kind.
        nn.init.zeros_(model.pos_embed.original_component.weight)
    layers = (0, 2) if kind == "span" else None if kind == "model" else 1
    width = models.D_VOCAB if kind == "model" else models.D_MODEL
    v = Random(1).at(torch.empty(1, width, dtype=F64))
    site = Site(kind, layers, cotangent=v, linearization="detached", expert=True)
    mus = read(model, site)
    (mu,) = (value for name, value in mus.items() if name.endswith(("centroid", "from_0")))
    (offset,) = (value for name, value in mus.items() if name.endswith("_offset"))
    scale = float(mu.norm()) + 1
    assert float(offset.abs().max()) < 1e-10 * scale
    plain = read(model, Site(kind, layers, cotangent=v))
    assert models.relative_error(mu, next(iter(plain.values()))) > 1e-2, "not the Jacobian"


def test_with_biases_the_offset_is_what_they_contribute() -> None:
    hf = models.huggingface("gpt2", F64)
    block = hf.transformer.h[1]
    x = torch.randn(1, 4, models.D_MODEL, dtype=F64, generator=torch.Generator().manual_seed(0))
    biases = [p for name, p in block.named_parameters() if name.endswith("bias")]

    def of_biases(*values: Tensor) -> Tensor:
        names = [name for name, _ in block.named_parameters() if name.endswith("bias")]
        return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,)).sum()

    def flat(row: Tensor) -> Tensor:
        return block(row.view(1, 4, -1)).reshape(1, -1)

    expert = lch.affine_expert(lch.detached(flat), x.reshape(1, -1))
    # With the factors fixed the output is linear in inputs and biases together.
    from lch_plugin.linearization import DetachedMode

    with DetachedMode() as mode:
        total = block(mode.follow(x.clone().requires_grad_())).sum()
    grads = torch.autograd.grad(total, biases, allow_unused=True)
    assert float(of_biases(*biases).detach()) == pytest.approx(float(total.detach()), abs=1e-9)
    share = sum(
        float((g * b).sum().detach()) for g, b in zip(grads, biases, strict=True) if g is not None
    )
    assert float(expert.offset) == pytest.approx(share, abs=1e-10)


def test_detached_sites_leave_the_logits_to_the_last_bit(model: Any) -> None:
    with torch.no_grad():
        expected = model(IDS)
    with lch.attach(model, site=Site("block", linearization="detached")) as handle, torch.no_grad():
        logits, cache = model.run_with_cache(IDS, names_filter=handle.hook_names)
    assert torch.equal(logits, expected)
    assert len(cache) == 3


def test_detached_sites_are_refused_where_they_would_change_the_callers_gradients(
    gpt2: Any,
) -> None:
    with lch.attach(gpt2, site=Site("block", linearization="detached")) as handle:
        with pytest.raises(lch.SiteError, match=r"no_grad\(\)"):
            gpt2.run_with_cache(IDS, names_filter=handle.hook_names)
        assert torch.is_grad_enabled()
        assert torch._C._len_torch_function_stack() == 0


def test_one_pass_has_one_linearisation(gpt2: Any) -> None:
    sites = (Site("span", (0, 2)), Site("block", 1, linearization="detached", label="d"))
    with lch.attach(gpt2, site=sites) as handle, torch.no_grad():
        for name in handle.hook_names:
            gpt2.run_with_cache(IDS, names_filter=name)
        with pytest.raises(lch.SiteError, match="overlap"):
            gpt2.run_with_cache(IDS, names_filter=handle.hook_names)
        assert not torch.is_grad_enabled()
        gpt2.run_with_cache(IDS, names_filter=handle.hook_names[0])


# ---------------------------------------------------------------- interventions


def test_interventions_within_a_span_are_differentiated_through(gpt2: Any) -> None:
    def double(x: Tensor, hook: Any) -> Tensor:
        return 2 * x

    def in_place(x: Tensor, hook: Any) -> Tensor:
        x[:, 1] += 1
        return x

    edits = [("blocks.1.hook_in", double), ("blocks.1.hook_out", in_place)]
    with lch.attach(gpt2, site=Site("span", (0, 2))) as handle, torch.no_grad():
        with gpt2.hooks(edits):
            (name,) = handle.hook_names
            logits, cache = gpt2.run_with_cache(IDS, names_filter=name)
    with gpt2.hooks(edits):
        values, expected = graph(gpt2)
    assert torch.equal(logits, expected.detach())
    truth = gradient(values["blocks.2.hook_out"], values["blocks.0.hook_in"])
    assert_close(cache[name], truth)


def test_edits_of_the_input_are_seen_and_edits_of_the_output_are_not(gpt2: Any) -> None:
    plain = read(gpt2, Site("block", 1))["blocks.1.hook_centroid"]
    for point, seen in (("blocks.1.hook_in", True), ("blocks.1.hook_out", False)):
        with gpt2.hooks([(point, lambda x, hook: x + 0.3 * x.flip(-1))]):
            edited = read(gpt2, Site("block", 1))["blocks.1.hook_centroid"]
        assert torch.equal(edited, plain) is not seen


def test_a_patch_that_cuts_the_graph_says_so(gpt2: Any) -> None:
    with lch.attach(gpt2, site=Site("span", (0, 2))) as handle, torch.no_grad():
        hooks = [
            ("blocks.1.hook_in", lambda x, hook: torch.zeros_like(x)),
            (handle.hook_names[0], lambda value, hook: None),
        ]
        with pytest.raises(lch.NotDifferentiableError, match="hook replaced"):
            gpt2.run_with_hooks(IDS, fwd_hooks=hooks)
        assert not torch.is_grad_enabled()


# ---------------------------------------------------------------- the caller's state


@contextmanager
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


SITES = (Site("attn"), Site("block"), Site("span", (0, 2)), Site("model"), Site("mlp"))


def test_nothing_of_the_callers_changes(model: Any) -> None:
    parameters = list(model.parameters())
    state = torch.get_rng_state(), [p.requires_grad for p in parameters]
    with torch.no_grad():
        expected = model(IDS)
    with lch.attach(model, site=SITES) as handle:
        with torch.no_grad():
            logits, cache = model.run_with_cache(IDS, names_filter=handle.hook_names)
            assert not torch.is_grad_enabled()
            assert torch.equal(logits, expected)
            assert not logits.requires_grad
            assert not any(value.requires_grad for value in cache.values())
        assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state[0])
    assert [p.requires_grad for p in parameters] == state[1]
    assert all(p.grad is None for p in parameters)


def test_a_caller_who_differentiates_still_can(model: Any) -> None:
    _, logits = graph(model)
    weight = next(p for n, p in model.named_parameters() if "mlp" in n and p.ndim == 2)
    (expected,) = torch.autograd.grad(logits.sum(), weight)
    with lch.attach(model, site=SITES) as handle:
        logits, _ = model.run_with_cache(IDS, names_filter=handle.hook_names)
        (found,) = torch.autograd.grad(logits.sum(), weight)
    assert_close(found, expected)


@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-gpt2"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_steering_vector_on_a_frozen_model_keeps_its_gradient(name: str, layer: int) -> None:
    model = BUILDS[name]().requires_grad_(False)
    v = torch.zeros(models.D_MODEL, dtype=F64, requires_grad=True)
    steer = (names(model)["resid_pre"].format(layer), lambda x, hook: x + v)

    def run() -> Tensor:
        with model.hooks([steer]):
            return torch.autograd.grad(model(IDS)[..., 3].sum(), v)[0]

    expected = run()
    with lch.attach(model, site=(Site("block"), Site("span", (0, 1)), Site("attn"))) as handle:
        with model.hooks([(n, lambda value, hook: None) for n in handle.hook_names]):
            assert_close(run(), expected)


@pytest.mark.parametrize("linearization", ["jacobian", "detached"])
def test_detaching_within_a_component_leaves_no_mode_behind(gpt2: Any, linearization: Any) -> None:
    expected = gpt2(IDS).detach()
    handle = lch.attach(gpt2, site=Site("block", linearization=linearization))
    hooks = [(name, lambda value, hook: None) for name in handle.hook_names]
    with torch.no_grad():
        inside = ("blocks.1.mlp.hook_out", lambda x, hook: handle.detach())
        logits = gpt2.run_with_hooks(IDS, fwd_hooks=[*hooks, inside])
        assert not torch.is_grad_enabled()
    assert torch.equal(logits, expected)
    assert torch._C._len_torch_function_stack() == 0
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "point", ["blocks.0.attn.hook_out", "blocks.1.hook_in", "ln_final.hook_in"]
)
@pytest.mark.parametrize("linearization", ["jacobian", "detached"])
def test_the_grad_mode_comes_back_when_the_forward_raises(
    gpt2: Any, point: str, error: type[BaseException], linearization: Any
) -> None:
    def fail(x: Tensor, hook: Any) -> None:
        raise error("on purpose")

    sites = [Site(s.kind, s.layers, linearization=linearization) for s in SITES]
    with lch.attach(gpt2, site=sites) as handle:
        listening = [(name, lambda value, hook: None) for name in handle.hook_names]
        torch.set_grad_enabled(False)  # Not a context, which would restore it by itself.
        try:
            with pytest.raises(error, match="on purpose"):
                gpt2.run_with_hooks(IDS, fwd_hooks=[*listening, (point, fail)])
            assert not torch.is_grad_enabled()
            assert torch._C._len_torch_function_stack() == 0
        finally:
            torch.set_grad_enabled(True)
        expected = read_names(gpt2, handle.hook_names)
    again = read(gpt2, *sites)
    for name, value in expected.items():
        assert torch.equal(value, again[name])


def read_names(model: Any, hook_names: list[str]) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(model.run_with_cache(IDS, names_filter=hook_names)[1])


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


@pytest.mark.parametrize("name", ["bridge-gpt2", "hooked-gpt2"])
def test_an_attached_model_can_be_copied_also_after_use(name: str) -> None:
    model = BUILDS[name]()
    with lch.attach(model, site=SITES) as handle:
        expected = read_names(model, handle.hook_names)
        twin = copy.deepcopy(model)
        for hook, value in read_names(twin, handle.hook_names).items():
            assert torch.equal(value, expected[hook])
    assert handle.hook_names[0] in twin.hook_dict
    found = read_names(twin, handle.hook_names)
    assert all(torch.equal(found[hook], expected[hook]) for hook in expected)


def test_the_stacks_of_an_encoder_decoder_have_masks_of_their_own() -> None:
    from tests import families

    model = families.bridge("bart")
    ids = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(0))
    decoder_ids = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    with lch.attach(model, site="block") as handle, torch.no_grad():

        def run(**masks: Tensor) -> dict[str, Tensor]:
            kw = {"names_filter": handle.hook_names, "decoder_input_ids": decoder_ids, **masks}
            return dict(model.run_with_cache(ids, **kw)[1])

        of_encoder = run(attention_mask=mask)
        of_decoder = run(attention_mask=torch.ones_like(mask), decoder_attention_mask=mask)
    encoder, decoder = "encoder_blocks.0.hook_centroid", "decoder_blocks.0.hook_centroid"
    assert not of_encoder[encoder][1, 3:].any()
    assert of_encoder[decoder][1, 3:].any(-1).all()
    assert not of_decoder[decoder][1, 3:].any()
    assert of_decoder[encoder][1, 3:].any(-1).all()


@pytest.mark.parametrize("additive", [False, True])
def test_padding_is_found_in_masks_by_query(gpt2: Any, additive: bool) -> None:
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    by_query = (mask[:, None, None] & torch.ones(6, 6).tril().bool()).expand(2, 1, 6, 6)
    if additive:
        by_query = torch.zeros(2, 1, 6, 6, dtype=F64).masked_fill(~by_query, torch.finfo(F64).min)
    mu = read(gpt2, Site("block", 1), attention_mask=by_query)["blocks.1.hook_centroid"]
    assert not mu[1, 4:].any()
    assert_close(
        mu, read(gpt2, Site("block", 1), attention_mask=mask.long())["blocks.1.hook_centroid"], 1e-6
    )


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


# ---------------------------------------------------------------- bad input


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("error", "match", "kw"),
    [
        (lch.SiteError, "'mpl'", {"kind": "mpl"}),
        (lch.SiteError, "needs two", {"kind": "span", "layers": 1}),
        (lch.SiteError, "no layers to choose", {"kind": "model", "layers": 1}),
        (lch.SiteError, "names no layer", {"layers": []}),
        (lch.InputError, "index=None", {"kind": "neuron"}),
        (lch.InputError, "index=3", {"kind": "mlp", "index": 3}),
        (lch.InputError, "zero or more", {"kind": "head", "index": -1}),
        (lch.InputError, "needs a label", {"kind": "neuron", "index": range(9)}),
        (lch.InputError, "does not mix positions", {"output_positions": 1}),
        (lch.InputError, "must be integers", {"kind": "attn", "output_positions": "x"}),
        (lch.InputError, "linearization='tangent'", {"linearization": "tangent"}),
        (
            lch.InputError,
            "one linearisation",
            {"kind": "neuron", "index": 0, "linearization": "detached"},
        ),
        (
            lch.InputError,
            "a head is differentiated",
            {"kind": "head", "index": 0, "compute_dtype": torch.float64},
        ),
        (lch.InputError, "label='a b'", {"label": "a b"}),
        (lch.InputError, "label='x_input'", {"label": "x_input"}),
        (lch.InputError, "compute_dtype", {"kind": "block", "compute_dtype": torch.float64}),
        (lch.InputError, "compute_dtype", {"compute_dtype": torch.int64}),
        (lch.InputError, "radius=-1", {"radius": -1.0}),
        (lch.InputError, "radius=nan", {"radius": float("nan")}),
        (lch.InputError, "n_samples=1", {"radius": 0.1, "n_samples": 1}),
        (lch.InputError, "neighbourhood='cube'", {"radius": 0.1, "neighbourhood": "cube"}),
        (lch.InputError, "offered for", {"kind": "model", "radius": 0.1}),
        (lch.InputError, "expert=True", {"radius": 0.1, "expert": True}),
        (lch.InputError, "known only from", {"radius": 0.1, "cotangent": Logit(3)}),
        (lch.InputError, "method `at", {"cotangent": "ones"}),
        (lch.InputError, "not finite|finite", {"cotangent": torch.tensor([1.0, float("inf")])}),
        (lch.InputError, "zeros", {"cotangent": torch.zeros(4)}),
        (lch.InputError, r"\(d_out,\)", {"cotangent": torch.ones(2, 2)}),
        (lch.InputError, "method `at", {"cotangent": Random}),
        (lch.InputError, "n_samples=2.5", {"radius": 0.1, "n_samples": 2.5}),
        (lch.InputError, "radius='a'", {"radius": "a"}),
        (lch.InputError, "generator=3", {"radius": 0.1, "generator": 3}),
        (lch.InputError, "compute_dtype='float32'", {"compute_dtype": "float32"}),
        (lch.InputError, "label=None", {"label": None}),
        (
            lch.InputError,
            "through everything downstream",
            {"kind": "block", "linearization": "detached", "cotangent": logit_difference(3, 4)},
        ),
        (lch.InputError, "twice", {"kind": "head", "index": [1, 1]}),
    ],
)
def test_sites_that_mean_nothing_are_refused(error: Any, match: str, kw: dict[str, Any]) -> None:
    with pytest.raises(error, match=match):
        Site(**kw)


@pytest.mark.usefixtures("as_users_run")
def test_sites_that_do_not_fit_a_model_are_refused(gpt2: Any) -> None:
    before = set(gpt2.hook_dict)
    for error, match, site in [
        (lch.SiteError, "ends with block 0, before block 2", Site("span", (2, 0))),
        (lch.SiteError, r"\[5\]", Site("span", (1, 5))),
        (lch.SiteError, "neurons 0 to 47", Site("neuron", 1, 48)),
        (lch.SiteError, "heads 0 to 3", Site("head", 1, 4)),
        (lch.InputError, r"shape \(32,\)", Site("block", cotangent=torch.ones(50))),
        (lch.InputError, r"shape \(50,\)", Site("model", cotangent=torch.ones(32))),
        (lch.InputError, r"shape \(1,\)", Site("neuron", 1, 3, cotangent=torch.ones(32))),
        (lch.InputError, "residual stream", Site("model", cotangent=Logit(3))),
        (lch.InputError, "outside 0 to 49", Site("mlp", cotangent=Logit(50))),
        (lch.InputError, "differentiable", Site("mlp", cotangent=Metric(lambda x: x.argmax()))),
        (lch.InputError, r"\(1, 3\)", Site("mlp", cotangent=Metric(lambda x: x.sum(-1)))),
        (lch.NonFiniteError, "metric", Site("mlp", cotangent=Metric(lambda x: (x / 0).sum()))),
        (lch.SiteError, "'decoder_blocks' is none", Site("mlp", stack="decoder_blocks")),
    ]:
        with pytest.raises(error, match=match):
            lch.attach(gpt2, site=site)
        assert set(gpt2.hook_dict) == before
        assert torch.is_grad_enabled()
    with pytest.raises(lch.AttachError, match="label"):
        lch.attach(gpt2, site=[Site("attn"), Site("attn", cotangent=Random(1))])
    with pytest.raises(lch.InputError, match="beside a Site"):
        lch.attach(gpt2, layers=1, site=Site("attn"))
    with pytest.raises(lch.InputError, match="names no component"):
        lch.attach(gpt2, site=[])
    with pytest.raises(lch.SiteError, match=r"position 6 .* 6 tokens"):
        read(gpt2, Site("block", 1, output_positions=6), ids=IDS)
    assert set(gpt2.hook_dict) == before


def test_centered_weights_make_a_block_read_nothing_and_are_refused() -> None:
    model = models.bridge("gpt2")
    model.enable_compatibility_mode(disable_warnings=True)
    refused = [
        *(Site("attn"), Site("head", index=1), Site("block"), Site("span", (0, 2)), Site("model")),
        *(Site("attn", radius=0.1, n_samples=2), Site("block", radius=0.1, n_samples=2)),
    ]
    for site in refused:
        with pytest.raises(lch.VanishingCentroidError, match="another cotangent"):
            lch.attach(model, site=site)
    with lch.attach(model, site=Site("block", cotangent=Random(0))):
        pass


@pytest.mark.parametrize("flag", ["use_split_qkv_input", "use_attn_in"])
@pytest.mark.parametrize("kind", ["attn", "head"])
def test_attention_that_reads_by_head_is_refused(flag: str, kind: Any) -> None:
    model = models.hooked(F64)
    getattr(model, f"set_{flag}")(True)
    with pytest.raises(lch.SiteError, match="Turn off"):
        lch.attach(model, site=Site(kind, index=0 if kind == "head" else None))


def test_an_mlp_that_is_differentiated_has_no_compute_dtype() -> None:
    from tests import families

    site = Site("mlp", compute_dtype=F64)
    with pytest.raises(lch.InputError, match="differentiated in the model's dtype"):
        lch.attach(families.bridge("mixtral"), site=site)


def test_hooks_that_break_the_graph_in_place_are_named(gpt2: Any) -> None:
    def ablate(pattern: Tensor, hook: Any) -> Tensor:
        pattern[:, 0] = 0
        return pattern

    with lch.attach(gpt2, site="attn") as handle, torch.no_grad():
        with gpt2.hooks([("blocks.1.attn.hook_pattern", ablate)]):
            with pytest.raises(lch.NotDifferentiableError, match="Return a new tensor"):
                gpt2.run_with_cache(IDS, names_filter=handle.hook_names)


def test_heads_with_held_patterns_have_no_offset_under_a_cache(gpt2: Any) -> None:
    with lch.attach(gpt2, site=held(1, expert=True)) as handle:
        with gpt2.hooks([(handle.hook_names[0], lambda value, hook: None)]):
            with pytest.raises(lch.SiteError, match="key-value cache"):
                gpt2.generate(IDS[:1], max_new_tokens=2, verbose=False, do_sample=False)


def test_weights_edited_through_data_are_seen() -> None:
    model = models.hooked(F64)
    with lch.attach(model) as handle:
        before = read_names(model, handle.hook_names)["blocks.1.mlp.hook_centroid"]
        model.blocks[1].mlp.W_out.data.mul_(2)
        after = read_names(model, handle.hook_names)["blocks.1.mlp.hook_centroid"]
    assert_close(after, 2 * before)


def test_a_logit_less_itself_is_refused() -> None:
    for make in (Logit, logit_difference):
        with pytest.raises(lch.InputError, match="both 3"):
            make(3, 3)


@pytest.mark.usefixtures("as_users_run")
def test_cotangents_of_other_types_are_refused() -> None:
    for make, match in (
        (lambda: Logit("a"), "integers"),  # type: ignore[arg-type]
        (lambda: Metric(3), "function of the logits"),  # type: ignore[arg-type]
        (lambda: Random("x"), "must be an integer"),  # type: ignore[arg-type]
    ):
        with pytest.raises(lch.InputError, match=match):
            make()


def test_a_cotangent_that_writes_to_the_output_changes_nothing(gpt2: Any) -> None:
    class Vandal:
        name = "vandal"

        def at(self, y: Tensor) -> Tensor:
            return y.mul_(0) + 1

    with torch.no_grad():
        expected = gpt2(IDS)
        with lch.attach(gpt2, site=Site("block", 1, cotangent=Vandal())) as handle:
            logits, _ = gpt2.run_with_cache(IDS, names_filter=handle.hook_names)
    assert torch.equal(logits, expected)


def test_non_finite_centroids_name_hook_layer_and_number() -> None:
    model = models.bridge("gpt2")
    edit = ("blocks.1.hook_in", lambda x, hook: x * float("inf"))
    for kind in ("mlp", "block"):
        with lch.attach(model, site=kind) as handle, torch.no_grad(), model.hooks([edit]):
            match = rf"{handle.hook_names[1]} came out with 384 of 384 .* layer 1"
            with pytest.raises(lch.NonFiniteError, match=match):
                model.run_with_cache(IDS, names_filter=handle.hook_names)
            assert not torch.is_grad_enabled()


def test_detach_is_idempotent_and_leaves_nothing(model: Any) -> None:
    before = set(model.hook_dict), [n for n, _ in model.named_modules()], set(vars(model))
    sites = (
        *SITES,
        Site("head", index=0),
        Site("neuron", index=1),
        Site("mlp", cotangent=Logit(3), expert=True),
        Site("block", radius=0.1, n_samples=2, label="local"),
        Site("block", linearization="detached", label="detached"),
    )
    handle = lch.attach(model, site=sites)
    assert set(model.hook_dict) > before[0]
    handle.detach()
    handle.detach()
    assert (set(model.hook_dict), [n for n, _ in model.named_modules()], set(vars(model))) == before
    hooks = [
        n
        for n, m in model.named_modules()
        if m._forward_hooks or m._forward_pre_hooks
        if not n.endswith(("ln1", "ln2", "_original_component"))  # Where bridges have their own.
    ]
    assert not [n for n in hooks if "hook" in n or n == ""]


def test_vectors_are_copies_and_random_is_seeded() -> None:
    v = torch.ones(3)
    vector = Vector(v)
    v.zero_()
    assert vector.v.all()
    y = torch.empty(1, 100)
    assert torch.equal(Random(1).at(y), Random(1).at(y))
    assert not torch.equal(Random(1).at(y), Random(2).at(y))
    assert float(Random(1).at(y).norm()) == pytest.approx(10, rel=1e-5)

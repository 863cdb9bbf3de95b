"""``J d`` against finite differences, and against ``J^T v``; singular triples against an SVD."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lch_plugin as lch
from lch_plugin.lens import component_map
from tests import models

IDS = models.tokens(1, 5)
SITES = [
    *(lch.Site("mlp", 1), lch.Site("neuron", 1, [3, 5]), lch.Site("attn", 1)),
    *(lch.Site("head", 1, [0, 2]), lch.Site("block", 1), lch.Site("span", (0, 1))),
    lch.Site("model"),
]
DETACHED = [
    lch.Site(site.kind, site.layers, site.index, linearization="detached")
    for site in SITES
    if "detached" in site.of_kind.linearizations
]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.fixture(scope="module")
def llama() -> Any:
    return models.bridge("llama", torch.float64)


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return models.bridge("gpt2", torch.float64)


def test_a_product_with_a_callables_jacobian_is_a_finite_difference() -> None:
    fn = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)).double()
    x, d, step = noise(2, 4), noise(2, 4, seed=1), 1e-5
    expected = (fn(x + step * d) - fn(x - step * d)) / (2 * step)
    torch.testing.assert_close(lch.jvp(fn, x, d), expected.detach(), rtol=1e-7, atol=1e-9)


def test_of_a_detached_callable_it_is_its_exact_map() -> None:
    fn = nn.Sequential(nn.Linear(4, 6, bias=False), nn.GELU(), nn.Linear(6, 3, bias=False)).double()
    x = noise(2, 4)
    torch.testing.assert_close(lch.jvp(lch.detached(fn), x, x), fn(x).detach())


def test_fused_attention_has_products_too() -> None:
    qkv = noise(3, 1, 2, 4, 8)

    def attend(x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)

    x, d, step = qkv[0], qkv[1], 1e-5
    expected = (attend(x + step * d) - attend(x - step * d)) / (2 * step)
    torch.testing.assert_close(lch.jvp(attend, x, d), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("site", [*SITES, *DETACHED], ids=lambda s: f"{s.kind}-{s.linearization}")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_products_from_both_sides_agree(family: str, site: lch.Site, request: Any) -> None:
    J = component_map(request.getfixturevalue(family), site, IDS)
    d, v = noise(3, *J.xs[0].shape), noise(3, *J.y.shape, seed=1)
    pushed, (pulled,) = J.push(d), J.pull(v)
    left, right = (v * pushed).flatten(1).sum(1), (pulled * d).flatten(1).sum(1)
    close = 1e-10 if family == "gpt2" else 1e-5  # RMS norms compute in float32.
    torch.testing.assert_close(left, right, rtol=close, atol=close)
    assert float(pushed.norm()) > 1e-3


@pytest.mark.parametrize("site", [*SITES, *DETACHED], ids=lambda s: f"{s.kind}-{s.linearization}")
def test_a_product_from_the_left_is_the_centroid(gpt2: Any, site: lch.Site) -> None:
    with lch.attach(gpt2, site=site) as handle, torch.no_grad():
        _, cache = gpt2.run_with_cache(IDS, names_filter=handle.hook_names)
        expected = cache[handle.centroid_names[0]]
    J = component_map(gpt2, site, IDS)
    torch.testing.assert_close(J.pull(torch.ones_like(J.y)[None])[0][0], expected)


def test_a_detached_block_without_biases_is_its_own_product(llama: Any) -> None:
    _, cache = llama.run_with_cache(IDS)
    site = lch.Site("block", 1, linearization="detached")
    found = lch.jvp(site, IDS, cache["blocks.1.hook_in"], model=llama)
    torch.testing.assert_close(found, cache["blocks.1.hook_out"], rtol=1e-5, atol=1e-6)


def test_a_hooked_transformer_has_the_same_products(gpt2: Any) -> None:
    hooked = models.hooked(torch.float64)
    for site in (*SITES[:-1], *DETACHED[:-1]):
        a, b = component_map(gpt2, site, IDS), component_map(hooked, site, IDS)
        d = noise(1, *a.xs[0].shape)
        torch.testing.assert_close(a.push(d), b.push(d), rtol=1e-6, atol=1e-9)


def dense(J: Any, rows: slice) -> Tensor:
    n = J.xs[0].numel()
    return J.push(torch.eye(n).double().reshape(n, *J.xs[0].shape))[:, 0, rows].flatten(1).T


@pytest.mark.parametrize("position", [None, 2])
@pytest.mark.parametrize("site", [SITES[0], SITES[5], DETACHED[-2]], ids=lambda s: s.kind)
def test_leading_triples_are_those_of_a_dense_svd(
    gpt2: Any, site: lch.Site, position: int | None
) -> None:
    found = lch.spectrum(gpt2, site, IDS, k=4, position=position, tolerance=1e-6)
    whole = dense(
        component_map(gpt2, site, IDS),
        slice(None) if position is None else slice(position, position + 1),
    )
    _, s, v = torch.linalg.svd(whole)
    torch.testing.assert_close(found.values, s[:4], rtol=1e-9, atol=1e-9)
    assert found.residual < 1e-6
    same = (found.inputs.flatten(1) * v[:4]).sum(1).abs()
    torch.testing.assert_close(same, torch.ones_like(same), rtol=1e-6, atol=1e-6)
    again = whole @ found.inputs.flatten(1).T
    torch.testing.assert_close(
        again.T, found.values[:, None] * found.outputs.flatten(1), atol=1e-5, rtol=1e-5
    )
    assert (found.coefficients >= 0).all()


def test_singular_vectors_read_and_write_tokens(gpt2: Any) -> None:
    site = lch.Site("span", (1, 2), linearization="detached")
    found = lch.spectrum(gpt2, site, IDS, k=2)
    at, tokens = found.reads(0, 3)
    assert at in found.prompt
    assert len(tokens) == 3
    scale = gpt2.ln_final.original_component.weight
    u = found.outputs[0]
    expected = ((u - u.mean()) * scale) @ gpt2.W_U
    assert found.writes(0, 3) == [f"w{i}" for i in expected.topk(3).indices.tolist()]


def test_spectra_that_are_not_there_are_refused(gpt2: Any) -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (lch.Site("mlp", 1), {"k": 0}, "k=0"),
        (lch.Site("mlp", 1), {"position": 5}, "position"),
        (lch.Site("mlp"), {}, "Give one layer"),
        (lch.Site("mlp", 1, expert=True), {}, "no cotangent"),
    ]
    for site, settings, said in cases:
        with pytest.raises(lch.LCHError, match=said):
            lch.spectrum(gpt2, site, IDS, **settings)


def test_products_that_make_no_sense_are_refused(gpt2: Any) -> None:
    x = noise(2, 4)
    with pytest.raises(lch.InputError, match="d has shape"):
        lch.jvp(nn.Identity(), x, x[:1])
    with pytest.raises(lch.NotDifferentiableError):
        lch.jvp(lambda z: z.detach(), x, x)
    with pytest.raises(lch.InputError, match="give model="):
        lch.jvp(lch.Site("mlp", 1), IDS, x)
    with pytest.raises(lch.InputError, match="goes with a Site"):
        lch.jvp(nn.Identity(), x, x, model=gpt2)

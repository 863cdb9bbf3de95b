"""What the output is weighed with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lch_plugin as lch
from lch_plugin.cotangents import Random, Vector, decoder_row
from lch_plugin.sites import Site
from tests import models
from tests.adapters.transformer_lens.sites.common import (
    F64,
    IDS,
    assert_close,
    built,
    gradient,
    graph,
    names,
    read,
    tolerance,
)
from tests.toolkits import needs_saes

pytestmark = pytest.mark.filterwarnings("ignore:run_with_hooks")


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
    model = built("bridge-gpt2")
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
    model = built("bridge-gpt2")
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
    model = built("bridge-gpt2")
    ids = models.tokens(4, 5)
    sites = (Site("mlp"), Site("attn"), Site("block"), Site("model"), Site("head", index=0))
    straight, shuffled = read(model, *sites, ids=ids), read(model, *sites, ids=ids[order])
    for name, value in straight.items():
        assert_close(shuffled[name], value[order])


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


def test_vectors_are_copies_and_random_is_seeded() -> None:
    v = torch.ones(3)
    vector = Vector(v)
    v.zero_()
    assert vector.v.all()
    y = torch.empty(1, 100)
    assert torch.equal(Random(1).at(y), Random(1).at(y))
    assert not torch.equal(Random(1).at(y), Random(2).at(y))
    assert float(Random(1).at(y).norm()) == pytest.approx(10, rel=1e-5)

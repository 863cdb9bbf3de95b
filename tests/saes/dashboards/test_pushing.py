"""Pushes that share the pass of a row, held to those with a pass of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lch_plugin as lch
from lch_plugin.saes import HookedModel
from lch_plugin.saes.dashboards.effects import push
from lch_plugin.saes.dashboards.pushing import Pusher
from tests import models

LAYER, N_POS = 1, 8
TOLERANCE = {"gpt2": 1e-10, "llama": 1e-5}  # Llama's norms compute in float32.
GENERATOR = torch.Generator().manual_seed(0)


def items(n: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """More items than the three rows of text have tokens."""
    rows = models.tokens(3, N_POS)[torch.randint(3, (n,), generator=GENERATOR)]
    positions = torch.randint(N_POS, (n,), generator=GENERATOR)
    directions = torch.randn(n, models.D_MODEL, generator=GENERATOR).double()
    return rows, positions, directions


def hooked(family: str, backend: str) -> tuple[Any, str]:
    """A model with a centroid hook, which stays for as long as the model does."""
    if backend == "HookedModel":
        name = {"gpt2": "transformer.h.1.mlp", "llama": "model.layers.1.mlp"}[family]
        hf = models.huggingface(family, torch.float64)
        return HookedModel(hf, models.tokenizer(), name), f"{name}.hook_centroid"
    model = models.bridge(family, torch.float64) if backend == "bridge" else models.hooked(
        torch.float64
    )  # fmt: skip
    return model, lch.attach(model, LAYER).hook_names[0]


@pytest.mark.parametrize(
    ("family", "backend", "shares"),
    [
        ("gpt2", "bridge", True),
        ("gpt2", "HookedModel", True),
        ("llama", "bridge", True),
        ("llama", "HookedModel", True),
        ("gpt2", "HookedTransformer", False),
    ],
)
def test_items_that_share_a_row_have_what_each_has_alone(
    family: str, backend: str, shares: bool
) -> None:
    model, hook = hooked(family, backend)
    tokens, positions, directions = items()
    pusher, done = Pusher(model, hook, batch_size=2), []
    points, logits = pusher(tokens, positions, directions, done.append)
    assert pusher.shares_rows is shares
    assert sum(done) == len(tokens)
    truth = push(model, hook, tokens, positions, directions)
    for found, expected in zip((points, logits), truth, strict=True):
        error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float(error.max()) < TOLERANCE[family]


@pytest.mark.parametrize("kind", ["attn", "block"])
def test_components_that_mix_positions_share_too(kind: Any) -> None:
    model = models.bridge("llama", torch.float64)
    tokens, positions, directions = items(12)
    with lch.attach(model, LAYER, kind) as handle:
        hook = handle.hook_names[0]
        pusher = Pusher(model, hook, batch_size=4)
        _, logits = pusher(tokens, positions, directions)
        _, truth = push(model, hook, tokens, positions, directions)
    assert pusher.shares_rows
    assert models.relative_error(logits, truth) < TOLERANCE["llama"]


def test_where_the_user_edits_the_model_each_item_has_its_own_pass() -> None:
    """A hook may mean positions of the row."""
    model, hook = hooked("gpt2", "bridge")
    tokens, positions, directions = items(6)

    def last_is_zero(value: Tensor, hook: Any) -> Tensor:
        return torch.cat([value[:, :-1], torch.zeros_like(value[:, -1:])], dim=1)

    with model.hooks([("blocks.0.hook_out", last_is_zero)]):
        pusher = Pusher(model, hook, batch_size=4)
        _, logits = pusher(tokens, positions, directions)
        _, truth = push(model, hook, tokens, positions, directions)
    assert pusher.shares_rows is False
    assert torch.equal(logits, truth)


def test_a_model_that_attends_less_far_than_its_mask_shares_nothing() -> None:
    """As with a sliding window that is shorter than the row: a copy would see too much."""
    model, hook = hooked("llama", "HookedModel")
    inner = model.model
    forward, window = inner.model.forward, 3

    def sliding(ids: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is None:
            own = torch.arange(ids.shape[1])
            sees = (own <= own[:, None]) & (own > own[:, None] - window)
            lowest = torch.finfo(torch.float64).min
            attention_mask = torch.zeros(sees.shape, dtype=torch.float64)
            attention_mask = attention_mask.masked_fill(~sees, lowest).expand(len(ids), 1, -1, -1)
        return forward(ids, attention_mask=attention_mask, **kwargs)

    inner.model.forward = lambda input_ids=None, **kwargs: sliding(input_ids, **kwargs)
    tokens, positions, directions = items(6)
    pusher = Pusher(model, hook, batch_size=4)
    _, logits = pusher(tokens, positions, directions)
    assert pusher.shares_rows is False
    assert torch.equal(logits, push(model, hook, tokens, positions, directions)[1])

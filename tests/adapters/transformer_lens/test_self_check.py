"""What attaching finds out about an MLP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens.toolkit import HookedTransformer
from tests import models
from tests.adapters.transformer_lens.common import NAMES, cached, snapshot


def test_an_mlp_that_computes_something_else_is_differentiated(model: Any) -> None:
    with lch.attach(model):
        plain = cached(model)[NAMES[1]]
    mlp = model.blocks[1].mlp
    inner = mlp if isinstance(model, HookedTransformer) else mlp.original_component
    original = inner.forward
    inner.forward = lambda x: 1.1 * original(x)
    before = snapshot(model)
    with lch.attach(model) as handle:
        assert list(handle.methods.values()) == ["closed form", "VJP", "closed form"]
        torch.testing.assert_close(cached(model)[NAMES[1]], 1.1 * plain)
    assert snapshot(model) == before
    with pytest.raises(lch.SiteError, match=r"self-check of blocks\.1\.mlp"):
        lch.attach(model, site=lch.Site("neuron", 1, 3))
    assert snapshot(model) == before


def test_a_wrong_activation_is_noticed() -> None:
    model = models.bridge("gpt2")
    model.blocks[1].mlp.original_component.act.forward = nn.functional.silu
    model.blocks[1].mlp.original_component.act_fn = nn.functional.gelu
    with lch.attach(model) as handle:
        assert handle.methods[NAMES[1]] == "VJP"


def test_a_layer_without_an_mlp_is_named() -> None:
    model = models.bridge("gpt2")
    del model.blocks[1]._modules["mlp"]
    model.blocks[1].original_component.mlp = None
    with pytest.raises(lch.SiteError, match=r"blocks\.1\.mlp does not exist"):
        lch.attach(model)

"""What users' hooks and edits do to centroids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lch_plugin as lch
from lch_plugin.sites import Site
from tests import models
from tests.adapters.transformer_lens.sites.common import (
    F64,
    IDS,
    assert_close,
    gradient,
    graph,
    read,
    read_names,
)

pytestmark = pytest.mark.filterwarnings("ignore:run_with_hooks")


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


def test_hooks_that_break_the_graph_in_place_are_named(gpt2: Any) -> None:
    def ablate(pattern: Tensor, hook: Any) -> Tensor:
        pattern[:, 0] = 0
        return pattern

    with lch.attach(gpt2, site="attn") as handle, torch.no_grad():
        with gpt2.hooks([("blocks.1.attn.hook_pattern", ablate)]):
            with pytest.raises(lch.NotDifferentiableError, match="Return a new tensor"):
                gpt2.run_with_cache(IDS, names_filter=handle.hook_names)


def test_weights_edited_through_data_are_seen() -> None:
    model = models.hooked(F64)
    with lch.attach(model) as handle:
        before = read_names(model, handle.hook_names)["blocks.1.mlp.hook_centroid"]
        model.blocks[1].mlp.W_out.data.mul_(2)
        after = read_names(model, handle.hook_names)["blocks.1.mlp.hook_centroid"]
    assert_close(after, 2 * before)

"""Gates are hooks for the time of one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens.hook_points import hook_points
from tests.adapters.transformer_lens.common import IDS, pre_activation_name


@pytest.mark.parametrize("resets", [False, True])
def test_after_a_pass_transformer_lens_knows_of_no_hook_of_ours(model: Any, resets: bool) -> None:
    """It lists those that come and go within a pass, and may be told to remove them there."""
    known: list[int] = []

    def within(_value: Tensor, hook: Any) -> None:
        known.append(sum(len(point.fwd_hooks) for point in hook_points(model)))
        if resets:
            model.reset_hooks(including_permanent=True)

    with lch.attach(model, site=("mlp", "block")) as handle, torch.no_grad():
        logits = model(IDS)
        hooks: list[Any] = [(name, lambda value, hook: None) for name in handle.hook_names]
        hooks.append((pre_activation_name(model), within))
        assert torch.equal(model.run_with_hooks(IDS, fwd_hooks=hooks), logits)
        assert known[0] > len(hooks)
        assert not torch.is_grad_enabled()
        for point in hook_points(model):
            assert not point.fwd_hooks
            assert not point._forward_hooks

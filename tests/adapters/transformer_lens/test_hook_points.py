"""A centroid is an ordinary hook point."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

import lch_plugin as lch
from tests import models
from tests.adapters.transformer_lens.common import IDS, NAMES, cached


@pytest.mark.parametrize(
    "names", [NAMES[1], [NAMES[1]], lambda name: name == NAMES[1]], ids=["str", "list", "callable"]
)
def test_run_with_cache_takes_every_kind_of_filter(model: Any, names: Any, computed: list) -> None:
    with lch.attach(model):
        del computed[:]
        cache = cached(model, names)
        assert set(cache) == {NAMES[1]}
        assert len(computed) == 1


def test_stop_at_layer_stops_early(model: Any) -> None:
    ran: list[int] = []
    for layer, block in enumerate(model.blocks):
        block.mlp.register_forward_hook(lambda *call, layer=layer: ran.append(layer))
    with lch.attach(model):
        full = cached(model)
        del ran[:]
        cache = cached(model, [NAMES[1]], stop_at_layer=2)
    assert ran == [0, 1]
    assert torch.equal(cache[NAMES[1]], full[NAMES[1]])


def test_hooks_added_in_every_way_see_the_centroid_once(model: Any) -> None:
    seen: list[tuple[str, Tensor]] = []

    def record(value: Tensor, hook: Any) -> None:
        seen.append((hook.name, value))

    with lch.attach(model):
        expected = cached(model)
        model.run_with_hooks(IDS, fwd_hooks=[(NAMES[0], record)])
        model.run_with_hooks(IDS, fwd_hooks=[(lambda name: name == NAMES[1], record)])
        model.add_hook(NAMES[2], record)
        model(IDS)
        assert [name for name, _ in seen] == NAMES
        assert all(torch.equal(value, expected[name]) for name, value in seen)
        model.reset_hooks()
        model(IDS)
        assert len(seen) == 3
        assert cached(model).keys() == set(NAMES)  # reset_hooks took the user's hook, not ours
        model.add_hook(NAMES[2], record, is_permanent=True)
        model.reset_hooks(including_permanent=True)
        model(IDS)
        assert len(seen) == 3
        assert cached(model).keys() == set(NAMES)
        assert set(NAMES) <= model.hook_dict.keys()
        assert all(model.hook_dict[name].name == name for name in NAMES)


def test_editing_the_centroid_never_changes_the_logits(model: Any) -> None:
    logits = model(IDS)
    with lch.attach(model):
        hooks = [(name, lambda value, hook: value * 0 + 100) for name in NAMES]
        assert torch.equal(model.run_with_hooks(IDS, fwd_hooks=hooks), logits)


def test_nothing_is_computed_when_nobody_listens(model: Any, computed: list) -> None:
    with lch.attach(model):
        del computed[:]
        model(IDS)
        cached(model, lambda name: name.endswith("hook_post"))
        assert not computed
        points = [m for name, m in model.named_modules() if name.endswith(("hook_pre", "out"))]
        assert points
        assert not any(point._forward_hooks for point in points if isinstance(point, HookPoint))


def test_generation_fires_at_every_step() -> None:
    model, shapes = models.bridge("gpt2"), []
    with lch.attach(model, layers=0):
        model.add_hook(NAMES[0], lambda value, hook: shapes.append(tuple(value.shape)))
        model.generate(IDS[:1], max_new_tokens=3, do_sample=False, verbose=False)
    assert shapes[0] == (1, 7, models.D_MODEL)
    assert len(shapes) == 3

"""`lch.attach` leaves nothing behind, and refuses what it cannot do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens import attached_readers
from tests import models
from tests.adapters.transformer_lens.common import IDS, NAMES, cached, pre_activation_name, snapshot


def test_detach_leaves_the_model_as_it_was(model: Any) -> None:
    before, logits = snapshot(model), model(IDS)
    handle = lch.attach(model)
    cached(model)
    handle.detach()
    handle.detach()
    assert snapshot(model) == before
    assert torch.equal(model(IDS), logits)


def test_leaving_the_block_by_an_exception_detaches(model: Any) -> None:
    before = snapshot(model)
    with pytest.raises(KeyError, match="no such hook"), lch.attach(model):
        raise KeyError("no such hook")
    assert snapshot(model) == before


def test_attaching_keeps_modes_and_random_state(model: Any) -> None:
    model.train()
    model.blocks[0].mlp.eval()
    for p in list(model.parameters())[::2]:
        p.requires_grad_(False)
    before, state = snapshot(model), torch.get_rng_state()
    with lch.attach(model):
        pass
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_a_deep_copy_is_attached_on_its_own(model: Any) -> None:
    if type(model).__name__ == "HookedSAETransformer":
        pytest.skip("SAELens binds the original's MLP.forward into it: no copy of one has hooks")
    with lch.attach(model):
        with torch.no_grad():  # A bridge cannot be copied after a pass with gradients.
            expected = cached(model)
        other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[0].mlp.W_in.mul_(2)
    changed = cached(other)
    assert not torch.equal(changed[NAMES[0]], expected[NAMES[0]])
    assert not attached_readers(model)
    assert set(attached_readers(other)) == set(NAMES)


def test_detaching_from_within_a_forward_pass(model: Any) -> None:
    logits = model(IDS)
    handle = lch.attach(model)
    hooks = [
        (NAMES[1], lambda value, hook: None),
        (pre_activation_name(model), lambda value, hook: handle.detach()),
    ]
    assert torch.equal(model.run_with_hooks(IDS, fwd_hooks=hooks), logits)
    assert not attached_readers(model)


def test_layers_attach_and_detach_separately(model: Any) -> None:
    first, last = lch.attach(model, layers=0), lch.attach(model, layers=[-1])
    assert first.hook_names == [NAMES[0]]
    assert last.hook_names == [NAMES[2]]
    first.detach()
    assert set(cached(model, lambda name: "centroid" in name)) == {NAMES[2]}
    last.detach()


def test_attaching_twice_says_so_and_leaves_the_first_alone(model: Any) -> None:
    with lch.attach(model, layers=[1]):
        expected = cached(model, [NAMES[1]])
        with pytest.raises(lch.AttachError, match=r"blocks\.1\.mlp\.hook_centroid is already"):
            lch.attach(model)
        assert [n for n in model.hook_dict if "centroid" in n] == [NAMES[1]]
        assert torch.equal(cached(model, [NAMES[1]])[NAMES[1]], expected[NAMES[1]])


@pytest.mark.usefixtures("as_users_run")
def test_bad_arguments_are_refused_before_anything_changes() -> None:
    model = models.bridge("gpt2")
    before = snapshot(model)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (lch.SiteError, r"layers \[3\] do not exist: .* 0 to 2", {"layers": 3}),
        (lch.SiteError, r"\[-4\]", {"layers": [0, -4]}),
        (lch.SiteError, "names no layer", {"layers": []}),
        (lch.SiteError, "names no layer", {"layers": True}),
        (lch.SiteError, "names no layer", {"layers": 1.0}),
        (lch.SiteError, "'mpl'", {"site": "mpl"}),
        (lch.InputError, r"\(32,\)", {"cotangent": torch.ones(31)}),
        (lch.InputError, "zeros", {"cotangent": torch.zeros(32)}),
        (lch.InputError, "floating", {"cotangent": torch.arange(32)}),
        (lch.InputError, "finite", {"cotangent": torch.full((32,), float("nan"))}),
        (TypeError, "radius", {"radius": 1.0}),
    ]
    for error, match, kw in cases:
        with pytest.raises(error, match=match):
            lch.attach(model, **kw)
    assert snapshot(model) == before
    with pytest.raises(lch.InputError, match="boot_transformers"):
        lch.attach(models.huggingface("gpt2"))


def test_weights_that_are_not_loaded_or_quantised_are_refused() -> None:
    model = models.bridge("gpt2").to("meta")
    with pytest.raises(lch.SiteError, match="meta"):
        lch.attach(model)
    model = models.hooked()
    integers = torch.ones_like(model.blocks[1].mlp.W_out, dtype=torch.int8)
    model.blocks[1].mlp.W_out = nn.Parameter(integers, requires_grad=False)
    with pytest.raises(lch.SiteError, match="int8"):
        lch.attach(model)

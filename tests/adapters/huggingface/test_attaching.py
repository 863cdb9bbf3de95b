"""Nothing changes, and nothing is left."""

from __future__ import annotations

import gc
import inspect
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import lch_plugin as lch
from lch_plugin.adapters.huggingface import attach
from tests import models
from tests.adapters.huggingface.common import (
    ATTN,
    BLOCK,
    IDS,
    MLP,
    SITES,
    SPAN,
    assert_close,
    assert_untouched,
    built,
    hooked,
    read,
    truth,
)


def test_logits_stay_bit_for_bit_and_nothing_is_left(gpt2: Any) -> None:
    state = {name: value.clone() for name, value in gpt2.state_dict().items()}
    modules = [name for name, _ in gpt2.named_modules()]
    signature = inspect.signature(gpt2.forward)
    with torch.no_grad():
        expected = gpt2(IDS).logits
    handle = attach(gpt2, SITES)
    with torch.no_grad():
        logits = gpt2(IDS).logits
    assert inspect.signature(gpt2.forward) == signature
    assert list(gpt2.state_dict()) == list(state)
    assert [name for name, _ in gpt2.named_modules()] == modules
    assert torch.equal(logits, expected)
    assert not logits.requires_grad
    handle.detach()
    handle.detach()
    assert_untouched(gpt2)
    assert len(handle.cache) == len(SITES)
    assert torch.equal(gpt2(IDS).logits, expected)
    for name, value in gpt2.state_dict().items():
        assert torch.equal(value, state[name])


def test_handles_come_off_in_any_order(gpt2: Any) -> None:
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        handles = [attach(gpt2, names) for names in ([MLP, SPAN], [MLP, BLOCK], [SPAN])]
        for i in order:
            with torch.no_grad():
                gpt2(IDS)
            assert torch.equal(
                handles[i].cache[handles[i].centroid_names[-1]],
                read(gpt2, handles[i].centroid_names)[handles[i].centroid_names[-1]],
            )
            handles[i].detach()
            handles[i].cache.clear()
        assert not any(handle.cache for handle in handles)
        assert_untouched(gpt2)


def test_attaching_again_leaves_what_was_read_alone(gpt2: Any) -> None:
    with attach(gpt2, [MLP, f"{MLP}.act", BLOCK]) as handle, torch.no_grad():
        gpt2(IDS)
        before = {name: value.clone() for name, value in handle.cache.items()}
        with attach(gpt2) as second:
            assert not second.cache
            for name, value in before.items():
                assert torch.equal(handle.cache[name], value)
            gpt2(IDS)
        for name, value in before.items():
            assert torch.equal(handle.cache[name], value)


def test_detaching_within_a_hook(gpt2: Any) -> None:
    for place in (MLP, f"{BLOCK}.ln_2", BLOCK, "transformer.h.2.mlp.c_fc"):
        handle = attach(gpt2, SITES)
        with torch.no_grad():
            expected = read(gpt2, "transformer.h.0.mlp")
            with hooked(gpt2.get_submodule(place), lambda *_, handle=handle: handle.detach()):
                logits = gpt2(IDS).logits
            assert not torch.is_grad_enabled()
            assert torch.equal(gpt2(IDS).logits, logits)
        assert torch.equal(handle.cache["transformer.h.0.mlp"], *expected.values())
        assert_untouched(gpt2)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("place", [MLP, f"{MLP}.act", ATTN, "transformer.h.2.mlp", "lm_head"])
def test_a_pass_that_fails_leaves_nothing_open(gpt2: Any, error: Any, place: str) -> None:
    def fail(*_: Any) -> None:
        raise error("on purpose")

    expected = read(gpt2, SITES)
    with attach(gpt2, SITES) as handle, torch.no_grad():
        for pre in (False, True):
            with hooked(gpt2.get_submodule(place), fail, pre=pre), pytest.raises(error):
                gpt2(IDS)
            assert not torch.is_grad_enabled()
            assert not any(m._forward_hooks for m in gpt2.get_submodule(MLP).modules())
        gpt2(IDS)
        for name in SITES:
            assert torch.equal(handle.cache[name], expected[name])


def test_the_users_own_gradients_stay_bit_for_bit(gpt2: Any) -> None:
    def gradients() -> list[Tensor]:
        gpt2.zero_grad()
        gpt2(IDS, labels=IDS).loss.backward()
        found = [p.grad for p in gpt2.parameters()]
        gpt2.zero_grad()
        return found

    expected = gradients()
    with attach(gpt2, SITES) as handle:
        for ours, theirs in zip(gradients(), expected, strict=True):
            assert torch.equal(ours, theirs)
        assert torch.is_grad_enabled()
        for name in SITES:
            assert_close(handle.cache[name], truth(gpt2, name))


def test_inference_mode_has_closed_forms_alone(gpt2: Any) -> None:
    expected = read(gpt2, MLP)
    with torch.inference_mode():
        with attach(gpt2) as handle:
            gpt2(IDS)
        assert torch.equal(handle.cache[MLP], expected[MLP])
        for name in (BLOCK, SPAN, ATTN):
            with attach(gpt2, name), pytest.raises(lch.SiteError, match=r"torch\.no_grad"):
                gpt2(IDS)
            assert torch.is_inference_mode_enabled()


def test_repeated_passes_hold_no_memory(gpt2: Any) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(isinstance(thing, Tensor) for thing in gc.get_objects())

    with attach(gpt2, SITES), torch.no_grad():
        for _ in range(3):
            gpt2(IDS)
        before = tensors()
        for _ in range(20):
            gpt2(IDS)
        assert tensors() <= before


def test_a_model_that_is_dropped_with_its_handle_is_collected() -> None:
    model = models.huggingface("gpt2")
    attach(model, SITES)
    with torch.no_grad():
        model(IDS)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_outputs_and_caches_carry_no_graph() -> None:
    model = built("llama")
    layer = "model.layers.1"
    embeddings = model.get_input_embeddings()(IDS).detach()
    options = {"output_attentions": True, "output_hidden_states": True, "use_cache": True}
    for names in ([f"{layer}.self_attn", layer], "model.layers.0:model.layers.2", ""):
        with attach(model, names), torch.no_grad():
            output = model(inputs_embeds=embeddings, **options)
        caches = [t for entry in output.past_key_values.layers for t in (entry.keys, entry.values)]
        for tensor in (output.logits, *output.hidden_states, *output.attentions, *caches):
            assert not tensor.requires_grad


def test_handles_say_what_they_are(gpt2: Any) -> None:
    with attach(gpt2, [MLP, BLOCK]) as handle:
        assert "attached to GPT2LMHeadModel" in repr(handle)
        assert handle.methods == {MLP: "closed form", BLOCK: "VJP"}
        gpt2(IDS)
    assert "detached" in repr(handle)
    assert "(2, 6, 32)" in repr(handle.cache)
    assert len(handle.cache) == 2

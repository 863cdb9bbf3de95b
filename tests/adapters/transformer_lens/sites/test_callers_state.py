"""Grad modes, random state, parameters and modules are the caller's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import lch_plugin as lch
from lch_plugin.cotangents import Logit
from lch_plugin.sites import Site
from tests import models
from tests.adapters.transformer_lens.sites.common import (
    BUILDS,
    F64,
    IDS,
    SITES,
    assert_close,
    graph,
    names,
    read,
    read_names,
)
from tests.slow import all_but

pytestmark = pytest.mark.filterwarnings("ignore:run_with_hooks")


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


@pytest.mark.parametrize("error", all_but([KeyboardInterrupt], [RuntimeError, KeyboardInterrupt]))
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

"""Gradients are on while somebody needs them, and then the caller's mode comes back."""

from __future__ import annotations

import pytest
import torch

import lch_plugin as lch
from lch_plugin.adapters.grad_scope import GradScope, gradients
from lch_plugin.linearization import DetachedMode


@pytest.mark.parametrize("caller", [True, False])
def test_the_mode_comes_back_with_the_last_holder(caller: bool) -> None:
    scope = GradScope()
    with torch.set_grad_enabled(caller):
        scope.hold("first")
        scope.hold("second")
        scope.release("first")
        scope.release("first")
        assert scope.is_open
        assert torch.is_grad_enabled()
        assert scope.caller_grad is caller
        with scope.outside():
            assert torch.is_grad_enabled() is caller
        assert torch.is_grad_enabled()
        assert scope.is_held_besides(["first"])
        assert not scope.is_held_besides(["second"])
        scope.release("second")
        assert not scope.is_open
        assert torch.is_grad_enabled() is caller


def test_all_are_released_and_the_detached_mode_with_them() -> None:
    scope = GradScope()
    with torch.no_grad():
        scope.hold("it", DetachedMode)
        assert torch._C._len_torch_function_stack() == 1
        scope.release_all()
        assert torch._C._len_torch_function_stack() == 0
        assert not torch.is_grad_enabled()
    assert scope.was_open


def test_what_cannot_be_held_changes_nothing() -> None:
    scope = GradScope()
    with torch.inference_mode(), pytest.raises(lch.SiteError, match=r"no_grad\(\)"):
        scope.hold("it")
    with pytest.raises(lch.SiteError, match="the caller has gradients on"):
        scope.hold("it", DetachedMode)
    assert not scope.is_open
    with torch.no_grad():
        scope.hold("plain")
        with pytest.raises(lch.SiteError, match="detached and plain overlap"):
            scope.hold("detached", DetachedMode)
        scope.release("detached")
        assert scope.is_open
        scope.release("plain")
        assert not torch.is_grad_enabled()


def test_a_variable_leaves_the_callers_tensor_alone() -> None:
    scope, x = GradScope(), torch.ones(3)
    scope.hold("it")
    variable, passed_on = scope.variable(x)
    passed_on.mul_(2)  # As a hook of the user's may.
    (mu,) = gradients("it", passed_on, [variable], torch.ones(3), keep=False)
    scope.release("it")
    assert not x.requires_grad
    assert torch.equal(x, torch.ones(3))
    assert torch.equal(mu, torch.full((3,), 2.0))


def test_where_no_path_leads_back_that_is_said() -> None:
    x, other = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    for y in (torch.ones(3), other * 2):
        with pytest.raises(lch.NotDifferentiableError, match="it: no gradient path"):
            gradients("it", y, [x], torch.ones(3), keep=False)

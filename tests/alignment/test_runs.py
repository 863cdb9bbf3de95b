"""A run of a model reads the Jacobian of the component that was named, and of no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lch_plugin as lch
from lch_plugin.alignment import jacobian, run
from lch_plugin.errors import InputError, NonFiniteError, NotDifferentiableError, SiteError
from tests import models


class Residual(nn.Module):
    """Two blocks with a stream that passes by them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x).tanh()
        x = x + self.second(x).tanh()
        return self.head(x)


def network() -> tuple[Residual, Tensor]:
    torch.manual_seed(0)
    return Residual().double(), torch.randn(5, 4, dtype=torch.float64)


def true_jacobian(fn: Any, x: Tensor) -> Tensor:
    return torch.stack([torch.autograd.functional.jacobian(fn, row) for row in x])


def test_without_a_site_it_is_the_jacobian_of_the_model() -> None:
    model, x = network()
    torch.testing.assert_close(jacobian(run(model, x)), true_jacobian(model, x))
    torch.testing.assert_close(jacobian(run(lambda x: model(x), x)), true_jacobian(model, x))


def test_a_module_is_its_own_input_to_its_own_output() -> None:
    model, x = network()
    found = run(model, x, "second")
    expected = model.second.weight.detach().expand(5, 4, 4)
    torch.testing.assert_close(jacobian(found), expected)
    torch.testing.assert_close(found.x, x + model.first(x).tanh())


def test_up_to_the_end_what_passes_by_the_module_is_left_out() -> None:
    model, x = network()
    stream = (x + model.first(x).tanh()).detach()
    found = run(model, x, "second:")
    through = true_jacobian(lambda h: model.head(model.second(h).tanh()), stream)
    torch.testing.assert_close(jacobian(found), through)


def test_the_output_is_that_of_the_model_and_reaches_all_weights() -> None:
    model, x = network()
    found = run(model, x, "second")
    torch.testing.assert_close(found.output, model(x))
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    actual = torch.autograd.grad(found.output.square().sum(), list(model.parameters()))
    torch.testing.assert_close(actual, expected)


def test_the_centroid_is_that_of_the_core() -> None:
    model, x = network()
    v = torch.randn(3, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(run(model, x).centroid(v), lch.centroid(model, x, v))
        torch.testing.assert_close(run(model, x).centroid(), lch.centroid(model, x))


def test_sites_of_a_language_model_are_those_of_both_toolkits() -> None:
    """The same weights as HuggingFace's model and as a bridge, at the last position alone."""
    ids = models.tokens()
    last = {"output": lambda out: getattr(out, "logits", out)[:, -1]}
    plain = run(models.huggingface("gpt2"), {"input_ids": ids}, "transformer.h.1:", **last)
    bridge = run(models.bridge("gpt2"), ids, "blocks.1:", **last)
    assert plain.y.shape == (2, models.D_VOCAB)
    torch.testing.assert_close(plain.centroid(), bridge.centroid(), rtol=1e-4, atol=1e-5)


def test_writing_in_place_does_not_change_what_was_read() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)).double(), -torch.ones(3, 4)
    found = run(model, x.double())
    assert (found.x == -1).all()
    assert (found.centroid() == 0).all()


@pytest.mark.parametrize(
    ("site", "error", "words"),
    [
        ("third", SiteError, "fits no module"),
        ("*", SiteError, "name one"),
        ("second:third", SiteError, "does not"),
    ],
)
def test_a_site_that_is_none_is_refused(site: str, error: type[Exception], words: str) -> None:
    model, x = network()
    with pytest.raises(error, match=words) as caught:
        run(model, x, site)
    assert "\n" not in str(caught.value)


def test_hooks_are_gone_afterwards_also_when_the_pass_fails() -> None:
    model, x = network()
    run(model, x, "second")
    with pytest.raises(RuntimeError):
        run(model, torch.randn(5, 7, dtype=torch.float64), "second")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_bad_passes_are_refused_in_one_line() -> None:
    model, x = network()
    shared = nn.Sequential(*[model.first] * 2)
    again = nn.Sequential(model.first, model.second, model.second)
    unused = Residual().double()
    unused.extra = nn.Linear(4, 4).double()
    cases: list[tuple[type[Exception], str, Any]] = [
        (SiteError, "no module and has no sites", lambda: run(model.forward, x, "second")),
        (SiteError, "first module ran 2 times", lambda: run(shared, x, "0")),
        (SiteError, "first module ran 1 times and its last 2", lambda: run(again, x, "0:1")),
        (SiteError, "its last 0 times", lambda: run(unused, x, "first:extra")),
        (InputError, "not finite", lambda: run(model, x * torch.nan)),
        (InputError, "one item or more", lambda: run(model, x[:0])),
        (InputError, "no floating-point tensor", lambda: run(model, {"x": x.long()})),
        (InputError, "one row of output", lambda: run(model, x, output=lambda y: y.sum())),
        (InputError, "one row of output", lambda: run(model, x, output=lambda y: y[:2])),
        (NotDifferentiableError, "no gradient path", lambda: run(torch.zeros_like, x).centroid()),
        (NonFiniteError, "not finite", lambda: run(torch.sqrt, x * 0).centroid()),
    ]
    for error, words, call in cases:
        with pytest.raises(error, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)

"""What hooks of torch's own do to centroids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lch_plugin as lch
from lch_plugin.adapters.huggingface import attach
from tests import models
from tests.adapters.huggingface.common import (
    ATTN,
    BLOCK,
    F64,
    IDS,
    MLP,
    SPAN,
    assert_close,
    hooked,
    noise,
    read,
    truth,
)
from tests.models import D_MODEL


@pytest.mark.parametrize("before", [True, False])
def test_edits_of_what_is_read_or_computed_within_are_seen(gpt2: Any, before: bool) -> None:
    direction = noise(D_MODEL)
    z = noise(models.D_MLP)

    def steer(_module: nn.Module, args: Any) -> Any:
        return (args[0] + direction, *args[1:])

    def edit(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output + z

    for place, hook, pre in (
        (BLOCK, steer, True),
        (MLP, steer, True),
        (f"{MLP}.c_fc", edit, False),
        (f"{BLOCK}.ln_1", lambda m, i, o: o * 2, False),
    ):
        names = [MLP, BLOCK, SPAN]
        clean = read(gpt2, names)
        if before:
            with hooked(gpt2.get_submodule(place), hook, pre=pre):
                mus = read(gpt2, names)
        else:
            with attach(gpt2, names) as handle, torch.no_grad():
                with hooked(gpt2.get_submodule(place), hook, pre=pre):
                    gpt2(IDS)
                mus = dict(handle.cache)
        with hooked(gpt2.get_submodule(place), hook, pre=pre):
            for name in names:
                assert not torch.allclose(mus[name], clean[name])
                assert_close(mus[name], truth(gpt2, name))


def test_pre_activations_that_are_replaced_are_those_of_the_centroid(gpt2: Any) -> None:
    # No gradient leads through the hook; the closed form takes its values as they are.
    z = noise(2, 6, models.D_MLP)
    mlp = gpt2.get_submodule(MLP)
    with hooked(mlp.c_fc, lambda *_: z):
        mu = read(gpt2, MLP)[MLP]
    inputs = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(mlp.c_proj(mlp.act(inputs)).sum(), inputs)
    assert_close(mu, (slope @ mlp.c_fc.weight.T).detach())


def test_edits_of_outputs_are_no_part(gpt2: Any) -> None:
    names = [MLP, ATTN, "transformer.h.2"]
    clean = read(gpt2, names)

    def double(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

    for name in names:
        with hooked(gpt2.get_submodule(name), double):
            assert_close(read(gpt2, name)[name], clean[name])


def test_hooks_may_write_in_place(gpt2: Any) -> None:
    def edit(_module: nn.Module, args: Any, output: Tensor) -> None:
        output[:, 0] = 0

    with hooked(gpt2.get_submodule(f"{MLP}.c_fc"), edit):
        assert_close(read(gpt2, BLOCK)[BLOCK], truth(gpt2, BLOCK))


def test_a_hook_that_cuts_the_graph_is_named(gpt2: Any) -> None:
    name = "transformer.h.1.ln_2:transformer.h.1.mlp"
    with hooked(gpt2.get_submodule(f"{BLOCK}.ln_2"), lambda m, i, o: o.detach()):
        with (
            attach(gpt2, name),
            pytest.raises(lch.NotDifferentiableError, match="no gradient path"),
        ):
            gpt2(IDS)


def test_modules_that_are_swapped_after_attaching_are_noticed() -> None:
    model = models.huggingface("gpt2", F64)
    with attach(model, MLP), torch.no_grad():
        model.get_submodule(MLP).act = nn.ReLU()
        with pytest.raises(lch.SiteError, match="replaced"):
            model(IDS)
    with attach(model, MLP) as handle, torch.no_grad():
        model(IDS)
    assert_close(handle.cache[MLP], truth(model, MLP))

"""What outputs are weighed with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lch_plugin as lch
from lch_plugin.adapters.huggingface import attach
from lch_plugin.cotangents import Logit, Random
from tests import families, models
from tests.adapters.huggingface.common import (
    BLOCK,
    F64,
    IDS,
    MLP,
    assert_close,
    hooked,
    read,
    truth,
)
from tests.models import D_MODEL


class Outputs:
    """Weighs each output by itself."""

    name = "outputs"

    def at(self, y: Tensor) -> Tensor:
        return y.mul_(2)  # A copy: what is written to it changes nothing.


def test_cotangents(gpt2: Any) -> None:
    v = Random(3).at(torch.empty(D_MODEL, dtype=F64))
    with torch.no_grad():
        logits = gpt2(IDS).logits
    for name in (MLP, BLOCK):
        assert_close(read(gpt2, name, cotangent=v)[name], truth(gpt2, name, v=v))
        assert torch.equal(
            read(gpt2, name, cotangent=Random(3))[name], read(gpt2, name, cotangent=v)[name]
        )
        outputs: list[Tensor] = []
        with hooked(
            gpt2.get_submodule(name), lambda m, i, o, kept=outputs: kept.append(o.detach())
        ):
            gpt2(IDS)
        with attach(gpt2, name, cotangent=Outputs()) as handle, torch.no_grad():
            assert torch.equal(gpt2(IDS).logits, logits)
        assert_close(handle.cache[name], truth(gpt2, name, v=2 * outputs[0]))


@pytest.mark.usefixtures("as_users_run")
def test_cotangents_that_cannot_work_are_refused(gpt2: Any) -> None:
    with pytest.raises(lch.InputError, match="the final norm"):
        attach(gpt2, MLP, cotangent=Logit(3))
    for bad in (torch.zeros(D_MODEL), torch.full((D_MODEL,), torch.nan), "ones", 3):
        with pytest.raises(lch.InputError):
            attach(gpt2, MLP, cotangent=bad)
    wrong = torch.ones(D_MODEL + 1)
    with pytest.raises(lch.InputError, match="shape"):
        attach(gpt2, MLP, cotangent=wrong)
    with attach(gpt2, BLOCK, cotangent=wrong), torch.no_grad():
        with pytest.raises(lch.InputError, match="shape"):
            gpt2(IDS)
        assert not torch.is_grad_enabled()


def test_cotangents_that_read_nothing_are_refused() -> None:
    model = models.huggingface("gpt2", F64)
    weight = model.get_submodule(MLP).c_proj.weight
    weight.data -= weight.data.mean(-1, keepdim=True)
    with pytest.raises(lch.VanishingCentroidError, match="another cotangent"):
        attach(model, MLP)
    with attach(model, MLP, cotangent=Random(0)), torch.no_grad():
        model(IDS)
    bert, block = families.huggingface("bert"), "bert.encoder.layer.1"
    bert.get_submodule(block).output.LayerNorm.weight.data.fill_(1)
    with attach(bert, block), torch.no_grad():
        with pytest.raises(lch.VanishingCentroidError, match="LayerNorm"):
            bert(IDS)
        assert not torch.is_grad_enabled()
    read(bert, block, IDS, cotangent=Random(0))


def test_numbers_that_are_not_finite_are_named(gpt2: Any) -> None:
    for name in (MLP, BLOCK):
        with attach(gpt2, name), torch.no_grad():
            with hooked(
                gpt2.get_submodule(name), lambda m, a: (a[0] * torch.nan, *a[1:]), pre=True
            ):
                with pytest.raises(lch.NonFiniteError, match=name):
                    gpt2(IDS)
            assert not torch.is_grad_enabled()
            gpt2(IDS)

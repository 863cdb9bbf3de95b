"""Modules that are called several times, out of order, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lch_plugin as lch
from lch_plugin.adapters.huggingface import attach
from tests.adapters.huggingface.common import (
    BLOCK,
    F64,
    IDS,
    MLP,
    assert_close,
    noise,
    other,
    read,
    truth,
)
from tests.models import D_MODEL


class Recurrent(nn.Module):
    """Calls its cell, its MLP and its norm three times."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(6, 6)
        self.mlp = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))
        self.unused = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.mlp(torch.tanh(self.cell(x)))
        return x


def test_modules_that_are_called_several_times() -> None:
    torch.manual_seed(0)
    net, x = Recurrent().to(F64), noise(2, 6)
    with attach(net, ["mlp", "cell", "cell:mlp"]) as handle, torch.no_grad():
        for _ in range(2):
            net(x)
        for name in handle.centroid_names:
            assert handle.cache.calls(name) == 3
            for i in range(3):
                assert_close(handle.cache[name, i], truth(net, name, x, call=i))
            assert torch.equal(handle.cache[name, -1], handle.cache[name, 2])
            with pytest.raises(lch.InputError, match=r"3 times.*, 0\]"):
                handle.cache[name]
            with pytest.raises(lch.SiteError, match="no call 3"):
                handle.cache[name, 3]


def test_tied_layers_of_albert() -> None:
    model = other("albert", embedding_size=8, num_hidden_groups=1)
    name = "encoder.albert_layer_groups.0"
    v = noise(D_MODEL)
    with attach(model, name, cotangent=v) as handle, torch.no_grad():
        model(IDS)
    assert handle.cache.calls(name) == 2
    for i in range(2):
        assert_close(handle.cache[name, i], truth(model, name, IDS, v=v, call=i))


def test_a_first_module_that_runs_again_before_the_last() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))

    torch.manual_seed(0)
    net, x = Twice().to(F64), noise(2, 6)
    with attach(net, "a:b") as handle, torch.no_grad():
        net(x)
        assert not torch.is_grad_enabled()
    inner = torch.tanh(net.a(x)).detach().requires_grad_()
    (expected,) = torch.autograd.grad(net.b(torch.tanh(net.a(inner))).sum(), inner)
    assert_close(handle.cache["a:b"], expected)


def test_modules_that_did_not_run() -> None:
    net, x = Recurrent().to(F64), noise(2, 6)
    with attach(net, ["mlp", "unused"]) as handle:
        for name in handle.centroid_names:
            with pytest.raises(lch.SiteError, match="run the model first"):
                handle.cache[name]
        assert handle.cache.get("mlp") is None
        net(x)
        assert list(handle.cache) == [("mlp", 0), ("mlp", 1), ("mlp", 2)]
        assert len(dict(handle.cache)) == len(handle.cache) == 3
        assert "mlp" in handle.cache
        assert ("mlp", 3) not in handle.cache
        assert "unused" not in handle.cache
        assert handle.cache.get("unused", 3) == 3
        with pytest.raises(lch.SiteError, match="was not called"):
            handle.cache["unused"]
        with pytest.raises(KeyError):
            handle.cache["cell"]


def test_a_module_that_is_called_on_its_own(gpt2: Any) -> None:
    x = noise(1, 3, D_MODEL)
    with attach(gpt2, [MLP, BLOCK]) as handle, torch.no_grad():
        gpt2(IDS)
        for _ in range(2):
            gpt2.get_submodule(MLP)(x)
        assert_close(handle.cache[MLP], truth(gpt2.get_submodule(MLP), "", x))
        assert handle.cache[BLOCK].shape == (2, 6, D_MODEL)


def test_outputs_that_are_dicts_have_named_parts() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            logits = torch.tanh(self.head(x))
            return {"loss": logits.square().mean(), "logits": logits}

    torch.manual_seed(0)
    net, x = Named().to(F64), noise(2, 6).requires_grad_()
    (expected,) = torch.autograd.grad(net(x)["logits"].sum(), x)
    assert_close(read(net, "", x.detach())[""], expected)


def test_token_ids_and_outputs_without_numbers_are_refused(gpt2: Any) -> None:
    with attach(gpt2, ""), pytest.raises(lch.InputError, match="inputs_embeds"):
        gpt2(IDS)
    with attach(gpt2, "transformer.wte"), pytest.raises(lch.InputError, match="token ids"):
        gpt2(IDS)

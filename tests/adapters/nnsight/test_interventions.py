"""Edits of a trace, hooks of torch, and modules that change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nnsight import NNsight
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor, nn

from tests import models
from tests.adapters.nnsight.common import F64, IDS, centroid, plain, site, tokenizer, traced, truth
from tests.models import relative_error

# How a loop over the steps of a generation ends.
pytestmark = pytest.mark.filterwarnings("ignore:.*was never reached", "ignore:Module '")


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("what", ["mlp input", "pre-activation", "block input"])
def test_earlier_edits_are_seen(family: str, what: str, in_place: bool) -> None:
    model, hf = traced(family), plain(family)
    name = site(family, "block" if what == "block input" else "mlp")
    projection = f"{name}.{'c_fc' if family == 'gpt2' else 'gate_proj'}"
    with model.trace(IDS):
        envoy = model.get(name)
        if what == "pre-activation":
            if in_place:
                model.get(projection).output[:, 2] += 1
            else:
                edited = model.get(projection).output.clone()
                edited[:, 2] += 1
                model.get(projection).output = edited
        elif in_place:
            envoy.input[:, 2] += 1
        else:
            edited = envoy.input.clone()
            edited[:, 2] += 1
            envoy.input = edited
        mu = centroid(envoy).save()

    def edit(value: Tensor) -> Tensor:
        return torch.cat([value[:, :2], value[:, 2:3] + 1, value[:, 3:]], 1)

    if what == "pre-activation":
        hook = hf.get_submodule(projection).register_forward_hook(lambda m, a, y: edit(y))
    else:
        hook = hf.get_submodule(name).register_forward_pre_hook(lambda m, a: (edit(a[0]), *a[1:]))
    try:
        expected = truth(hf, name, IDS)
    finally:
        hook.remove()
    assert relative_error(mu, expected) < 1e-10


def test_later_edits_within_a_module_are_not_seen() -> None:
    model, name = traced("llama"), site("llama", "block")
    with model.trace(IDS):
        mu = centroid(model.get(name)).save()
        model.get(name).self_attn.output[0][:] = 0
        y = model.get(name).output.save()
    with model.trace(IDS):
        unedited = model.get(name).output.save()
    assert relative_error(mu, truth(plain("llama"), name, IDS)) < 1e-10
    assert not torch.allclose(y, unedited)


@pytest.mark.parametrize("kind", ["mlp", "block"])
def test_an_edit_of_the_model_sees_and_is_seen(kind: str) -> None:
    model = TransformersModel(models.huggingface("llama", F64), tokenizer=tokenizer())
    name, before = site("llama", kind), site("llama", "block", 0)
    with model.edit(inplace=True):
        model.get(before).output = model.get(before).output * 2
    with model.edit(inplace=True):
        seen.append(centroid(model.get(name)))
    with model.trace(IDS):
        mu = centroid(model.get(name)).save()
    hook = plain("llama").get_submodule(before).register_forward_hook(lambda m, a, y: y * 2)
    expected = truth(plain("llama"), name, IDS)
    hook.remove()
    assert relative_error(mu, expected) < 1e-10
    assert relative_error(seen.pop(), expected) < 1e-10
    model.clear_edits()
    with model.trace(IDS):
        mu = centroid(model.get(name)).save()
    assert relative_error(mu, truth(plain("llama"), name, IDS)) < 1e-10


seen: list[Tensor] = []


def _steer(_module: nn.Module, args: Any) -> Any:
    return (args[0] + 0.5, *args[1:])


def _double(_module: nn.Module, _args: Any, output: Any) -> Any:
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


@pytest.mark.parametrize(
    ("kind", "where", "hook"),
    [
        ("block", "", _steer),
        ("block", ".mlp", _steer),
        ("block", ".self_attn", _double),
        ("mlp", "", _steer),
        ("mlp", ".gate_proj", _double),
        ("mlp", ".down_proj", _steer),
        ("mlp", ".act_fn", _double),
    ],
)
def test_hooks_of_torch_are_part_of_the_model(kind: str, where: str, hook: Any) -> None:
    """Each applies once: a module's centroid is taken with respect to what its pre-hooks leave."""
    hf = models.huggingface("llama", F64)
    name = site("llama", kind)
    module = hf.get_submodule(name + where)
    register = "register_forward_pre_hook" if hook is _steer else "register_forward_hook"
    getattr(module, register)(hook)
    expected = truth(hf, name, IDS)
    model = TransformersModel(hf, tokenizer=tokenizer())
    with model.trace(IDS):
        mu = centroid(model.get(name)).save()
    assert relative_error(mu, expected) < 1e-10


def test_a_hook_that_comes_and_goes() -> None:
    model, name = (
        TransformersModel(models.huggingface("gpt2", F64), tokenizer=tokenizer()),
        site("gpt2", "mlp"),
    )
    found = []
    for hooked in (False, True, False):
        hook = model.get(f"{name}.c_fc")._module.register_forward_hook(_double) if hooked else None
        with model.trace(IDS):
            mu = centroid(model.get(name)).save()
        found.append(mu)
        if hook is not None:
            hook.remove()
    assert torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], found[1])


def test_a_module_that_was_changed_is_recognised_anew() -> None:
    hf = models.huggingface("gpt2", F64)
    model, name = TransformersModel(hf, tokenizer=tokenizer()), site("gpt2", "mlp")
    with model.trace(IDS):
        centroid(model.get(name))
    model.get(name).act = nn.Tanh()
    with model.trace(IDS):
        mu = centroid(model.get(name)).save()
    assert relative_error(mu, truth(hf, name, IDS)) < 1e-10


def test_writing_to_a_pre_activation_in_place() -> None:
    class Shifted(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            z = self[0](x)
            z += 1.5
            return self[2](self[1](z))

    torch.manual_seed(0)
    net = nn.Sequential(Shifted(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), nn.Tanh()).double()
    x = torch.randn(2, 3, 4, dtype=F64)
    model = NNsight(net)
    with model.trace(x):
        mu = centroid(model[0]).save()
    assert relative_error(mu, truth(net, "0", x)) < 1e-10


def test_activations_in_place() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate = nn.Linear(4, 8), nn.Linear(4, 8)
            self.down, self.act = nn.Linear(8, 4), nn.SiLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            gate = self.act(self.gate(x))
            return self.down(gate * self.up(x))

    torch.manual_seed(0)
    net, x = nn.Sequential(Gated(), nn.Tanh()).double(), torch.randn(2, 3, 4, dtype=F64)
    expected, y = truth(net, "0", x), net(x)
    model = NNsight(net)
    with model.trace(x):
        mu, out = centroid(model[0]).save(), model.output.save()
    assert relative_error(mu, expected) < 1e-10
    assert torch.equal(out, y)


@pytest.mark.parametrize("kind", ["mlp", "block"])
def test_dropout_is_the_models_own(kind: str) -> None:
    hf = models.huggingface("gpt2", F64).train()
    name = site("gpt2", kind)
    torch.manual_seed(7)
    expected = truth(hf, name, IDS)
    model = TransformersModel(hf, tokenizer=tokenizer())
    torch.manual_seed(7)
    with model.trace(IDS):
        mu, logits = centroid(model.get(name)).save(), model.output.logits.save()
    torch.manual_seed(7)
    with model.trace(IDS):
        alone = model.output.logits.save()
    assert relative_error(mu, expected) < 1e-10
    assert torch.equal(logits, alone)


def test_running_statistics_are_the_models_own() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
    net, x = nn.Sequential(inner, nn.Tanh()).double(), torch.randn(5, 4, dtype=F64)
    expected, before = truth(net, "0", x), [b.clone() for b in net.buffers()]
    net(x)
    after = [b.clone() for b in net.buffers()]
    for buffer, value in zip(net.buffers(), before, strict=True):
        buffer.copy_(value)
    model = NNsight(net)
    with model.trace(x):
        mu = centroid(model[0]).save()
    assert relative_error(mu, expected) < 1e-10
    for buffer, value in zip(net.buffers(), after, strict=True):
        assert torch.equal(buffer, value)


def test_source_instrumented_modules() -> None:
    model = TransformersModel(models.huggingface("llama", F64), tokenizer=tokenizer())
    mlp, block = (model.get(site("llama", kind)) for kind in ("mlp", "block"))
    assert mlp.source.names
    assert block.source.names
    with model.trace(IDS):
        whole = centroid(block).save()
        mu = centroid(mlp).save()
        act = mlp.source.self_down_proj_0.input.save()
    for found, kind in ((whole, "block"), (mu, "mlp")):
        assert relative_error(found, truth(plain("llama"), site("llama", kind), IDS)) < 1e-10
    assert act.shape == (*IDS.shape, models.D_MLP)

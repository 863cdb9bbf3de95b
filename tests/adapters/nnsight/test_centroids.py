"""Centroids inside nnsight's traces, against gradients taken outside the package."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from nnsight import Envoy, NNsight
from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.modeling.transformers import TransformersModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    ViTConfig,
    ViTModel,
)

import lch_plugin as lch
from lch_plugin.cotangents import Metric, Random
from tests import models, nnsight_server
from tests.models import relative_error

# How a loop over the steps of a generation ends.
pytestmark = pytest.mark.filterwarnings("ignore:.*was never reached", "ignore:Module '")

F64 = torch.float64
IDS = models.tokens(batch=2, pos=6)
centroid = lch.nnsight.centroid

# Where a family keeps its layers, and in a layer its attention and a norm.
NAMES = {
    "gpt2": ("transformer.h", "attn", "ln_1"),
    "llama": ("model.layers", "self_attn", "input_layernorm"),
    "gemma3_text": ("model.layers", "self_attn", "pre_feedforward_layernorm"),
    "phi3": ("model.layers", "self_attn", "post_attention_layernorm"),
}
KINDS = ("mlp", "attn", "block", "norm")


@cache
def plain(family: str) -> Any:
    """HuggingFace's model, which neither nnsight nor this package has seen."""
    return models.huggingface(family, F64)


@cache
def traced(family: str) -> Any:
    return TransformersModel(models.huggingface(family, F64), tokenizer=tokenizer())


@cache
def tokenizer() -> Any:
    words = {f"w{i}": i for i in range(models.D_VOCAB)}
    splitting = Tokenizer(WordLevel(words, unk_token="w0"))
    splitting.pre_tokenizer = Whitespace()
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "w0")
    return PreTrainedTokenizerFast(tokenizer_object=splitting, **special)


def text(ids: Tensor) -> str:
    return " ".join(f"w{i}" for i in ids.tolist())


def site(family: str, kind: str, layer: int = 1) -> str:
    layers, attn, norm = NAMES[family]
    return (
        f"{layers}.{layer}"
        + {"mlp": ".mlp", "attn": f".{attn}", "block": "", "norm": f".{norm}"}[kind]
    )


@contextmanager
def gradients(
    module: nn.Module, v: Tensor | Callable[[Tensor], Tensor] | None = None
) -> Iterator[list[Tensor]]:
    """The centroid of every call of a module, by autograd and torch's own hooks alone."""
    found: list[Tensor] = []
    leaves: list[Tensor] = []

    def enter(_module: Any, args: Any, kwargs: Any) -> Any:
        key = None if args else next(k for k, v in kwargs.items() if isinstance(v, Tensor))
        leaf = (args[0] if key is None else kwargs[key]).detach().clone().requires_grad_()
        leaves.append(leaf)
        return ((leaf, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: leaf})

    def leave(_module: Any, _args: Any, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
        w = v(y.detach()) if callable(v) else torch.ones_like(y) if v is None else v
        mu = torch.autograd.grad(y, leaves.pop(), w.to(y).expand_as(y), retain_graph=True)
        found.extend(mu)

    hooks = [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave),
    ]
    try:
        # Keys and values are written in place.
        with torch.enable_grad(), torch.autograd.graph.allow_mutation_on_saved_tensors():
            yield found
    finally:
        for hook in hooks:
            hook.remove()


def truth(
    model: nn.Module, name: str, *args: Any, v: Any = None, call: int = 0, **kwargs: Any
) -> Tensor:
    """The centroid of one call of a module in a model's forward pass."""
    with gradients(model.get_submodule(name), v) as found:
        model(*args, **kwargs)
    return found[call]


# --- What a trace gives -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", NAMES)
def test_a_centroid_is_the_gradient(family: str, kind: str) -> None:
    model, name = traced(family), site(family, kind)
    with model.trace(IDS):
        mu = centroid(model.get(name), Random(0)).save()
    r = Random(0).at(torch.ones(models.D_MODEL, dtype=F64))
    assert relative_error(mu, truth(plain(family), name, IDS, v=r)) < 1e-10
    assert not mu.requires_grad
    assert mu.dtype == F64


@pytest.mark.parametrize("family", NAMES)
def test_many_layers_and_sites_in_one_trace(family: str) -> None:
    model, found = traced(family), {}
    with model.trace(IDS):
        for layer in range(models.N_LAYERS):
            for kind in ("block", "attn", "mlp"):
                name = site(family, kind, layer)
                found[name] = centroid(model.get(name)).save()
    assert len(found) == 3 * models.N_LAYERS
    for name, mu in found.items():
        assert relative_error(mu, truth(plain(family), name, IDS)) < 1e-10


class OfTheOutput:
    """A user's own cotangent, which depends on what the module writes."""

    name = "output"

    def at(self, y: Tensor) -> Tensor:
        return y.add_(1)  # It is a copy.


@pytest.mark.parametrize("kind", ["mlp", "attn", "block"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_cotangents(family: str, kind: str) -> None:
    model, name = traced(family), site(family, kind)
    v = torch.linspace(-1, 1, models.D_MODEL)
    found = {}
    for key, cotangent in {"vector": v, "random": Random(3), "own": OfTheOutput()}.items():
        with model.trace(IDS):
            found[key] = centroid(model.get(name), cotangent).save()
    for key, w in {"vector": v, "random": Random(3).at, "own": lambda y: y + 1}.items():
        assert relative_error(found[key], truth(plain(family), name, IDS, v=w)) < 1e-10


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("kind", ["mlp", "block"])
def test_any_grad_mode(kind: str, mode: Callable[[], Any]) -> None:
    model, name = traced("llama"), site("llama", kind)
    with mode():
        with model.trace(IDS):
            mu = centroid(model.get(name)).save()
    assert relative_error(mu, truth(plain("llama"), name, IDS)) < 1e-10
    assert not mu.requires_grad
    assert all(p.grad is None for p in model._module.parameters())


@pytest.mark.parametrize("family", NAMES)
def test_the_model_computes_the_same_to_the_bit(family: str) -> None:
    model = traced(family)
    with model.trace(IDS):
        logits = model.output.logits.save()
    with model.trace(IDS):
        for layer in range(models.N_LAYERS):
            for kind in ("block", "attn", "mlp"):
                centroid(model.get(site(family, kind, layer)), Random(0))
        asked = model.output.logits.save()
    assert torch.equal(asked, logits)
    with torch.no_grad():
        assert torch.equal(plain(family)(IDS).logits, logits)


@pytest.mark.parametrize("kind", ["mlp", "block"])
def test_half_precision_models_give_float32(kind: str) -> None:
    hf = models.huggingface("llama", torch.bfloat16)
    model = TransformersModel(hf, tokenizer=tokenizer())
    with model.trace(IDS):
        mu = centroid(model.get(site("llama", kind))).save()
    assert mu.dtype == torch.float32
    assert relative_error(mu, truth(plain("llama"), site("llama", kind), IDS)) < 0.1


def test_values_next_to_a_centroid_are_as_without_it() -> None:
    """An activation that a closed form evaluates is no call of the model's."""
    model, mlp = traced("phi3"), traced("phi3").model.layers[1].mlp
    with model.trace(IDS):
        alone = mlp.activation_fn.output.save()
    with model.trace(IDS):
        centroid(mlp)
        act, down = mlp.activation_fn.output.save(), mlp.down_proj.input.save()
    assert torch.equal(act, alone)
    assert down.shape[-1] == models.D_MLP


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_the_first_centroid_of_a_model_leaves_every_call_to_the_trace(family: str) -> None:
    """It is found out what a module is while the trace stands down, its activation included."""
    hf = models.huggingface(family, torch.float64)
    model, name = NNsight(hf), site(family, "mlp")
    mlp = model.get(name)
    act = {"gpt2": "act", "phi3": "activation_fn"}[family]
    ids = models.tokens(2, 6)
    with model.trace(ids):
        alone = getattr(mlp, act).output.save()
    fresh = NNsight(models.huggingface(family, torch.float64))
    mlp = fresh.get(name)
    with fresh.trace(ids):
        mu = lch.nnsight.centroid(mlp).save()
        beside = getattr(mlp, act).output.save()
    assert torch.equal(beside, alone)
    assert mu.any()


def test_cotangents_do_not_disturb_an_activation_without_a_kernel() -> None:
    class Squared(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return F.relu(z).square()

    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 8), Squared(), nn.Linear(8, 4)), nn.Tanh())
    model, x = NNsight(net), torch.randn(3, 4)
    with model.trace(x):
        mu = centroid(model[0], OfTheOutput()).save()
    with model.trace(x):
        centroid(model[0])
        act = model[0][1].output.save()
    assert torch.equal(act, net[0][1](net[0][0](x)))
    assert relative_error(mu, truth(net, "0", x, v=net[0](x).detach() + 1)) < 1e-6


# --- Interventions ----------------------------------------------------------------------------


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


# --- Several prompts, several steps -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "attn", "block"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"), [("eager", torch.float32, 1e-5), ("sdpa", F64, 1e-6)]
)
def test_invokes_of_different_lengths(
    family: str, kind: str, attention: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Tokens have the centroids that they have alone; nnsight pads on the left."""
    hf = models.huggingface(family, dtype)
    hf.set_attn_implementation(attention)
    model, name = TransformersModel(hf, tokenizer=tokenizer()), site(family, kind)
    short, long = IDS[0, :3], IDS[1]
    with model.trace() as tracer:
        with tracer.invoke(text(short)):
            of_short = centroid(model.get(name)).save()
        with tracer.invoke(text(long)):
            of_long = centroid(model.get(name)).save()
        with tracer.invoke():
            of_both = centroid(model.get(name)).save()
    assert of_both.shape == (2, len(long), models.D_MODEL)
    assert relative_error(of_short, of_both[:1]) < tolerance
    assert relative_error(of_long, of_both[1:]) < tolerance
    for mu, ids in ((of_short[:, -len(short) :], short), (of_long, long)):
        assert relative_error(mu, truth(plain(family), name, ids[None])) < tolerance


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("kind", ["mlp", "attn", "block"])
@pytest.mark.parametrize("family", NAMES)
def test_as_many_invokes_as_tokens(family: str, kind: str, n: int) -> None:
    """Nothing without rows is cut to rows."""
    model, name, ids = traced(family), site(family, kind), models.tokens(2, n, seed=5)
    with model.trace() as tracer:
        with tracer.invoke(ids[:1]):
            first = centroid(model.get(name)).save()
        with tracer.invoke(ids[1:]):
            second = centroid(model.get(name)).save()
    expected = truth(plain(family), name, ids)
    assert relative_error(torch.cat([first, second]), expected) < 1e-10


def steps(hf: Any, name: str, ids: Tensor) -> list[Tensor]:
    """The centroids of greedy decoding with a cache, one forward pass each."""
    state: dict[str, Any] = {"input_ids": ids}
    with gradients(hf.get_submodule(name)) as found:
        for _ in range(4):
            out = hf(**state, use_cache=True)
            state = {
                "input_ids": out.logits[:, -1:].argmax(-1),
                "past_key_values": out.past_key_values,
            }
    return found


N_NEW = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.mark.parametrize("kind", ["mlp", "attn", "block"])
@pytest.mark.parametrize("family", NAMES)
def test_generation(family: str, kind: str) -> None:
    """Every step has its own, through its own keys and values; the tokens do not change."""
    model, name = traced(family), site(family, kind)
    with model.generate(IDS, **N_NEW):
        alone = model.generator.output.save()
    with model.generate(**N_NEW) as tracer:
        found = [].save()
        with tracer.invoke(IDS):
            for _ in tracer.iter[:]:
                found.append(centroid(model.get(name)))
        with tracer.invoke():
            tokens = model.generator.output.save()
    assert torch.equal(tokens, alone)
    expected = steps(plain(family), name, IDS)
    assert len(found) == 4
    for mu, step in zip(found, expected, strict=True):
        assert relative_error(mu, step) < 1e-9


@pytest.mark.parametrize("kind", ["mlp", "block"])
def test_chosen_steps_of_a_generation(kind: str) -> None:
    model, name = traced("gemma3_text"), site("gemma3_text", kind)
    with model.generate(IDS, **N_NEW) as tracer:
        found = [].save()
        for _ in tracer.iter[1:3]:
            found.append(centroid(model.get(name)))
    for mu, step in zip(found, steps(plain("gemma3_text"), name, IDS)[1:3], strict=True):
        assert relative_error(mu, step) < 1e-9


@pytest.mark.parametrize("family", NAMES)
def test_the_steps_of_an_mlp_are_the_positions_of_its_sequence(family: str) -> None:
    model, name = traced(family), site(family, "mlp")
    with model.generate(IDS, **N_NEW) as tracer:
        found = [].save()
        for _ in tracer.iter[:4]:
            found.append(centroid(model.get(name)))
        tokens = tracer.result.save()
    expected = truth(plain(family), name, tokens[:, :-1])
    assert relative_error(torch.cat(list(found), 1), expected) < 1e-6


@pytest.mark.parametrize("kind", ["mlp", "attn", "block"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_generation_of_several_prompts(family: str, kind: str) -> None:
    """Each through its own rows of the cache."""
    model, name = traced(family), site(family, kind)
    with model.generate(**N_NEW) as tracer:
        first, second = [].save(), [].save()
        with tracer.invoke(IDS[:1]):
            for _ in tracer.iter[:]:
                first.append(centroid(model.get(name)))
        with tracer.invoke(IDS[1:]):
            for _ in tracer.iter[:]:
                second.append(centroid(model.get(name)))
        with tracer.invoke():
            tokens = tracer.result.save()
    with model.generate(IDS, **N_NEW):
        alone = model.generator.output.save()
    assert torch.equal(tokens, alone)
    expected = steps(plain(family), name, IDS)
    for *pair, step in zip(first, second, expected, strict=True):
        assert relative_error(torch.cat(pair), step) < 1e-9


@pytest.mark.parametrize("n_prompts", [1, 2])
def test_generation_with_a_static_cache(n_prompts: int) -> None:
    model, name = traced("gemma3_text"), site("gemma3_text", "block")
    options = {**N_NEW, "cache_implementation": "static", "disable_compile": True}
    with model.generate(**options) as tracer:
        found = [[] for _ in range(n_prompts)].save()
        for i, mine in enumerate(found):
            with tracer.invoke(IDS[i : i + 1]):
                for _ in tracer.iter[:]:
                    mine.append(centroid(model.get(name)))
        with tracer.invoke():
            tokens = tracer.result.save()
    with model.generate(IDS[:n_prompts], **options):
        alone = model.generator.output.save()
    assert torch.equal(tokens, alone)
    expected = steps(plain("gemma3_text"), name, IDS[:n_prompts])
    for *pair, step in zip(*found, expected, strict=True):
        assert relative_error(torch.cat(pair), step) < 1e-6


def hybrid() -> Any:
    """Linear attention beside full attention, with states that it writes to in place."""
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=models.D_VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        mlp_only_layers=[0, 1],
    )
    return Qwen3NextForCausalLM(config).eval()


def test_generation_with_linear_attention() -> None:
    model, hf = TransformersModel(hybrid(), tokenizer=tokenizer()), hybrid()
    with model.generate(IDS, **N_NEW):
        alone = model.generator.output.save()
    with model.generate(**N_NEW) as tracer:
        found = [].save()
        with tracer.invoke(IDS):
            for _ in tracer.iter[:]:
                found.append(centroid(model.model.layers[0]))
        with tracer.invoke():
            tokens = tracer.result.save()
    assert torch.equal(tokens, alone)
    for mu, step in zip(found, steps(hf, "model.layers.0", IDS), strict=True):
        assert relative_error(mu, step) < 1e-4


# --- Other models ---------------------------------------------------------------------------------


class Twice(nn.Module):
    """A block that runs twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(4, 4), nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(self.block(x)) + self.mlp(x)
        return x


@pytest.mark.parametrize("name", ["mlp", "block"])
def test_a_module_that_runs_twice(name: str) -> None:
    torch.manual_seed(0)
    net, x = Twice().double(), torch.randn(3, 4, dtype=F64)
    r = torch.tensor([1.0, -2.0, 0.5, 3.0])
    expected = [truth(net, name, x, v=r, call=call) for call in range(2)]
    model = NNsight(net)
    with model.trace(x):
        mu = centroid(model.get(name), r).save()
    assert relative_error(mu, expected[0]) < 1e-10
    with model.trace(x) as tracer:
        each = [].save()
        for _ in tracer.iter[:2]:
            each.append(centroid(model.get(name), r))
    for mu, step in zip(each, expected, strict=True):
        assert relative_error(mu, step) < 1e-10
    with model.trace(x) as tracer:
        for _ in tracer.iter[1]:
            mu = centroid(model.get(name), r).save()
    assert relative_error(mu, expected[1]) < 1e-10


@pytest.mark.parametrize("kind", ["", ".attention"])
def test_tied_layers_of_albert(kind: str) -> None:
    config = AlbertConfig(
        vocab_size=50,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
    )
    torch.manual_seed(0)
    hf = AlbertModel(config).double().eval()
    name = "encoder.albert_layer_groups.0.albert_layers.0" + kind
    r = Random(0).at(torch.ones(32, dtype=F64))
    expected = [truth(hf, name, IDS, v=r, call=call) for call in range(3)]
    model = NNsight(hf)
    with model.trace(IDS) as tracer:
        each = [].save()
        for _ in tracer.iter[:]:
            each.append(centroid(model.get(name), Random(0)))
    for mu, step in zip(each, expected, strict=True):
        assert relative_error(mu, step) < 1e-9


@pytest.mark.parametrize("name", ["", "0", "2", "2.0", "3"])
def test_plain_torch_models(name: str) -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(6, 9), nn.SiLU(), nn.Linear(9, 6))
    net = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Tanh(), mlp, nn.Linear(6, 3)).double()
    x = torch.randn(2, 4, 6, dtype=F64)
    expected = truth(net, name, x)
    model = NNsight(net)
    with model.trace(x):
        mu = centroid(model.get(name) if name else model).save()
    assert relative_error(mu, expected) < 1e-10


@pytest.mark.parametrize("name", ["layers.1", "layers.1.mlp", "layers.1.attention"])
def test_vision(name: str) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
    )
    hf = ViTModel(config).double().eval()
    pixels = torch.randn(2, 3, 16, 16, dtype=F64)
    expected = truth(hf, name, pixels)
    model = NNsight(hf)
    with model.trace(pixels):
        mu = centroid(model.get(name)).save()
        rest = model.output.last_hidden_state.save()
    assert relative_error(mu, expected) < 1e-10
    with torch.no_grad():
        assert torch.equal(rest, hf(pixels).last_hidden_state)


def test_the_whole_model_reads_embeddings() -> None:
    model = traced("llama")
    embeddings = torch.randn(2, 5, models.D_MODEL, dtype=F64)
    with model.trace(inputs_embeds=embeddings):
        mu = centroid(model).save()
    assert relative_error(mu, truth(plain("llama"), "", inputs_embeds=embeddings)) < 1e-10


def test_renamed_modules() -> None:
    """As nnterp names them, and the projections too."""
    names = {
        "transformer": "model",
        "h": "layers",
        "attn": "self_attn",
        "c_fc": "up_proj",
        "mlp": "feed_forward",
    }
    hf = models.huggingface("gpt2", F64)
    model = TransformersModel(hf, tokenizer=tokenizer(), rename=names)
    with model.trace(IDS):
        layer = model.model.layers[1]
        found = {"block": centroid(layer), "attn": centroid(layer.self_attn)}.save()
        found["mlp"] = centroid(layer.feed_forward)
    for kind, mu in found.items():
        assert relative_error(mu, truth(plain("gpt2"), site("gpt2", kind), IDS)) < 1e-10


def test_the_deprecated_alias() -> None:
    with pytest.warns(nnsight.NNsightDeprecationWarning):
        model = nnsight.LanguageModel(models.huggingface("gpt2", F64), tokenizer=tokenizer())
    with model.trace(text(IDS[0])):
        mu = centroid(model.transformer.h[1].mlp).save()
    assert relative_error(mu, truth(plain("gpt2"), site("gpt2", "mlp"), IDS[:1])) < 1e-10


def test_a_model_that_is_loaded_by_its_first_trace(tmp_path: Path) -> None:
    models.huggingface("gpt2").save_pretrained(tmp_path)
    model = TransformersModel(
        str(tmp_path), task="text-generation", tokenizer=tokenizer(), dtype=F64
    )
    with model.trace(IDS):
        block = centroid(model.transformer.h[1]).save()
        mlp = centroid(model.transformer.h[1].mlp).save()
    for kind, mu in (("block", block), ("mlp", mlp)):
        assert relative_error(mu, truth(plain("gpt2"), site("gpt2", kind), IDS)) < 1e-10


@pytest.mark.parametrize("kind", ["mlp", "block"])
def test_a_trace_may_stop_there(kind: str) -> None:
    model, name, ran = traced("llama"), site("llama", kind), []
    hook = model.model.layers[2]._module.register_forward_hook(lambda *_: ran.append(1))
    with model.trace(IDS) as tracer:
        mu = centroid(model.get(name)).save()
        tracer.stop()
    hook.remove()
    assert relative_error(mu, truth(plain("llama"), name, IDS)) < 1e-10
    assert not ran


def test_a_session_shares_centroids() -> None:
    model, name = traced("llama"), site("llama", "mlp")
    with model.session():
        with model.trace(IDS):
            mu = centroid(model.get(name))
        with model.trace(IDS):
            again = centroid(model.get(name))
            difference = (mu - again).abs().max().save()
    assert difference == 0


# --- The persistent form --------------------------------------------------------------------------


def test_every_envoy_has_a_centroid() -> None:
    hf = models.huggingface("gpt2", F64)
    model = TransformersModel(hf, tokenizer=tokenizer(), envoys=lch.nnsight.CentroidEnvoy)
    with model.trace(IDS):
        found = {"block": model.transformer.h[1].centroid}.save()
        found["mlp"] = model.transformer.h[1].mlp.centroid
    for kind, mu in found.items():
        assert relative_error(mu, truth(plain("gpt2"), site("gpt2", kind), IDS)) < 1e-10


def test_a_subclass_chooses_its_cotangent() -> None:
    class Randomly(lch.nnsight.CentroidEnvoy):
        cotangent = Random(1)

    hf = models.huggingface("gpt2", F64)
    model = TransformersModel(hf, tokenizer=tokenizer(), envoys={"mlp": Randomly})
    with model.trace(IDS):
        mu = model.transformer.h[1].mlp.centroid.save()
    r = Random(1).at(torch.ones(models.D_MODEL, dtype=F64))
    assert relative_error(mu, truth(plain("gpt2"), site("gpt2", "mlp"), IDS, v=r)) < 1e-10
    assert type(model.transformer.h[1]) is Envoy


def test_what_goes_wrong_in_a_property_is_said() -> None:
    class Faulty:
        name = "faulty"

        def at(self, y: Tensor) -> Tensor:
            return y.nonexistent

    model = TransformersModel(
        models.huggingface("gpt2"), tokenizer=tokenizer(), envoys=lch.nnsight.CentroidEnvoy
    )
    model.transformer.h[1].mlp.cotangent = Faulty()
    with pytest.raises(RuntimeError, match="nonexistent"):
        with model.trace(IDS):
            model.transformer.h[1].mlp.centroid  # noqa: B018


# --- On a server ----------------------------------------------------------------------------------


def test_a_server_needs_nothing_of_ours(tmp_path: Path) -> None:
    """Requests run where this package and what it imports are missing, to the same values."""
    models.huggingface("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    torch.save(IDS, tmp_path / "ids.pt")
    command = [sys.executable, "-W", "ignore", nnsight_server.__file__, str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)
    found = {
        name: torch.load(tmp_path / f"{name}.pt") for name in ("trace", "generation", "envoys")
    }

    hf, r = models.huggingface("llama"), Random(3).at(torch.ones(models.D_MODEL))
    for kind, v in (("block", None), ("attn", r), ("mlp", None)):
        expected = truth(hf, site("llama", kind), IDS, v=v)
        assert relative_error(found["trace"][kind], expected) < 1e-5
    expected = truth(hf, site("llama", "mlp", 2), IDS, v=r)
    assert relative_error(found["trace"]["other"], expected) < 1e-5
    for kind in ("block", "mlp"):
        expected = truth(hf, site("llama", kind), IDS)
        assert relative_error(found["envoys"][kind], expected) < 1e-5
        of_steps = found["generation"][kind]
        assert len(of_steps) == 3
        for mu, step in zip(of_steps, steps(hf, site("llama", kind), IDS), strict=False):
            assert relative_error(mu, step) < 1e-5


# --- Nothing is left behind -----------------------------------------------------------------------


def test_memory_is_flat() -> None:
    model, counts = traced("llama"), []

    def live() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    for n in (20, 50):
        for _ in range(n):
            with model.trace(IDS):
                centroid(model.model.layers[1])
                mu = centroid(model.model.layers[1].mlp, torch.randn(models.D_MODEL)).save()
        counts.append(live())
    assert mu.grad_fn is None
    assert counts[0] == counts[1]


def test_a_model_may_be_thrown_away() -> None:
    def use() -> weakref.ref[nn.Module]:
        model = TransformersModel(models.huggingface("llama"), tokenizer=tokenizer())
        with model.trace(IDS):
            centroid(model.model.layers[1])
            centroid(model.model.layers[1].mlp)
        return weakref.ref(model.model.layers[1].mlp._module)

    module = use()
    gc.collect()
    assert module() is None


def test_a_failed_trace_leaves_the_next_alone() -> None:
    class Raises:
        name = "raises"

        def at(self, y: Tensor) -> Tensor:
            raise KeyError("mine")

    model = traced("llama")
    for kind in ("mlp", "block"):
        name = site("llama", kind)
        with pytest.raises(KeyError, match="mine"):
            with model.trace(IDS):
                centroid(model.get(name), Raises())
        with model.trace(IDS):
            mu = centroid(model.get(name)).save()
        assert relative_error(mu, truth(plain("llama"), name, IDS)) < 1e-10


# --- Bad input ------------------------------------------------------------------------------------


def test_outside_a_trace() -> None:
    with pytest.raises(lch.InputError, match="outside a trace"):
        centroid(traced("gpt2").transformer.h[0].mlp)


@pytest.mark.parametrize("kind", ["mlp", "block"])
def test_a_scan_has_no_values(kind: str) -> None:
    model = TransformersModel(models.huggingface("gpt2"), tokenizer=tokenizer())
    with pytest.raises(lch.InputError, match="no values"):
        with model.scan(IDS):
            centroid(model.get(site("gpt2", kind)))
    assert not any(p.is_meta for p in model._module.parameters())


@pytest.mark.usefixtures("as_users_run")
def test_not_an_envoy() -> None:
    model = traced("gpt2")
    with pytest.raises(lch.InputError, match=r"without \.output or \.input"):
        with model.trace(IDS):
            centroid(model.transformer.h[0].mlp.output)


@pytest.mark.parametrize("kind", ["mlp", "attn"])
def test_out_of_order(kind: str) -> None:
    model = traced("gpt2")

    def ask() -> None:
        with model.trace(IDS):
            model.transformer.h[1].output.save()
            centroid(model.get(site("gpt2", kind)))

    with pytest.raises(lch.SiteError, match="order the model runs"):
        ask()


def test_an_input_after_its_centroid() -> None:
    """Nnsight's own error, for a value of nnsight's own."""
    model = traced("gpt2")

    def ask() -> None:
        with model.trace(IDS):
            centroid(model.transformer.h[1].mlp)
            model.transformer.h[1].mlp.input.save()

    with pytest.raises(OutOfOrderError):
        ask()


def test_a_module_that_does_not_run() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = NNsight(Idle())
    with pytest.raises(lch.SiteError, match="does not call it"):
        with model.trace(torch.randn(2, 3)):
            centroid(model.idle)


@pytest.mark.parametrize("kind", ["mlp", "block"])
@pytest.mark.parametrize(
    ("cotangent", "error", "message"),
    [
        (Metric(lambda logits: logits.argmax()), lch.InputError, "differentiable"),
        (torch.ones(5), lch.InputError, "shape"),
        (torch.ones(1), lch.InputError, "shape"),
        (torch.zeros(models.D_MODEL), lch.InputError, "zero"),
        (torch.full((models.D_MODEL,), torch.nan), lch.InputError, "finite"),
        (torch.ones(models.D_MODEL, dtype=torch.int64), lch.InputError, "floating-point"),
        ("ones", lch.InputError, "cotangents"),
    ],
)
@pytest.mark.usefixtures("as_users_run")
def test_cotangents_that_cannot_work(kind: str, cotangent: Any, error: Any, message: str) -> None:
    model = traced("gpt2")
    for _ in range(2):
        with pytest.raises(error, match=message):
            with model.trace(IDS):
                centroid(model.get(site("gpt2", kind)), cotangent)


def test_weights_that_are_not_there() -> None:
    with torch.device("meta"):
        model = NNsight(nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3)))
    with pytest.raises(lch.SiteError, match="meta"):
        with model.trace(torch.randn(2, 3)):
            centroid(model[0])


@pytest.mark.parametrize("kind", ["mlp", "block"])
def test_quantised_weights(kind: str) -> None:
    hf = models.huggingface("llama")
    weight = hf.model.layers[1].mlp.up_proj.weight
    model = TransformersModel(hf, tokenizer=tokenizer())
    hf.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(lch.SiteError, match="unquantised"):
        with model.trace(IDS):
            centroid(model.get(site("llama", kind)))


def test_a_projection_that_nnsight_does_not_know() -> None:
    hf = models.huggingface("llama")
    model, mlp = TransformersModel(hf, tokenizer=tokenizer()), hf.model.layers[1].mlp
    mlp.up_proj = nn.Linear(models.D_MODEL, models.D_MLP, bias=False)
    with pytest.raises(lch.SiteError, match="Wrap it anew"):
        with model.trace(IDS):
            centroid(model.model.layers[1].mlp)


def test_a_model_that_reads_token_ids() -> None:
    model = traced("gpt2")
    with pytest.raises(lch.InputError, match="inputs_embeds"):
        with model.trace(IDS):
            centroid(model)


class OnesOfMine:
    name = "mine"

    def at(self, y: Tensor) -> Tensor:
        return torch.ones_like(y)


@pytest.mark.parametrize("cotangent", [None, torch.ones(models.D_MODEL), OnesOfMine()])
def test_a_vanishing_mlp_is_refused_each_time(cotangent: Any) -> None:
    hf = models.huggingface("gpt2", F64)
    with torch.no_grad():
        weight = hf.transformer.h[1].mlp.c_proj.weight
        weight -= weight.mean(-1, keepdim=True)
    model = TransformersModel(hf, tokenizer=tokenizer())
    mlp = model.transformer.h[1].mlp
    with model.trace(IDS):
        centroid(mlp, torch.randn(models.D_MODEL))  # Another vector of the same name.
    for _ in range(2):
        with pytest.raises(lch.VanishingCentroidError):
            with model.trace(IDS):
                centroid(mlp, cotangent)


@pytest.mark.parametrize("cotangent", [None, torch.ones(32), OnesOfMine()])
def test_a_vanishing_block_is_refused_each_time(cotangent: Any) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    model = NNsight(BertModel(config).double().eval())
    block = model.encoder.layer[1]
    with model.trace(IDS):
        mu = centroid(block, torch.randn(32)).save()
    assert mu.norm() > 0.1
    for _ in range(2):
        with pytest.raises(lch.VanishingCentroidError):
            with model.trace(IDS):
                centroid(block, cotangent)

"""Centroids of modules of plain models against gradients taken outside the package."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import lch_plugin as lch
from lch_plugin.adapters.huggingface import attach
from lch_plugin.adapters.huggingface.names import resolve
from lch_plugin.cotangents import Logit, Random
from tests import families, models
from tests.models import D_MODEL, relative_error

F64 = torch.float64
IDS = models.tokens(batch=2, pos=6)
BLOCKS = [f"transformer.h.{i}" for i in range(models.N_LAYERS)]
MLP, ATTN, BLOCK, SPAN = (
    *("transformer.h.1.mlp", "transformer.h.1.attn", "transformer.h.1"),
    "transformer.h.0:transformer.h.2",
)
# Overlapping, nested, with common ends, the model's end included.
SITES = [
    *(MLP, ATTN, BLOCK, SPAN, "transformer.h.1:transformer.h.2", "transformer.h.1.mlp.act"),
    *("transformer.h.1.ln_1:transformer.h.1.mlp", "transformer.h.2:", "transformer.h.0.mlp"),
]
# Families whose MLPs differ from each other: in layout, activation, place, or what is beside them.
MLPS = (
    *("afmoe", "arcee", "audio-spectrogram-transformer", "audioflamingo3", "bert", "codegen"),
    *("deepseek_v2", "ernie4_5_moe", "falcon", "falcon_h1", "gemma3n", "gemma4_text", "glm4v"),
    *("gpt_bigcode", "gpt_neo", "gptj", "granitemoehybrid", "hubert", "jamba", "lfm2"),
    *("llama4_text", "longt5", "modernbert-decoder", "nanochat", "nemotron_h", "openai-gpt", "phi"),
    *("qwen2_moe", "qwen3_5", "recurrent_gemma", "starcoder2", "switch_transformers", "t5gemma"),
)
VISION = {
    "num_hidden_layers": 2,
    "hidden_size": D_MODEL,
    "intermediate_size": models.D_MLP,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


@functools.cache
def _build(family: str) -> Any:
    return models.huggingface(family, F64)


@pytest.fixture
def gpt2() -> Iterator[Any]:
    """Built once: every test leaves a model as it found it."""
    model = _build("gpt2")
    yield model
    assert_untouched(model)


def other(model_type: str, **config: Any) -> Any:
    """A model of another family, its weights far from zero."""
    torch.manual_seed(0)
    config = {**families._BASE, "num_hidden_layers": 2, **config}
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **config))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.to(F64).eval()


def noise(*shape: int, seed: int = 3, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=F64, generator=generator).to(dtype)


def read(
    model: nn.Module, modules: Any = None, *args: Any, cotangent: Any = None, **kwargs: Any
) -> dict[str, Tensor]:
    """Centroids as a user without gradients gets them."""
    with attach(model, modules, cotangent=cotangent) as handle, torch.no_grad():
        model(*(args or (() if kwargs else (IDS,))), **kwargs)
    return dict(handle.cache)


def first_float(values: Any) -> Tensor:
    while not isinstance(values, Tensor):
        values = next(v for v in values if isinstance(v, Tensor | tuple | list))
    return values


def truth(
    model: nn.Module,
    name: str,
    *args: Any,
    v: Tensor | None = None,
    call: int = 0,
    **kwargs: Any,
) -> Tensor:
    """Centroid of one component, by hooks and `torch.autograd.grad`, no code of ours involved."""
    first, _, last = name.partition(":")
    last = last if ":" in name else first
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def start(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        found = next(a for a in values if isinstance(a, Tensor) and a.is_floating_point())
        x = found.clone() if found.requires_grad else found.detach().clone().requires_grad_()
        inputs.append(x)
        copy = x.clone()  # Which the module may write to.
        swap = lambda value: copy if value is found else value  # noqa: E731
        return tuple(map(swap, args)), {key: swap(value) for key, value in kwargs.items()}

    def end(_module: nn.Module, _args: Any, output: Any) -> None:
        output = getattr(output, "logits", getattr(output, "last_hidden_state", output))
        outputs.append(first_float(output))

    hooks = [
        model.get_submodule(first).register_forward_pre_hook(start, with_kwargs=True),
        model.get_submodule(last).register_forward_hook(end, prepend=True),
    ]
    try:
        with torch.enable_grad():
            model(*(args or (() if kwargs else (IDS,))), **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    y = outputs[call]
    v = torch.ones_like(y) if v is None else v.expand_as(y)
    return torch.autograd.grad(y, inputs[call], v)[0]


def assert_close(value: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert value.shape == expected.shape
    assert not value.requires_grad
    assert relative_error(value, expected) < tolerance


def assert_untouched(model: nn.Module) -> None:
    for name, module in model.named_modules():
        assert "forward" not in vars(module), name
        assert not module._forward_pre_hooks, name
        # transformers installs its own the first time it captures hidden states.
        assert all("capturing" in h.__qualname__ for h in module._forward_hooks.values()), name
    assert torch.is_grad_enabled()


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any], *, pre: bool = False) -> Iterator[None]:
    register = module.register_forward_pre_hook if pre else module.register_forward_hook
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize("family", models.FAMILIES)
def test_parts_of_language_models_equal_autograd(family: str) -> None:
    model, layers = _build(family), models.FAMILIES[family].layers
    blocks = [f"{layers}.{i}" for i in range(models.N_LAYERS)]
    children = dict(model.get_submodule(blocks[1]).named_children())
    attn = next(name for name in ("attn", "self_attn", "attention") if name in children)
    names = [*blocks, f"{blocks[1]}.{attn}", f"{blocks[0]}:{blocks[1]}", f"{blocks[1]}:"]
    names += [] if family == "opt" else [f"{blocks[1]}.mlp"]
    v = noise(D_MODEL)
    mus = read(model, names)
    directed = read(model, names[:-2], cotangent=v)
    for name in names:
        assert_close(mus[name], truth(model, name))
    for name in names[:-2]:
        if not name.endswith(":"):
            assert_close(directed[name], truth(model, name, v=v))


@pytest.mark.parametrize("family", MLPS)
def test_every_mlp_that_is_found_equals_autograd(family: str) -> None:
    model, inputs = families.huggingface(family), families.inputs(family)
    x = inputs.pop("input")
    with torch.no_grad():
        expected = model(x, **inputs)[0]
        with attach(model) as handle:
            assert torch.equal(model(x, **inputs)[0], expected)
    assert set(handle.methods.values()) == {"closed form"}
    assert len(handle.cache) > 0
    for name in handle.cache:
        for i in range(handle.cache.calls(name)):
            assert_close(handle.cache[name, i], truth(model, name, x, call=i, **inputs))


@pytest.mark.parametrize(
    ("model_type", "config", "found"),
    [
        ("dinov2", {**VISION, "mlp_ratio": 2}, "encoder.layer.0.mlp"),
        ("dinov2", {**VISION, "use_swiglu_ffn": True}, "encoder.layer.0.mlp"),
        ("dinov3_vit", {**VISION, "use_gated_mlp": True}, "model.layer.0.mlp"),
        ("vit", VISION, "layers.0.mlp"),
        ("siglip_vision_model", VISION, "encoder.layers.0.mlp"),
        ("convnext", {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2}, None),
    ],
)
def test_vision_models_from_mlps_to_the_whole(
    model_type: str, config: dict[str, Any], found: str | None
) -> None:
    model = other(model_type, **config)
    image = noise(2, 3, 16, 16) if found else noise(2, 3, 32, 32)
    if found is not None:
        mus = read(model, pixel_values=image)
        assert next(iter(mus)) == found
        assert len(mus) >= 2
        for name, mu in mus.items():
            assert_close(mu, truth(model, name, pixel_values=image))
    v = noise(D_MODEL if found else 32)  # The norm at the end ignores all ones.
    v = v[: model(pixel_values=image).last_hidden_state.shape[-1]]
    name = ""
    assert_close(
        read(model, name, pixel_values=image, cotangent=v)[name],
        truth(model, name, pixel_values=image, v=v),
    )


def test_convolutions_and_mlps_in_a_sequential() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Sequential(nn.Linear(64, 20), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(20, 5)),
    ).to(F64)
    net.eval()
    image = noise(2, 3, 8, 8)
    names = ["", "0", "0:2", "2:4", "5", "0:5", "3"]
    with attach(net, names) as handle, torch.no_grad():
        net(image)
    assert handle.methods["5"] == "closed form"
    for name in names:
        assert_close(handle.cache[name], truth(net, name, image))


def test_mixtures_of_experts() -> None:
    model = families.huggingface("mixtral")
    name = "model.layers.1.mlp"
    with attach(model, name) as handle, torch.no_grad():
        model(IDS)
    assert handle.methods == {name: "VJP"}
    assert_close(handle.cache[name], truth(model, name, IDS))


def test_queries_keys_and_values_that_are_one_tensor() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True).to(F64).eval()
    x, v = noise(2, 5, 16), noise(16)
    mus = read(layer, ["", "self_attn"], x, cotangent=v)
    for name in ("", "self_attn"):
        expected = truth(layer, name, x.clone().requires_grad_(), v=v)
        assert_close(mus[name], expected)


def test_what_passes_by_a_stretch_is_no_part_of_it(gpt2: Any) -> None:
    # The residual stream goes around ln_1, which has the same input.
    name = "transformer.h.1.ln_1:transformer.h.1.mlp"
    expected = truth(gpt2, name)
    assert_close(read(gpt2, name)[name], expected)
    assert_close(read(gpt2, [name, BLOCK])[name], expected)
    with attach(gpt2, name) as handle:
        gpt2(IDS)
    assert_close(handle.cache[name], expected)


def test_components_together_are_as_each_alone(gpt2: Any) -> None:
    together = read(gpt2, SITES)
    assert list(together) == [name for name in together if name in SITES]
    assert set(together) == set(SITES)
    for name in SITES:
        assert_close(together[name], truth(gpt2, name))
        assert torch.equal(together[name], read(gpt2, name)[name])


def test_handles_of_a_model_and_of_parts_of_it_share_graphs(gpt2: Any) -> None:
    # They overlap: each begins within the other's stretch, or ends there.
    whole, part = SPAN, "h.1:ln_f"
    v = noise(D_MODEL)
    for order in ([gpt2, gpt2.transformer], [gpt2.transformer, gpt2]):
        handles = [attach(m, whole if m is gpt2 else part, cotangent=v) for m in order]
        with torch.no_grad():
            gpt2(IDS)
        for handle in handles:
            handle.detach()
            (name,) = handle.cache
            assert_close(handle.cache[name], truth(handle.model, name, IDS, v=v))


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06), (torch.float16, 5e-3)]
)
def test_lower_precision_gives_float32_near_float64(
    gpt2: Any, dtype: torch.dtype, limit: float
) -> None:
    names = [MLP, ATTN, BLOCK, SPAN]
    exact, mus = read(gpt2, names), read(models.huggingface("gpt2", dtype), names)
    for name in names:
        assert mus[name].dtype is torch.float32
        assert relative_error(mus[name], exact[name]) < limit


def test_models_may_change_dtype_after_attaching(gpt2: Any) -> None:
    model = models.huggingface("gpt2", torch.float32)
    with attach(model, [MLP, BLOCK]) as handle, torch.no_grad():
        model(IDS)
        assert handle.cache[MLP].dtype is torch.float32
        model.to(F64)
        model(IDS)
    for name in (MLP, BLOCK):
        assert_close(handle.cache[name], truth(model, name))


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("transformer.h.*.mlp", [f"{b}.mlp" for b in BLOCKS]),
        ("transformer.h.?", BLOCKS),
        ("transformer.h.[0-1]", BLOCKS[:2]),
        ("transformer.h.[!0]", BLOCKS[1:]),
        ("transformer.w*", ["transformer.wte", "transformer.wpe"]),
        ("*", ["transformer", "lm_head"]),
        ("transformer.h.2.*tn", ["transformer.h.2.attn"]),
        (["transformer.h.2", "transformer.h.0", "transformer.h.?"], BLOCKS),
        ("transformer.h.*:transformer.h.*.mlp", [f"{b}:{b}.mlp" for b in BLOCKS]),
        # A stretch from a module to itself is the module.
        (
            "transformer.h.*.ln_?:transformer.h.*.ln_?",
            [f"{b}.ln_{i}" for b in BLOCKS for i in "12"],
        ),
        ("", [""]),
        (["transformer.h.2:", BLOCKS[1]], ["transformer.h.2:", BLOCKS[1]]),
        ("transformer.h.1:transformer.h.2", ["transformer.h.1:transformer.h.2"]),
    ],
)
def test_names_and_wildcards(gpt2: Any, patterns: Any, expected: list[str]) -> None:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    names = [target.name for target in resolve(gpt2, patterns)]
    assert names == expected


def test_names_are_in_the_order_of_the_model(gpt2: Any) -> None:
    with attach(gpt2, ["transformer.h.2", "transformer.h.*.mlp", SPAN, ATTN]) as handle:
        assert handle.centroid_names == [
            *("transformer.h.0.mlp", ATTN, MLP, SPAN, "transformer.h.2", "transformer.h.2.mlp"),
        ]


@pytest.mark.parametrize(
    ("modules", "error", "match"),
    [
        ("h.*.mlp", lch.SiteError, r"fits no module.*transformer\.h\.0\.mlp"),
        ("transformer.h.1.mpl", lch.SiteError, r"Near it are .*transformer\.h\.1\.mlp"),
        ("transformer.h.*:transformer.h.*.mpl", lch.SiteError, "does not"),
        ("transformer.h.1:transformer.h.*", lch.SiteError, "more wildcards"),
        ("transformer.h.[2-0]", lch.InputError, "bad character range"),
        ([], lch.InputError, "name at least one"),
        ([3], lch.InputError, "strings"),
        ([nn.ReLU()], lch.InputError, "strings"),
    ],
)
@pytest.mark.usefixtures("as_users_run")
def test_names_that_fit_nothing_are_refused(
    gpt2: Any, modules: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        attach(gpt2, modules)


@pytest.mark.usefixtures("as_users_run")
def test_models_without_mlps_and_things_that_are_no_models_are_refused() -> None:
    with pytest.raises(lch.SiteError, match="no MLP with a closed form"):
        attach(nn.Sequential(nn.Conv1d(2, 2, 1)))
    with pytest.raises(lch.InputError, match=r"torch\.nn\.Module"):
        attach(lambda x: x)  # type: ignore[arg-type]
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    for modules in (None, "1:2", ""):
        with pytest.raises(lch.SiteError, match="meta"):
            attach(net, modules)


def test_a_model_that_is_an_mlp_is_found_once() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3)))
    assert lch.huggingface.mlp_names(net) == [""]


# ---------------------------------------------------------------- nothing changes, nothing is left


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
    model = _build("llama")
    layer = "model.layers.1"
    embeddings = model.get_input_embeddings()(IDS).detach()
    options = {"output_attentions": True, "output_hidden_states": True, "use_cache": True}
    for names in ([f"{layer}.self_attn", layer], "model.layers.0:model.layers.2", ""):
        with attach(model, names), torch.no_grad():
            output = model(inputs_embeds=embeddings, **options)
        caches = [t for entry in output.past_key_values.layers for t in (entry.keys, entry.values)]
        for tensor in (output.logits, *output.hidden_states, *output.attentions, *caches):
            assert not tensor.requires_grad


# ---------------------------------------------------------------- copies, wrappers, training


def test_copies_of_a_model_are_not_attached(gpt2: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        expected = gpt2(IDS).logits
    with attach(gpt2, SITES) as handle, torch.no_grad():
        gpt2(IDS)
        before = {name: value.clone() for name, value in handle.cache.items()}
        gpt2.save_pretrained(tmp_path / "model")
        copies = [
            copy.deepcopy(gpt2),
            pickle.loads(pickle.dumps(gpt2)),
            AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager"),
        ]
        for model in copies:
            model(IDS.flip(1))
            assert torch.equal(model(IDS).logits, expected)
            model.transformer.h[1].mlp.c_fc.weight.mul_(2)
            assert not torch.equal(model(IDS).logits, expected)
        for name, value in before.items():
            assert torch.equal(handle.cache[name], value)
        assert torch.equal(gpt2(IDS).logits, expected)
    for model in copies:
        for name, value in read(model, [MLP, BLOCK]).items():
            assert_close(value, truth(model, name))


def test_forwards_that_others_wrap_before_and_after(gpt2: Any) -> None:
    calls: list[str] = []

    def wrap(module: nn.Module, label: str) -> Callable[[], None]:
        """As accelerate does: an attribute, and the old forward back where it was."""
        old, was_there = module.forward, "forward" in vars(module)

        @functools.wraps(old)
        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append(label)
            return old(*args, **kwargs)

        module.forward = forward

        def unwrap() -> None:
            module.forward = old
            if not was_there:
                del module.forward

        return unwrap

    mlp = gpt2.get_submodule(MLP)
    expected = read(gpt2, MLP)[MLP]
    unwrap_first = wrap(mlp, "first")
    one = attach(gpt2, MLP)
    wrap(mlp, "second")
    two = attach(gpt2, MLP)
    calls.clear()
    with torch.no_grad():
        gpt2(IDS)
    assert calls == ["second", "first"]
    assert torch.equal(one.cache[MLP], expected)
    assert torch.equal(two.cache[MLP], expected)
    one.detach()
    one.cache.clear()
    calls.clear()
    with torch.no_grad():
        gpt2(IDS)
    assert calls == ["second", "first"]
    assert not one.cache
    two.detach()
    two.cache.clear()
    with torch.no_grad():
        gpt2(IDS)
    assert not two.cache
    unwrap_first()
    assert_untouched(gpt2)


def test_gradient_checkpointing() -> None:
    model = models.huggingface("gpt2", F64)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    names = [MLP, ATTN, BLOCK, SPAN]
    expected = read(model, names)
    model.train()
    model(IDS, use_cache=False).logits.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with attach(model, names) as handle:
        model(IDS, use_cache=False).logits.sum().backward()
        for name in names:  # Modules that ran again for a gradient do not count.
            assert_close(handle.cache[name], expected[name])
    for ours, theirs in zip([p.grad for p in model.parameters()], gradients, strict=True):
        assert relative_error(ours, theirs) < 1e-12
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with attach(model, SPAN), pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(IDS, use_cache=False)


def test_training_mode_and_dropout() -> None:
    model = models.huggingface("gpt2", F64).train()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model(IDS).logits
    torch.manual_seed(0)
    with attach(model, [MLP, BLOCK]) as handle, torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
    assert [m.training for m in model.modules()] == modes
    torch.manual_seed(0)
    assert_close(handle.cache[BLOCK], truth(model, BLOCK))


# ---------------------------------------------------------------- padding and key-value caches


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_padded_prompts_have_the_centroids_they_have_alone(
    family: str, side: str, attention: str
) -> None:
    if family == "bert":
        model, layers = families.huggingface("bert"), "bert.encoder.layer"
        names = [f"{layers}.0.attention", f"{layers}.0", f"{layers}.0:{layers}.1"]
        names += [f"{layers}.0.intermediate:{layers}.0.output.dense", f"{layers}.1:"]
    else:
        model, layers = models.huggingface(family, F64), models.FAMILIES[family].layers
        attn = "attn" if family == "gpt2" else "self_attn"
        norm = "transformer.ln_f" if family == "gpt2" else "model.norm"
        names = [f"{layers}.0.{attn}", f"{layers}.1.mlp", f"{layers}.0:{layers}.1"]
        names += [f"{layers}.0:{norm}", f"{layers}.1:", f"{layers}.2"]
    # Llama's softmax is in float32, where float64's lowest number for a mask is infinite.
    dtype, tolerance = F64, 1e-9
    if (family, side, attention) == ("llama", "left", "eager"):
        model, dtype, tolerance = copy.deepcopy(model).float(), torch.float32, 1e-5
    model.set_attn_implementation(attention)
    n, n_pad = 4, 3
    short = IDS[:1, :n]
    padded = torch.cat([short, short.new_zeros(1, n_pad)], dim=1)
    mask = torch.tensor([[1] * n + [0] * n_pad])
    if side == "left":
        padded, mask = padded.roll(n_pad, 1), mask.roll(n_pad, 1)
    ids = torch.cat([padded, models.tokens(1, n + n_pad, seed=8)])
    mask = torch.cat([mask, torch.ones_like(mask)])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    n_vocab = model.config.vocab_size
    v = {n: noise(n_vocab if n[-1] == ":" else D_MODEL, dtype=dtype) for n in names}
    for name in names:
        alone = read(model, name, short, cotangent=v[name])[name]
        together = read(
            model, name, ids, attention_mask=mask, position_ids=positions, cotangent=v[name]
        )[name]
        real = slice(n_pad, None) if side == "left" else slice(n)
        assert_close(together[:1, real], alone, tolerance)
        full = read(model, name, ids[1:], cotangent=v[name])[name]
        assert_close(together[1:], full, tolerance)


def test_padding_of_an_encoder_is_none_of_its_decoders() -> None:
    model = families.huggingface("t5gemma")
    ids, decoder_ids = IDS[:, :6], IDS[:, 1:5]
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder_ids}
    names = ["model.decoder.layers.0", "model.decoder.layers.0.cross_attn"]
    for name in names:
        assert_close(read(model, name, **inputs)[name], truth(model, name, **inputs))
    embeddings = model.get_input_embeddings()(ids).detach()
    inputs = {**inputs, "inputs_embeds": embeddings, "input_ids": None}
    v = noise(model.config.decoder.vocab_size)
    mus = read(
        model, ["", "model.encoder.layers.0:model.decoder.layers.1"], **inputs, cotangent=None
    )
    for name, value in mus.items():
        assert_close(value, truth(model, name, **inputs))
    assert v is not None


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_padding_of_encoders_with_positional_masks(model_type: str) -> None:
    config = families._T5 if model_type == "t5" else families._SEQ2SEQ
    model = other(model_type, **config)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    inputs = {"input_ids": IDS, "attention_mask": mask, "decoder_input_ids": IDS[:, 1:5]}
    block = "decoder.block.0" if model_type == "t5" else "decoder.layers.0"
    v = noise(D_MODEL)
    mu = read(model, block, **inputs, cotangent=v)[block]
    assert_close(mu, truth(model, block, **inputs, v=v))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generated_tokens_stay_and_caches_hold_no_graph(family: str) -> None:
    model, layers = _build(family), models.FAMILIES[family].layers
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    options |= {"pad_token_id": 0, "eos_token_id": -1}
    expected = model.generate(IDS, **options)
    names = [f"{layers}.1.mlp", f"{layers}.1", f"{layers}.0:{layers}.2", f"{layers}.1:"]
    with attach(model, names) as handle:
        result = model.generate(IDS, **options)
    assert torch.equal(result.sequences, expected.sequences)
    for entry in result.past_key_values.layers:
        assert not entry.keys.requires_grad
        assert not entry.values.requires_grad
    for name in names:  # Of the last token, whose pass reads the others from the cache.
        assert handle.cache[name].shape == (2, 1, D_MODEL)
        last = read(model, name, result.sequences[:, :-1])[name][:, -1:]
        assert_close(handle.cache[name], last, 1e-10 if family == "gpt2" else 1e-6)


# ---------------------------------------------------------------- interventions


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


# ---------------------------------------------------------------- passes and calls


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


# ---------------------------------------------------------------- cotangents


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


def test_handles_say_what_they_are(gpt2: Any) -> None:
    with attach(gpt2, [MLP, BLOCK]) as handle:
        assert "attached to GPT2LMHeadModel" in repr(handle)
        assert handle.methods == {MLP: "closed form", BLOCK: "VJP"}
        gpt2(IDS)
    assert "detached" in repr(handle)
    assert "(2, 6, 32)" in repr(handle.cache)
    assert len(handle.cache) == 2


@pytest.mark.parametrize("make", [lambda: models.bridge("gpt2"), models.hooked])
def test_models_of_transformerlens_are_referred_to_their_own_adapter(make: Any) -> None:
    """HookedTransformer's attention reads one value as three tensors, of which one was followed."""
    with pytest.raises(lch.AttachError, match=r"lch\.attach"):
        lch.huggingface.attach(make(), "blocks.1.attn")

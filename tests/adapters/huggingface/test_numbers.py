"""Centroids of modules of plain models against gradients taken outside the package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lch_plugin.adapters.huggingface import attach
from tests import families, models
from tests.adapters.huggingface.common import (
    ATTN,
    BLOCK,
    F64,
    IDS,
    MLP,
    SITES,
    SPAN,
    assert_close,
    built,
    noise,
    other,
    read,
    truth,
)
from tests.models import D_MODEL, relative_error

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


@pytest.mark.parametrize("family", models.FAMILIES)
def test_parts_of_language_models_equal_autograd(family: str) -> None:
    model, layers = built(family), models.FAMILIES[family].layers
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

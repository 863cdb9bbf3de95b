"""The same weights through every adapter give the same centroids.

``python -m tests.adapters.test_agreement`` prints the matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight import NNsight
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor
from torch.overrides import TorchFunctionMode

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens.toolkit import HookedTransformer
from tests import families, models
from tests.toolkits import needs_hooked, require_hooked

F64 = torch.float64
N_LAYERS = {"gpt2": 3, "llama": 3, "gemma3_text": 3, "vit": 2}
FAMILIES = ("gpt2", "llama", "gemma3_text", "vit")
ADAPTERS = ("TransformerBridge", "HookedTransformer", "nnsight", "HuggingFace")
KINDS = ("mlp", "attn", "block", "span")
# Where HuggingFace keeps layers, attention and MLP.
NAMES = {
    "gpt2": ("transformer.h", "attn", "mlp"),
    "llama": ("model.layers", "self_attn", "mlp"),
    "gemma3_text": ("model.layers", "self_attn", "mlp"),
    "vit": ("vit.layers", "attention", "mlp"),
}

Centroids = dict[tuple[str, int], Tensor]


class KeepFloat64(TorchFunctionMode):
    """HuggingFace computes norms, softmaxes and rotations in float32 at best; here in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.dtype == F64:
            asked = (*args[1:], *kwargs.values())
            if func is Tensor.float or (func is Tensor.to and torch.float32 in asked):
                return first
            if kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": F64}
        return func(*args, **kwargs)


@contextmanager
def in_float64() -> Iterator[None]:
    with KeepFloat64(), torch.no_grad():
        yield


@cache
def huggingface(family: str) -> Any:
    model = (families if family == "vit" else models).huggingface(family, F64)
    for module in model.modules():
        exact_constants(module)
    return model


def exact_constants(module: Any) -> None:
    """Rotary frequencies and the scale of embeddings in float64, as HookedTransformer has them."""
    if "embed_scale" in dict(module.named_buffers(recurse=False)):
        module.embed_scale = torch.tensor(module.embedding_dim**0.5, dtype=F64)
    for name, buffer in list(module.named_buffers(recurse=False)):
        if not name.endswith("inv_freq"):
            continue
        kind = name.removesuffix("inv_freq").removesuffix("original_").rstrip("_")
        rope = module.config.rope_parameters
        base = (rope[kind] if kind else rope)["rope_theta"]
        n = 2 * len(buffer)
        setattr(module, name, 1 / base ** (torch.arange(0, n, 2, dtype=F64) / n))


def hooked(family: str) -> HookedTransformer:
    require_hooked()
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import (
        convert_gemma_weights,
        convert_gpt2_weights,
        convert_llama_weights,
    )

    hf = huggingface(family)
    c = hf.config
    shared: dict[str, Any] = {"d_mlp": models.D_MLP, "device": "cpu", "dtype": F64}
    if family == "gpt2":
        convert: Callable[..., dict[str, Tensor]] = convert_gpt2_weights
        own: dict[str, Any] = {"act_fn": "gelu_new", "normalization_type": "LN"}
        own |= {"eps": c.layer_norm_epsilon, "d_head": c.hidden_size // c.num_attention_heads}
    else:
        convert = convert_llama_weights
        own = {
            "act_fn": c.hidden_act if family == "llama" else c.hidden_activation,
            "normalization_type": "RMS",
            "eps": c.rms_norm_eps,
            "d_head": c.head_dim,
            "n_key_value_heads": c.num_key_value_heads,
            "positional_embedding_type": "rotary",
            "rotary_dim": c.head_dim,
            "rotary_adjacent_pairs": False,
            "final_rms": True,
            "gated_mlp": True,
        }
    if family == "gemma3_text":
        convert = convert_gemma_weights
        own |= {
            "rotary_base": int(c.rope_parameters["full_attention"]["rope_theta"]),
            "rotary_base_local": int(c.rope_parameters["sliding_attention"]["rope_theta"]),
            "attn_scale": c.query_pre_attn_scalar**0.5,
            "use_normalization_before_and_after": True,
            "use_qk_norm": True,
            "use_local_attn": True,
            "window_size": c.sliding_window,
            "attn_types": ["local"] * N_LAYERS[family],
        }
    cfg = HookedTransformerConfig(
        n_layers=N_LAYERS[family],
        d_model=c.hidden_size,
        n_heads=c.num_attention_heads,
        n_ctx=models.N_CTX,
        d_vocab=c.vocab_size,
        model_name="tiny",
        **shared,
        **own,
    )
    lens = HookedTransformer(cfg, models.tokenizer())
    lens.load_state_dict(convert(hf, cfg), strict=False)
    return lens.to(F64)


def inputs(family: str) -> dict[str, Tensor]:
    if family == "vit":
        return {"pixel_values": families.inputs("vit")["input"]}
    return {"input_ids": models.tokens()}


def by_transformer_lens(family: str, model: Any) -> Centroids:
    last = N_LAYERS[family] - 1
    sites = [*KINDS[:-1], lch.Site("span", layers=(0, last))]
    with lch.attach(model, site=sites) as handle, in_float64():
        _, found = model.run_with_cache(*inputs(family).values(), names_filter=handle.hook_names)
    names = {"mlp": "mlp.hook_centroid", "attn": "attn.hook_centroid", "block": "hook_centroid"}
    centroids = {
        (kind, i): found[f"blocks.{i}.{name}"]
        for kind, name in names.items()
        for i in range(last + 1)
    }
    return centroids | {("span", 0): found[f"blocks.{last}.hook_centroid_from_0"]}


def by_huggingface(family: str) -> Centroids:
    layers, attn, mlp = NAMES[family]
    names = {"mlp": f".{mlp}", "attn": f".{attn}", "block": ""}
    sites = {
        (kind, i): f"{layers}.{i}{name}"
        for kind, name in names.items()
        for i in range(N_LAYERS[family])
    } | {("span", 0): f"{layers}.0:{layers}.{N_LAYERS[family] - 1}"}
    model = huggingface(family)
    with lch.huggingface.attach(model, sites.values()) as handle, in_float64():
        model(**inputs(family))
    return {site: handle.cache[name] for site, name in sites.items()}


def by_nnsight(family: str) -> Centroids:
    layers, attn, mlp = NAMES[family]
    hf = huggingface(family)
    model: Any = (
        NNsight(hf) if family == "vit" else TransformersModel(hf, tokenizer=models.tokenizer())
    )
    centroid = lch.nnsight.centroid
    with in_float64(), model.trace(**inputs(family)):
        found = {}.save()  # type: ignore[attr-defined]
        for i in range(N_LAYERS[family]):
            block = model.get(layers)[i]
            found["block", i] = centroid(block)
            found["attn", i] = centroid(block.get(attn))
            found["mlp", i] = centroid(block.get(mlp))
    # In a pass of its own: a span is known when its last block has run.
    with in_float64(), model.trace(**inputs(family)):
        span = centroid(model.get(layers)[: N_LAYERS[family]]).save()
    return found | {("span", 0): span}


@cache
def through(adapter: str, family: str) -> Centroids | None:
    """Centroids by site; None where an adapter does not know the family."""
    if adapter == "HookedTransformer":
        return None if family == "vit" else by_transformer_lens(family, hooked(family))
    if adapter == "TransformerBridge":
        model = (families if family == "vit" else models).bridge(family, F64)
        for module in model.original_model.modules():
            exact_constants(module)
        return by_transformer_lens(family, model)
    return by_nnsight(family) if adapter == "nnsight" else by_huggingface(family)


def disagreement(adapter: str, family: str, kind: str) -> float | None:
    """Largest relative distance from the HuggingFace adapter's centroids, over layers."""
    found, truth = through(adapter, family), through("HuggingFace", family)
    assert truth is not None
    sites = [site for site in found or () if site[0] == kind]
    if not sites:
        return None
    assert found is not None
    return max(models.relative_error(found[site], truth[site]) for site in sites)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ADAPTERS[:-1])
def test_every_adapter_gives_the_same_centroids(adapter: str, family: str, kind: str) -> None:
    error = disagreement(adapter, family, kind)
    if error is None:
        assert (adapter, family) == ("HookedTransformer", "vit")
        return
    assert error < 1e-10


def matrix() -> str:
    """Largest relative distance from the HuggingFace adapter, by adapter, family and site."""
    lines = [f"{'':20}" + "".join(f"{kind:>12}" for kind in KINDS)]
    for family in FAMILIES:
        for adapter in ADAPTERS[:-1]:
            errors = [disagreement(adapter, family, kind) for kind in KINDS]
            cells = "".join(f"{'-':>12}" if e is None else f"{e:12.0e}" for e in errors)
            lines.append(f"{family:>12} {adapter:>18} {cells}")
    return "\n".join(lines)


@needs_hooked
def test_the_page_shows_the_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    """But for the last bits, which differ between machines."""
    with capsys.disabled():
        print("\n" + matrix())  # noqa: T201
    page = (Path(__file__).parents[2] / "docs" / "reference" / "adapters.md").read_text()
    (shown,) = re.findall(r"```\n( +mlp .*?)\n```", page, re.DOTALL)
    numbers = re.compile(r" *\de[-+]\d\d")
    assert numbers.sub(" x", shown).split() == numbers.sub(" x", matrix()).split()


if __name__ == "__main__":
    print(matrix())  # noqa: T201

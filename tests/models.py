"""Tiny random models of the families the adapters support, built from configs, no network."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from lch_plugin.adapters.transformer_lens.toolkit import HookedTransformer
from tests.toolkits import require_hooked, require_saes

N_LAYERS, D_MODEL, D_MLP, D_VOCAB, N_CTX = 3, 32, 48, 50, 16

_NEW_STYLE = {
    "num_hidden_layers": N_LAYERS,
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_attention_heads": 4,
    "vocab_size": D_VOCAB,
    "max_position_embeddings": N_CTX,
}
_GQA = {**_NEW_STYLE, "num_key_value_heads": 2}
_GEMMA = {**_GQA, "head_dim": 8, "sliding_window": 8}


@dataclass(frozen=True)
class Family:
    """Where a family's HuggingFace implementation keeps its layers, and how they compute."""

    config: dict[str, Any]
    layers: str
    mlp: str = "mlp"


FAMILIES = {
    "gpt2": Family(
        {
            "n_layer": N_LAYERS,
            "n_embd": D_MODEL,
            "n_inner": D_MLP,
            "n_head": 4,
            "vocab_size": D_VOCAB,
            "n_positions": N_CTX,
        },
        "transformer.h",
    ),
    "gpt_neox": Family(_NEW_STYLE, "gpt_neox.layers"),
    "opt": Family(
        {
            "num_hidden_layers": N_LAYERS,
            "hidden_size": D_MODEL,
            "word_embed_proj_dim": D_MODEL,
            "ffn_dim": D_MLP,
            "num_attention_heads": 4,
            "vocab_size": D_VOCAB,
            "max_position_embeddings": N_CTX,
        },
        "model.decoder.layers",
        mlp="fc1",
    ),
    "llama": Family(_GQA, "model.layers"),
    "qwen2": Family(_GQA, "model.layers"),
    "phi3": Family(
        {**_GQA, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}, "model.layers"
    ),
    "gemma2": Family(_GEMMA, "model.layers"),
    "gemma3_text": Family(_GEMMA, "model.layers"),
}


_DIRECTORY = tempfile.TemporaryDirectory(prefix="lch-tokenizer-")


@cache
def _tokenizer_directory() -> str:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(D_VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="w0",
        eos_token="w0",
        pad_token="w0",
    ).save_pretrained(_DIRECTORY.name)
    return _DIRECTORY.name


def tokenizer() -> Any:
    """A word-level tokenizer, loaded from disk: TransformerLens asks where it came from.

    One for each model, since TransformerLens leaves the side of the last padding on it.
    """
    return AutoTokenizer.from_pretrained(_tokenizer_directory())


def huggingface(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **FAMILIES[family].config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.config.architectures = [type(model).__name__]
    for name, parameter in model.named_parameters():
        if "norm" not in name and "ln" not in name:
            nn.init.normal_(parameter, std=0.2)  # Far from zero: every activation bends.
    return model.to(dtype).eval()


def boot(model: Any, dtype: torch.dtype) -> TransformerBridge:
    return TransformerBridge.boot_transformers(
        "tiny", hf_model=model, tokenizer=tokenizer(), device="cpu", dtype=dtype
    )


def bridge(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> TransformerBridge:
    return boot(huggingface(family, dtype, seed), dtype)


def hooked(
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    cls: type[HookedTransformer] = HookedTransformer,
) -> HookedTransformer:
    """GPT-2 as a HookedTransformer, unprocessed weights. Skips the test where there is none."""
    require_hooked()
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    model = huggingface("gpt2", dtype, seed)
    c = model.config
    cfg = HookedTransformerConfig(
        n_layers=c.n_layer,
        d_model=c.n_embd,
        n_heads=c.n_head,
        d_head=c.n_embd // c.n_head,
        d_mlp=D_MLP,
        n_ctx=c.n_positions,
        d_vocab=c.vocab_size,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=c.layer_norm_epsilon,
        device="cpu",
        dtype=dtype,
        model_name="tiny",
    )
    lens = cls(cfg, tokenizer())
    lens.load_state_dict(convert_gpt2_weights(model, cfg), strict=False)
    return lens.to(dtype)


def lens_model(**kw: Any) -> HookedTransformer:
    """A HookedTransformer of any configuration, with random weights."""
    require_hooked()
    from transformer_lens import HookedTransformerConfig

    torch.manual_seed(0)
    defaults = {
        "n_layers": 2,
        "d_model": 16,
        "n_heads": 2,
        "d_head": 8,
        "d_mlp": 24,
        "n_ctx": 8,
        "d_vocab": 20,
        "dtype": torch.float64,
        "device": "cpu",
    }
    return HookedTransformer(HookedTransformerConfig(**{**defaults, **kw}))


def tokens(batch: int = 2, pos: int = 7, seed: int = 1) -> Tensor:
    """Ids of text: none of them is the token that begins, ends and fills up, 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, D_VOCAB, (batch, pos), generator=generator).clamp_min(1)


def mlp_inputs(family: str, ids: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """What each MLP of the plain HuggingFace model reads, ``(batch, pos, d_model)``."""
    model, inputs = huggingface(family, dtype), []
    for layer in model.get_submodule(FAMILIES[family].layers):
        layer.get_submodule(FAMILIES[family].mlp).register_forward_pre_hook(
            lambda module, args: inputs.append(args[0].detach().reshape(*ids.shape, -1))
        )
    with torch.no_grad():
        model(ids)
    return inputs


def autograd_centroids(
    family: str, inputs: list[Tensor], cotangent: Tensor | None = None
) -> list[Tensor]:
    """Centroids by autograd through HuggingFace's own modules, no code of ours involved."""
    spec, centroids = FAMILIES[family], []
    layers = huggingface(family, inputs[0].dtype).get_submodule(spec.layers)
    for layer, value in zip(layers, inputs, strict=True):
        x = value.detach().clone().requires_grad_()
        if spec.mlp == "fc1":
            y = layer.fc2(layer.activation_fn(layer.fc1(x)))
        else:
            y = layer.get_submodule(spec.mlp)(x)
        v = torch.ones_like(y) if cotangent is None else cotangent.to(y).expand_as(y)
        (mu,) = torch.autograd.grad(y, x, v)
        centroids.append(mu)
    return centroids


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


@contextmanager
def no_hooks_added(model: nn.Module) -> Iterator[None]:
    """Fail if the body leaves a hook; a bridge sets some of its own at its first pass."""

    def hooks() -> list[tuple[int, int]]:
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    with torch.no_grad():
        model(tokens())
    before = hooks()
    yield
    assert hooks() == before


def sae_bridge(**kw: Any) -> Any:
    """What SAETransformerBridge.boot_transformers does, for a model in memory."""
    require_saes()
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    model = bridge("gpt2", **kw)
    model.__class__ = SAETransformerBridge
    model._acts_to_saes, model._transcoder_output_hooks = {}, {}
    return model


def hooked_sae_transformer(**kw: Any) -> Any:
    require_saes()
    from sae_lens import HookedSAETransformer

    return hooked(cls=HookedSAETransformer, **kw)


@cache
def float64(backend: str) -> Any:
    """A family's bridge, or the HookedTransformer, built once: tests leave it as it was."""
    return hooked(torch.float64) if backend == "hooked" else bridge(backend, torch.float64)

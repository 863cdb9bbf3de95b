"""Models in a .gguf file.

transformers reads these, and drops without a word what it has no place for (5.23: rescaled rotary
frequencies, biases, context lengths). So what the file says is compared with what was made of it.
"""

from __future__ import annotations

import math
import re
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from lch_plugin.errors import InputError
from lch_plugin.loading.directories import Place, load_model
from lch_plugin.loading.memory import check_memory
from lch_plugin.loading.origins import Origin

# What a .gguf file says and transformers reads under another name than its own classes do.
_NAMES = {
    "gpt2": {"context_length": "n_positions", "feed_forward_length": "n_inner"},
    "qwen3": {"attention.key_length": "head_dim"},
}
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3_text": 62}
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")


def load_gguf(
    origin: Origin, dtype: torch.dtype | str, place: Place
) -> tuple[PreTrainedModel, Any]:
    """A model and its tokenizer, by transformers' own reader.

    Raises:
        InputError: the file is not whole, has no room or is to be spread over devices, the
            architecture is unknown to that reader, or the reader would make a model of it that
            computes something else.
    """
    if not isinstance(place, torch.device):
        raise InputError(
            f"{origin.path} is unpacked on one device, and device_map={place!r} asks for several. "
            f"Convert it once (lch convert {origin.path} DIR), and give the directory."
        )
    if find_spec("gguf") is None:
        raise InputError(
            f"{origin.path} needs the gguf package, which is not installed. Install it: "
            "pip install 'lch-plugin[gguf]'."
        )
    from lch_plugin.loading.gguf_reader import read_once

    with ExitStack() as stack:
        try:
            file = _read(stack.enter_context(read_once(origin.path)))
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise InputError(
                f"{origin.path} is no whole .gguf file: {error}. Copy or download it again."
            ) from error
        return _load(origin, dtype, place, file)


def _load(
    origin: Origin, dtype: torch.dtype | str, place: torch.device, file: _File
) -> tuple[PreTrainedModel, Any]:
    _check_rotation(origin.name, file)
    n = sum(file.elements.values())
    # Of its own accord transformers unpacks to half precision at the least.
    itemsize = dtype.itemsize if isinstance(dtype, torch.dtype) else 2
    check_memory(origin.name, n, n * itemsize, place)
    config = origin.read(AutoConfig.from_pretrained, "metadata")
    _complete_config(config, file.stated)
    _check_config(origin.name, file.stated, config)
    kwargs: dict[str, Any] = {"dtype": dtype}
    if hasattr(transformers, "GgufConfig"):  # Versions without it unpack all weights anyway.
        kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = load_model(origin, config, place, **kwargs)
    _check_tensors(origin.name, file, model)
    processor = origin.read(AutoTokenizer.from_pretrained, "tokenizer") if file.tokenizer else None
    return model, processor


@dataclass(frozen=True)
class _File:
    """What a .gguf file says before its tensors.

    Attributes:
        stated: numbers and texts about the architecture, under names without that of the
            architecture.
        elements: numbers in each tensor.
        tokenizer: whether there is a vocabulary.
    """

    stated: dict[str, Any]
    elements: dict[str, int]
    tokenizer: bool


def _read(reader: Any) -> _File:
    """What the file says, in so far as it is looked at here."""
    prefix = reader.fields["general.architecture"].contents() + "."
    return _File(
        stated={
            key.removeprefix(prefix): field.contents()
            for key, field in reader.fields.items()
            if key.startswith(prefix)
        },
        elements={tensor.name: int(tensor.n_elements) for tensor in reader.tensors},
        tokenizer="tokenizer.ggml.tokens" in reader.fields,
    )


def _check_rotation(name: str, file: _File) -> None:
    factors = [key for key in file.elements if key.startswith(("rope_freqs", "rope_factors"))]
    if factors:
        raise InputError(
            f"{name} rescales its rotary frequencies by {factors[0]}, which transformers drops: "
            "the model would compute something else. Load the model's safetensors."
        )


def _complete_config(config: Any, stated: dict[str, Any]) -> None:
    """Set what transformers' reader leaves at the default of the config's class."""
    for key, attribute in _NAMES.get(config.model_type, {}).items():
        if key in stated:
            setattr(config, attribute, stated[key])
    if config.model_type in _GEMMA_27B_LAYERS:
        # No file states the scale of attention; llama.cpp tells the 27B models by their layers.
        config.query_pre_attn_scalar = (
            config.hidden_size // config.num_attention_heads
            if config.num_hidden_layers == _GEMMA_27B_LAYERS[config.model_type]
            else config.head_dim
        )


def _check_config(name: str, stated: dict[str, Any], config: Any) -> None:
    """Refuse what transformers' reader drops without a word and the model needs.

    Raises:
        InputError: the config differs from what the file says.
    """
    head = getattr(config, "head_dim", getattr(config, "d_kv", None)) or (
        config.hidden_size // config.num_attention_heads
        if getattr(config, "num_attention_heads", None)
        else math.nan
    )
    scaled = stated.get("rope.scaling.type", "none") != "none"
    read = {
        "rope.freq_base": _rope(config, "rope_theta", math.nan),
        "rope.dimension_count": [head * f for f in _rope(config, "partial_rotary_factor", 1.0)],
        "rope.scaling.factor": _rope(config, "factor", 1.0) if scaled else [],
        "attention.key_length": [head],
        "attn_logit_softcapping": [getattr(config, "attn_logit_softcapping", None)],
        "final_logit_softcapping": [getattr(config, "final_logit_softcapping", None)],
        "attention.layer_norm_epsilon": [getattr(config, key, None) for key in _EPSILONS],
        "attention.layer_norm_rms_epsilon": [getattr(config, key, None) for key in _EPSILONS],
    }
    for key, values in read.items():
        if not values or not isinstance(stated.get(key), (int, float)):
            continue
        if not any(v is not None and math.isclose(v, stated[key], rel_tol=1e-5) for v in values):
            known = [value for value in values if value is not None]
            raise InputError(
                f"{name} says {key} = {stated[key]}, but transformers reads {known}: the model "
                "would compute something else. Load the model's safetensors."
            )


def _rope(config: Any, key: str, default: float) -> list[float]:
    """A rotary parameter, of every type of layer where they differ."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer = [value for value in parameters.values() if isinstance(value, dict)]
    return [p.get(key, default) for p in by_layer or [parameters]]


def _check_tensors(name: str, file: _File, model: PreTrainedModel) -> None:
    """Every number of the file is in the model: transformers skips tensors it has no place for."""
    layers = model.config.get_text_config().num_hidden_layers
    elements = 0
    for key, count in file.elements.items():
        block = re.match(r"blk\.(\d+)\.", key)
        # A layer too many predicts further tokens; a tied head repeats the embedding.
        further = block is not None and int(block[1]) >= layers
        tied = key == "output.weight" and model.config.tie_word_embeddings
        if not further and not tied:
            elements += count
    held = sum({t.data_ptr(): t.numel() for t in model.state_dict().values()}.values())
    if held != elements:
        raise InputError(
            f"{name} holds {elements} weights, but transformers makes a {type(model).__name__} of "
            f"{held}: it would compute something else. Load the model's safetensors."
        )

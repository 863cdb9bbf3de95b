"""Models in a directory, written by ``save_pretrained`` or downloaded from the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)

from lch_plugin.errors import InputError
from lch_plugin.loading.memory import check_memory, count_weights
from lch_plugin.loading.origins import Origin
from lch_plugin.records import read_json

#: A device for the whole model, or how transformers and accelerate spread it.
Place = torch.device | str | dict[str, Any]

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.spm", "tekken.json")
_PREPROCESSOR = "preprocessor_config.json"
# What transformers reads here, and where it may be told to run code.
_CONFIGS = ("config.json", "tokenizer_config.json", _PREPROCESSOR)
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def load_directory(
    origin: Origin, dtype: torch.dtype | str, place: Place
) -> tuple[PreTrainedModel, Any]:
    """A model and its processor.

    Raises:
        InputError: there is none, it is not whole, has no room, or cannot be loaded faithfully.
    """
    _check_code(origin)
    _check_type(origin)
    config = origin.read(AutoConfig.from_pretrained, "config.json")
    _check_unquantized(origin, config)
    _check_weights(origin)
    if isinstance(place, torch.device):
        n, stored = count_weights(origin.path / f for f in weight_files(origin.name, origin.path))
        own = getattr(config, "dtype", None) if dtype == "auto" else dtype
        n_bytes = n * own.itemsize if isinstance(own, torch.dtype) else stored
        check_memory(origin.name, n, n_bytes, place)
    model = load_model(origin, config, place, dtype=dtype, use_safetensors=True)
    return model, load_processor(origin, model)


def _check_code(origin: Origin) -> None:
    """Refuse to choose between a checkpoint's own code and transformers' classes in its place."""
    code = [f"{file} ({name})" for name in _CONFIGS for file in _code(origin.path / name)]
    if code and origin.trust_remote_code is None:
        raise InputError(
            f"{origin.name} comes with code of its own, {', '.join(code)}, and transformers' own "
            "classes may compute something else. Read the code and pass trust_remote_code=True to "
            "run it, or trust_remote_code=False to take transformers' own classes in its place."
        )


def _code(path: Path) -> list[str]:
    """The files of code that the ``auto_map`` of a config refers to."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # Not there, or no JSON, which its reader will say.
        return []
    references = _texts(config.get("auto_map")) if isinstance(config, dict) else ()
    # "module.Class", or "owner/name--module.Class" for code of another repository.
    parts = [(ref.rpartition(".")[0] or ref).rpartition("--") for ref in references]
    files = [f"{module}.py" + (f" of {owner}" if owner else "") for owner, _, module in parts]
    return list(dict.fromkeys(files))


def _texts(value: Any) -> Iterator[str]:
    """Texts in lists and dicts within each other: a tokenizer or processor may have several."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def _check_type(origin: Origin) -> None:
    path = origin.path / "config.json"
    if not path.is_file():
        raise InputError(
            f"{origin.name} has no config.json in {origin.path}, so there is no model to load. "
            "Give a directory written by save_pretrained, or a .gguf file by its own path."
        )
    config = read_json(path, "Copy or download it again.")
    kind = config.get("model_type") if isinstance(config, dict) else None
    own = isinstance(config, dict) and "AutoConfig" in (config.get("auto_map") or {})
    if own and origin.trust_remote_code:
        return
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        code = " It comes with code of its own; trust_remote_code=True runs it." if own else ""
        raise InputError(
            f"{origin.name} is of model_type {kind!r}, which transformers "
            f"{transformers.__version__} does not know.{code} Give a model that transformers has a "
            "class for, or upgrade transformers."
        )


def _check_unquantized(origin: Origin, config: Any) -> None:
    quantization = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if quantization is not None:
        method = (
            quantization.get("quant_method")
            if isinstance(quantization, dict)
            else quantization.quant_method
        )
        raise InputError(
            f"{origin.name} is quantised ({method}): packed weights cannot be read as the numbers "
            "that centroids are computed from. Load the unquantised model that it was made from."
        )


def _check_weights(origin: Origin) -> None:
    """Every file of weights is there and whole. Only their headers are read."""
    name, path = origin.name, origin.path
    try:
        for file in weight_files(name, path):
            if not (path / file).is_file():
                raise InputError(
                    f"{name} lacks {file}, a part of its weights, in {path}. Copy or download it "
                    "again."
                )
            with safe_open(path / file, framework="pt"):
                pass
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"The weights of {name} in {path} are damaged or incomplete: {error}. Copy or download "
            "them again."
        ) from error


def weight_files(name: str, path: Path) -> list[str]:
    """The files of weights in a model's directory, whether or not all of them are there.

    Raises:
        InputError: there is none that is read here.
    """
    if (path / _WEIGHTS).is_file():
        return [_WEIGHTS]
    if (path / _INDEX).is_file():
        index = read_json(path / _INDEX, "Copy or download it again.")
        try:
            return sorted(set(index["weight_map"].values()))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path / _INDEX} lists no weights. Copy or download it again."
            ) from error
    pickled = sorted(p.name for p in path.glob("*.bin"))
    raise InputError(
        f"{name} has no {_WEIGHTS} in {path}{', but ' if pickled else ''}{', '.join(pickled)}. "
        "Pickled weights are not read, for they can run code. Where you trust them, load them with "
        "transformers and write them with save_pretrained, which makes safetensors."
    )


def load_model(origin: Origin, config: Any, place: Place, **kwargs: Any) -> PreTrainedModel:
    """A model of the class its config names, with every weight, in its place.

    Args:
        origin: where its files are.
        config: transformers'.
        place: a device for the whole model, or transformers' ``device_map``.
        **kwargs: for ``from_pretrained``.

    Raises:
        InputError: transformers cannot read it, or weights are missing.
    """
    model, info = origin.read(
        _model_class(config, bool(origin.trust_remote_code)).from_pretrained,
        "weights",
        config=config,
        output_loading_info=True,
        **({} if isinstance(place, torch.device) else {"device_map": place}),
        **kwargs,
    )
    # transformers leaves at random what is missing. A base model's pooler often is, and nothing
    # but the pooled output reads it.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise InputError(
            f"{origin.name} lacks {len(missing)} weights of a {type(model).__name__}, such as "
            f"{missing[0]}, which would be random. Give a complete checkpoint, whose config.json "
            "names its class in architectures."
        )
    if not model.config.architectures:
        # TransformerLens goes by them, and no .gguf file names any.
        model.config.architectures = [type(model).__name__]
    return model.to(place) if isinstance(place, torch.device) else model


def _model_class(config: Any, trusted: bool) -> Any:
    """The class the checkpoint was saved as: its own if that may be run, or transformers'."""
    own = (getattr(config, "auto_map", None) or {}) if trusted else {}
    for architecture in config.architectures or []:
        for auto, reference in own.items():
            saved_as = any(text.endswith(f".{architecture}") for text in _texts(reference))
            if saved_as and hasattr(transformers, auto):
                return getattr(transformers, auto)
        cls = getattr(transformers, architecture, None)
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            return cls
    causal = AutoModelForCausalLM.__name__ in own
    if causal or type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    return AutoModel


def load_processor(origin: Origin, model: PreTrainedModel) -> Any:
    """The tokenizer, image processor or feature extractor beside a model; None if there is none.

    Raises:
        InputError: transformers cannot read it.
    """
    # transformers makes an empty tokenizer where it finds none.
    if any(any(origin.path.glob(pattern)) for pattern in _TOKENIZER_FILES):
        return origin.read(AutoTokenizer.from_pretrained, "tokenizer")
    if (origin.path / _PREPROCESSOR).is_file():
        images = model.main_input_name == "pixel_values"
        auto = AutoImageProcessor if images else AutoFeatureExtractor
        return origin.read(auto.from_pretrained, _PREPROCESSOR)
    return None

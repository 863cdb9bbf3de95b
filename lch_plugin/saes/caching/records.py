"""What a cache is of, in terms of JSON, and how two such records differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from reprlib import repr as shortened
from typing import Any

import torch
import xxhash
from torch import nn
from transformers import PreTrainedTokenizerBase

from lch_plugin.adapters import huggingface
from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.files import portable
from lch_plugin.saes.sources.hook_points import attached, provenance
from lch_plugin.saes.sources.hooked_model import HookedModel

# Said of a model and of how it was run, but no reason to call it another one.
_INCIDENTAL = ("name", "revision", "class", "lch_plugin_version", "model")
# Values of each parameter that its fingerprint reads.
_N_SAMPLES = 1024


def record(model: LensModel | HookedModel, d_in: Mapping[str, int]) -> dict[str, Any]:
    """A model, and what is read of it: ``{"model": ..., "hooks": ...}``.

    Args:
        model: attached with the all-ones cotangent where it is not attached, as `attached` does.
        d_in: dimensions of the values, by hook point.
    """
    if isinstance(model, HookedModel):
        config = getattr(model.model, "config", None)
        name, kind = huggingface.model_name(model.model), type(model.model).__name__
    else:
        config = getattr(getattr(model, "original_model", None), "config", None)
        name, kind = portable(model.cfg.model_name), type(model).__name__
    with attached(model, d_in):
        centroids = {hook: provenance(model, hook) for hook in d_in}
    return {
        "model": {
            "name": name,
            "revision": getattr(config, "_commit_hash", None),
            "class": kind,
            "weights": weights_fingerprint(model),
            "tokenizer": tokenizer_fingerprint(model.tokenizer),
        },
        "hooks": {hook: {"d_in": d_in[hook], "centroid": centroids[hook]} for hook in d_in},
    }


def weights_fingerprint(model: nn.Module) -> str:
    """xxh3 of names, shapes and dtypes of all parameters, and of some values of each.

    It reads up to 1,024 values of each parameter, evenly spaced: enough to tell two models, or two
    checkpoints of one, apart. An edit of single weights may go unnoticed.
    """
    xxh3 = xxhash.xxh3_128()
    for name, parameter in sorted(model.named_parameters()):
        xxh3.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        values = parameter.detach().flatten()
        values = values[:: -(-len(values) // _N_SAMPLES) or 1].cpu().contiguous()
        xxh3.update(values.view(torch.uint8).numpy().tobytes())
    return xxh3.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """xxh3 of what decides the tokens of a text; None if there is no tokenizer."""
    if tokenizer is None:
        return None
    content: dict[str, Any] = {"special": tokenizer.special_tokens_map}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content["vocabulary"] = tokenizer.get_vocab()
    else:
        # How the last call padded and truncated is kept among its settings.
        settings = json.loads(backend.to_str())
        content |= {k: v for k, v in settings.items() if k not in ("padding", "truncation")}
    text = json.dumps(content, sort_keys=True, default=str)
    return xxhash.xxh3_128(text.encode()).hexdigest()


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What ``here`` says otherwise than ``there``, a sentence for each."""
    # As it would be read back: tuples are lists then.
    here = json.loads(json.dumps(here))
    old = {key: value for part in here for key, value in _leaves({part: there.get(part)})}
    new = dict(_leaves(here))
    return [
        f"{key} is {shortened(new.get(key))} and was {shortened(old.get(key))}."
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if key in _INCIDENTAL and prefix:
            continue
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}, ")
        else:
            yield f"{prefix}{key}", value

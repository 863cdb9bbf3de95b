"""Centroids of prompts into a directory: what ``lch centroids`` does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lch_plugin.adapters import huggingface
from lch_plugin.cotangents import Cotangent
from lch_plugin.errors import InputError
from lch_plugin.files import claimed, portable, write_directory
from lch_plugin.loading import LoadedModel

CENTROIDS, RECORD = "centroids.safetensors", "record.json"


def extract(
    loaded: LoadedModel,
    prompts: str | Sequence[str],
    out: Path,
    *,
    modules: Sequence[str] | None = None,
    cotangent: Cotangent | None = None,
) -> dict[str, Any]:
    """Write the centroids of prompts, and what they are of, to a new directory.

    ``centroids.safetensors`` holds a tensor ``(prompt, pos, d_in)`` for each component, under its
    name (``name[0]``, ``name[1]``... of one that is called several times), with ``input_ids`` and
    ``attention_mask`` beside them; ``record.json`` says which model, components, cotangent and
    versions.

    Args:
        loaded: a language model with its tokenizer.
        prompts: one, or several run together, padded on the right to the longest.
        out: an absent or empty directory.
        modules: as `lch_plugin.huggingface.attach`.
        cotangent: ``v``; all ones if None.

    Returns:
        The record.

    Raises:
        InputError: no prompts, a model without a tokenizer or with a decoder of its own, prompts
            longer than its context, or several and no token to pad with.
        OutputError: ``out`` holds something.
        SiteError, VanishingCentroidError: as `lch_plugin.huggingface.attach`.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    inputs = _tokenize(loaded, prompts)
    with claimed(out) as out:
        with (
            huggingface.attach(loaded.model, modules, cotangent=cotangent) as handle,
            torch.no_grad(),
        ):
            loaded.model(**inputs)
        tensors = {
            name if handle.cache.calls(name) == 1 else f"{name}[{i}]": handle.cache[name, i]
            for name in handle.centroid_names
            for i in range(max(1, handle.cache.calls(name)))  # None is an error that says so.
        }
        tensors = {name: mu.contiguous().cpu() for name, mu in tensors.items()}
        record = {
            "model": portable(loaded.name),
            "revision": loaded.revision,
            "conversion": loaded.conversion and loaded.conversion.model_dump(),
            "dtype": str(loaded.model.dtype),
            "prompts": prompts,
            "components": handle.records(),
            "methods": handle.methods,
            "versions": {name: version(name) for name in ("lch-plugin", "torch", "transformers")},
        }
        stored = {**tensors, **{k: v.cpu() for k, v in inputs.items()}}

        def write(directory: Path) -> None:
            save_file(stored, directory / CENTROIDS)
            (directory / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")

        write_directory(out, write)
    _print(tensors, handle.methods, inputs["attention_mask"].cpu())
    return record


def _tokenize(loaded: LoadedModel, prompts: Sequence[str]) -> dict[str, Tensor]:
    tokenizer = loaded.processor
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(
            f"{loaded.name} has no tokenizer, so it cannot read prompts. For images and other "
            "inputs use lch.huggingface.attach or lch.saes.Rows in Python."
        )
    if not prompts or not all(prompts):
        raise InputError("there is no prompt, or an empty one: give at least one, with text in it.")
    if loaded.model.config.is_encoder_decoder:
        raise InputError(
            f"{loaded.name} has an encoder and a decoder, and prompts are for one of them. Run it "
            "with inputs for both under lch.huggingface.attach in Python."
        )
    several = len(prompts) > 1
    if several and tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(
                f"the tokenizer of {loaded.name} has no token to pad with, so prompts of different "
                "lengths cannot run together. Give one at a time."
            )
        tokenizer.pad_token = tokenizer.eos_token
    # On the right: models with learned positions count them from the left.
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=several, padding_side="right")
    n_pos, n_ctx = inputs["input_ids"].shape[1], huggingface.context_length(loaded.model)
    if n_ctx is not None and n_pos > n_ctx:
        raise InputError(
            f"the longest prompt has {n_pos} tokens, more than the model's context of {n_ctx}."
        )
    wanted = ("input_ids", "attention_mask")
    return {key: inputs[key].to(loaded.model.device) for key in wanted}


def _print(tensors: dict[str, Tensor], methods: dict[str, str], mask: Tensor) -> None:
    table = Table("component", "method", "shape", "mean norm")
    for name, mu in tensors.items():
        norms = mu.norm(dim=-1)
        is_token = mask.bool() if mask.shape == norms.shape else torch.ones_like(norms).bool()
        shape = " x ".join(map(str, mu.shape))
        method = methods.get(name) or methods[name.rpartition("[")[0]]
        table.add_row(name, method, shape, f"{norms[is_token].mean():.4g}")
    Console().print(table)

"""What is asked of a comparison, held to what two checkpoints have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from lch_plugin.adapters.transformer_lens import (
    LensModel,
    TransformerBridge,
    as_tokens,
    weight_processing,
)
from lch_plugin.adapters.transformer_lens.architecture import check_model
from lch_plugin.cotangents import AnyCotangent, Cotangent, is_fixed
from lch_plugin.errors import InputError
from lch_plugin.sites import Kind, Site


def check_cotangent(v: AnyCotangent) -> Cotangent:
    """One direction, whatever a component computes.

    Raises:
        InputError: it is none.
    """
    if not isinstance(v, Cotangent) or not is_fixed(v):
        raise InputError(
            f"cotangent {v.name!r} depends on what a model computes, so that both would be read "
            "through other directions: give a vector, Ones or Random of lch_plugin.cotangents."
        )
    return v


def check_sites(sites: Kind | Site | Sequence[Kind | Site]) -> list[Site]:
    """Sites, of kinds too.

    Raises:
        InputError: none, a model, or settings that a comparison has itself.
    """
    listed = [sites] if isinstance(sites, str | Site) else list(sites)
    if not listed:
        raise InputError("sites=[] names no component.")
    chosen = [Site(site) if isinstance(site, str) else site for site in listed]
    for site in chosen:
        if site.kind == "model":
            raise InputError("a model is compared by its parts: give a span of all its blocks.")
        plain = Site(
            site.kind,
            site.layers,
            site.index,
            stack=site.stack,
            linearization=site.linearization,
            output_positions=site.output_positions,
        )
        if site.record() != plain.record() or site.expert or site.create_graph:
            raise InputError(
                f"a {site.kind} is compared through the cotangents of compare(): of a Site give "
                "the kind, the layers, the index, the linearization and the output positions alone."
            )
    return chosen


def check_models(before: LensModel, after: LensModel) -> None:
    """Refuse two models that are not checkpoints of one.

    Raises:
        InputError: so it is.
    """
    for model in (before, after):
        check_model(model)
    if before is after:
        raise InputError("before and after are one object: load the two checkpoints apart.")
    kinds = [_architecture(model) for model in (before, after)]
    if kinds[0] != kinds[1]:
        raise InputError(
            f"before is a {kinds[0]} and after a {kinds[1]}: give two checkpoints of one model."
        )
    own, other = (dict(model.named_parameters()) for model in (before, after))
    for name in (*own, *other):
        a, b = own.get(name), other.get(name)
        if a is None or b is None or (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            shown = [
                None if p is None else f"{tuple(p.shape)} {p.dtype} {p.device}" for p in (a, b)
            ]
            raise InputError(
                f"{name} is {shown[0]} before and {shown[1]} after: give two checkpoints of one "
                "model, of one type and on one device."
            )
    processing = [weight_processing(model, 0) for model in (before, after)]
    if processing[0] != processing[1]:
        raise InputError(
            f"weights are {processing[0]} before and {processing[1]} after: process both or none."
        )


def _architecture(model: LensModel) -> str:
    own = type(model.original_model) if isinstance(model, TransformerBridge) else None
    return f"{type(model).__name__}" + (f" of a {own.__name__}" if own else "")


def check_prompts(
    before: LensModel, after: LensModel, prompts: str | Sequence[str] | Int[Tensor, "batch pos"]
) -> list[Int[Tensor, " _"]]:
    """Token ids of each prompt, equal for both models.

    Raises:
        InputError: no prompts, or other ids for the one than for the other.
    """
    if isinstance(prompts, Tensor):
        return list(as_tokens(before, prompts))
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    if not listed or not all(isinstance(p, str) and p.strip() for p in listed):
        raise InputError("there is no prompt, or an empty one: give at least one, with text in it.")
    found = []
    for prompt in listed:
        ids, other = (as_tokens(model, prompt)[0] for model in (before, after))
        if not torch.equal(ids, other):
            raise InputError(
                f"the tokenizers of the two models read {prompt[:40]!r} as {ids.tolist()} and "
                f"{other.tolist()}: give two checkpoints with one tokenizer, or token ids."
            )
        found.append(ids)
    return found

"""What training and caching ask of a model: hook points by name, their values' shape and origin."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from typing import Any

import torch
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from torch import Tensor

from lch_plugin.adapters import huggingface
from lch_plugin.adapters.hooked import readers
from lch_plugin.adapters.transformer_lens import (
    HookedTransformer,
    LensModel,
    Reader,
    TransformerBridge,
    attach,
    weight_processing,
)
from lch_plugin.errors import InputError, SiteError
from lch_plugin.names import did_you_mean
from lch_plugin.padding import mark_tokens
from lch_plugin.saes.sources.hooked_model import HookedModel
from lch_plugin.sites import Site

_CENTROID_HOOK = re.compile(r"blocks\.(\d+)\.(?:(mlp|attn)\.)?hook_centroid")


def check_model(model: Any) -> None:
    """Refuse what SAELens cannot read.

    Raises:
        InputError: the model has no hook points.
    """
    if not isinstance(model, HookedModel | TransformerBridge | HookedTransformer):
        raise InputError(
            f"model is a {type(model).__name__}; SAELens reads models with hook points. Wrap a "
            "HuggingFace model as lch.saes.HookedModel(model, tokenizer), or load it into "
            "TransformerLens: lch.load(...).bridge()."
        )


def site_of(hook_name: str) -> Site | None:
    """The mlp, attn or block whose all-ones centroid a hook point shows by its name, if it does."""
    match = _CENTROID_HOOK.fullmatch(hook_name)
    return match and Site(match[2] or "block", int(match[1]))  # type: ignore[arg-type]


@contextmanager
def attached(model: LensModel | HookedModel, hook_names: Iterable[str]) -> Iterator[None]:
    """See that a model has these hook points, for as long as the block lasts.

    Centroids of mlp, attn and block that nobody has attached are attached with the all-ones
    cotangent. Other sites have to be there, and so have all of a `HookedModel`.

    Rows of tokens that the model reads within are taken for text from end to end, as SAELens puts
    them together: a token that a tokenizer pads with may be part of it.

    Raises:
        SiteError: the model has no such hook point.
        VanishingCentroidError: as `lch_plugin.attach`.
    """
    names = list(dict.fromkeys(hook_names))
    missing = (
        [] if isinstance(model, HookedModel) else [n for n in names if n not in readers(model)]
    )
    sites = [site for site in map(site_of, missing) if site is not None]
    with attach(model, site=sites) if sites else nullcontext():
        for name in names:
            _check_hook(model, name)
        found = {reader.padding: None for reader in readers(model).values()}
        before = {finder: finder.is_packed for finder in found if finder is not None}
        for finder in before:
            finder.is_packed = True
        try:
            yield
        finally:
            for finder, was in before.items():
                finder.is_packed = was


def _check_hook(model: LensModel | HookedModel, hook: str) -> None:
    if hook in model.hook_dict:
        return
    place = hook.rpartition(".")[0]
    known = [name for name in model.hook_dict if name.rpartition(".")[0] == place]
    raise SiteError(
        f"hook_name={hook!r} is no hook point of this model. "
        f"{did_you_mean(hook, known or model.hook_dict)} "
        "Centroids of mlp, attn and block are attached for you; attach other sites with "
        "lch.attach first. A HookedModel has those it was made with."
    )


def widths(
    model: LensModel | HookedModel, heads: Mapping[str, int | None], context_size: int
) -> dict[str, int]:
    """Dimensions of what SAELens reads at hook points, from one pass.

    Args:
        model: with the hook points attached.
        heads: by hook point, the head that is read; None for all of them, which SAELens joins.
        context_size: tokens in a sequence.

    Raises:
        InputError: the context is longer than the model's, there are no positions to train on, or
            a centroid is asked for its heads.
    """
    longest = n_ctx(model)
    if longest is not None and context_size > longest:
        raise InputError(
            f"context_size={context_size} is longer than the model's context of {longest} "
            f"tokens. Set context_size to {longest} or less."
        )
    for hook, head in heads.items():
        if hook in readers(model) and head is not None:
            raise InputError(f"hook_head_index={head}: a centroid has no heads. Set it to None.")
    stops = [extract_stop_at_layer_from_tlens_hook_name(hook) for hook in heads]
    with torch.no_grad():
        device = next(model.parameters()).device
        tokens = torch.zeros(1, context_size, dtype=torch.long, device=device)
        mark_tokens(tokens)
        _, found = model.run_with_cache(
            tokens,
            names_filter=list(heads),
            stop_at_layer=None if None in stops else max(stops),
        )
    return {hook: _width(hook, found[hook], head) for hook, head in heads.items()}


def width(model: LensModel | HookedModel, hook: str, context_size: int) -> int:
    """As `widths`, of one hook point with all its heads."""
    return widths(model, {hook: None}, context_size)[hook]


def _width(hook: str, value: Tensor, head: int | None) -> int:
    if value.ndim < 3:
        raise InputError(
            f"{hook} has shape {tuple(value.shape)}, not (batch, pos, d_in): there is nothing to "
            "train an SAE on."
        )
    return int(value[0, 0].numel() if head is None else value.shape[-1])


def n_ctx(model: LensModel | HookedModel) -> int | None:
    """The longest sequence a model reads; None if it does not say."""
    longest: int | None = model.n_ctx if isinstance(model, HookedModel) else model.cfg.n_ctx
    return longest


def d_vocab(model: LensModel | HookedModel) -> int:
    """How many tokens a model knows."""
    if isinstance(model, HookedModel):
        return int(model.model.get_input_embeddings().num_embeddings)
    return int(model.cfg.d_vocab)


def provenance(model: LensModel | HookedModel, hook: str) -> dict[str, Any] | None:
    """What a centroid hook's values are of, in terms of JSON; None for any other hook."""
    reader = readers(model).get(hook)
    if reader is None:
        return None
    if isinstance(reader, Reader):
        more: dict[str, Any] = {"weight_processing": weight_processing(model, reader.layer or 0)}
    else:
        more = {"model": huggingface.model_name(model.model)}
    return {**reader.record(), **more, "lch_plugin_version": version("lch-plugin")}

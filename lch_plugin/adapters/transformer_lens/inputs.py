"""Token ids a model can read, and what its MLPs read on them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lch_plugin.adapters.transformer_lens.sites import CentroidSite, LensModel
from lch_plugin.errors import InputError


def as_tokens(
    model: LensModel, prompt: str | Int[Tensor, "*batch pos"]
) -> Int[Tensor, "batch pos"]:
    """Token ids of a prompt, on the model's device, checked to be what the model can read.

    Raises:
        InputError: no tokens, not integers, an id out of vocabulary, or longer than the context.
    """
    tokens = model.to_tokens(prompt) if isinstance(prompt, str) else prompt
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.ndim != 2 or tokens.numel() == 0 or tokens.is_floating_point():
        raise InputError(
            f"tokens of shape {tuple(tokens.shape)} and dtype {tokens.dtype}: integers of shape "
            "(pos,) or (batch, pos), at least one, are needed."
        )
    check_token_ids(model, int(tokens.min()), int(tokens.max()))
    if tokens.shape[-1] > model.cfg.n_ctx:
        raise InputError(
            f"{tokens.shape[-1]} tokens are longer than the model's context of {model.cfg.n_ctx}. "
            "Shorten the prompt."
        )
    return tokens.to(next(model.parameters()).device)


def check_token_ids(model: LensModel, lowest: int, highest: int) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        InputError: an id below zero, or at or above ``d_vocab``.
    """
    d_vocab = model.cfg.d_vocab
    if lowest < 0 or highest >= d_vocab:
        raise InputError(
            f"token ids {lowest} to {highest} leave the model's vocabulary, 0 to {d_vocab - 1}. "
            "Tokenise with the model's own tokenizer."
        )


def mlp_inputs(
    model: LensModel, tokens: Int[Tensor, "batch pos"], sites: Sequence[CentroidSite]
) -> list[Float[Tensor, "batch pos d_model"]]:
    """What each MLP reads on these tokens, at least in float32, from one forward pass."""
    inputs: dict[int, Tensor] = {}

    def record(layer: int, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().reshape(*tokens.shape, -1)
        inputs[layer] = x.to(torch.promote_types(x.dtype, torch.float32))

    handles = [s.entry.register_forward_pre_hook(partial(record, s.layer)) for s in sites]
    try:
        with torch.no_grad():
            model(tokens, return_type=None)
    finally:
        for handle in handles:
            handle.remove()
    return [inputs[s.layer] for s in sites]

"""Token ids a model can read, and what its MLPs read on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lch_plugin.adapters.transformer_lens.mlps import MLPParts
from lch_plugin.adapters.transformer_lens.toolkit import LensModel
from lch_plugin.errors import InputError
from lch_plugin.mlp import at_least_float32
from lch_plugin.padding import PadToken, known_tokens, tokens_in_ids


def as_tokens(
    model: LensModel, prompt: str | Int[Tensor, "*batch pos"]
) -> Int[Tensor, "batch pos"]:
    """Token ids of a prompt, on the model's device, checked to be what the model can read.

    Raises:
        InputError: no tokens, not integers, an id out of vocabulary, longer than the context, or
            rows that are filled up: circuits know positions by their number.
    """
    tokens = model.to_tokens(prompt, truncate=False) if isinstance(prompt, str) else prompt
    if (
        not isinstance(tokens, Tensor)
        or tokens.ndim not in (1, 2)
        or tokens.numel() == 0
        or tokens.dtype not in (torch.int64, torch.int32)
    ):
        found = f"{tuple(tokens.shape)}, {tokens.dtype}" if isinstance(tokens, Tensor) else tokens
        raise InputError(
            f"tokens must be a string, or integers in a tensor of shape (pos,) or (batch, pos) "
            f"with at least one; got {found!r}."
        )
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    check_token_ids(model.cfg.d_vocab, int(tokens.min()), int(tokens.max()))
    if tokens.shape[-1] > model.cfg.n_ctx:
        raise InputError(
            f"{tokens.shape[-1]} tokens are longer than the model's context of {model.cfg.n_ctx}. "
            "Shorten the prompt."
        )
    _check_unpadded(model, tokens)
    return tokens.to(next(model.parameters()).device)


def near_token(model: LensModel, text: str) -> str:
    """Of a text that is not one token: which is, with or without a space; nothing if none."""
    for other in (f" {text.strip()}", text.strip()):
        ids = model.to_tokens(other, prepend_bos=False, truncate=False)[0].tolist()
        if other != text and len(ids) == 1 and ids != [model.tokenizer.unk_token_id]:
            return f" Did you mean {other!r}?"
    return ""


def _check_unpadded(model: LensModel, tokens: Int[Tensor, "batch pos"]) -> None:
    known = known_tokens(tokens)
    if known is None:
        pad = PadToken.of(model.tokenizer)
        # An id that text may have as well has the benefit of the doubt.
        known = tokens_in_ids(tokens, pad, is_text=True)
    if known is not None and not bool(known.all()):
        row = int((~known).any(1).nonzero()[0])
        raise InputError(
            f"row {row} of the tokens has {int(known[row].sum())} tokens and "
            f"{int((~known[row]).sum())} of padding, and positions here count both. Pass prompts "
            "of one length, or one at a time."
        )


def check_token_ids(d_vocab: int, lowest: int, highest: int) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        InputError: an id below zero, or at or above ``d_vocab``.
    """
    if lowest < 0 or highest >= d_vocab:
        raise InputError(
            f"token ids {lowest} to {highest} leave the model's vocabulary, 0 to {d_vocab - 1}. "
            "Tokenise with the model's own tokenizer."
        )


def mlp_inputs(
    model: LensModel, tokens: Int[Tensor, "batch pos"], mlps: Sequence[MLPParts]
) -> list[Float[Tensor, "batch pos d_model"]]:
    """What each MLP reads on these tokens, at least in float32, from one forward pass.

    Hooks that the user has on the model act as in any forward pass.
    """
    with recorded_mlp_inputs(mlps) as inputs, torch.no_grad():
        model(tokens, return_type=None)
    return [inputs[mlp.layer].reshape(*tokens.shape, -1) for mlp in mlps]


@contextmanager
def recorded_mlp_inputs(mlps: Sequence[MLPParts]) -> Iterator[dict[int, Float[Tensor, "*rows d"]]]:
    """By layer, what each MLP reads in the first forward pass within, at least in float32."""
    inputs: dict[int, Tensor] = {}

    def record(layer: int, x: Tensor) -> None:
        # The first: a local centroid that somebody listens to runs the MLP again.
        if layer not in inputs:
            inputs[layer] = x.detach().to(at_least_float32(x))

    gates = [mlp.input_gate for mlp in mlps]
    try:
        for mlp, gate in zip(mlps, gates, strict=True):
            gate.install(lambda: True, partial(record, mlp.layer))
        yield inputs
    finally:
        for gate in gates:
            gate.remove()

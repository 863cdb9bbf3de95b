"""Direct logit attribution: which tokens a neuron writes towards, with nothing in between.

A neuron adds a multiple of its row of ``W_out`` to the residual stream, which the final norm and
the unembedding read. Norms centre what they read (or do not), scale all of it by one number, and
multiply it by their gain. The scale is positive, so the order of tokens is that of

    (norm(w_out) - norm(0)) W_U

whatever the prompt. A soft cap of the logits keeps the order as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import HookedTransformer

from lch_plugin.adapters.transformer_lens import LensModel, locate_mlps
from lch_plugin.adapters.transformer_lens.anatomy import post_norm
from lch_plugin.adapters.transformer_lens.states import silenced


def promoted_tokens(
    model: LensModel, layer: int, neurons: Sequence[int], n: int = 5
) -> list[list[str]]:
    """The ``n`` tokens whose logits each neuron raises most when it is active, highest first.

    Args:
        model: TransformerBridge or HookedTransformer.
        layer: block of the neurons.
        neurons: their indices.
        n: tokens for each.

    Raises:
        SiteError: as `locate_mlps`.
    """
    logits = direct_logits(model, layer, neurons)
    return [[model.to_string([i]) for i in row] for row in logits.topk(n).indices.tolist()]


def direct_logits(
    model: LensModel, layer: int, neurons: Sequence[int]
) -> Float[Tensor, "neuron d_vocab"]:
    """What each neuron adds to the logits, up to one positive factor a neuron; as above."""
    (parts,) = locate_mlps(model, layer)
    final = (
        model.ln_final
        if isinstance(model, HookedTransformer)
        else (model.ln_final.original_component)
    )
    with torch.no_grad():
        writes = parts.weights.W_out[list(neurons)]
        for norm in (post_norm(model.blocks[parts.layer], "mlp"), final):
            if isinstance(norm, nn.Module):
                with silenced(norm):
                    writes = norm(writes) - norm(torch.zeros_like(writes))
        return (writes @ model.W_U).float()

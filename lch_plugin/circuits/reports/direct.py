"""Direct logit attribution: what a write to the residual stream does to the logits of its position.

The path leads through the final norm and the unembedding alone. With the scale of the norm held it
is affine, so that a write is worth so many logits to each token. A soft cap is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lch_plugin.adapters.transformer_lens import HookedTransformer, LensModel, locate_mlps
from lch_plugin.adapters.transformer_lens.architecture import post_norm
from lch_plugin.adapters.transformer_lens.hook_points import silenced
from lch_plugin.linearization import DetachedMode


def direct_logits(
    model: LensModel,
    residual: Float[Tensor, "n d_model"],
    writes: Float[Tensor, "n d_model"],
) -> Float[Tensor, "n d_vocab"]:
    """What some writes to the residual stream add to the logits, the final norm's scale held.

    Args:
        model: TransformerBridge or HookedTransformer.
        residual: what the final norm reads where each write is a part of it.
        writes: one a row.
    """
    norm: Any = model.ln_final
    norm = norm if isinstance(model, HookedTransformer) else norm.original_component
    return (_through(norm, residual, writes) @ model.W_U.detach().to(writes)).to(writes)


def promoted_tokens(
    model: LensModel, layer: int, neurons: Sequence[int], n: int = 5
) -> list[list[str]]:
    """The ``n`` tokens whose logits each neuron raises most when it is active, highest first.

    The scale of a norm is one positive number a position, which leaves their order as it is,
    whatever the prompt.

    Args:
        model: TransformerBridge or HookedTransformer.
        layer: block of the neurons.
        neurons: their indices.
        n: tokens for each.

    Raises:
        SiteError: as `locate_mlps`.
    """
    (parts,) = locate_mlps(model, layer)
    writes = parts.weights.W_out[list(neurons)].detach()
    after: Any = post_norm(model.blocks[parts.layer], "mlp")
    writes = writes if after is None else _through(after, writes, writes)
    top = direct_logits(model, writes, writes).float().topk(n).indices.tolist()
    return [[model.to_string([i]) for i in row] for row in top]


def _through(norm: Any, residual: Tensor, writes: Tensor) -> Float[Tensor, "n d_model"]:
    """What becomes of writes in a norm whose scale is that of what it reads."""
    recording = DetachedMode()

    def normalised(x: Tensor, mode: DetachedMode) -> Tensor:
        with mode:
            found: Tensor = norm(mode.follow(x.detach().requires_grad_())).detach()
        return found

    dtype = next((p.dtype for p in norm.parameters()), writes.dtype)
    with silenced(norm), torch.inference_mode(False), torch.enable_grad():
        normalised(residual.to(dtype), recording)
        with_write, without = (
            normalised(x.to(dtype), DetachedMode(replay=recording.recorded))
            for x in (writes, torch.zeros_like(writes))
        )
    return (with_write - without).to(writes)

"""The mean Jacobian between two places in the residual stream, over texts and positions.

Two kinds of place are enough to read everything that a block writes. What is added to the residual
stream at one position goes on from there as the residual stream itself does::

    d x_end / d (what attention or a head writes) = d x_end / d (the stream after attention)
    d x_end / d (what an MLP writes)              = d x_end / d (the stream after the block)

The first is taken in what attention writes, because a norm reads the residual stream on one of two
branches, and a model may give that branch a tensor of its own. So that it is the stream after
attention, what attention adds to the block's input must be what is read there: that is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lch_plugin.adapters.states import evaluating, without_autocast
from lch_plugin.adapters.transformer_lens import TransformerBridge
from lch_plugin.adapters.transformer_lens.architecture import (
    attention,
    attention_output,
    block_input,
    block_output,
    norm_after,
    stacks,
)
from lch_plugin.adapters.transformer_lens.gates import Gate, PointGate
from lch_plugin.errors import SiteError
from lch_plugin.lens.passes import watching
from lch_plugin.linear_maps import LinearMap, graphs_that_last
from lch_plugin.linearization import DetachedMode
from lch_plugin.mlp import at_least_float32
from lch_plugin.sites import Linearization

Place = Literal["resid_post", "resid_mid"]


@dataclass(frozen=True)
class Span:
    """From where to where.

    Attributes:
        layers: blocks of the sources, sorted.
        place: in each of them: after attention, or after all of it.
        end: the block whose output is the target.
        linearization: of what lies between.
    """

    layers: tuple[int, ...]
    place: Place
    end: int
    linearization: Linearization


@graphs_that_last()
def mean_jacobians(
    model: TransformerBridge,
    prompts: Sequence[Int[Tensor, "1 _"]],
    span: Span,
    *,
    skip_first: int,
    batch_size: int,
) -> dict[int, Float[Tensor, "d_model d_model"]]:
    """``mean over prompts and p of sum over t >= p of d x_(end,t) / d x_(l,p)`` for each layer.

    As `JacobianLens.fit` counts: neither the first positions nor the last are sources or targets.

    Args:
        model: with the weights as they were saved.
        prompts: token ids.
        span: from where to where.
        skip_first: positions left out at the beginning.
        batch_size: backward passes at once.

    Raises:
        SiteError: a block has no residual stream after attention, or hides it.
    """
    if span.place == "resid_mid":
        _check_adds(model, span.layers, prompts[0])
    total: dict[int, Tensor] = {}
    for ids in prompts:
        linear = _linear_map(model, ids, span)
        counted = list(range(skip_first, ids.shape[1] - 1))
        d_model = linear.y.shape[-1]
        for layer, x in zip(span.layers, linear.xs, strict=True):
            total.setdefault(layer, x.new_zeros(d_model, d_model, dtype=at_least_float32(x)))
        for dims in torch.arange(d_model).split(batch_size):
            v = linear.y.new_zeros(len(dims), *linear.y.shape)
            v[torch.arange(len(dims))[:, None], 0, counted, dims[:, None]] = 1
            with without_autocast():
                pulled = linear.pull(v)
            for layer, mu in zip(span.layers, pulled, strict=True):
                total[layer][dims] += mu[:, 0, counted].to(total[layer].dtype).mean(1)
    return {layer: matrix / len(prompts) for layer, matrix in total.items()}


def _linear_map(model: TransformerBridge, ids: Int[Tensor, "1 pos"], span: Span) -> LinearMap:
    """From each source to the end, on one prompt."""
    blocks, layers = stacks(model, "blocks")["blocks"], span.layers
    mode = DetachedMode() if span.linearization == "detached" else None
    seen: dict[object, Tensor] = {}

    def start(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        seen[layers[0]] = leaf if mode is None else mode.follow(leaf)
        return leaf.clone()

    def keep(key: object, x: Tensor) -> Tensor:
        seen[key] = x
        return x

    gates = {layer: _source(blocks[layer], f"blocks.{layer}", span.place) for layer in layers}
    acts: list[Any] = [(gates[layers[0]], start)]
    acts += [(gates[layer], partial(keep, layer)) for layer in layers[1:]]
    acts += [(block_output(blocks[span.end], last=True), partial(keep, "end"))]
    with watching(acts), evaluating(model), without_autocast(), mode or nullcontext():
        model(ids, return_type=None)
    if missed := {*layers, "end"} - set(seen):
        raise SiteError(f"what is read at {sorted(map(str, missed))} did not pass its hook point.")
    return LinearMap(seen["end"], [seen[layer] for layer in layers])


def _source(block: Any, path: str, place: Place) -> Gate:
    if place == "resid_post":
        return block_output(block)
    norm = norm_after(block, "attn")
    return attention_output(attention(block, path)[0]) if norm is None else _after(norm)


def _after(norm: Any) -> Gate:
    return PointGate(norm, "hook_out", last=False)


def _check_adds(model: TransformerBridge, layers: Sequence[int], ids: Int[Tensor, "1 pos"]) -> None:
    """The stream after attention is the block's input and what attention writes.

    Raises:
        SiteError: so it is not (parallel blocks, scaled branches).
    """
    blocks = stacks(model, "blocks")["blocks"]
    for layer in layers:
        block: Any = blocks[layer]
        gates = [block_input(block), _source(block, f"blocks.{layer}", "resid_mid")]
        if "hook_resid_mid" in getattr(block, "hook_aliases", {}):
            gates.append(PointGate(block, "hook_resid_mid", last=True))
        seen: list[Tensor] = []
        with torch.no_grad(), watching([(gate, seen.append) for gate in gates]), evaluating(model):
            model(ids, return_type=None)
        if len(seen) < 3 or not torch.allclose(seen[0] + seen[1], seen[2], rtol=1e-3, atol=1e-5):
            raise SiteError(
                f"blocks.{layer} shows no residual stream that is its input and what its attention "
                'writes, so there is no resid_mid. If attention and MLP are parallel, site="resid_'
                'post" reads what either writes.'
            )

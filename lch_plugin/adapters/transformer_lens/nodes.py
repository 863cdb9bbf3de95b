"""Nodes of a circuit: attention heads, neurons and whole MLPs, where their activations pass.

A head writes ``z W_O``, a neuron its activation times a row of ``W_out``; so a hook point at what
``W_O`` or ``W_out`` reads holds the activations of all heads or neurons of a layer side by side,
and a node is a slice of its last dimensions. Biases are of no node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lch_plugin.adapters.transformer_lens.architecture import (
    attention,
    check_heads,
    check_model,
    stacks,
    values_name,
)
from lch_plugin.adapters.transformer_lens.inputs import as_tokens
from lch_plugin.adapters.transformer_lens.mlps import locate_mlp
from lch_plugin.adapters.transformer_lens.toolkit import HookPoint, LensModel
from lch_plugin.errors import InputError, SiteError

NodeKind = Literal["head", "neuron", "mlp"]
KINDS: tuple[NodeKind, ...] = get_args(NodeKind)


@dataclass(frozen=True)
class NodePoint:
    """A hook point that holds the activations of a layer's nodes.

    Attributes:
        kind: of the nodes.
        layer: block.
        name: of the hook point.
        n_nodes: how many nodes share it.
        width: numbers of each node: ``d_head``, 1 of a neuron, ``d_mlp`` of a whole MLP.
    """

    kind: NodeKind
    layer: int
    name: str
    n_nodes: int
    width: int

    def split(self, value: Float[Tensor, "batch pos *rest"]) -> Float[Tensor, "batch pos node w"]:
        """The value of the hook point, node by node."""
        return value.reshape(*value.shape[:2], self.n_nodes, self.width)


def node_points(
    model: LensModel, kinds: Sequence[NodeKind] = ("head", "neuron")
) -> tuple[NodePoint, ...]:
    """Where the activations of all nodes of these kinds pass, in the order they are computed.

    Raises:
        InputError: an unknown kind, none, or both neurons and the MLPs they make up.
        SiteError: a block without attention or MLP of a kind that shows its nodes, or a model with
            an encoder.
    """
    check_model(model)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds or {"neuron", "mlp"} <= set(kinds):
        raise InputError(
            f"kinds={tuple(kinds)}: choose among {KINDS}, and either neurons or whole MLPs."
        )
    found: list[NodePoint] = []
    (stack,) = stacks(model, "blocks")
    for layer, block in enumerate(stacks(model, stack)[stack]):
        if "head" in kinds:
            path, attn = _attention(block, f"{stack}.{layer}")
            point = values_name(attn)
            n_heads, d_head = attn.W_O.shape[:2]
            found.append(NodePoint("head", layer, f"{path}.{point}", n_heads, d_head))
        if "neuron" in kinds or "mlp" in kinds:
            parts = locate_mlp(model, stack, layer)
            parts.check_readable()
            d_mlp = parts.weights.W_out.shape[0]
            name = parts.post_activation_name
            if "neuron" in kinds:
                found.append(NodePoint("neuron", layer, name, d_mlp, 1))
            else:
                found.append(NodePoint("mlp", layer, name, 1, d_mlp))
    return tuple(found)


def pattern_names(model: LensModel) -> list[str]:
    """Hook points of the attention patterns, ``(batch, head, dest, src)``, layer by layer.

    Raises:
        InputError, SiteError: as `node_points`.
    """
    check_model(model)
    (stack,) = stacks(model, "blocks")
    blocks = enumerate(stacks(model, stack)[stack])
    return [f"{_attention(block, f'{stack}.{i}')[0]}.hook_pattern" for i, block in blocks]


def run_edited(
    model: LensModel,
    tokens: Int[Tensor, "batch pos"],
    edits: Mapping[str, Callable[[Tensor], Tensor | None]],
    *,
    last_only: bool = False,
) -> Float[Tensor, "batch out d_vocab"]:
    """Logits, from a forward pass in which the values of some hook points are looked at or edited.

    Hooks that the user has on the same points come first.

    Args:
        model: TransformerBridge or HookedTransformer.
        tokens: what it reads, on any device.
        edits: by hook name, a function of the value that returns another, or None to leave it.
        last_only: compute the logits of the last position alone, ``(batch, 1, d_vocab)``. With a
            large vocabulary that is most of the work saved, and of the memory.

    Raises:
        InputError: as `as_tokens`.
        SiteError: a hook did not fire.
    """
    tokens = as_tokens(model, tokens)
    if tokens.is_inference() and not torch.is_inference_mode_enabled():
        tokens = tokens.clone()  # What is made under inference_mode cannot be part of a graph.
    fired: set[str] = set()

    def on_value(name: str, _module: object, _args: object, value: Tensor) -> Tensor | None:
        fired.add(name)
        # OPT's projections read batch and position as one.
        edited = edits[name](value if value.ndim > 2 else value.reshape(*tokens.shape, -1))
        # Only the batch may have another size: some edits read a component for several inputs.
        return None if edited is None else edited.reshape(-1, *value.shape[1:])

    # Torch's own hooks: TransformerBridge lists all its hook points and their aliases ten times in
    # a call of run_with_hooks, which takes as long as a pass of a small model.
    points = {name: attrgetter(name)(model) for name in edits}
    handles = [
        point.register_forward_hook(partial(on_value, name))
        for name, point in points.items()
        if isinstance(point, HookPoint)
    ]
    if last_only:
        handles.append(model.unembed.register_forward_pre_hook(_last_position))
    try:
        logits: Tensor = model(tokens, return_type="logits")
    finally:
        for handle in handles:
            handle.remove()
    missed = [name for name in edits if name not in fired]
    if missed:
        raise SiteError(
            f"{missed} did not fire, so nothing was seen or changed there. If an SAE stands there, "
            "call reset_saes() first."
        )
    return logits


def _last_position(_unembed: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    residual, *others = args
    return residual[:, -1:], *others


def _attention(block: Any, path: str) -> tuple[str, Any]:
    """Full name of a block's attention, and the attention, held to show its heads."""
    attn, attribute = attention(block, path)
    check_heads(attn, f"{path}.{attribute}")
    return f"{path}.{attribute}", attn

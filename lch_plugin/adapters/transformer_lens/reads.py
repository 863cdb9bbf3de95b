"""Where components read the residual stream, before their norms, and where they write to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformer_lens import HookedTransformer

from lch_plugin.adapters.transformer_lens.anatomy import (
    LensModel,
    attention,
    check_model,
    is_hooked,
    is_module,
    locate_mlp,
    stacks,
)
from lch_plugin.adapters.transformer_lens.gates import Gate, ModuleGate, PointGate
from lch_plugin.errors import SiteError


@dataclass(frozen=True, eq=False)
class Component:
    """Attention or the MLP of one block, between two places of the residual stream.

    Attributes:
        kind: which of the two.
        layer: block.
        read: the residual stream as the component's norm reads it. Components that share a norm
            have gates of equal `key` here.
        write: what is added to the residual stream, after every norm and every hook.
        entry: what its weights read, after the norm; of MLPs alone.
    """

    kind: Literal["attn", "mlp"]
    layer: int
    read: Gate
    write: Gate
    entry: Gate | None = None


def components(model: LensModel) -> list[Component]:
    """All attentions and MLPs in the order they are computed.

    Raises:
        InputError, SiteError: as `node_points`.
    """
    check_model(model)
    found = []
    (stack,) = stacks(model, "blocks")
    for layer, block in enumerate(stacks(model, stack)[stack]):
        parts = block._modules
        norm = _norm(block, "ln1", layer)
        attn, _ = attention(block, f"{stack}.{layer}")
        found.append(Component("attn", layer, _input(norm), _write(block, attn, "attn")))
        mlp = parts.get("mlp")
        if mlp is not None:
            # Without a norm of its own the MLP shares that of attention (GPT-J, Phi).
            norm = parts.get("ln2") or norm
            write = _write(block, mlp, "mlp")
            entry = locate_mlp(model, stack, layer).input_gate
            found.append(Component("mlp", layer, _input(norm), write, entry))
    return found


def final_read(model: LensModel) -> Gate:
    """The residual stream as the final norm reads it, or the unembedding where there is none."""
    return _input(getattr(model, "ln_final", None) or model.unembed)


def position_embedding_name(model: LensModel) -> str | None:
    """Hook point of the position embeddings; None if nothing is added for the position."""
    if isinstance(model, HookedTransformer):
        standard = model.cfg.positional_embedding_type == "standard"
        return "hook_pos_embed" if standard else None
    return "pos_embed.hook_out" if "pos_embed" in model._modules else None


def _norm(block: Any, name: str, layer: int) -> Any:
    norm = block._modules.get(name)
    if norm is None:
        raise SiteError(
            f"block {layer}, a {type(block).__name__}, has no `{name}` between the residual stream "
            "and its attention, so what its nodes read of each other cannot be told. Score nodes "
            "without a graph: lch_plugin.circuits.node_attribution."
        )
    return norm


def _input(module: Any) -> Gate:
    if is_hooked(module):
        return ModuleGate(module, "input")
    return PointGate(module, "hook_in", last=True)


def _write(block: Any, component: Any, kind: str) -> Gate:
    if is_hooked(block):
        return PointGate(block, f"hook_{kind}_out", last=True)
    norm = block._modules.get("ln1_post" if kind == "attn" else "ln2_post")
    if norm is not None:
        return PointGate(norm, "hook_out", last=True)
    if kind == "mlp" and not is_module(component):
        component = component.out
    return PointGate(component, "hook_out", last=True)

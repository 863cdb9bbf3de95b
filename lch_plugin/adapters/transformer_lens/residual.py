"""Where components read the residual stream, before their norms, and where they write to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from lch_plugin.adapters.transformer_lens.architecture import (
    attention,
    check_heads,
    check_model,
    is_hooked,
    norm_after,
    stacks,
    values_name,
)
from lch_plugin.adapters.transformer_lens.gates import Gate, ModuleGate, PointGate
from lch_plugin.adapters.transformer_lens.mlps import is_module, locate_mlp
from lch_plugin.adapters.transformer_lens.toolkit import HookedTransformer, LensModel
from lch_plugin.errors import SiteError

#: What a head reads the residual stream for: its queries, its keys and its values.
Slot: TypeAlias = Literal["q", "k", "v"]
SLOTS: tuple[Slot, ...] = get_args(Slot)


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


class HeadReads:
    """How each head of a layer reads the residual stream by itself, and what it writes.

    A head reads three times: for queries, keys and values, each through the norm and a projection.
    Where queries are grouped, the heads of a group share one key and one value. Here each head has
    its own: attention is entered with a copy of the batch for each member of a group (`entered`),
    copy g holds the keys and values of the g-th members, and of copy g only their ``z`` are kept.
    With one member there is one copy, and nothing is changed.

    Attributes:
        layer: block.
        n_heads: of queries.
        names: hook points of queries, keys and values before they are rotated or normalised.
        z_name: hook point of what the heads mix of their values.
    """

    def __init__(self, model: LensModel, layer: int) -> None:
        (stack,) = stacks(model, "blocks")
        block = stacks(model, stack)[stack][layer]
        attn, attribute = attention(block, f"{stack}.{layer}")
        path = f"{stack}.{layer}.{attribute}"
        check_heads(attn, path)
        hooked = is_hooked(attn)
        self.layer = layer
        self.n_heads, self._d_head = attn.W_O.shape[:2]
        self.names: Mapping[Slot, str] = {
            slot: f"{path}.hook_{slot}" if hooked else f"{path}.{slot}.hook_out" for slot in SLOTS
        }
        self.z_name = f"{path}.{values_name(attn)}"
        norm = _norm(block, "ln1", layer)
        # Past the hooks on it, and not the bridge's own: they belong to the pass that is under way.
        self.norm: Callable[[Tensor], Tensor] = (
            norm.forward if is_hooked(norm) else norm.original_component
        )
        self._attn = attn
        self._n_copies = self.n_heads // _n_key_heads(model, attn)

    def projected(self, slot: Slot, normed: Float[Tensor, "head *n d_model"]) -> Tensor:
        """What heads make of their own reads, after the norm: queries, or keys or values.

        Shape ``(head, *n, d_head)``.
        """
        weight = self._weight(slot).to(normed)
        found = einsum(normed, weight, "head ... d_model, head d_model d -> head ... d")
        bias = getattr(self._attn, f"b_{slot.upper()}", None)
        if bias is None:
            return found
        by_head = self._of_heads(bias.detach()).to(found)
        return found + by_head.reshape(-1, *[1] * (found.ndim - 2), self._d_head)

    def written(self, z: Float[Tensor, "head *n d_head"]) -> Tensor:
        """What each head writes, without the bias, ``(head, *n, d_model)``."""
        weight = self._attn.W_O.detach().to(z)
        return einsum(z, weight, "head ... d, head d d_model -> head ... d_model")

    def by_head(self, slot: Slot | Literal["z"], value: Tensor) -> Float[Tensor, "head b pos d"]:
        """What passes a hook point, head by head: of each head the copy that is its own."""
        # Heads are apart or joined, as the hook point has them.
        sizes = {"copy": self._n_copies, "d": self._d_head}
        if slot in ("k", "v"):  # One of each group in each copy.
            pattern = "(copy b) pos (group d) -> (group copy) b pos d"
            return rearrange(value.flatten(2), pattern, **sizes)
        pattern = "(copy b) pos (group member d) -> copy member group b pos d"
        found = rearrange(value.flatten(2), pattern, member=self._n_copies, **sizes)
        own = found.diagonal(dim1=0, dim2=1)
        return rearrange(own, "group b pos d member -> (group member) b pos d")

    def joined(self, slot: Slot, heads: Float[Tensor, "head b pos d"]) -> Tensor:
        """The value of a hook point, from what each head has there."""
        if slot == "q":
            return self.mixed(heads).repeat(self._n_copies, 1, 1)
        pattern = "(group copy) b pos d -> (copy b) pos (group d)"
        return rearrange(heads, pattern, copy=self._n_copies)

    def mixed(self, z: Float[Tensor, "head b pos d"]) -> Tensor:
        """What passes the hook point of ``z`` and goes on, one copy of the batch again."""
        return rearrange(z, "head b pos d -> b pos (head d)")

    @contextmanager
    def entered(self) -> Iterator[None]:
        """While this lasts, attention is given a copy of the batch for each member of a group."""
        if self._n_copies == 1:
            yield
            return
        handle = self._attn.register_forward_pre_hook(self._copy, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _copy(self, _attn: Any, args: Any, kwargs: Any) -> Any:
        first = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim == 3)

        def copied(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim < 2 or len(value) != len(first):
                return value
            return value.repeat(self._n_copies, *[1] * (value.ndim - 1))

        def copied_each(value: Any) -> Any:
            return tuple(map(copied, value)) if isinstance(value, tuple) else copied(value)

        return tuple(map(copied_each, args)), {k: copied_each(v) for k, v in kwargs.items()}

    def _weight(self, slot: Slot) -> Float[Tensor, "head d_model d_head"]:
        return self._of_heads(getattr(self._attn, f"W_{slot.upper()}").detach())

    def _of_heads(self, weight: Tensor) -> Tensor:
        """Of each head, where several may share one."""
        return weight.repeat_interleave(self.n_heads // len(weight), 0)


def _n_key_heads(model: LensModel, attn: Any) -> int:
    """Heads of keys and of values, as their hook points have them."""
    if not is_hooked(attn):
        return len(attn.W_K)
    # HookedTransformer shows W_K once for each head of queries.
    n_key_heads = getattr(model.cfg, "n_key_value_heads", None)
    ungrouped = getattr(model.cfg, "ungroup_grouped_query_attention", False)
    return len(attn.W_O) if n_key_heads is None or ungrouped else int(n_key_heads)


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
    norm = norm_after(block, kind)
    if norm is not None:
        return PointGate(norm, "hook_out", last=True)
    if kind == "mlp" and not is_module(component):
        component = component.out
    return PointGate(component, "hook_out", last=True)

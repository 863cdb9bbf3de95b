"""Any component of a model, on one prompt, as the linear map of its Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from lch_plugin.adapters.states import evaluating, without_autocast
from lch_plugin.adapters.transformer_lens import LensModel, run_edited
from lch_plugin.adapters.transformer_lens.architecture import (
    attention,
    attention_input,
    attention_output,
    block_input,
    block_output,
    check_heads,
    check_members,
    check_model,
    embedding_name,
    head_outputs,
    heads_values,
    layer_indices,
    stacks,
)
from lch_plugin.adapters.transformer_lens.gates import Gate
from lch_plugin.adapters.transformer_lens.mlps import locate_mlp, mlp_gates
from lch_plugin.cotangents import Ones
from lch_plugin.errors import InputError, SiteError
from lch_plugin.lens.asked import one_prompt
from lch_plugin.lens.passes import watching
from lch_plugin.linear_maps import LinearMap, graphs_that_last, jacobian_product
from lch_plugin.linearization import DetachedMode
from lch_plugin.sites import Site


@dataclass(frozen=True)
class Ends:
    """Between which tensors a component lies.

    Attributes:
        read: what it reads.
        written: what is seen of what it writes.
        output: what it writes, of these.
    """

    read: Gate
    written: tuple[Gate, ...]
    output: Callable[..., Tensor] = lambda y: y


@graphs_that_last()
def component_map(model: LensModel, site: Site, prompt: str | Int[Tensor, "*one pos"]) -> LinearMap:
    """A component's Jacobian, or its exact affine map if the site is detached, on one prompt.

    Args:
        model: TransformerBridge or HookedTransformer.
        site: one component. A cotangent, and what else is said of how to take a centroid, has no
            meaning here.
        prompt: text, or the ids of one prompt without padding.

    Returns:
        From what the component reads, ``(1, pos, d_in)``, to what it writes, ``(1, pos, d_out)``.

    Raises:
        InputError: no such prompt, or a site with more settings than these.
        SiteError: no such component, or several.
    """
    check_model(model)
    _check_site(site)
    ids = one_prompt(model, prompt)
    mode = DetachedMode() if site.linearization == "detached" else None
    seen: dict[object, Tensor] = {}

    def start(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        seen["x"] = leaf if mode is None else mode.follow(leaf)
        return leaf.clone()

    def keep(i: int, y: Tensor) -> Tensor:
        seen[i] = y
        return y

    ends = None if site.kind == "model" else component_ends(model, site)
    acts: list[Any] = []
    if ends is not None:
        acts = [(ends.read, start), *((g, partial(keep, i)) for i, g in enumerate(ends.written))]
    edits = {embedding_name(model): start} if ends is None else {}
    with watching(acts), evaluating(model), without_autocast(), mode or nullcontext():
        logits = run_edited(model, ids, edits)
        if ends is None:
            return LinearMap(logits, [seen["x"]])
        if len(seen) < 1 + len(ends.written):
            raise SiteError(
                f"what the {site.kind} reads or writes did not pass its hook points. If an SAE "
                "stands there, call reset_saes() first."
            )
        y = ends.output(*(seen[i] for i in range(len(ends.written))))
    return LinearMap(y, [seen["x"]])


@graphs_that_last()
def jvp(
    site_or_fn: Site | Callable[[Tensor], Tensor],
    x: Any,
    d: Float[Tensor, ...],
    *,
    model: LensModel | None = None,
) -> Float[Tensor, "*y"]:
    """``J d``: what a component writes for a direction of what it reads, from the right.

    The other side of a centroid ``J^T v``: ``v . (J d) = (J^T v) . d``. Of a callable the true
    Jacobian is taken, of ``lch.detached(fn)`` the exact affine map; a `lch_plugin.Site` says which.

    Args:
        site_or_fn: any callable or ``nn.Module`` from tensors to tensors, or a component of
            ``model``.
        x: where the Jacobian is taken: the input of the callable; of a component the prompt, as
            text or token ids.
        d: direction, in the shape of what the callable or the component reads; ``(1, pos, d_in)``
            of a component.
        model: TransformerBridge or HookedTransformer, of a site.

    Returns:
        In the shape of the output.

    Raises:
        InputError: shapes that do not fit, a prompt that the model cannot read, or a site without a
            model.
        NotDifferentiableError: the output does not depend differentiably on the input.
        SiteError: no such component.

    Example:
        >>> linear, x, d = torch.nn.Linear(3, 5), torch.randn(2, 3), torch.randn(2, 3)
        >>> torch.allclose(lch.jvp(linear, x, d), d @ linear.weight.T, atol=1e-6)
        True

        A component of a model, on a prompt.

        >>> model, site = lch.load_demo_model(), lch.Site("mlp", layers=2)
        >>> lch.jvp(site, "A pear", torch.randn(1, 3, 128), model=model).shape
        torch.Size([1, 3, 128])
    """
    if not isinstance(site_or_fn, Site):
        if model is not None:
            raise InputError("model= goes with a Site, and a callable was given.")
        return jacobian_product(site_or_fn, x, d)
    if model is None:
        raise InputError("a Site is a component of a model: give model=, and the prompt as x.")
    d = d.clone() if d.is_inference() else d
    return component_map(model, site_or_fn, x).push(d[None])[0]


def _check_site(site: Site) -> None:
    if not isinstance(site, Site):
        raise InputError(
            f"site={site!r} must be a lch_plugin.Site, such as lch.Site('span', (3, 7))."
        )
    if site.expert or site.is_local or site.create_graph or not isinstance(site.v, Ones):
        raise InputError(
            f"a Jacobian of a {site.kind} is read through no cotangent, is no mean and has no "
            "offset: of a Site give the kind, the layers, the index and the linearization alone."
        )
    if site.positions is not None:
        raise InputError(f"output_positions={site.output_positions!r}: take these rows of J d.")


def component_ends(model: LensModel, site: Site) -> Ends:
    """Where a component begins and ends.

    Raises:
        SiteError: no such component, or several.
    """
    found = stacks(model, site.stack or "blocks")
    ((stack, blocks),) = found.items()
    layers = layer_indices(blocks, site.layers, keep_order=True)
    if site.of_kind.layers == "ends":
        first, last = layers
        if last < first:
            raise SiteError(f"layers={site.layers!r}: the span ends before it starts.")
        return Ends(block_input(blocks[first]), (block_output(blocks[last]),))
    if len(layers) != 1:
        raise SiteError(f"layers={site.layers!r}: a Jacobian is of one component. Give one layer.")
    (layer,) = layers
    block: Any = blocks[layer]
    if site.kind == "block":
        return Ends(block_input(block), (block_output(block),))
    members = list(site.members)
    if site.kind == "mlp":
        if block._modules.get("mlp") is None:
            raise SiteError(f"{stack}.{layer}.mlp does not exist. Take another layer.")
        read, written = mlp_gates(block.mlp)
        return Ends(read, (written,))
    if site.kind == "neuron":
        parts = locate_mlp(model, stack, layer)
        parts.check_readable()
        mlp = parts.weights
        d_mlp = mlp.W_out.shape[0]
        if max(members) >= d_mlp:
            raise SiteError(f"{stack}.{layer}.mlp has neurons 0 to {d_mlp - 1}, not {members}.")

        def activations(*pre: Tensor) -> Tensor:
            return mlp.neurons(members).activations(tuple(z[..., members] for z in pre))

        return Ends(parts.input_gate, tuple(parts.pre_activation_gates), activations)
    attn, name = attention(block, f"{stack}.{layer}")
    if site.kind == "attn":
        return Ends(attention_input(attn), (attention_output(attn),))
    check_heads(attn, f"{stack}.{layer}.{name}")
    check_members(attn, f"{stack}.{layer}.{name}", members)
    output = partial(head_outputs, attn, members)
    return Ends(attention_input(attn), (heads_values(attn, last=False),), output)

"""Add a vector to what a component reads, or edit it in any other way, while a context is open."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lch_plugin.adapters.arguments import input_of
from lch_plugin.adapters.hooked import readers, unwrapped
from lch_plugin.adapters.transformer_lens.mlps import is_module
from lch_plugin.errors import InputError, SiteError
from lch_plugin.names import did_you_mean

Positions = slice | Sequence[int]
EVERYWHERE = slice(None)


@contextmanager
def steering(
    model: nn.Module,
    component: str,
    vector: Float[Tensor, " d_in"],
    positions: Positions = EVERYWHERE,
) -> Iterator[None]:
    """While open, a vector is added to what a component reads, in every forward pass.

    Generation too: with a key-value cache each step reads one token, which is position 0 and -1.
    Hooks and centroids within the component see the steered value. Contexts nest, and their vectors
    add up. Afterwards the model is what it was.

    Args:
        model: any module: TransformerLens' models, `lch_plugin.saes.HookedModel` and those of
            HuggingFace included.
        component: name of a module, which stands for what it reads, as ``blocks.2.mlp``; or of a
            hook point, as in the metadata of an SAE: of a centroid it stands for what the component
            reads, of anything else for the value there, with heads joined if the vector is as wide
            as all of them.
        vector: for an SAE ``strength * sae.W_dec[feature]``.
        positions: of the sequence, where to add it.

    Raises:
        SiteError: there is no such component.
        InputError: the vector is no vector or not finite; in a pass, it does not fit what is there.

    Example:
        >>> with lch.steering.steering(model, sae.cfg.metadata.hook_name, 4 * sae.W_dec[17]):
        ...     print(model.generate("Once upon a time", max_new_tokens=20))
    """
    if vector.ndim != 1 or not bool(vector.isfinite().all()):
        raise InputError(
            f"the vector has shape {tuple(vector.shape)}, and {int((~vector.isfinite()).sum())} "
            "of its values are not finite; a finite one of shape (d_in,) is needed."
        )
    vector = vector.detach()
    with edited_input(model, component, lambda x: _add(x, vector, positions, component)):
        yield


@contextmanager
def edited_input(
    model: nn.Module, component: str, edit: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """While open, a component reads ``edit`` of what it would have read.

    Args:
        model, component: as `steering`.
        edit: gets and returns a tensor, ``(batch, pos, d_in)`` mostly.

    Raises:
        SiteError: there is no such component.
    """
    entry = entry_of(model, component)

    def on_call(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        x, instead = input_of((args, kwargs), component)
        return instead(edit(x))

    # First of all, so that whatever else looks at the input sees the edited one.
    handle = entry.register_forward_pre_hook(on_call, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def entry_of(model: nn.Module, component: str) -> nn.Module:
    """The module whose input a component reads, or the hook point of what it reads."""
    points: Mapping[str, nn.Module] = getattr(model, "hook_dict", {})
    reader = readers(model).get(component)
    if component in points and reader is None:  # Under any of its names.
        return points[component]
    if reader is not None:
        name = reader.input_name
    else:  # A module, or a centroid's hook point that is not attached.
        name, _, rest = component.partition(".hook_centroid")
        if span := re.match(r"_from_(\d+)", rest):
            name = f"{name.rpartition('.')[0]}.{span[1]}"
        name = name.partition(":")[0]  # A stretch begins with its first module.
    try:
        if not name or name.startswith("hook_centroid"):
            raise AttributeError("it names no module.")
        module = unwrapped(model).get_submodule(name)
    except AttributeError as error:
        kind = type(unwrapped(model)).__name__
        modules = [
            known for known, _ in unwrapped(model).named_modules(remove_duplicate=False) if known
        ]
        raise SiteError(
            f"{component!r} is no component of this {kind}: {str(error).rstrip('.')}. "
            f"{did_you_mean(component, [*points, *modules])} Give the name of a module or hook "
            "point as in model.named_modules(), or of a centroid's hook point, as "
            "'blocks.2.mlp.hook_centroid'."
        ) from error
    entry: nn.Module = module if is_module(module) else getattr(module, "in")
    return entry


def joined(x: Tensor, d_in: int) -> Tensor:
    """With heads joined, as SAELens does, where ``d_in`` is the width of all of them together."""
    return x.flatten(2) if x.ndim == 4 and x.shape[-1] != d_in == x[0, 0].numel() else x


def _add(x: Tensor, vector: Tensor, positions: Positions, component: str) -> Tensor:
    flat = joined(x, len(vector))
    if flat.shape[-1] != len(vector) or (x.ndim < 3 and positions != EVERYWHERE):
        raise InputError(
            f"{component} reads a tensor of shape {tuple(x.shape)}: a vector of {len(vector)} "
            f"values at positions {positions!r} cannot be added to it. Vectors have to have as "
            "many values as its last dimension, and positions are of (batch, pos, d_in)."
        )
    if positions == EVERYWHERE:
        return (flat + vector.to(x)).view_as(x)
    flat = flat.clone()
    try:
        flat[:, positions] += vector.to(x)
    except IndexError as error:
        raise InputError(
            f"positions={positions!r} do not exist in sequences of {x.shape[1]} tokens."
        ) from error
    return flat.view_as(x)

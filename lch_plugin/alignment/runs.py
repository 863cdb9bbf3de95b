"""One run of a model that a component's Jacobian can be read from, and differentiated through.

A run knows ``x``, what a component read, and ``y``, what it wrote. Measures and penalties are
made of products ``J^T v`` of the two. So they need no second forward pass, know nothing of the
model, and are the same at its input and at a site within.

An item is a row of the batch: all of ``x[i]`` and all of ``y[i]``, flattened. Items have to be
independent, as they are of a model without batch normalisation, or in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lch_plugin.adapters.arguments import Call, input_of, output_of
from lch_plugin.adapters.grad_scope import gradients
from lch_plugin.adapters.huggingface import Target, resolve_modules
from lch_plugin.adapters.passes import through
from lch_plugin.centroids import fit_cotangent
from lch_plugin.cotangents import Cotangent
from lch_plugin.errors import InputError, NonFiniteError, SiteError

#: What a model is called with: its first argument, or its arguments by name.
Inputs: TypeAlias = Tensor | Mapping[str, Any]
#: A plain function, or a module whose components have names.
Model: TypeAlias = nn.Module | Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Run:
    """What one component read and wrote, with the graph between the two.

    Attributes:
        output: what the model returned: for the loss of the same forward pass.
        x: input of the component.
        y: its output.
        name: of the component, for messages.
    """

    output: Any
    x: Float[Tensor, "batch ..."]
    y: Float[Tensor, "batch ..."]
    name: str

    def pull(
        self, v: Float[Tensor, "batch ..."], *, create_graph: bool = False
    ) -> Float[Tensor, "batch ..."]:
        """``J^T v`` for every item, by one backward pass.

        Args:
            v: in the shape of ``y``.
            create_graph: whether the product can be differentiated again.

        Raises:
            NotDifferentiableError: ``y`` does not depend differentiably on ``x``.
            NonFiniteError: the product has NaN or infinite values.
        """
        with torch.inference_mode(False):
            (product,) = gradients(
                self.name, self.y, [self.x], v, keep=True, create_graph=create_graph
            )
        if not bool(product.isfinite().all()):
            bad = int((~product.flatten(1).isfinite().all(1)).sum())
            raise NonFiniteError(
                f"{self.name}: J^T v of {bad} of {len(product)} items is not finite. Look for what "
                "overflowed: the input, the weights, or a learning rate that diverged."
            )
        return product

    def centroid(
        self,
        cotangent: Float[Tensor, ...] | Cotangent | None = None,
        *,
        create_graph: bool = False,
    ) -> Float[Tensor, "batch ..."]:
        """The centroid of every item, ``J^T 1``, in the shape of ``x``.

        Args:
            cotangent: ``v`` in place of the ones, as in `lch_plugin.centroid`.
            create_graph: as `pull`.

        Raises:
            InputError: the cotangent does not fit, is zero or not finite.
            NotDifferentiableError, NonFiniteError: as `pull`.
        """
        return self.pull(fit_cotangent(cotangent, self.y), create_graph=create_graph)


def run(
    model: Model,
    inputs: Inputs,
    site: str = "",
    *,
    output: Callable[[Any], Tensor] | None = None,
) -> Run:
    """Run a model once, with the graph between a component's input and its output.

    The pass is the model's own: in its mode (dropout too), with gradients to all weights, so that
    a loss of ``run(...).output`` and a penalty share it.

    Args:
        model: any callable, or a module (HuggingFace's, TransformerLens', your own).
        inputs: the model's first argument, or its arguments by name. Their first dimension is that
            of items.
        site: the component, as in `lch_plugin.huggingface.attach`: ``"h.1"`` is that module,
            ``"h.1:"`` all from its input to the model's output, ``"h.1:h.3"`` a stretch. The empty
            name is the model itself.
        output: takes from what the component returns the tensor that counts, or a part of it, as
            ``lambda logits: logits[:, -1]``; if None the tensor, a model's logits or hidden states.

    Raises:
        InputError: no floating-point input to differentiate by, an empty batch, an input that is
            not finite, or an output without one row for each item.
        SiteError: no such module, several, or one that is not called just once.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.GELU())
        >>> found = lch.alignment.run(model, torch.randn(4, 3), "1")
        >>> found.x.shape, found.y.shape
        (torch.Size([4, 8]), torch.Size([4, 8]))
    """
    target = find_component(model, site)
    call: Call = ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
    label = f"site {site!r}" if site else "the model"
    xs: list[Tensor] = []

    def enter(own: Call) -> Call:
        read, instead = input_of(own, label)
        xs.append(_variable(read, label))
        # What passes by the component is another tensor, and writes in place go to the copy.
        return instead(xs[-1].clone())

    with torch.inference_mode(False), torch.enable_grad():
        if target is None:
            args, kwargs = enter(call)
            returned = written = model(*args, **kwargs)
        else:
            assert isinstance(model, nn.Module)
            first, last = (model.get_submodule(name) for name in (target.first, target.last))
            returned, written = through(
                label, first, last, enter, lambda: model(*call[0], **call[1])
            )
        x = xs[0]
        y = output_of(written, label) if output is None else output(written)
    if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != len(x):
        found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise InputError(
            f"{label} reads {tuple(x.shape)} and gives {found}: one row of output is needed for "
            "each item. Take them out with output=."
        )
    return Run(returned, x, y, label)


def find_component(model: Model, site: str) -> Target | None:
    """The component that a site names; None for a plain function.

    Raises:
        SiteError: no such module, or several.
    """
    if not isinstance(model, nn.Module):
        if site:
            raise SiteError(
                f"site {site!r}: a {type(model).__name__} is no module and has no sites. Pass the "
                "nn.Module, or leave the site out."
            )
        return None
    targets = resolve_modules(model, site)
    if len(targets) != 1:
        names = [target.name for target in targets]
        raise SiteError(f"site {site!r} stands for {names}: name one, and call once for each.")
    return targets[0]


def _variable(x: Tensor, label: str) -> Tensor:
    """What a component reads, as something to differentiate by."""
    if x.ndim == 0 or x.numel() == 0:
        raise InputError(f"{label} reads {tuple(x.shape)}: pass one item or more.")
    if not bool(x.isfinite().all()):
        raise InputError(f"{label} reads values that are not finite (NaN or infinite).")
    # Through a clone the way back to the model's own weights stays open.
    x = x.clone() if x.requires_grad or x.is_inference() else x.detach()
    return x if x.requires_grad else x.requires_grad_()

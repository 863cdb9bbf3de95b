"""A Jacobian as a linear map: products from the left and from the right, never written out.

From the left it is a vector-Jacobian product, ``J^T v``: one backward pass. From the right,
``J d``, it takes no forward mode, which few models have: ``J^T v`` is linear in ``v``, with the
Jacobian ``J^T``, so that a backward pass through the backward pass of ``J^T v`` gives ``J d``
(Townsend 2017, "A new trick for calculating Jacobian vector products").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lch_plugin.centroids import NO_PATH, check_input
from lch_plugin.errors import InputError, NotDifferentiableError

# Numbers in the vectors of one batch of products: bounds memory whatever their number is.
_BATCH_SIZE = 2**20


class LinearMap:
    """The Jacobian of ``y`` in each of several tensors on its graph.

    Attributes:
        y: the output.
        xs: what it is differentiated in. One may lie on the way from another to ``y``.

    Raises:
        NotDifferentiableError: ``y`` depends on one of them by no differentiable path.
    """

    def __init__(self, y: Tensor, xs: Sequence[Tensor]) -> None:
        if not y.requires_grad:
            raise NotDifferentiableError(NO_PATH)
        self.y, self.xs = y, list(xs)

    def pull(self, vs: Float[Tensor, "n ..."]) -> list[Float[Tensor, "n ..."]]:
        """``J^T v`` of each of several ``v``, in each of ``xs``.

        Raises:
            NotDifferentiableError: as the class.
        """
        self._check(vs, self.y, "v")
        parts = [_gradients(self.y, self.xs, some) for some in _batches(vs)]
        return [torch.cat(found) for found in zip(*parts, strict=True)]

    def push(self, ds: Float[Tensor, "n ..."], index: int = 0) -> Float[Tensor, "n ..."]:
        """``J d`` of each of several ``d`` in ``xs[index]``.

        Raises:
            NotDifferentiableError: as the class.
        """
        self._check(ds, self.xs[index], "d")
        pulled, dual = self._dual
        parts = [_gradients(pulled[index], [dual], some)[0] for some in _batches(ds)]
        return torch.cat(parts)

    @cached_property
    def _dual(self) -> tuple[Sequence[Tensor], Tensor]:
        """``J^T v`` on a graph from ``v``, and that ``v``."""
        with torch.inference_mode(False), torch.enable_grad():
            dual = torch.zeros_like(self.y).requires_grad_()
            pulled = torch.autograd.grad(
                self.y, self.xs, dual, create_graph=True, allow_unused=True
            )
        return [_found(p) for p in pulled], dual

    @staticmethod
    def _check(vectors: Tensor, like: Tensor, name: str) -> None:
        if vectors.shape[1:] != like.shape:
            raise InputError(
                f"{name} has shape {tuple(vectors.shape[1:])}, and its space {tuple(like.shape)}: "
                "give one of that shape."
            )


def jacobian_product(
    fn: Callable[[Tensor], Tensor], x: Float[Tensor, "*x"], d: Float[Tensor, ...]
) -> Float[Tensor, "*y"]:
    """``J_fn(x) d`` of any callable: how its output changes, to first order, as ``x`` moves by d.

    Raises:
        InputError: ``x`` is not floating point, or ``d`` not of its shape.
        NotDifferentiableError: ``fn(x)`` does not depend differentiably on ``x``.
    """
    check_input(x)
    if not isinstance(d, Tensor) or d.shape != x.shape:
        found = tuple(d.shape) if isinstance(d, Tensor) else type(d).__name__
        raise InputError(f"d has shape {found} and x {tuple(x.shape)}: a direction of x has both.")
    with graphs_that_last():
        leaf = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        direction = (d.clone() if d.is_inference() else d.detach()).to(leaf)
        return LinearMap(fn(leaf), [leaf]).push(direction[None])[0]


@contextmanager
def graphs_that_last() -> Iterator[None]:
    """Gradients on, and attention in operations whose backward pass has one of its own."""
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def _batches(vectors: Tensor) -> Sequence[Tensor]:
    return vectors.split(max(1, _BATCH_SIZE // max(1, vectors[0].numel())))


def _gradients(y: Tensor, xs: Sequence[Tensor], vs: Tensor) -> list[Tensor]:
    """Of each ``v . y``, in each of ``xs``."""
    options: Any = {"retain_graph": True, "allow_unused": True}
    vs = vs.to(y)
    try:
        found = torch.autograd.grad(y, xs, vs, is_grads_batched=True, **options)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        # Operations whose backward pass writes in place take one vector at a time.
        each = [torch.autograd.grad(y, xs, v, **options) for v in vs]
        return [torch.stack([_found(g) for g in of_x]) for of_x in zip(*each, strict=True)]
    return [_found(g) for g in found]


def _found(gradient: Tensor | None) -> Tensor:
    if gradient is None:
        raise NotDifferentiableError(NO_PATH)
    return gradient

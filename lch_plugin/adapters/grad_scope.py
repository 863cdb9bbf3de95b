"""Gradients on between two places of a forward pass, and nowhere else.

Vector-Jacobian products are taken on the model's own graph, built while it runs: at a component's
input the tensor becomes one that gradients can be asked for, at its output they are asked for, and
what flows on is detached again. So the user's hooks within are part of the component, no module
runs twice, and components that overlap share one graph. While any component is under way gradients
are on, whatever the caller's mode; hooks on the points inside see tensors that carry gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lch_plugin.adapters.states import without_autocast
from lch_plugin.errors import NotDifferentiableError, SiteError
from lch_plugin.linearization import DetachedMode


class GradScope:
    """Held open by whoever needs gradients, until the last one releases it.

    Attributes:
        was_open: whether gradients were ever on.
    """

    def __init__(self) -> None:
        self.was_open = False
        # Whether each holder wants the detached linearisation.
        self._holders: dict[Hashable, bool] = {}
        self._caller_grad = False
        self._mode: DetachedMode | None = None

    @property
    def is_open(self) -> bool:
        """Whether anybody holds it."""
        return bool(self._holders)

    def is_held_besides(self, holders: Sequence[Hashable]) -> bool:
        """Whether anybody else holds it."""
        return any(holder not in holders for holder in self._holders)

    @property
    def caller_grad(self) -> bool:
        """The caller's grad mode."""
        return self._caller_grad if self._holders else torch.is_grad_enabled()

    def hold(self, holder: Hashable, detach: Callable[[], DetachedMode] | None = None) -> None:
        """Gradients on.

        Args:
            holder: who needs them; named in messages.
            detach: makes the mode in which gradients are those of the detached linearisation; None
                for the model's own.

        Raises:
            SiteError: under inference_mode, or beside a holder with another linearisation.
        """
        if torch.is_inference_mode_enabled():
            raise SiteError(
                f"{holder} needs gradients, which torch.inference_mode() rules out. Run the model "
                "under torch.no_grad()."
            )
        if detach is not None and self.caller_grad:
            raise SiteError(
                f"{holder} is a detached linearisation, which changes gradients, and the caller "
                "has gradients on. Run the model under torch.no_grad(), and not from a hook within "
                "a component that is differentiated."
            )
        if any(other != (detach is not None) for other in self._holders.values()):
            raise SiteError(
                f"{holder} and {next(iter(self._holders))} overlap, and only one of them is "
                "detached: the linearisation is that of the whole pass. Listen to one at a time."
            )
        if not self._holders:
            self._caller_grad = torch.is_grad_enabled()
            torch.set_grad_enabled(True)
            if detach is not None:
                self._mode = detach()
                self._mode.__enter__()
        self.was_open = True
        self._holders[holder] = detach is not None

    def release(self, holder: Hashable) -> None:
        """No longer needed; with the last holder the caller's grad mode comes back."""
        if self._holders.pop(holder, None) is not None and not self._holders:
            if self._mode is not None:
                self._mode.__exit__(None, None, None)
                self._mode = None
            torch.set_grad_enabled(self._caller_grad)

    def release_all(self) -> None:
        """Nobody holds it any longer."""
        for holder in list(self._holders):
            self.release(holder)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """As if it were closed: for what is not the component's own computation."""
        with torch.set_grad_enabled(self.caller_grad), without_autocast():
            if self._mode is None:
                yield
            else:
                with self._mode.paused():
                    yield

    def variable(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` as something to differentiate by, and what the model is to go on with."""
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        if self._mode is not None:
            self._mode.follow(x)
        # A copy, so that a hook of the user's may write to it in place.
        return x, x.clone()


def gradients(
    name: str,
    y: Tensor,
    xs: Sequence[Tensor],
    v: Tensor,
    *,
    keep: bool,
    create_graph: bool = False,
) -> list[Tensor]:
    """Gradients of ``v . y`` in each of several inputs, in one backward pass.

    Args:
        name: of the centroids, for messages.
        y: output.
        xs: inputs.
        v: cotangent, in the shape of the output.
        keep: whether the graph is needed again.
        create_graph: whether the gradients are to have one.

    Raises:
        NotDifferentiableError: no path leads there, or something wrote in place to what is needed.
    """
    mus: Sequence[Tensor | None] = ()
    try:
        if y.requires_grad:
            with without_autocast():  # Of the forward pass alone: each operation has its dtype.
                mus = torch.autograd.grad(
                    y,
                    xs,
                    v,
                    retain_graph=keep or create_graph,
                    create_graph=create_graph,
                    allow_unused=True,
                )
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise NotDifferentiableError(
            f"{name}: a tensor that the gradient needs was written to in place. "
            "Return a new tensor from the hook instead."
        ) from error
    found = [mu for mu in mus if mu is not None]
    if len(found) < len(xs):
        raise NotDifferentiableError(
            f"{name}: no gradient path leads from the output back to the input. Either the model "
            "computes it where gradients do not go, or a hook replaced everything on the way."
        )
    return found

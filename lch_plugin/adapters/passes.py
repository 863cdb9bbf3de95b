"""One forward pass: gradients on where a centroid needs them, and nowhere else.

Vector-Jacobian products are taken on the model's own graph, built while it runs: at a component's
input the tensor becomes one that gradients can be asked for, at its output they are asked for, and
what flows on is detached again. So the user's hooks within are part of the component, no module
runs twice, and components that overlap share one graph. While such a stretch is open gradients are
on, whatever the caller's mode; hooks on the points inside see tensors that carry gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lch_plugin.adapters.states import without_autocast
from lch_plugin.errors import NotDifferentiableError, SiteError
from lch_plugin.linearization import DetachedMode


@dataclass(frozen=True, eq=False)
class Late:
    """A centroid that waits for its cotangent.

    Attributes:
        y: the component's output.
        finish: computes and shows the centroid, given ``v`` of the shape of ``y``.
    """

    y: Float[Tensor, "batch pos d_out"]
    finish: Callable[[Tensor], None]


class Pass:
    """State of one forward pass.

    Attributes:
        given: what the model was called with, by name.
        n_pos: positions that it reads, of a model that makes tokens of what it is given.
        masks: by list of blocks that read padding, which positions are tokens.
        inputs: by reader, what its component has read and not yet turned into an output.
        captured: by reader, tensors it has put aside.
        late: by reader, centroids that wait for a cotangent.
    """

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.n_pos = 0
        self.masks: dict[str, Bool[Tensor, "batch pos"]] = {}
        self.inputs: dict[Any, Tensor] = {}
        self.captured: dict[Any, Any] = {}
        self.late: dict[Any, Late] = {}
        # Whether gradients were ever on, and the key-value caches that may have seen them.
        self.has_graph = False
        self.caches: list[Any] = []
        self.norm_input: Tensor | None = None
        self._holders: dict[Hashable, bool] = {}
        self._caller_grad = False
        self._mode: DetachedMode | None = None

    @property
    def is_open(self) -> bool:
        """Whether any stretch is."""
        return bool(self._holders)

    def is_held_besides(self, holders: Sequence[Hashable]) -> bool:
        """Whether anybody else has a stretch open."""
        return any(holder not in holders for holder in self._holders)

    @property
    def caller_grad(self) -> bool:
        """The caller's grad mode."""
        return self._caller_grad if self._holders else torch.is_grad_enabled()

    @property
    def mode(self) -> DetachedMode | None:
        """The detached linearisation, while a stretch that uses it is open."""
        return self._mode

    def hold(
        self, holder: Hashable, *, detached: bool = False, replay: list[Tensor] | None = None
    ) -> None:
        """Open a stretch: gradients on.

        Raises:
            SiteError: under inference_mode, or beside a stretch with another linearisation.
        """
        if torch.is_inference_mode_enabled():
            raise SiteError(
                f"{holder} needs gradients, which torch.inference_mode() rules out. Run the model "
                "under torch.no_grad()."
            )
        if detached and self.caller_grad:
            raise SiteError(
                f"{holder} is a detached linearisation, which changes gradients, and the caller "
                "has gradients on. Run the model under torch.no_grad()."
            )
        if any(other != detached for other in self._holders.values()):
            raise SiteError(
                f"{holder} and {next(iter(self._holders))} overlap, and only one of them is "
                "detached: the linearisation is that of the whole pass. Listen to one at a time."
            )
        if not self._holders:
            self._caller_grad = torch.is_grad_enabled()
            torch.set_grad_enabled(True)
            if detached:
                self._mode = DetachedMode(replay)
                self._mode.__enter__()
        self.has_graph = True
        self._holders[holder] = detached

    def release(self, holder: Hashable) -> None:
        """Close a stretch; with the last one the caller's grad mode comes back."""
        if self._holders.pop(holder, None) is not None and not self._holders:
            if self._mode is not None:
                self._mode.__exit__(None, None, None)
                self._mode = None
            torch.set_grad_enabled(self._caller_grad)

    def abandon(self) -> None:
        """Close every stretch."""
        for holder in list(self._holders):
            self.release(holder)
        self.norm_input = None
        self.inputs.clear()
        self.captured.clear()
        self.late.clear()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """As if no stretch were open: for what is not the component's own computation."""
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


def gradients(name: str, y: Tensor, xs: Sequence[Tensor], v: Tensor, *, keep: bool) -> list[Tensor]:
    """Gradients of ``v . y`` in each of several inputs, in one backward pass.

    Args:
        name: of the centroids, for messages.
        y: output.
        xs: inputs.
        v: cotangent, in the shape of the output.
        keep: whether the graph is needed again.

    Raises:
        NotDifferentiableError: no path leads there, or something wrote in place to what is needed.
    """
    mus: Sequence[Tensor | None] = ()
    try:
        if y.requires_grad:
            with without_autocast():  # Of the forward pass alone: each operation has its dtype.
                mus = torch.autograd.grad(y, xs, v, retain_graph=keep, allow_unused=True)
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

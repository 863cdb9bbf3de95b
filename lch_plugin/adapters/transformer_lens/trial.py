"""A forward pass as an experiment: what the self-check looks at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lch_plugin.adapters.checks import noise
from lch_plugin.adapters.transformer_lens.readers import Reader


@dataclass(eq=False)
class Trial:
    """Makes a pass an experiment on the readers that listen.

    Attributes:
        shift: added to what the first component that is read reads.
        replay: factors of a detached linearisation to use instead of the pass's own.
        norms: by reader, how much its cotangent and a random one read, and the dtype.
        experts: by reader, ``x``, ``y``, ``mu`` and ``v``.
        recorded: factors the detached linearisation held fixed.
    """

    shift: Tensor | None = None
    replay: list[Tensor] | None = None
    norms: dict[Reader, list[tuple[float, float, torch.dtype]]] = field(default_factory=dict)
    experts: dict[Reader, tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=dict)
    recorded: list[Tensor] = field(default_factory=list)

    def note(
        self, reader: Reader, x: Tensor, y: Tensor, v: Tensor, gradient: Callable[[Tensor], Tensor]
    ) -> None:
        """Compare a centroid, ``gradient(v)``, with that of a random cotangent of the same norm."""
        r = noise(v)
        r = r * (v.norm() / r.norm())
        mu, typical = gradient(v), gradient(r)
        norms = [(float(mu.norm()), float(typical.norm()), x.dtype)]
        if reader.site.kind in ("block", "span") and y.shape == x.shape:
            # The residual stream itself passes a cotangent on as it is.
            norms.append((float((mu - v).norm()), float((typical - r).norm()), x.dtype))
        self.norms[reader] = norms
        self.experts[reader] = x.detach(), y.detach(), mu.detach(), v.detach()

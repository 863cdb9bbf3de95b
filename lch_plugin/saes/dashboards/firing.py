"""Where features fire, collected from a stream of any length in constant memory."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Survey:
    """How often, how much and how strongly each feature of an SAE fires.

    Attributes:
        n_tokens: tokens seen.
        n_fired: tokens on which each feature fires (is not zero), ``(d_sae,)``.
        squares: sum of each feature's squared activations, float64, ``(d_sae,)``.
        maximum: magnitude of each feature's highest activation, ``(d_sae,)``.
    """

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.n_tokens = 0
        self.n_fired = torch.zeros(d_sae, dtype=torch.long, device=device)
        self.squares = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.maximum = torch.zeros(d_sae, device=device)

    def add(self, feature_acts: Float[Tensor, "row pos d_sae"], n_tokens: int) -> None:
        """See a batch of which ``n_tokens`` count; the others are zero."""
        self.n_tokens += n_tokens
        self.n_fired += (feature_acts != 0).sum((0, 1))
        self.squares += feature_acts.square().sum((0, 1), dtype=torch.float64)
        highest = torch.maximum(feature_acts.amax((0, 1)), -feature_acts.amin((0, 1)))
        self.maximum = torch.maximum(self.maximum, highest.float())

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of tokens on which each feature fires."""
        return self.n_fired / max(self.n_tokens, 1)

    @property
    def energy(self) -> Float[Tensor, " d_sae"]:
        """Each feature's share of the sum of all squared activations."""
        return (self.squares / self.squares.sum().clamp_min(1e-300)).float()


class Histogram:
    """Magnitudes of activations of some features, in equal bins from 0 to each one's maximum.

    Attributes:
        counts: tokens in each bin; zero is in none of them.
    """

    def __init__(self, maximum: Float[Tensor, " feature"], n_bins: int) -> None:
        self._maximum = maximum.clamp_min(torch.finfo(maximum.dtype).tiny)
        self.counts = torch.zeros(len(maximum), n_bins, dtype=torch.long, device=maximum.device)

    def bins(
        self, feature_acts: Float[Tensor, "row pos feature"]
    ) -> Int[Tensor, "row pos feature"]:
        """The bin of each activation; -1 of those that are zero."""
        n_bins = self.counts.shape[1]
        return (feature_acts.abs() / self._maximum * n_bins).ceil().long().clamp(0, n_bins) - 1

    def add(self, bins: Int[Tensor, "row pos feature"]) -> None:
        """Count a batch."""
        flat = (bins + 1).flatten(0, 1).T
        with_zero = flat.new_zeros(len(self.counts), self.counts.shape[1] + 1)
        self.counts += with_zero.scatter_add_(1, flat, torch.ones_like(flat))[:, 1:]


class MaxActivatingExamples:
    """Of each feature the tokens of highest score, at most one a row, with their rows.

    Attributes:
        n: how many are kept; fewer if fewer rows have a score above zero.
        scores: ``(n, feature)``, highest first.
        positions: ``(n, feature)``.
        values: the feature's activation along the row, ``(n, feature, pos)``.
        tokens: ids of the row, ``(n, feature, pos)``.
    """

    scores: Float[Tensor, "n feature"]
    positions: Int[Tensor, "n feature"]
    values: Float[Tensor, "n feature pos"]
    tokens: Int[Tensor, "n feature pos"]

    def __init__(self, n: int) -> None:
        self.n = n
        self._is_empty = True

    def add(
        self,
        scores: Float[Tensor, "row pos feature"],
        values: Float[Tensor, "row pos feature"],
        tokens: Int[Tensor, "row pos"],
    ) -> None:
        """See a batch."""
        best, positions = scores.max(1)
        rows = tokens[:, None].expand(-1, best.shape[1], -1)
        found = (best, positions, values.transpose(1, 2), rows)
        if not self._is_empty:
            kept = (self.scores, self.positions, self.values, self.tokens)
            # Earlier rows first: among equals they stay.
            found = tuple(torch.cat(pair) for pair in zip(kept, found, strict=True))  # type: ignore[assignment]
        order = found[0].argsort(dim=0, descending=True, stable=True)[: self.n]
        self.scores, self.positions = (t.take_along_dim(order, 0) for t in found[:2])
        self.values, self.tokens = (t.take_along_dim(order[..., None], 0) for t in found[2:])
        self._is_empty = False

    def count(self, feature: int) -> int:
        """How many examples there are of a feature."""
        return 0 if self._is_empty else int((self.scores[:, feature] > 0).sum())

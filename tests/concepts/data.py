"""Gaussians whose boundary is known."""

from __future__ import annotations

import torch
from torch import Tensor

D = 6


def gaussians(n: int, seed: int = 0, apart: float = 2.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of two classes with one covariance, labels, that covariance, the means' gap."""
    g = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    root = torch.randn(D, D, dtype=torch.float64, generator=fixed)
    gap = apart * torch.nn.functional.normalize(
        torch.randn(D, dtype=torch.float64, generator=fixed), dim=0
    )
    labels = torch.arange(n) % 2
    noise = torch.randn(n, D, dtype=torch.float64, generator=g)
    return noise @ root.T + labels[:, None] * gap + 5, labels, root @ root.T, gap


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))

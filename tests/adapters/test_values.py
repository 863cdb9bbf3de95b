"""The numbers that are shown beside a centroid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lch_plugin.adapters.values import expert_values, local_values
from lch_plugin.sites import Site

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, 5, 4, dtype=torch.float64, generator=GENERATOR)
W = torch.randn(4, 3, dtype=torch.float64, generator=GENERATOR)
BIAS = torch.randn(3, dtype=torch.float64, generator=GENERATOR)


@pytest.mark.parametrize("mixes_positions", [False, True])
def test_the_expert_of_an_affine_map_is_the_map(mixes_positions: bool) -> None:
    """Its offset is what the bias is worth: of a position, or of all positions of a sequence."""
    v = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64).expand(2, 5, 3)
    mu, y = v @ W.T, X @ W + BIAS
    found = expert_values(mu, X, y, v, mixes_positions=mixes_positions)
    shown = {ending: value() for ending, value in found.items()}
    worth = (v * BIAS).sum(-1, keepdim=True)
    offset = worth.sum((1, 2)) if mixes_positions else worth
    square = mu.square().sum((1, 2)) if mixes_positions else mu.square().sum(-1, keepdim=True)
    torch.testing.assert_close(shown["_offset"], offset)
    torch.testing.assert_close(shown["_radius"], square + 2 * offset)
    cosine = torch.nn.functional.cosine_similarity(mu, X, dim=-1)[..., None]
    torch.testing.assert_close(shown["_alignment"], cosine)
    assert shown[""] is not None
    assert shown[""].dtype == torch.float64


def test_half_precision_is_shown_in_float32() -> None:
    half = (t.bfloat16() for t in (X, X, X, X))
    found = expert_values(*half, mixes_positions=False)
    assert {value().dtype for value in found.values()} == {torch.float32}


@pytest.mark.parametrize("settings", [{"radius": 0.3}, {"sigma": 0.2, "neighbourhood": "gaussian"}])
def test_an_affine_map_has_one_centroid_in_a_neighbourhood(settings: dict[str, Any]) -> None:
    points: list[Tensor] = []

    def mu(samples: Tensor) -> Tensor:
        points.append(samples)
        return (torch.ones(3, dtype=torch.float64) @ W.T).expand_as(samples)

    site = Site("mlp", 1, n_samples=6, **settings)
    shown = {ending: value() for ending, value in local_values(site, X, mu).items()}
    torch.testing.assert_close(shown[""], mu(X))
    torch.testing.assert_close(shown["_variance"], torch.zeros_like(shown["_variance"]))
    torch.testing.assert_close(shown["_standard_error"], torch.zeros_like(shown["_standard_error"]))
    seen = torch.cat(points[:-1])
    assert seen.shape == (6, *X.shape)
    assert (seen - X).norm(dim=-1).min() > 0

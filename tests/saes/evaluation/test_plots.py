"""Figures of one SAE show what they were given."""

from __future__ import annotations

import pytest
import torch

from lch_plugin.errors import InputError
from lch_plugin.saes.evaluation.plots import patches_by_feature


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_by_feature(channels: int) -> None:
    """The strongest image of each feature comes first, and its strongest patch is the darkest."""
    images = torch.rand(4, channels, 8, 8)
    activations = torch.zeros(4, 2, 2, 3)
    activations[2, 0, 1, 1] = 2.0
    activations[1, 1, 0, 1] = 1.0
    rows = activations.reshape(16, 3).bfloat16().requires_grad_()
    figure = patches_by_feature(images, rows, [1, 0], n_images=3)
    first, second = (axis.images[1].get_alpha() for axis in figure.axes[:2])
    assert first[0, 7] == first.max() == pytest.approx(0.75)
    assert second[7, 0] == second.max() == pytest.approx(0.375)
    assert figure.axes[0].get_title(loc="left") == "1"
    assert len(figure.axes) == 6


def test_patches_that_make_no_grid_are_refused() -> None:
    with pytest.raises(InputError, match="CLS token"):
        patches_by_feature(torch.rand(2, 1, 8, 8), torch.rand(10, 3))

"""Figures: what they show is what they were given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from examples.centroids_by_site import SiteStatistics, centroids_by_site
from lch_plugin.errors import InputError
from lch_plugin.saes.comparison.plots import firing_by_k, scores_by_k
from lch_plugin.saes.evaluation.plots import patches_by_feature

RADII = [0.01, 0.1, 1.0]


def statistics(kind: str, layer: int | None) -> SiteStatistics:
    values = torch.linspace(0.5, 1.5, 5)
    return SiteStatistics(kind, layer, values, values - 1, (3.0, 7.0), torch.tensor(RADII))


def markers(axis: Any) -> tuple[list[float], list[float]]:
    lines = [line for line in axis.lines if line.get_marker() != "None"]
    return [float(x) for l in lines for x in l.get_xdata()], [
        float(y) for l in lines for y in l.get_ydata()
    ]


@pytest.mark.parametrize("with_model", [True, False])
def test_centroids_by_site(with_model: bool) -> None:
    shown = [statistics(kind, layer) for kind in ("mlp", "block") for layer in (0, 1)]
    shown += [statistics("model", None)] * with_model

    figure = centroids_by_site(shown, RADII)

    norm, cosine, dimension, linearity = figure.axes
    ticks = [label.get_text() for label in norm.get_xticklabels()]
    assert ticks == ["0", "1", "model"][: 2 + with_model]
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == ["mlp", "block", "model"][: 2 + with_model]
    places = []
    for axis, expected in ((norm, [1.0]), (cosine, [0.0]), (dimension, [3.0, 7.0])):
        xs, ys = markers(axis)
        assert sorted(set(ys)) == expected
        places.append(sorted(set(xs)))
    assert places[0] == places[1] == places[2]
    assert len(places[0]) == len(shown)
    # One marker a kind and radius: the errors were alike in both layers.
    assert sorted(markers(linearity)[1]) == pytest.approx(sorted(RADII * len(named)))


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


def test_scores_by_k() -> None:
    """Every seed is a dot, every mean on a line; places without a panel stay empty."""
    panel = {"centroid": {8: [0.1, 0.3], 16: [0.5, 0.7]}, "input": {8: [0.2, 0.2], 16: [0.4, 0.4]}}
    titles = ["one", "two", "three", "four"]
    figure = scores_by_k(dict.fromkeys(titles, panel), {"two": {"centroid": 0.9}})
    shown = [axis for axis in figure.axes if axis.axison]
    assert [axis.get_title() for axis in shown] == titles
    first, second = shown[:2]
    assert [line.get_ydata() for line in first.lines] == [
        pytest.approx([0.2, 0.6]),
        pytest.approx([0.2, 0.4]),
    ]
    dots = [float(y) for dots in first.collections for y in dots.get_offsets()[:, 1]]
    assert dots == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.2, 0.2, 0.4, 0.4])
    assert [float(y) for y in second.lines[-1].get_ydata()] == [0.9, 0.9]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["centroid", "input"]


def test_firing_by_k() -> None:
    """Features that never fire are left out, the others go by frequency."""
    density = torch.tensor([0.0, 0.01, 0.5, 0.1])
    figure = firing_by_k({8: {"centroid": [density, density]}, 16: {"input": [density]}})
    left, right = figure.axes
    assert [axis.get_title() for axis in (left, right)] == ["k = 8", "k = 16"]
    assert len(left.lines) == 2
    assert [float(y) for y in right.lines[0].get_ydata()] == pytest.approx([0.5, 0.1, 0.01])

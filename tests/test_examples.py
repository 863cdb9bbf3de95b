"""The figure of an example shows what it was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from examples.centroids_by_site import SiteStatistics, centroids_by_site

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

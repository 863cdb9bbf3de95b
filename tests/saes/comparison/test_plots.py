"""Figures of SAEs side by side show what they were given."""

from __future__ import annotations

import pytest
import torch

from lch_plugin.saes.comparison.plots import firing_by_k, scores_by_k


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

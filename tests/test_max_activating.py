"""Peaks, and the text around them."""

from __future__ import annotations

import torch

from lch_plugin.max_activating import ActivatingExample, max_activating_examples

TOKENS = [list("abcdef"), list("ghijkl"), list("mnopqr")]


def test_the_highest_peak_of_each_row_comes_with_its_surroundings() -> None:
    values = torch.zeros(3, 6)
    values[0, 5], values[0, 1], values[2, 0] = 1.0, 0.5, 3.0
    assert max_activating_examples(values, TOKENS, before=2, after=1) == [
        ActivatingExample(["m", "n"], [3.0, 0.0], peak=0),
        ActivatingExample(["d", "e", "f"], [0.0, 0.0, 1.0], peak=2),
    ]
    assert len(max_activating_examples(values, TOKENS, n=1)) == 1


def test_silence_has_no_peaks() -> None:
    assert max_activating_examples(-torch.ones(3, 6), TOKENS) == []

"""What is collected in batches is what the whole would give."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lch_plugin.saes.dashboards.firing import Histogram, MaxActivatingExamples, Survey

N_POS, N_FEATURES = 5, 3


@st.composite
def codes_in_batches(draw: st.DrawFn) -> tuple[Tensor, list[int]]:
    """Sparse codes with ties, and how many rows come at a time."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    seed = draw(st.integers(0, 2**16))
    shape = sum(sizes), N_POS, N_FEATURES
    feature_acts = torch.randint(-3, 5, shape, generator=torch.Generator().manual_seed(seed))
    return feature_acts.clamp_min(0).float(), sizes


@given(codes_in_batches(), st.integers(1, 6))
def test_the_best_rows_are_kept_in_order_with_their_text(
    found: tuple[Tensor, list[int]], n: int
) -> None:
    feature_acts, sizes = found
    tokens = torch.arange(feature_acts.shape[0] * N_POS).view(-1, N_POS)
    examples = MaxActivatingExamples(n)
    for batch, ids in zip(feature_acts.split(sizes), tokens.split(sizes), strict=True):
        examples.add(batch, 2 * batch, ids)
    for feature in range(N_FEATURES):
        peaks, positions = feature_acts[..., feature].max(1)
        # Earlier rows first among equals.
        rows = sorted(range(len(peaks)), key=lambda row, peaks=peaks: -float(peaks[row]))[:n]
        rows = [row for row in rows if peaks[row] > 0]
        assert examples.count(feature) == len(rows)
        for i, row in enumerate(rows):
            assert examples.scores[i, feature] == peaks[row]
            assert examples.positions[i, feature] == positions[row]
            assert torch.equal(examples.tokens[i, feature], tokens[row])
            assert torch.equal(examples.values[i, feature], 2 * feature_acts[row, :, feature])


@given(codes_in_batches())
def test_surveys_and_histograms_count_every_token_once(found: tuple[Tensor, list[int]]) -> None:
    feature_acts, sizes = found
    survey = Survey(N_FEATURES, torch.device("cpu"))
    for batch in feature_acts.split(sizes):
        survey.add(batch, batch.shape[0] * N_POS)
    fires = (feature_acts > 0).sum((0, 1))
    assert torch.equal(survey.n_fired, fires)
    assert torch.equal(survey.maximum, feature_acts.amax((0, 1)))
    torch.testing.assert_close(survey.density, (feature_acts > 0).float().mean((0, 1)))
    energy = feature_acts.square().sum((0, 1))
    torch.testing.assert_close(survey.energy, energy / energy.sum().clamp_min(1e-300))
    histogram = Histogram(survey.maximum, 4)
    for batch in feature_acts.split(sizes):
        histogram.add(histogram.bins(batch))
    assert torch.equal(histogram.counts.sum(1), fires)
    for feature, maximum in enumerate(survey.maximum.tolist()):
        for i, count in enumerate(histogram.counts[feature].tolist()):
            own = feature_acts[..., feature]
            inside = (own > maximum * i / 4) & (own <= maximum * (i + 1) / 4) & (own > 0)
            assert count == int(inside.sum())


def test_nothing_seen_is_nothing_found() -> None:
    assert MaxActivatingExamples(3).count(0) == 0
    survey = Survey(2, torch.device("cpu"))
    assert survey.density.tolist() == survey.energy.tolist() == [0, 0]

"""Bad statements are refused in one line, before there is a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

import lch_plugin as lch
from lch_plugin import probes
from lch_plugin.probes.statements import FEWEST
from tests.probes.conftest import fruit, write

GOOD = fruit("saw")


@pytest.mark.parametrize(
    ("rows", "header", "said"),
    [
        (GOOD, "statement,truth", "has no column 'label', only 'statement', 'truth'"),
        (GOOD, "text,truth", "has no column 'statement' and no 'label'"),
        ([(text, 1) for text, _ in GOOD], "statement,label", "none with the label 0"),
        ([*GOOD, ("Tom sat.", 2)], "statement,label", "row 21 has the label '2'"),
        ([*GOOD, ("Tom sat.", "")], "statement,label", "row 21 has the label ''"),
        ([*GOOD, ("  ", 1)], "statement,label", "row 21 has no statement"),
        (GOOD[:8], "statement,label", f"too few: each label needs at least {FEWEST}"),
        ([], "statement,label", "has 0 rows"),
        ([*GOOD, (GOOD[0][0], 0)], "statement,label", "is labelled 0 and 1"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(
    rows: list[tuple[str, object]], header: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(lch.InputError, match=r"mine\.csv") as raised:
        probes.read_statements(write(tmp_path / "mine.csv", rows, header))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lch.InputError, match="is no file"):
        probes.read_statements(tmp_path / "none.csv")


def test_a_statement_in_several_rows_is_kept_once(tmp_path: Path) -> None:
    found = probes.read_statements(write(tmp_path / "mine.csv", [*GOOD, *GOOD[:3]]))
    assert found.texts == tuple(text for text, _ in GOOD)
    assert found.n_repeats == 3


def test_a_data_set_gives_what_a_file_gives(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.csv", GOOD)
    columns = {"statement": [t for t, _ in GOOD], "label": [y for _, y in GOOD], "x": [0] * 20}
    ours, theirs = (probes.read_statements(s, "a") for s in (path, Dataset.from_dict(columns)))
    assert ours.texts == theirs.texts
    np.testing.assert_array_equal(ours.labels, theirs.labels)


def test_sets_that_share_a_statement_or_a_name_are_refused(tmp_path: Path) -> None:
    one = probes.read_statements(write(tmp_path / "one.csv", GOOD))
    two = probes.read_statements(write(tmp_path / "two.csv", [*fruit("found"), GOOD[0]]))
    with pytest.raises(lch.InputError, match="1 statements of two are in one too"):
        probes.check([one], [two])
    with pytest.raises(lch.InputError, match="two sets are called one"):
        probes.check([one, one])


def test_a_sample_keeps_the_share_of_each_label_and_is_drawn_by_seed(tmp_path: Path) -> None:
    whole = probes.read_statements(write(tmp_path / "one.csv", fruit("saw", "found")))
    first, again, other = (probes.sample(whole, 20, seed) for seed in (0, 0, 1))
    assert first.labels.mean() == 0.5
    assert first.texts == again.texts != other.texts
    assert set(first.texts) < set(whole.texts)
    with pytest.raises(lch.InputError, match="too few"):
        probes.sample(whole, 9, 0)

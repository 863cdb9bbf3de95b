"""How far work has come, in a terminal and elsewhere."""

from __future__ import annotations

import time
from typing import Any

import datasets
import pytest
import transformers
from tqdm.auto import tqdm

from lch_plugin import progress as module
from lch_plugin.progress import each, only_long_bars, progress, track


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")


def test_outside_a_terminal_there_is_a_line_now_and_then(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with progress("caching", 1000, "sequences") as advance:
        for _ in range(10):
            now[0] += 20
            advance(100)
    assert capsys.readouterr().err.splitlines() == [
        "caching: 200 of 1,000 sequences, 3 min left",
        "caching: 400 of 1,000 sequences, 2 min left",
        "caching: 600 of 1,000 sequences, 80 s left",
        "caching: 800 of 1,000 sequences, 40 s left",
        "caching: 1,000 of 1,000 sequences, 0 s left",
    ]


def test_short_work_says_nothing_outside_a_terminal(capsys: Any) -> None:
    assert list(track(range(5), "short")) == [0, 1, 2, 3, 4]
    assert not capsys.readouterr().err


def test_in_a_terminal_the_bar_moves_while_one_step_takes_long(terminal: None, capsys: Any) -> None:
    with progress("slow", 2, "steps"):
        drawn = capsys.readouterr().err
        time.sleep(0.4)
        moved = capsys.readouterr().err
    assert moved
    assert "slow" in drawn + moved
    assert "0 of 2 steps" in drawn + moved


def test_work_within_work_has_a_bar_of_its_own(terminal: None) -> None:
    with progress("outer", 1, "SAEs") as advance:
        assert list(each(track(iter("ab"), "inner", 2), lambda n: None)) == ["a", "b"]
        with pytest.raises(ZeroDivisionError):
            with progress("failing", None):
                raise ZeroDivisionError
        advance(1)
        (bars,) = module._shown
        assert [task.description for task in bars.tasks] == ["outer"]
    assert not module._shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.3, "12 s"), (89, "89 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_times_are_in_units_that_people_use(seconds: Any, text: str) -> None:
    assert module._duration(float(seconds)) == text


@pytest.mark.parametrize("bar", [tqdm, datasets.utils.tqdm, transformers.utils.logging.tqdm])
def test_bars_of_other_libraries_are_drawn_of_what_takes_long(
    bar: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said() -> str:
        assert list(bar(range(3), desc="Loading weights")) == [0, 1, 2]
        return capsys.readouterr().err

    with only_long_bars():
        assert not said()
    assert "Loading weights" in said()
    monkeypatch.setattr(module, "_LONG", 0.0)
    with only_long_bars():
        assert "Loading weights" in said()

"""How far long work has come: a bar in a terminal, and a line now and then elsewhere.

In a terminal the bar is drawn ten times a second, with the time gone by and the time left, so that
it moves however long one step takes. Work within other work has a bar of its own below that one.
Elsewhere, as in the log of a cluster's job, there is a line every half minute. All of it goes to
stderr.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from functools import partialmethod
from typing import TypeAlias, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")
Advance: TypeAlias = Callable[[int], None]

#: Seconds between two lines where there is no terminal.
SECONDS_BETWEEN_LINES = 30.0
# Seconds over which speed is measured: of steps that take long, there are several in it.
_SPEED_PERIOD = 600.0
# Seconds that the work of another library takes before its bar is shown.
_LONG = 5.0

# The bars that are on the screen, if any are.
_shown: list[Progress] = []


@contextmanager
def progress(what: str, total: int | None, unit: str = "") -> Iterator[Advance]:
    """Show how far a piece of work has come, for as long as the block lasts.

    Args:
        what: the work, as in "training".
        total: how much there is; None if nobody knows.
        unit: of it, as in "tokens".

    Yields:
        What is to be called with each amount that is done.

    Example:
        >>> with progress("caching", len(batches), "batches") as advance:
        ...     for batch in batches:
        ...         write(batch)
        ...         advance(1)
    """
    if _shown:
        with _task(_shown[0], what, total, unit) as advance:
            yield advance
        return
    console = Console(stderr=True)
    if not (console.is_interactive or console.is_jupyter):
        yield _lines(console, what, total, unit)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[done]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bars = Progress(
        *columns,
        console=console,
        transient=True,
        speed_estimate_period=_SPEED_PERIOD,
        # What is printed meanwhile comes above the bars, unless it goes elsewhere.
        redirect_stdout=sys.stdout.isatty(),
    )
    with bars:
        _shown.append(bars)
        try:
            with _task(bars, what, total, unit) as advance:
                yield advance
        finally:
            _shown.clear()


def track(items: Iterable[T], what: str, total: int | None = None, unit: str = "") -> Iterator[T]:
    """The same items, with `progress` by their number; ``total`` of those that have no length."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(what, total, unit) as advance:
        yield from each(items, advance)


def each(items: Iterable[T], advance: Advance) -> Iterator[T]:
    """The same items; ``advance`` hears of each when it has been used."""
    for item in items:
        yield item
        advance(1)


@contextmanager
def only_long_bars() -> Iterator[None]:
    """While open, other libraries' bars, by tqdm, are drawn of what takes more than seconds alone.

    That the weights of a small model are loaded is noise, and of a large one it is news. Where
    there is no terminal such a bar moves as rarely as ours, because each step is more text.
    """
    from tqdm import tqdm

    drawn, settings = tqdm.__init__, {"delay": _LONG}
    if not sys.stderr.isatty():
        settings["mininterval"] = SECONDS_BETWEEN_LINES
    tqdm.__init__ = partialmethod(drawn, **settings)
    try:
        yield
    finally:
        tqdm.__init__ = drawn


@contextmanager
def _task(bars: Progress, what: str, total: int | None, unit: str) -> Iterator[Advance]:
    done = 0
    task = bars.add_task(what, total=total, done=_amount(0, total, unit))

    def advance(n: int) -> None:
        nonlocal done
        done += n
        bars.update(task, advance=n, done=_amount(done, total, unit))

    try:
        yield advance
    finally:
        bars.remove_task(task)


def _lines(console: Console, what: str, total: int | None, unit: str) -> Advance:
    start = last = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        left = ""
        if total is not None and done:
            left = f", {_duration((now - start) * max(0, total - done) / done)} left"
        console.print(
            f"{what}: {_amount(done, total, unit)}{left}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip

    return advance


def _amount(done: int, total: int | None, unit: str) -> str:
    of = "" if total is None else f" of {total:,}"
    return f"{done:,}{of} {unit}".rstrip()


def _duration(seconds: float) -> str:
    """Such as "40 s", "12 min" or "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

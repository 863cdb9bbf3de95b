"""Ctrl-C and SIGTERM: which of them came, what is kept of the work, and how to go on."""

from __future__ import annotations

import shlex
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NOTHING = "Nothing of this run is kept: repeat the command to begin anew."

_keeping: list[Callable[[], str | None]] = []


def keeping(what: Callable[[], str | None]) -> None:
    """Say what an interrupt from now on leaves behind; None if there is nothing yet."""
    _keeping[:] = [what]


def what_is_kept() -> str:
    """What an interrupt leaves behind, and how to go on."""
    return next((said for what in _keeping if (said := what())), _NOTHING)


def finished_parts(out: Path) -> str | None:
    """Of work that goes on when its command is repeated."""
    from lch_plugin.files import unfinished

    if not (partial := unfinished(out.resolve())).exists():
        return None
    return f"What is finished is kept in {partial}: repeat the same command to go on after it."


def scores_alone(out: Path) -> str | None:
    """Of a circuit that was being tested."""
    from lch_plugin.files import unfinished

    if not (scores := unfinished(out.resolve()) / "scores.csv").exists():
        return None
    return f"The scores are kept in {scores}. Repeat the same command for all of it."


def last_checkpoint(run: Path, resumed: Path | None) -> str | None:
    """Of training: its newest checkpoint, or the one that it was resumed from."""
    from lch_plugin.saes.training.checkpoints import newest_good

    if (last := newest_good(run) or resumed) is None:
        return None
    again = f"repeat the command with --resume {shlex.quote(str(last))} to go on."
    return f"A checkpoint is kept in {last}: {again}"


@contextmanager
def watched() -> Iterator[Callable[[], int | None]]:
    """Have SIGTERM interrupt as Ctrl-C does, and know which of the two came last.

    Python notes each signal in a socket, whoever handles it: training has its own handlers.

    Yields:
        What returns the number of the signal, or None if none came.
    """
    ours, pythons = socket.socketpair()
    ours.setblocking(False)
    pythons.setblocking(False)
    before = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
    # As an exception, so that temporary files are cleaned up on the way out; SIGINT as well, for
    # SAELens' runners leave a handler of their own. What is ignored, as by nohup, stays so.
    handlers = {
        number: signal.signal(number, signal.default_int_handler)
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) != signal.SIG_IGN
    }

    def received() -> int | None:
        numbers = b""
        with suppress(BlockingIOError):
            numbers = ours.recv(1 << 16)
        return next((n for n in reversed(numbers) if n in (signal.SIGINT, signal.SIGTERM)), None)

    try:
        yield received
    finally:
        _keeping.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(before)
        ours.close()
        pythons.close()

"""Ctrl-C and SIGTERM: an exit code that says which, and a line that says what is kept."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sae_lens.training._interruption import interrupt_callback

from tests.cli import COMMANDS, HOOK, NEEDED, run
from tests.cli.conftest import LOADERS
from tests.slow import all_but

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
TRAIN = ["sae", "train", HOOK, "--setting", "k=4", "--d-sae", "64", "--batch-size", "512"]
CACHE = ["sae", "cache", HOOK, "--max-shard-size", "100KB", "--batch-size", "4"]


def raising(number: signal.Signals) -> Callable[..., Any]:
    def stop(*_args: Any, **_kwargs: Any) -> Any:
        signal.raise_signal(number)
        time.sleep(5)

    return stop


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_which_signal_came(
    command: str, number: signal.Signals, code: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for loader in LOADERS:
        monkeypatch.setattr(loader, raising(number))
    before = sorted(Path.cwd().rglob("*"))
    found, said = run(*command.split(), *NEEDED[command])
    assert found == code
    assert said.splitlines()[-1].startswith("Interrupted. Nothing of this run is kept: repeat")
    assert "Traceback" not in said
    assert sorted(Path.cwd().rglob("*")) == before
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_a_handler_that_a_toolkit_left_is_not_ours(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGINT, interrupt_callback)
    try:
        for loader in LOADERS:
            monkeypatch.setattr(loader, raising(signal.SIGINT))
        found, said = run("demo", *NEEDED["demo"])
        assert (found, signal.getsignal(signal.SIGINT)) == (130, interrupt_callback)
        assert "Traceback" not in said
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_is_finished_of_a_comparison_and_of_a_circuit_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lch_plugin.loading.load", raising(signal.SIGTERM))
    for name in ("comparison", "circuit"):
        partial = tmp_path / f".{name}.partial"
        partial.mkdir()
        (partial / "scores.csv").touch()
    code, said = run("sae", "compare", "--task", "digits")
    assert code == 143
    assert f"kept in {tmp_path}/.comparison.partial: repeat the same command" in said
    code, said = run("circuit", "--task", "an")
    assert code == 143
    assert f"kept in {tmp_path}/.circuit.partial/scores.csv. Repeat" in said


@pytest.mark.parametrize(
    ("command", "number", "code"),
    all_but(  # Below the other way round.
        [("train", signal.SIGINT, 130)],
        [("train", signal.SIGINT, 130), ("cache", signal.SIGTERM, 143)],
    ),
)
def test_a_process_that_is_stopped_can_go_on(
    command: str, number: signal.Signals, code: int, tmp_path: Path
) -> None:
    """Stopped in the midst of its work, and repeated as it says."""
    script = [sys.executable, "-c", "from lch_plugin.cli import entry_point; entry_point()"]
    tokens = ["--tokens", "400000", "--checkpoints", "400"] if command == "train" else []
    arguments = TRAIN + tokens if command == "train" else [*CACHE, "--n-tokens", "40000"]
    process = subprocess.Popen(
        [*script, *arguments, "--out", "out"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    pattern = "out-checkpoints/*/[0-9]*" if command == "train" else ".out.partial/*.arrow"
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(pattern)) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
    line = said.splitlines()[-1]
    if command == "train":
        found = re.fullmatch(
            r"Interrupted\. A checkpoint is kept in (.*): repeat the command with --resume \1 to "
            r"go on\.",
            line,
        )
        assert found, said
        checkpoint = tmp_path / found[1]
        newest = max(int(p.name) for p in checkpoint.parent.iterdir() if p.name.isdigit())
        assert int(checkpoint.name) == newest
    else:
        partial = tmp_path / ".out.partial"
        assert line == (
            f"Interrupted. What is finished is kept in {partial}: repeat the same command to go "
            "on after it."
        )
        assert list(partial.glob("data-*.arrow"))


def test_what_a_stopped_run_says_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --checkpoints too: an interrupt makes one."""
    monkeypatch.chdir(tmp_path)
    from lch_plugin.saes.training import runners

    fit = runners._stopping_between_steps

    def stopping(trainer: Any, *more: Any) -> Any:
        step, n = trainer.step, iter(range(100))

        def stop_at_the_third(batch: Any) -> Any:
            if next(n) == 2:
                signal.raise_signal(signal.SIGTERM)
            return step(batch)

        trainer.step = stop_at_the_third
        return fit(trainer, *more)

    arguments = [*TRAIN, "--tokens", "4096"]
    with monkeypatch.context() as patch:
        patch.setattr(runners, "_stopping_between_steps", stopping)
        code, said = run(*arguments)
    assert code == 143
    resume = said.splitlines()[-1].partition("--resume ")[2].removesuffix(" to go on.")
    assert Path(resume).name == str(3 * 512)
    assert run(*arguments, "--resume", resume)[0] == 0
    assert (tmp_path / "sae").is_dir()


def test_a_cache_goes_on_when_its_command_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    from lch_plugin.saes.caching import computing

    write, n = computing.write_shard, iter(range(100))

    def stop_at_the_third(*args: Any, **kwargs: Any) -> Any:
        if next(n) == 2:
            signal.raise_signal(signal.SIGINT)
        return write(*args, **kwargs)

    arguments = [*CACHE, "--n-tokens", "4000", "--max-shard-size", "1KB"]
    with monkeypatch.context() as patch:
        patch.setattr(computing, "write_shard", stop_at_the_third)
        code, said = run(*arguments)
    assert code == 130
    partial = tmp_path / ".cache.partial"
    assert f"kept in {partial}: repeat the same command" in said
    written = {path.name: path.stat().st_mtime_ns for path in partial.glob("data-*.arrow")}
    assert len(written) == 2
    assert run(*arguments)[0] == 0
    for name, at in written.items():
        assert (tmp_path / "cache" / name).stat().st_mtime_ns == at

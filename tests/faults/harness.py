"""Break what the package writes and reads, in every way that disks, signals and people do.

    python -m tests.faults.harness                        everything: about an hour on 2 cores
    python -m tests.faults.harness --kills 10 --flips 10 --cuts 5 --disks 3

- **Kills**: SIGKILL at moments spread over what an operation does to files (each file opened for
  writing, made, moved or removed is one), or at random moments. Afterwards nothing bears the
  output's name, or it is whole; the operation is run again and gives, file by file, what a run
  gives that nobody killed; nothing is left beside it; and files of the user's own are still there.
- **Flips** of a bit and **cuts** of a file's end, anywhere in an artifact: reading it is refused in
  one line, or gives what it gave before.
- **Hostile text** in place of every text of a page, in headless Chromium where there is one: none
  of it runs.
- **Cycles** of attaching, running and detaching each adapter: nothing is left on the model.
- **Full disks**: an output on a file system that fills up (or where none can be mounted, a limit on
  the size of files) is an error in one line, nothing torn, and what was finished is kept where the
  error says.

Prints the table of tried, survived and lost.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from sae_lens.constants import RUNNER_CFG_FILENAME
from torch.utils._pytree import tree_leaves

import lch_plugin as lch
from lch_plugin.circuits import attribution_graph, load_graph, save_graph, task
from lch_plugin.files import CONTENTS, check_contents, check_new_directory
from lch_plugin.saes.caching.shards import MANIFEST
from tests.faults import operations
from tests.faults.cycles import CYCLES, repeat
from tests.faults.operations import HOOK, OPERATIONS
from tests.faults.pages import captured, check_page

NOTES = "NOTES.md"
_WITH_PAGES = ("evaluate", "features", "circuit", "neurons", "demo", "compare")
# A child that is still at work after so many seconds is a fault of its own.
_PATIENCE = 300
_DIED, _REFUSED, _TRACEBACK = -signal.SIGKILL, 3, 4


@dataclass
class Tally:
    """How often something was tried, and what became of it."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, kind: str, fault: str | None) -> None:
        self.counts[kind, "tried"] += 1
        self.counts[kind, "survived" if fault is None else "lost"] += 1
        if fault is not None:
            self.faults.append(f"{kind}: {fault}")

    def table(self) -> str:
        kinds = dict.fromkeys(kind for kind, _ in self.counts)
        rows = [
            f"| {kind} | {self.counts[kind, 'tried']} | {self.counts[kind, 'survived']} | "
            f"{self.counts[kind, 'lost']} |"
            for kind in kinds
        ]
        return "\n".join(
            ["| fault | tried | survived | lost |", "| --- | --- | --- | --- |", *rows]
        )


def content(path: Path) -> dict[str, str]:
    """Hashes of the files of an output, but for those that hold times or drawn names."""
    return {
        str(file.relative_to(path)): xxhash.xxh3_128(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in (RUNNER_CFG_FILENAME, CONTENTS)
    }


class Bench:
    """A directory in which operations are run, each in a child that may die."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        operations.prepare(directory)
        operations.small_demo()
        self._whole: dict[str, tuple[dict[str, str], int, float]] = {}

    def whole(self, name: str) -> tuple[dict[str, str], int, float]:
        """What an operation gives that nobody kills, its events, and its seconds."""
        if name not in self._whole:
            out = self.directory / f"whole-{name}"
            counted = multiprocessing.get_context("fork").Value("i", 0)
            began = time.monotonic()
            code = self.run(lambda: _counting(OPERATIONS[name], out, counted))
            assert code == 0, f"{name} fails by itself: {code}"
            self._whole[name] = content(out), counted.value, time.monotonic() - began
        return self._whole[name]

    def run(self, work: Callable[[], Any], patience: float = _PATIENCE) -> int:
        """The exit code of a fork that does some work; killed when the patience ends."""
        process = multiprocessing.get_context("fork").Process(target=_quietly, args=(work,))
        process.start()
        process.join(patience)
        if process.is_alive():
            process.kill()
            process.join()
        assert process.exitcode is not None
        return process.exitcode

    def kill(self, name: str, generator: random.Random) -> str | None:
        """Kill an operation somewhere, and run it again; what was lost, if anything."""
        whole, n_events, seconds = self.whole(name)
        with self.room(name) as out:
            if generator.random() < 0.5:
                at = generator.randrange(n_events)
                code = self.run(lambda: _killed(OPERATIONS[name], out, at))
                where = f"at event {at} of {n_events}"
            else:
                moment = generator.uniform(0, seconds)
                code = self.run(lambda: OPERATIONS[name](out), patience=moment)
                where = f"after {moment:.2f} of {seconds:.2f} s"
            if code not in (_DIED, 0):
                return f"{name} {where}: exit code {code}"
            torn = _torn(out)
            if torn is not None:
                return f"{name} {where}: {torn}"
            again = "resume" if name == "train" else name
            if out.exists():  # The next run is refused, and tidies up all the same.
                with contextlib.suppress(lch.OutputError):
                    check_new_directory(out)
            else:
                code = self.run(lambda: OPERATIONS[again](out))
            if code not in (_DIED, 0) or not out.exists():
                return f"{name} {where}: run again it ends with {code}"
            if content(out) != whole:
                return f"{name} {where}: run again it gives something else"
            left = {p.name for p in out.parent.iterdir()} - {
                *(NOTES, "rows", "dictionary", out.name, f"{out.name}-checkpoints")
            }
            if left or not (out.parent / NOTES).exists():
                return f"{name} {where}: beside it are {sorted(left)}"
        return None

    @contextlib.contextmanager
    def room(self, name: str, parent: Path | None = None) -> Iterator[Path]:
        """An output in a directory with what operations read, and notes of the user's."""
        with tempfile.TemporaryDirectory(dir=parent or self.directory) as directory:
            for source in ("rows", "dictionary"):
                (Path(directory) / source).symlink_to(self.directory / source)
            (Path(directory) / NOTES).write_text("mine")
            yield Path(directory) / name

    def fill(self, name: str, share: float) -> str | None:
        """Run an operation on a disk that is full before it is done; what was lost, if anything."""
        size = max(4096, int(share * _size(self.directory / f"whole-{name}")))
        told = self.directory / "told.txt"
        with _small_disk(self.directory, size) as (parent, limit):
            with self.room(name, parent) as out:
                code = self.run(lambda: _telling(OPERATIONS[name], out, told, limit))
                said = told.read_text() if told.exists() else ""
                told.unlink(missing_ok=True)
                if code == 0:  # There was room.
                    return _torn(out)
                if code != _REFUSED or "\n" in said:
                    return f"{name}, {size} bytes: exit code {code}: {said[-300:]}"
                if torn := _torn(out):
                    return f"{name}, {size} bytes: {torn}"
                kept = re.search(r"is kept in (.+?)\.$", said)
                if kept is None:
                    finished = re.search(r"parts are kept|complete shards are kept|be kept", said)
                    return None if finished or limit else f"{name}: nothing is kept: {said}"
                place = Path(kept[1])
                if not check_contents(place, ""):
                    return f"{name}: {place} is not whole"
                shutil.rmtree(place)
        return None


def _torn(out: Path) -> str | None:
    """What is half done under a final name: the output's own, or a checkpoint's."""
    checkpoints = [p for p in Path(f"{out}-checkpoints").glob("*/*/") if p.name.isdigit()]
    for found in [out, *checkpoints]:
        if not found.exists():
            continue
        try:
            if (found / MANIFEST).exists():
                lch.saes.Cache(found)
            elif not check_contents(found, ""):
                return f"{found.name} does not say what it holds"
        except lch.LCHError as error:
            return str(error)
    return None


def _quietly(work: Callable[[], Any]) -> None:
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    work()


def _events(out: Path, then: Callable[[], None]) -> None:
    """Call something before each change that is made to files beside an output."""
    parent = str(out.parent)
    changing = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wax"
        if (writes or event in changing) and str(arguments[0]).startswith(parent):
            then()

    sys.addaudithook(hook)


def _counting(operation: Callable[[Path], None], out: Path, counted: Any) -> None:
    def count() -> None:
        counted.value += 1

    _events(out, count)
    operation(out)


def _killed(operation: Callable[[Path], None], out: Path, at: int) -> None:
    left = at

    def count() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    _events(out, count)
    operation(out)


def _telling(operation: Callable[[Path], None], out: Path, told: Path, limit: int) -> None:
    """Run an operation, and write what it raises; exit codes say of which kind that is."""
    file = told.open("w")  # Before there is no room.
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        operation(out)
    except lch.LCHError as error:
        file.write(str(error)[:4000])
        file.flush()
        os._exit(_REFUSED)
    except BaseException as error:
        file.write(f"{type(error).__name__}: {error}"[:4000])
        file.flush()
        os._exit(_TRACEBACK)


@contextlib.contextmanager
def _small_disk(directory: Path, size: int) -> Iterator[tuple[Path, int]]:
    """A file system of few bytes; where none can be mounted, a directory and a limit to files."""
    place = Path(tempfile.mkdtemp(dir=directory))
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield place, 0 if mounted else size // 3
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)
        shutil.rmtree(place, ignore_errors=True)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


class Artifacts:
    """One of each kind that is read again, with what reading it gives."""

    def __init__(self, bench: Bench) -> None:
        self.directory = bench.directory / "artifacts"
        self.directory.mkdir()
        operations.make_cache(self.directory / "cache")
        (self.directory / "rows").symlink_to(bench.directory / "rows")
        operations.train(self.directory / "sae")
        run = next((self.directory / "sae-checkpoints").iterdir())
        self.checkpoint = min(run.glob("*/"), key=lambda path: int(path.name))
        graph = attribution_graph(
            operations.model(), task(operations.model(), "an", 1)[0][0], max_nodes=60
        )
        for ending in ("json", "graphml"):
            save_graph(graph, self.directory / f"graph.{ending}")
        self.readers: dict[str, tuple[Path, Callable[[], Any]]] = {
            "cache": (self.directory / "cache", self.read_cache),
            "SAE": (self.directory / "sae", self.read_sae),
            "checkpoint": (self.checkpoint, self.read_checkpoint),
            "graph.json": (self.directory / "graph.json", self.read_graph),
            "graph.graphml": (self.directory / "graph.graphml", self.read_graphml),
        }
        self.before = {name: read() for name, (_, read) in self.readers.items()}

    def read_cache(self) -> list[Any]:
        cache = lch.saes.Cache(self.directory / "cache")
        return [cache.values(HOOK), cache.token_ids(), repr(cache.manifest)]

    def read_sae(self) -> list[Any]:
        sae = lch.saes.load_sae(self.directory / "sae")
        return [*sae.state_dict().values(), repr(sae.cfg.to_dict())]

    def read_checkpoint(self) -> list[Any]:
        """Resumed for one step, all the training there is left to do."""
        with tempfile.TemporaryDirectory(dir=self.directory) as directory:
            (Path(directory) / "rows").symlink_to(self.directory / "rows")
            n_tokens = int(self.checkpoint.name) + 256
            operations.train(
                Path(directory) / "again",
                resume_from_checkpoint=str(self.checkpoint),
                training_tokens=n_tokens,
                n_checkpoints=0,
            )
            sae = lch.saes.load_sae(Path(directory) / "again")
        return list(sae.state_dict().values())

    def read_graph(self) -> list[Any]:
        graph = load_graph(self.directory / "graph.json")
        return [repr(sorted(graph.nodes(data=True))), repr(sorted(graph.edges(data=True)))]

    def read_graphml(self) -> list[Any]:
        graph = load_graph(self.directory / "graph.graphml")
        return [repr(sorted(graph.nodes(data=True))), repr(sorted(graph.edges(data=True)))]

    def damage(self, name: str, generator: random.Random, *, cut: bool) -> str | None:
        """Flip a bit of a file, or cut off its end; what was believed, if anything."""
        path, read = self.readers[name]
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        file = generator.choice([f for f in files if f.stat().st_size])
        whole = file.read_bytes()
        at = generator.randrange(len(whole))
        bit = 1 << generator.randrange(8)
        file.write_bytes(
            whole[:at] if cut else whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :]
        )
        where = f"{file.name}, byte {at} of {len(whole)}" + ("" if cut else f", bit {bit}")
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                found = read()
        except lch.LCHError as error:
            return f"{where}: several lines: {error}" if "\n" in str(error) else None
        except Exception as error:
            return f"{where}: {type(error).__name__}: {error}"
        finally:
            file.write_bytes(whole)
        if not _same(found, self.before[name]):
            return f"{where}: other values were believed"
        return None


def _same(a: Any, b: Any) -> bool:
    pairs = list(zip(tree_leaves(a), tree_leaves(b), strict=True))
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else bool(x == y) for x, y in pairs)


def break_everything(
    bench: Bench,
    *,
    kills: int,
    flips: int,
    cuts: int,
    disks: int,
    names: list[str],
    cycles: int = 0,
    pages: bool = False,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> Tally:
    """Try each kind of fault so many times, in turn over operations and artifacts."""
    generator, tally = random.Random(seed), Tally()
    for i in range(kills):
        name = names[i % len(names)]
        tally.add(f"SIGKILL in {name}", bench.kill(name, generator))
        tell(f"kill {i + 1} of {kills}: {name}")
    if flips or cuts:
        artifacts = Artifacts(bench)
        kinds = list(artifacts.readers)
        for i in range(flips + cuts):
            cut, kind = i >= flips, kinds[i % len(kinds)]
            what = "cut off" if cut else "flipped bit"
            tally.add(f"{what} in {kind}", artifacts.damage(kind, generator, cut=cut))
            tell(f"{what} {i + 1} of {flips + cuts}")
    for i in range(disks):
        name = names[i % len(names)]
        bench.whole(name)
        tally.add(f"full disk in {name}", bench.fill(name, generator.uniform(0.05, 0.9)))
        tell(f"disk {i + 1} of {disks}: {name}")
    for name in _WITH_PAGES if pages else ():
        with bench.room(name) as out, contextlib.redirect_stdout(io.StringIO()):
            for template, values in captured(lambda name=name, out=out: OPERATIONS[name](out)):
                tally.add(f"hostile text in {template}", check_page(template, values))
        tell(f"page of {name}")
    for adapter in CYCLES if cycles else ():
        tally.add(f"{cycles} cycles of {adapter}", repeat(adapter, cycles))
        tell(f"{cycles} cycles of {adapter}")
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    for name, number in {
        "kills": 108,
        "flips": 80,
        "cuts": 40,
        "disks": 18,
        "cycles": 1000,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--only", nargs="+", choices=list(OPERATIONS), default=None)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lch-faults-") as directory:
        tally = break_everything(
            Bench(Path(directory)),
            kills=given.kills,
            flips=given.flips,
            cuts=given.cuts,
            disks=given.disks,
            cycles=given.cycles,
            pages=not given.only,
            names=given.only or list(OPERATIONS),
            seed=given.seed,
            tell=lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201
        )
    print(tally.table())  # noqa: T201
    for fault in tally.faults:
        print(f"\n{fault}")  # noqa: T201
    raise SystemExit(bool(tally.faults))


if __name__ == "__main__":
    main()

"""The same work on many processes and machines, by Ray: a set-up for each worker, and tasks.

Ray is imported here alone, when something runs.

1. Each worker is a Ray actor. On its first task it calls the set-up, which loads what the tasks
   need, a model for example, from files that it sees; what it returns does the tasks.
2. A worker that is free gets the next task. Tasks are made as they are needed.
3. Ray starts a lost worker again, with its set-up, and gives it its task again.

Set-up, tasks and results travel between the machines of a cluster by Ray's pickle: run nothing on a
cluster that you do not trust.
"""

from __future__ import annotations

import os
import platform
import re
import signal
import socket
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Generic, TypeVar

import torch

from lch_plugin.errors import ClusterError, InputError, ToolkitError

T = TypeVar("T")
R = TypeVar("R")

# How often a worker may be lost: more is no accident.
_RESTARTS = 3
# Seconds in which an address has to answer.
_PATIENCE = 3.0
# What opens a conversation in gRPC, which is HTTP/2 (RFC 9113, 3.4), and the kind of what answers.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = 4


@dataclass(frozen=True)
class Cluster:
    """Where work runs: workers of a Ray cluster, or of a Ray that is started for it here.

    Attributes:
        address: ``host:port`` of the cluster's head, as ``ray start --head`` says it. None for the
            Ray that this process has started already, or else one on this machine, that ends when
            the work is done.
        workers: how many processes.
        num_gpus: GPUs of each; a part of one shares it. A worker sees its own alone, as ``cuda``.
        num_cpus: CPU cores of each. torch computes in as many threads there (at least one), and
            numbers are those of one process bit for bit only if it has as many.

    Raises:
        InputError: an address of another form, or a number out of range.
        ToolkitError: Ray is not installed.

    Example:
        >>> cluster = lch.cluster.Cluster(workers=2)
        >>> dict(cluster.run(lambda: abs, [-1, -2]))
        {-1: 1, -2: 2}
    """

    address: str | None = None
    workers: int = 2
    num_gpus: float = 0.0
    num_cpus: float = 1.0

    def __post_init__(self) -> None:
        if find_spec("ray") is None:
            raise ToolkitError("Clusters need Ray: pip install 'lch-plugin[cluster]'.")
        if self.address is not None and not re.fullmatch(r"[^:/\s]+:\d{1,5}", self.address):
            raise InputError(
                f"address={self.address!r} is no host:port, such as 10.0.0.5:6379, which ray start "
                "--head says; leave it out for this machine."
            )
        if self.workers < 1:
            raise InputError(f"workers={self.workers}: work needs at least 1.")
        if not (self.num_gpus >= 0 and self.num_cpus > 0):
            raise InputError(
                f"num_gpus={self.num_gpus} and num_cpus={self.num_cpus} of a worker: GPUs are 0 or "
                "more, and CPUs more than 0."
            )

    def run(
        self, setup: Callable[[], Callable[[T], R]], tasks: Iterable[T]
    ) -> Generator[tuple[T, R], None, None]:
        """Do tasks on the workers.

        Args:
            setup: called once on each worker, and again on one that replaces a lost one; returns
                what does a task. Loads what is large from files.
            tasks: what it is called with, one at a time. They are taken from here as workers get
                free. A task whose worker is lost is done again, so that doing it twice must be
                like doing it once.

        Yields:
            Each task with its result, as they are done. Closed early, it stops the workers.

        Raises:
            InputError: the cluster does not answer, or has too few CPUs or GPUs.
            ClusterError: workers are lost again and again.
            Exception: what set-up or task raises on a worker is raised here.
        """
        tasks = iter(tasks)
        try:
            first = next(tasks)
        except StopIteration:
            return  # Nothing is started for nothing.
        with self._ray() as ray:
            self._check_room(ray)
            kind = ray.remote(_Worker).options(
                num_gpus=self.num_gpus,
                num_cpus=self.num_cpus,
                max_restarts=_RESTARTS,
                max_task_retries=_RESTARTS,
            )
            threads = max(1, int(self.num_cpus))
            workers = [kind.remote(setup, threads) for _ in range(self.workers)]
            try:
                yield from _spread(ray, workers, chain([first], tasks))
            finally:
                for worker in workers:
                    ray.kill(worker)

    @contextmanager
    def _ray(self) -> Iterator[Any]:
        """Ray, connected; for the time of the block, unless this process was connected before."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        if ray.is_initialized():
            known = ray.get_runtime_context().gcs_address
            if self.address not in (None, known):
                raise InputError(
                    f"address={self.address!r}: this process is connected to the Ray at {known}. "
                    "Call ray.shutdown() first, or leave the address out to use that one."
                )
            yield ray
            return
        if self.address is not None:
            _check_answers(self.address)
        try:
            with _own_signals():
                ray.init(
                    address=self.address or "local",
                    include_dashboard=None if self.address else False,
                    log_to_driver=False,
                    logging_level="error",
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise InputError(
                f"address={self.address!r}: Ray cannot be used there: {reason}. Its versions have "
                "to be the same here and there."
            ) from error
        try:
            yield ray
        finally:
            ray.shutdown()

    def _check_room(self, ray: Any) -> None:
        """Refuse what the machines could never run at the same time: Ray would wait for ever."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        wanted = {"CPU": self.num_cpus, "GPU": self.num_gpus}
        room = sum(
            int(min(node.get(kind, 0) / n for kind, n in wanted.items() if n)) for node in nodes
        )
        if room < self.workers:
            there = [f"{sum(node.get(k, 0) for node in nodes):g} {k}s" for k in wanted]
            raise InputError(
                f"workers={self.workers} with num_cpus={self.num_cpus:g} and "
                f"num_gpus={self.num_gpus:g} each do not fit: the machines of the cluster "
                f"({len(nodes)}) have {' and '.join(there)}, room for {room}. Lower one of these."
            )


@dataclass(frozen=True)
class Shared:
    """A directory that workers write to, as they know it: by a file with a name of its own.

    Attributes:
        directory: where it is, on every machine.
        mark: the name of the file.
    """

    directory: Path
    mark: str

    def check(self) -> None:
        """See, on a worker, that this machine has the directory.

        Raises:
            InputError: it has not, or another one of that name.
        """
        if not (self.directory / self.mark).exists():
            raise InputError(
                f"the worker on {here()} does not see {self.directory}, where workers write. "
                "Choose a path on a disk that all machines of the cluster share."
            )


@contextmanager
def shared(directory: Path) -> Iterator[Shared]:
    """Mark a directory for workers, for as long as the block lasts."""
    # Named as what killed runs leave behind, which `lch_plugin.files` removes.
    with NamedTemporaryFile(prefix=".mark-", suffix=".tmp", dir=directory) as file:
        yield Shared(directory, Path(file.name).name)


def here() -> str:
    """The name of this machine, for errors that come from another one."""
    return platform.node() or "a worker"


class _Worker(Generic[T, R]):
    """An actor: a set-up, called when the first task comes, and what it gave."""

    def __init__(self, setup: Callable[[], Callable[[T], R]], threads: int) -> None:
        torch.set_num_threads(threads)
        self._setup = setup
        self._work: Callable[[T], R] | None = None

    def do(self, task: T) -> R:
        # Not as the actor begins: what is raised there arrives as text alone.
        if self._work is None:
            self._work = self._setup()
        return self._work(task)


def _spread(ray: Any, workers: list[Any], tasks: Iterator[T]) -> Iterator[tuple[T, Any]]:
    """Each worker one task, and another when it is done."""
    free = list(workers)
    running: dict[Any, tuple[Any, T]] = {}
    while True:
        for task in tasks if free else ():
            worker = free.pop()
            running[worker.do.remote(task)] = worker, task
            if not free:
                break
        if not running:
            return
        done, _ = ray.wait(list(running), num_returns=1)
        worker, task = running.pop(done[0])
        try:
            result = ray.get(done[0])
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error  # The worker's own, and not Ray's subclass of it.
        except ray.exceptions.RayError as error:
            reason = str(error).strip().partition("\n")[0]
            raise ClusterError(
                f"a worker was lost {1 + _RESTARTS} times or cannot be started: {reason} Its "
                "machine may be out of memory, or lack lch_plugin in this version: see Ray's logs "
                "there."
            ) from error
        free.append(worker)
        yield task, result


def _check_answers(address: str) -> None:
    """See that a head of Ray is there, for which Ray itself would wait for minutes."""
    host, _, port = address.partition(":")
    cure = "See that ray start --head runs there, and that nothing is between this machine and it."
    try:
        with socket.create_connection((host, int(port)), timeout=_PATIENCE) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return
            connection.sendall(_PREFACE)
            answer = connection.recv(9)
    except (OSError, OverflowError) as error:
        raise InputError(f"address={address!r} does not answer: {error}. {cure}") from error
    if len(answer) < 4 or answer[3] != _SETTINGS:
        raise InputError(
            f"address={address!r} answers, but is no head of Ray. Give the port that ray start "
            "--head says, 6379 by default, and not that of its dashboard or client."
        )


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep Ray from having SIGTERM end the process on the spot."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

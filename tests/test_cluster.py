"""Tasks on Ray: two workers on this machine, some of which are killed."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lch_plugin as lch
from lch_plugin.cluster import Cluster, _check_answers

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("ray_here")]

ONE = Cluster(workers=1)


def test_tasks_come_with_their_results_and_a_killed_workers_is_done_again(tmp_path: Path) -> None:
    def setup() -> Any:
        (tmp_path / f"set-up-{os.getpid()}").touch()

        def work(x: int) -> tuple[int, int, int]:
            if x == 3 and not (tmp_path / "killed").exists():
                (tmp_path / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return x * x, os.getpid(), torch.get_num_threads()

        return work

    found = dict(Cluster(workers=2).run(setup, range(12)))
    assert {x: square for x, (square, _, _) in found.items()} == {x: x * x for x in range(12)}
    assert (tmp_path / "killed").exists()
    assert len(list(tmp_path.glob("set-up-*"))) == 3
    assert os.getpid() not in {pid for _, pid, _ in found.values()}
    assert {threads for _, _, threads in found.values()} == {1}


def test_a_worker_that_is_always_lost_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lch_plugin.cluster._RESTARTS", 1)

    def setup() -> Any:
        return lambda _: os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(lch.ClusterError, match="was lost 2 times or cannot be started") as caught:
        list(ONE.run(setup, [0]))
    assert "\n" not in str(caught.value)


def test_tasks_are_taken_as_workers_get_free_and_their_errors_come_as_they_are() -> None:
    taken: list[int] = []

    def tasks() -> Iterator[int]:
        for i in range(9):
            taken.append(i)
            yield i

    def setup() -> Any:
        def work(x: int) -> None:
            if x == 2:
                raise lch.SiteError("no such site")

        return work

    with pytest.raises(lch.SiteError, match=r"^no such site$") as caught:
        list(ONE.run(setup, tasks()))
    assert type(caught.value) is lch.SiteError
    assert taken == [0, 1, 2]


def test_a_head_answers_and_a_worker_has_as_many_threads_as_cpus() -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    _check_answers(address)
    wide = Cluster(address, workers=1, num_cpus=2.0)
    assert list(wide.run(lambda: lambda _: torch.get_num_threads(), [0])) == [(0, 2)]


def test_without_tasks_nothing_is_started() -> None:
    assert list(Cluster("127.0.0.1:1").run(lambda: abs, [])) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"workers": 0}, "workers=0: work needs at least 1"),
        ({"num_cpus": 0.0}, "CPUs more than 0"),
        ({"num_gpus": float("nan")}, "num_gpus=nan"),
        ({"address": "auto"}, "address='auto' is no host:port"),
        ({"address": "ray://10.0.0.5:10001"}, "is no host:port"),
        ({"workers": 3}, "(1) have 2 CPUs and 0 GPUs, room for 2"),
        ({"num_gpus": 1.0}, "(1) have 2 CPUs and 0 GPUs, room for 0"),
        ({"address": "127.0.0.1:1"}, "this process is connected to the Ray at"),
    ],
)
def test_what_no_cluster_is_or_has_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(lch.InputError) as caught:
        list(Cluster(**settings).run(lambda: abs, [0]))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "said"), [(None, "does not answer"), (b"HTTP/1.1 400 No", "no head of Ray")]
)
def test_an_address_without_a_head_of_ray_is_refused_at_once(
    answer: bytes | None, said: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(answer or b"")

        if answer is None:
            server.close()
        else:
            threading.Thread(target=serve).start()
        with pytest.raises(lch.InputError, match=said):
            _check_answers(address)


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(lch.ToolkitError, match=r"^Clusters need Ray: .*lch-plugin\[cluster\]"):
        Cluster()

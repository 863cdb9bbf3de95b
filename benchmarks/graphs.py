"""What an attribution graph costs: from a prompt to a pruned graph, and to files and back.

    make bench

On the embedded model: heads and neurons of one prompt with its corrupt twin, pruned at the usual
thresholds, written as JSON and read again. Seconds are medians of rounds in one process, after one
to warm up. Memory is what torch holds at most beyond the model, while the graph is built.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import networkx as nx
from centroids import peak_bytes
from common import Task, in_turn, machine, table
from rich.console import Console

import lch_plugin as lch
from lch_plugin.circuits import graphs, prompts

CLEAN = "I climbed up the pear tree and picked a pear. I climbed up the apple tree and picked"
CORRUPT = "I climbed up the pear tree and picked a pear. I climbed up the pear tree and picked"


def measured(max_nodes: int, rounds: int) -> list[str]:
    model = lch.load_demo_model()
    (prompt,) = prompts(model, CLEAN, " an", " a", CORRUPT)
    found: dict[str, nx.DiGraph] = {}

    def build() -> None:
        found["whole"] = graphs.attribution_graph(model, prompt, max_nodes=max_nodes)

    def prune() -> None:
        found["pruned"] = graphs.prune(found["whole"])

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "graph.json"

        def save_and_load() -> None:
            graphs.save_graph(found["pruned"], path)
            graphs.load_graph(path)

        tasks: dict[str, Task] = {"build": build, "prune": prune, "files": save_and_load}
        seconds = {name: statistics.median(t) for name, t in in_turn(tasks, rounds).items()}
        size = path.stat().st_size
    return [
        str(max_nodes),
        *(f"{found['whole'].number_of_nodes()}", f"{found['whole'].number_of_edges()}"),
        *(f"{found['pruned'].number_of_nodes()}", f"{found['pruned'].number_of_edges()}"),
        *(f"{seconds[name]:.2f}" for name in tasks),
        f"{peak_bytes(build) / 2**20:.0f}",
        f"{size / 2**20:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    console = Console(width=140)
    console.print(machine("networkx"))
    columns = ["nodes kept", "nodes", "edges", "pruned: nodes", "edges", "build, s", "prune, s"]
    columns += ["save and load, s", "peak, MiB", "JSON, MiB"]
    rows = [measured(max_nodes, options.rounds) for max_nodes in (100, 500)]
    console.print(table("Attribution graph of the embedded model", columns, rows))


if __name__ == "__main__":
    main()

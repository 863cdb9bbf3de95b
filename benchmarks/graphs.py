"""What an attribution graph costs: from a prompt to a pruned graph, a page, and files and back.

    make bench
    python benchmarks/graphs.py --model DIRECTORY

Heads and neurons of one prompt with its corrupt twin, pruned at the usual thresholds, with tokens
and attention of its nodes drawn as a page, written as JSON and read again; and one intervention.
The embedded model continues with "an" or "a", any other with a name (indirect objects). Seconds are
medians of rounds in one process, after one to warm up. Memory is what torch holds at most beyond
the model, while the graph is built.
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
from transformer_lens.model_bridge import TransformerBridge

import lch_plugin as lch
from lch_plugin import circuits
from lch_plugin.circuits.reports.graph_page import NodeDetail

AN = (
    "I climbed up the pear tree and picked a pear. I climbed up the apple tree and picked",
    *(" an", " a"),
    "I climbed up the pear tree and picked a pear. I climbed up the pear tree and picked",
)
IOI = (
    "When Mary and John went to the store, John gave a drink to",
    *(" Mary", " John"),
    "When Mary and John went to the store, Mary gave a drink to",
)


def measured(
    model: TransformerBridge, prompt: circuits.Prompts, max_nodes: int, rounds: int
) -> list[str]:
    found: dict[str, nx.DiGraph] = {}
    details: dict[str, NodeDetail] = {}

    def build() -> None:
        found["whole"] = circuits.attribution_graph(model, prompt, max_nodes=max_nodes)

    def prune() -> None:
        found["pruned"] = circuits.prune(found["whole"])

    def describe() -> None:
        details.update(circuits.node_details(model, prompt, found["pruned"]))

    def intervene() -> None:
        heads = [n for n, kind in found["pruned"].nodes(data="kind") if kind == "head"]
        circuits.intervene(model, found["pruned"], heads[0], 0)

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "graph.json"

        def save_and_load() -> None:
            circuits.save_graph(found["pruned"], path)
            circuits.load_graph(path)

        def draw() -> None:
            circuits.write_graph_page(found["pruned"], path.with_suffix(".html"), details)

        tasks: dict[str, Task] = {
            **{"build": build, "prune": prune, "details": describe, "page": draw},
            **{"files": save_and_load, "intervene": intervene},
        }
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
    parser.add_argument("--model", help="hub name or directory; the embedded model if not given")
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 300, 500])
    options = parser.parse_args()
    console = Console(width=160)
    console.print(machine("networkx"))
    embedded = options.model is None
    model = lch.load_demo_model() if embedded else lch.load(options.model).bridge()
    (prompt,) = circuits.prompts(model, *(AN if embedded else IOI))
    columns = ["nodes kept", "nodes", "edges", "pruned: nodes", "edges", "build, s", "prune, s"]
    columns += ["details, s", "page, s", "save and load, s", "intervene, s", "peak, MiB"]
    rows = [measured(model, prompt, n, options.rounds) for n in options.nodes]
    name = "the embedded model" if embedded else options.model
    title = f"Attribution graph of {name}, {prompt.clean.shape[1]} tokens"
    console.print(table(title, [*columns, "JSON, MiB"], rows))


if __name__ == "__main__":
    main()

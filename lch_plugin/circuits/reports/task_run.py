"""What ``lch circuit --task`` does: find a circuit, test it, draw it.

1. Score all heads and neurons on the task's training prompts; the circuit is the share of them that
   score highest.
2. Test it on held-out prompts: what it recovers of the metric beside random circuits, by size;
   what is left without it; what each of its nodes is worth to it.
3. Draw how it works on one held-out prompt, as a graph.
4. ``report.html`` with all of it, and the same as files: ``results.json``, ``circuit.json``,
   ``graph.json``, ``graph.graphml``, ``mib.json`` and the plots as PNG.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from jaxtyping import Int
from rich.console import Console
from torch import Tensor

from lch_plugin import plots
from lch_plugin.adapters.states import evaluating
from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.circuits.evaluation.faithfulness import (
    Judgement,
    faithfulness,
    judge,
    size_of,
    smallest_circuit,
)
from lch_plugin.circuits.evaluation.mib import save_mib
from lch_plugin.circuits.graphs import attribution_graph, prune, save_graph
from lch_plugin.circuits.metrics import COMPARISONS
from lch_plugin.circuits.nodes import ScoredNode
from lch_plugin.circuits.prompts import Prompts
from lch_plugin.circuits.reports.direct import promoted_tokens
from lch_plugin.circuits.reports.graph_details import node_details
from lch_plugin.circuits.reports.graph_page import UNITS, NodeDetail, page_data
from lch_plugin.circuits.scores.attribution import node_attribution
from lch_plugin.circuits.tasks import TASKS, task
from lch_plugin.errors import InputError
from lch_plugin.files import check_new_directory, new_directory, portable
from lch_plugin.report import write_report

#: Prompts a circuit is found on, the share of heads and neurons that it is made of, and by what.
N_PROMPTS, SHARE, METRIC = 60, 0.05, "logit_difference"
#: Share of the metric that the smallest circuit looked for recovers.
ENOUGH = 0.8
# Of the circuit, the highest nodes that are listed; these, and as many of the lowest, are taken out
# one at a time.
_N_LISTED = 20
# Random circuits of its size, and of each other size.
_N_RANDOM, _N_RANDOM_BY_SIZE = 20, 5
_PACKAGES = ("lch-plugin", "torch", "transformer-lens", "transformers")


def run(
    model: LensModel,
    name: str,
    out: str | Path,
    *,
    n: int = N_PROMPTS,
    share: float = SHARE,
    metric: str = METRIC,
    seed: int = 0,
) -> dict[str, Any]:
    """Find a task's circuit, test it on held-out prompts, and write a report.

    Nodes outside the circuit take the activations that they have on the corrupt twin of each
    prompt. The same seed gives the same numbers on the same machine.

    Args:
        model: TransformerBridge or HookedTransformer.
        name: of the task, one of `lch_plugin.circuits.TASKS`.
        out: directory to make.
        n: prompts to find the circuit on, and as many others to test it on.
        share: of all heads and neurons that make up the circuit.
        metric: that it is found and tested by, one of `lch_plugin.circuits.metrics.COMPARISONS`.
        seed: of everything random.

    Returns:
        What ``results.json`` holds.

    Raises:
        InputError: no such task or metric, n or share out of range, or as
            `lch_plugin.circuits.task`.
        SiteError: as `lch_plugin.circuits.node_attribution`.
        OutputError: ``out`` holds other content or cannot be written.
    """
    check(name, n, share, metric)
    check_new_directory(out)
    console, generator = Console(), torch.Generator().manual_seed(seed)
    choose = partial(task, model, name, metric=COMPARISONS[metric], seed=seed)
    train, test = (choose(n, split=split) for split in ("train", "test"))
    console.print(f"scores of all heads and neurons on {n} prompts")
    scores = node_attribution(model, train)
    whole = node_attribution(model, train, ("head", "mlp"))
    circuit = scores.circuit(size_of(share, len(scores.values)))
    ranked = scores.top(len(circuit))
    top = ranked[:_N_LISTED]
    by_size = faithfulness(model, test, scores, n_random=_N_RANDOM_BY_SIZE, generator=generator)
    tested = judge(
        model,
        test,
        circuit,
        nodes=[one.node for one in dict.fromkeys((*top, *ranked[-_N_LISTED:]))],
        n_random=_N_RANDOM,
        generator=generator,
    )
    smallest = smallest_circuit(model, test, scores, ENOUGH)
    (shown,) = choose(1)
    console.print("the graph of one prompt")
    graph = prune(attribution_graph(model, shown, circuit=circuit))
    details = node_details(model, shown, graph, scores)
    results: dict[str, Any] = {
        "run": {
            **_describe(model),
            "task": name,
            "n_prompts": n,
            "share": share,
            "seed": seed,
            "metric": metric,
            "units": UNITS[metric],
            "n_positive": int((tested.full > 0).sum()),
            "n_heads": sum(p.n_nodes for p in scores.points if p.kind == "head"),
            "n_neurons": sum(p.n_nodes for p in scores.points if p.kind == "neuron"),
            "example": _example(model, test),
        },
        "circuit": tested.to_dict(),
        "by_size": by_size.to_dict(),
        "smallest": {
            "recovered": ENOUGH,
            "n_nodes": len(smallest),
            "share": smallest.share,
        },
        "shown": _predictions(model, shown),
        "top_nodes": _listed(model, top, tested, graph, details),
    }
    figures = {
        "scores": plots.node_scores(scores, circuit),
        "faithfulness": plots.faithfulness_curves({"highest scores": by_size}),
    }
    with new_directory(out) as directory:
        page = {"graph": page_data(graph, details)}
        write_report(directory, "circuit.html", results, figures, beside=page)
        record = {**results["run"], "nodes": circuit.to_dict()}
        text = json.dumps(record, indent=2, ensure_ascii=False)
        (directory / "circuit.json").write_text(text + "\n", encoding="utf-8")
        save_graph(graph, directory / "graph.json")
        save_graph(graph, directory / "graph.graphml")
        save_mib(model, whole, directory / "mib.json")
    console.print(summary(results))
    return results


def check(name: str, n: int = N_PROMPTS, share: float = SHARE, metric: str = METRIC) -> None:
    """Refuse what cannot be run, before a model is loaded for it.

    Raises:
        InputError: as `run`.
    """
    if name not in TASKS:
        raise InputError(f"no task is called {name!r}; there are {', '.join(TASKS)}.")
    if n < 2:
        raise InputError(f"n={n}: at least 2 prompts are needed to find and to test a circuit.")
    if not 0 < share < 1:
        raise InputError(f"share={share} must lie between 0 and 1, as 0.05 does.")
    if metric not in COMPARISONS:
        raise InputError(
            f"no metric of tasks is called {metric!r}; there are {', '.join(COMPARISONS)}."
        )


def summary(results: dict[str, Any]) -> str:
    """What was found, in two sentences; shares lie on the way from no node to all of them."""
    c = results["circuit"]
    low, high = c["interval"]
    random = c["random"]
    return (
        f"The circuit found for {results['run']['task']!r} recovers {c['recovered']:.1%} "
        f"({c['confidence']:.0%} interval {low:.1%} to {high:.1%}) of the "
        f"{results['run']['metric'].replace('_', ' ')} with {c['n_nodes']:,} "
        f"node{'s' if c['n_nodes'] > 1 else ''}, {c['share']:.1%} of all neurons and heads. "
        f"{len(random)} random circuits of the same size and layers recover "
        f"{sum(random) / len(random):.1%} (range {min(random):.1%} to {max(random):.1%})."
    )


def _describe(model: LensModel) -> dict[str, Any]:
    """The model and what ran it."""
    parameter = next(model.parameters())
    return {
        "model": portable(model.cfg.model_name),
        "n_layers": model.cfg.n_layers,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def _example(model: LensModel, batches: Sequence[Prompts]) -> dict[str, str]:
    """The first prompt, with its twin."""
    first = batches[0]
    assert first.corrupt is not None
    return {"clean": _text(model, first.clean[0]), "corrupt": _text(model, first.corrupt[0])}


def _text(model: LensModel, tokens: Int[Tensor, " pos"]) -> str:
    ids = tokens.tolist()
    bos = getattr(model.tokenizer, "bos_token_id", None)
    return str(model.to_string(ids[1:] if ids[0] == bos else ids))


def _predictions(model: LensModel, shown: Prompts) -> dict[str, str]:
    """The token that comes next on a prompt and on its twin."""
    assert shown.corrupt is not None
    with evaluating(model), torch.no_grad():
        logits = model(torch.cat([shown.clean, shown.corrupt]))
    clean, corrupt = (model.to_string([i]) for i in logits[:, -1].argmax(-1).tolist())
    return {"predicted": clean, "predicted_on_twin": corrupt}


def _listed(
    model: LensModel,
    top: Sequence[ScoredNode],
    tested: Judgement,
    graph: nx.DiGraph,
    details: Mapping[str, NodeDetail],
) -> list[dict[str, Any]]:
    """The nodes that score highest, with what they write towards."""
    last = len(graph.graph["tokens"]) - 1

    def tokens(one: ScoredNode) -> list[str]:
        if one.node.kind == "neuron":  # The same on every prompt.
            return promoted_tokens(model, one.node.layer, [one.node.index])[0]
        return [token for token, _ in details.get(f"{one.node}@{last}", NodeDetail()).promoted]

    return [
        {
            "node": str(one.node),
            "kind": one.node.kind,
            "layer": one.node.layer,
            "score": one.score,
            "rank": one.rank,
            "percentile": one.percentile,
            "fall": tested.falls[one.node],
            "promotes": tokens(one),
        }
        for one in top
    ]

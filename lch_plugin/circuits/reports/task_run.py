"""What ``lch circuit --task`` and ``--prompts`` do: find a circuit, test it, draw it.

1. Say which of the prompts the model gets right. The others have no behaviour to explain, and are
   left out.
2. Score all heads and neurons on some of them, and choose the circuit: the fewest of the highest
   scores that recover a share of the metric on others, or a number of nodes, or a share of them.
3. Test it on the rest: what it recovers of the metric beside random circuits, and circuits of other
   sizes; what is left without it; what single nodes of it are worth to it.
4. Draw how it works on one of these prompts, as a graph.
5. ``report.html`` with all of it, and the same as files: ``results.json``, ``circuit.json``,
   ``scores.csv``, ``graph.json``, ``graph.graphml``, ``mib.json`` and the plots as PNG.

What is finished waits in ``.NAME.partial`` beside the output: a run that was cut short keeps its
scores, as ``scores.csv``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

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
from lch_plugin.circuits.nodes import Circuit, NodeScores, ScoredNode, whole_mlps
from lch_plugin.circuits.prompt_batches import Prompts, deal, solved
from lch_plugin.circuits.prompt_files import read_prompts, read_rows
from lch_plugin.circuits.reports import plots
from lch_plugin.circuits.reports.direct import promoted_tokens
from lch_plugin.circuits.reports.graph_details import node_details
from lch_plugin.circuits.reports.graph_page import UNITS, NodeDetail, page_data
from lch_plugin.circuits.scores.attribution import METHODS, node_attribution
from lch_plugin.circuits.tasks import TASKS, TemplateReport, task, task_templates
from lch_plugin.errors import InputError
from lch_plugin.files import (
    check_new_directory,
    portable,
    resumable_directory,
    write_file,
)
from lch_plugin.metrics import COMPARISONS
from lch_plugin.names import did_you_mean
from lch_plugin.report import write_report

#: Prompts a circuit is found on; the share of the metric that it recovers; what it is scored and
#: measured by.
N_PROMPTS, RECOVER, METHOD, METRIC = 60, 0.8, "integrated", "logit_difference"
# Of the circuit, the highest nodes that are listed. One pass each tells what the highest of these,
# and as many of the circuit's lowest, are worth to it.
_N_LISTED, _N_TAKEN_OUT = 20, 5
# Random circuits of its size, and of each other size; subsets taken out of it.
_N_RANDOM, _N_RANDOM_BY_SIZE, _N_SUBSETS = 10, 1, 3
# Nodes of the graph, at one position each.
_MAX_NODES = 300
# How prompts are dealt: to find, to choose the size by, and to test.
_DEALT = (2, 1, 2)
# A mean over fewer prompts says nothing. Of so many of a file, as they are dealt, each gets them.
_FEWEST, _FEWEST_OF_FILE = 2, 8
_PACKAGES = ("lch-plugin", "torch", "transformer-lens", "transformers")


def run(
    model: LensModel,
    name: str | Path,
    out: str | Path,
    *,
    n: int = N_PROMPTS,
    recover: float | None = None,
    nodes: int | None = None,
    share: float | None = None,
    method: str = METHOD,
    metric: str = METRIC,
    seed: int = 0,
) -> dict[str, Any]:
    """Find the circuit of a task or of prompts of one's own, test it, and write a report.

    Nodes outside the circuit take the activations that they have on the corrupt twin of each
    prompt. The same seed gives the same numbers on the same machine.

    Args:
        model: TransformerBridge or HookedTransformer.
        name: of the task, one of `lch_plugin.circuits.TASKS`; or the path of a file of prompts
            with twins (`lch_plugin.circuits.read_prompts`), two in five of which the circuit is
            found on, and as many tested on.
        out: directory to make.
        n: prompts of the task to find the circuit on, as many others to test it on, and half as
            many to choose its size by.
        recover: the share of the metric that the circuit is to recover, and no more than as far
            above 1; 0.8 if none of the three is given.
        nodes: or how many of the heads and neurons make it up.
        share: or which share of them does.
        method: that they are scored by, one of `lch_plugin.circuits.METHODS`.
        metric: that it is found and tested by, one of `lch_plugin.metrics.COMPARISONS`.
        seed: of everything random.

    Returns:
        What ``results.json`` holds.

    Raises:
        InputError: no such task, file, method or metric; n, recover, nodes or share out of range,
            or two of the last three; too few prompts that the model gets right; no circuit recovers
            what is asked for; or as `lch_plugin.circuits.task` and `read_prompts`.
        SiteError: as `lch_plugin.circuits.node_attribution`.
        OutputError: ``out`` holds other content or cannot be written.
    """
    check(name, n=n, recover=recover, nodes=nodes, share=share, method=method, metric=metric)
    check_new_directory(out)
    console, generator = Console(), torch.Generator().manual_seed(seed)
    found_on, sized_on, tested_on = _prompts(model, name, n, metric, seed, console)
    settings = {
        "prompts": str(name),
        "n": n,
        "method": method,
        "metric": metric,
        "seed": seed,
        "model": portable(model.cfg.model_name),
    }
    with resumable_directory(out, settings) as directory:
        console.print(f"scores of all heads and neurons on {_count(found_on)} prompts")
        scores = node_attribution(model, found_on, method=method)
        table = scores.to_dataframe().to_csv(index=False)
        write_file(directory / "scores.csv", table)
        if nodes is not None:
            circuit = scores.circuit(nodes)
        elif share is not None:
            circuit = scores.circuit(size_of(share, len(scores.values)))
        else:
            recover = RECOVER if recover is None else recover
            console.print(f"the size of the circuit, by {_count(sized_on)} other prompts")
            circuit = smallest_circuit(model, sized_on, scores, recover)
        console.print(f"{circuit}, tested on {_count(tested_on)} prompts that it has not seen")
        results, figures, page, graph = _tested(
            model, scores, circuit, tested_on, generator=generator
        )
        results["run"] |= {
            "task": name if name in TASKS else Path(name).name,
            "n_prompts": _count(found_on),
            "n_sized_on": _count(sized_on),
            "recover": recover,
            "seed": seed,
            "method": method,
            "metric": metric,
            "units": UNITS[metric],
        }
        write_report(directory, "circuit.html", results, figures, beside=page)
        record = {**results["run"], "nodes": circuit.to_dict()}
        text = json.dumps(record, indent=2, ensure_ascii=False)
        (directory / "circuit.json").write_text(text + "\n", encoding="utf-8")
        save_graph(graph, directory / "graph.json")
        save_graph(graph, directory / "graph.graphml")
        save_mib(model, whole_mlps(model, scores), directory / "mib.json")
    console.print(summary(results))
    return results


def _tested(
    model: LensModel,
    scores: NodeScores,
    circuit: Circuit,
    tested_on: list[Prompts],
    *,
    generator: torch.Generator,
) -> tuple[dict[str, Any], dict[str, Figure], dict[str, Any], nx.DiGraph]:
    """Results of the tests, figures, what the page draws, and the graph of a prompt."""
    by_size = faithfulness(
        model, tested_on, scores, n_random=_N_RANDOM_BY_SIZE, generator=generator
    )
    ranked = scores.top(len(circuit))
    taken_out = dict.fromkeys((*ranked[:_N_TAKEN_OUT], *ranked[-_N_TAKEN_OUT:]))
    tested = judge(
        model,
        tested_on,
        circuit,
        nodes=[one.node for one in taken_out],
        n_subsets=_N_SUBSETS,
        n_random=_N_RANDOM,
        generator=generator,
    )
    shown = tested_on[0][0]
    graph = prune(attribution_graph(model, shown, circuit=circuit, max_nodes=_MAX_NODES))
    details = node_details(model, shown, graph, scores)
    results: dict[str, Any] = {
        "run": {
            **_describe(model),
            "n_positive": int((tested.full > 0).sum()),
            "n_heads": sum(p.n_nodes for p in scores.points if p.kind == "head"),
            "n_neurons": sum(p.n_nodes for p in scores.points if p.kind == "neuron"),
            "example": dict(zip(("clean", "corrupt"), tested_on[0].texts[0], strict=True)),
        },
        "circuit": tested.to_dict(),
        "by_size": by_size.to_dict(),
        "shown": _predictions(model, shown),
        "top_nodes": _listed(model, ranked[:_N_LISTED], tested, graph, details),
    }
    figures = {
        "scores": plots.node_scores(scores, circuit),
        "faithfulness": plots.faithfulness_curves({"highest scores": by_size}),
    }
    return results, figures, {"graph": page_data(graph, details)}, graph


def _prompts(
    model: LensModel, name: str | Path, n: int, metric: str, seed: int, console: Console
) -> tuple[list[Prompts], list[Prompts], list[Prompts]]:
    """The prompts that the model gets right: to find on, to choose a size by, and to test on."""
    measure = COMPARISONS[metric]
    if name in TASKS:
        name = str(name)
        _tell_templates(task_templates(model, name, n, metric=measure, seed=seed), console)
        train = task(model, name, n + n // 2, split="train", metric=measure, seed=seed)
        find, choose = deal(solved(model, train), _DEALT[:2])
        test = solved(model, task(model, name, n, split="test", metric=measure, seed=seed))
    else:
        every = read_prompts(model, name, metric=measure)
        right = solved(model, every)
        console.print(f"the model gets {_count(right)} of {_count(every)} prompts right")
        _check_number(_count(right), f"of {name} that the model gets right")
        find, choose, test = deal(right, _DEALT)
    for prompts, what in ((find, "find a circuit on"), (choose, "choose"), (test, "test it on")):
        if _count(prompts) < _FEWEST:
            raise InputError(
                f"{_count(prompts)} prompts that the model gets right are too few to {what}: at "
                f"least {_FEWEST} are needed. Give more prompts, or another model."
            )
    return find, choose, test


def _tell_templates(templates: Sequence[TemplateReport], console: Console) -> None:
    """What the model makes of each template, before a circuit is searched for."""
    columns = ("template", "readable", "pairs", "right", "metric", "on twins", "such as")
    table = Table(*columns, box=None)
    for one in templates:
        means = (f"{value:+.2f}" for value in (one.clean, one.corrupt))
        table.add_row(
            one.template,
            f"{one.readable:.0%}",
            str(one.n),
            f"{one.accuracy:.0%}",
            *means,
            Text(one.example[-40:]),
        )
    console.print(table)


def _count(prompts: Sequence[Prompts]) -> int:
    return sum(map(len, prompts))


def check(
    name: str | Path,
    *,
    n: int = N_PROMPTS,
    recover: float | None = None,
    nodes: int | None = None,
    share: float | None = None,
    method: str = METHOD,
    metric: str = METRIC,
) -> None:
    """Refuse what cannot be run, before a model is loaded for it.

    Raises:
        InputError: as `run`.
    """
    if name not in TASKS and not Path(name).is_file():
        raise InputError(
            f"no task or file of prompts is called {str(name)!r}. {did_you_mean(name, TASKS)}"
        )
    if n < 4:
        raise InputError(f"n={n}: at least 4 prompts are needed to find and to test a circuit.")
    if sum(one is not None for one in (recover, nodes, share)) > 1:
        raise InputError("give one of recover, nodes and share: each chooses a circuit by itself.")
    if nodes is not None and nodes < 1:
        raise InputError(f"nodes={nodes} must be at least 1.")
    for what, value in (("recover", recover), ("share", share)):
        if value is not None and not 0 < value < 1:
            raise InputError(f"{what}={value} must lie between 0 and 1, as 0.05 does.")
    if method not in METHODS:
        raise InputError(f"no method is called {method!r}; there are {', '.join(METHODS)}.")
    if metric not in COMPARISONS:
        raise InputError(
            f"no metric of tasks is called {metric!r}; there are {', '.join(COMPARISONS)}."
        )
    if name not in TASKS:
        rows = read_rows(name)
        if "corrupt" not in rows[0]:
            raise InputError(
                f"{name} has no corrupt prompts, which nodes outside a circuit take their values "
                "from. Give a column 'corrupt'."
            )
        _check_number(len(rows), f"in {name}")


def _check_number(n: int, which: str) -> None:
    """Refuse prompts of a file that are too few to be dealt."""
    if n < _FEWEST_OF_FILE:
        raise InputError(
            f"{n} prompt{'s' * (n != 1)} {which} {'are' if n != 1 else 'is'} too few: at least "
            f"{_FEWEST_OF_FILE} that the model gets right are needed. Two in five are to find a "
            "circuit on, one to choose its size by, and two to test it on. Give more prompts, or "
            "another model."
        )


def summary(results: dict[str, Any]) -> str:
    """What was found, in two sentences; shares lie on the way from no node to all of them."""
    c = results["circuit"]
    low, high = c["interval"]
    random = c["random"]
    asked = results["run"]["recover"]
    said = ""
    if asked is not None and not asked <= c["recovered"] <= 2 - asked:
        side = "less" if c["recovered"] < asked else "more"
        said = (
            f" That is {side} than the {asked:.0%} to {2 - asked:.0%} asked for, which it "
            "recovered of the prompts that its size was chosen by."
        )
    return (
        f"The circuit found for {results['run']['task']!r} recovers {c['recovered']:.1%} "
        f"({c['confidence']:.0%} interval {low:.1%} to {high:.1%}) of the "
        f"{results['run']['metric'].replace('_', ' ')} with {c['n_nodes']:,} "
        f"node{'s' if c['n_nodes'] > 1 else ''}, {c['share']:.1%} of all neurons and heads. "
        f"{len(random)} random circuits of the same size and layers recover "
        f"{sum(random) / len(random):.1%} (range {min(random):.1%} to {max(random):.1%}).{said}"
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
            "fall": tested.minimality.get(one.node),
            "promotes": tokens(one),
        }
        for one in top
    ]

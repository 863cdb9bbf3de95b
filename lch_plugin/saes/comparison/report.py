"""Scores of all SAEs as tables, plots, a page and files."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lch_plugin.report import write_report
from lch_plugin.saes.comparison import plots
from lch_plugin.saes.comparison.scores import SPARSE
from lch_plugin.saes.comparison.settings import SITES
from lch_plugin.saes.comparison.statistics import correct, mean_and_sd, paired_test
from lch_plugin.saes.sources.rows import Of

Score = Mapping[str, Any]
Densities = Mapping[tuple[Of, int, int], Float[Tensor, " d_sae"]]

#: What is scored of every SAE, and how tables call it.
OF_SAE = {
    "explained_variance": "explained variance",
    "l0": "L0",
    "n_fired": "features that fire",
    "n_dense": "dense features",
}
#: What is scored for every kind of label.
OF_LABELS = {
    "probe": "linear probe",
    **{f"sparse_probe_{n}": f"probe on {n} feature{'s' * (n > 1)}" for n in SPARSE},
    "neighbours": "neighbours agree",
}
_SEPARATOR = ": "
_COUNTS = ("l0", "n_fired", "n_dense")


def write(
    directory: Path, results: dict[str, Any], densities: Sequence[Densities], console: Console
) -> dict[str, Any]:
    """Write the report, the plots and the tables into a directory, and print the first table.

    Args:
        directory: an existing one.
        results: of all SAEs, to which summaries, tests and their number are added.
        densities: of each component, by site, k and seed.
        console: to print to.

    Returns:
        What ``results.json`` holds.
    """
    comparisons = [
        {**found, "summary": list(summarise(found)), "tests": list(contrasts(found))}
        for found in results["comparisons"]
    ]
    results = {
        **results,
        "comparisons": comparisons,
        "similarities": similarities(results),
        "n_tests": correct([test for found in comparisons for test in found["tests"]]),
    }
    names = {"sae": OF_SAE, "labels": OF_LABELS}
    figures = {
        name + (f"-against-{i}" if i else ""): figure
        for i, (found, density) in enumerate(zip(comparisons, densities, strict=True))
        for name, figure in _figures(found, density).items()
    }
    write_report(directory, "compare.html", {**results, "names": names}, figures)
    _write_csv(directory / "scores.csv", results)
    for component, found in zip(results["components"], comparisons, strict=True):
        console.print(_table(component["module"], found))
    return json.loads((directory / "results.json").read_text(encoding="utf-8"))


def flatten(score: Score) -> dict[str, float]:
    """Every number by which SAEs are compared, those of labels as ``LABEL: NAME``."""
    found = {name: float(score[name]) for name in OF_SAE}
    for label, scores in score["labels"].items():
        found |= {label + _SEPARATOR + name: float(value) for name, value in scores.items()}
    return found


def by_seed(scores: Sequence[Score], of: str, k: int) -> dict[str, list[float]]:
    """Of one site and k each number of `flatten`, a list over seeds."""
    chosen = sorted(
        (score for score in scores if score["of"] == of and score["k"] == k),
        key=lambda score: score["seed"],
    )
    numbers = [flatten(score) for score in chosen]
    return {name: [each[name] for each in numbers] for name in numbers[0]}


def summarise(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Mean and standard deviation over seeds, for each k and site."""
    stability = {(line["of"], line["k"]): line for line in found["stability"]}
    for k, of in itertools.product(_ks(found), SITES):
        numbers = by_seed(found["scores"], of, k)
        pairs = stability[of, k]
        yield {
            "of": of,
            "k": k,
            "scores": {name: mean_and_sd(values) for name, values in numbers.items()},
            **{
                name: sum(pairs[name]) / len(pairs[name])
                for name in ("cosine", "cosine_with_random", "correlation")
            },
        }


def contrasts(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Centroids against input and output, paired by seed."""
    for k in _ks(found):
        numbers = {of: by_seed(found["scores"], of, k) for of in SITES}
        centroid, *others = SITES
        for other, name in itertools.product(others, numbers[centroid]):
            pair = paired_test(numbers[centroid][name], numbers[other][name])
            yield {"k": k, "against": other, "score": name, **pair.to_dict()}


def similarities(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each other component, site and k the mean over seeds."""
    lines = results["similarity"]
    groups = dict.fromkeys((line["against"], line["k"], line["of"]) for line in lines)
    found = []
    for against, k, of in groups:
        chosen = [x for x in lines if (x["against"], x["k"], x["of"]) == (against, k, of)]
        found.append(
            {
                **{name: chosen[0][name] for name in ("against", "model", "module", "k", "of")},
                "n_items": chosen[0]["n_items"],
                "correlation": mean_and_sd([x["correlation"] for x in chosen]),
                "chance": mean_and_sd([x["chance"] for x in chosen]),
            }
        )
    return found


def _ks(found: Mapping[str, Any]) -> list[int]:
    return list(dict.fromkeys(score["k"] for score in found["scores"]))


def _figures(found: Mapping[str, Any], densities: Densities) -> dict[str, Figure]:
    ks, seeds = _ks(found), list(dict.fromkeys(score["seed"] for score in found["scores"]))
    numbers = {of: {k: by_seed(found["scores"], of, k) for k in ks} for of in SITES}
    pairs = {(line["of"], line["k"]): line for line in found["stability"]}

    def curves(name: str) -> dict[str, dict[int, list[float]]]:
        return {of: {k: numbers[of][k][name] for k in ks} for of in SITES}

    dictionaries = {OF_SAE[name]: curves(name) for name in OF_SAE if name != "l0"}
    for name, title in (("cosine", "stability: decoder cosine"), ("correlation", "correlation")):
        dictionaries[title] = {of: {k: pairs[of, k][name] for k in ks} for of in SITES}
    figures = {
        "dictionaries": plots.scores_by_k(dictionaries),
        "firing": plots.firing_by_k(
            {k: {of: [densities[of, k, s] for s in seeds] for of in SITES} for k in ks}
        ),
    }
    baselines = {line["of"]: line["labels"] for line in found["baselines"]}
    for i, label in enumerate(found["chance"]):
        panels = {title: curves(label + _SEPARATOR + name) for name, title in OF_LABELS.items()}
        levels = {
            title: {str(of): baselines[of][label][name] for of in SITES}
            for name, title in OF_LABELS.items()
            if name in baselines["centroid"][label]
        }
        figures[f"label{i}"] = plots.scores_by_k(panels, levels)
    return figures


def _table(module: str, found: Mapping[str, Any]) -> Table:
    columns = {
        "explained_variance": "var. expl.",
        "l0": "L0",
        "n_fired": "fire",
        "n_dense": "dense",
        **{label + _SEPARATOR + "probe": f"{label}, probe" for label in found["chance"]},
    }
    table = Table("k", title=f"{module}, held out: means over seeds")
    table.add_column("SAE on", no_wrap=True)
    for name in (*columns.values(), "stability"):
        table.add_column(name, justify="right")
    for line in found["summary"]:
        cells = [
            f"{line['scores'][name]['mean']:.{1 if name in _COUNTS else 3}f}" for name in columns
        ]
        table.add_row(
            str(line["k"]),
            line["of"],
            *cells,
            f"{line['cosine']:.3f}",
            end_section=line["of"] == SITES[-1],
        )
    return table


def _write_csv(path: Path, results: Mapping[str, Any]) -> None:
    """One line an SAE."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = None
        for component, found in zip(results["components"], results["comparisons"], strict=True):
            for score in found["scores"]:
                line = {
                    "model": component["model"],
                    "module": component["module"],
                    **{name: score[name] for name in ("of", "k", "seed")},
                    **flatten(score),
                }
                writer = writer or csv.DictWriter(file, line)
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(line)

"""Scores of all SAEs as tables, plots, a page and files."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lch_plugin import plots
from lch_plugin.report import write_report
from lch_plugin.saes.compare.scores import SPARSE
from lch_plugin.saes.compare.settings import SITES
from lch_plugin.saes.compare.statistics import mean_and_sd, paired_test
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
        results: of all SAEs, to which summaries and tests are added.
        densities: of each component, by site, k and seed.
        console: to print to.

    Returns:
        ``results`` with the summaries.
    """
    comparisons = [
        {**found, "summary": list(summarise(found)), "tests": list(test(found))}
        for found in results["comparisons"]
    ]
    results = {**results, "comparisons": comparisons, "similarities": similarities(results)}
    names = {"sae": OF_SAE, "labels": OF_LABELS}
    figures = {
        f"{name}{i or ''}": figure
        for i, (found, density) in enumerate(zip(comparisons, densities, strict=True))
        for name, figure in _figures(found, density).items()
    }
    write_report(directory, "compare.html", {**results, "names": names}, figures)
    _write_csv(directory / "scores.csv", results)
    for component, found in zip(results["components"], comparisons, strict=True):
        console.print(_table(component["module"], found))
    return results


def flatten(score: Score) -> dict[str, float]:
    """Every number by which SAEs are compared, those of labels as ``LABEL: NAME``."""
    found = {name: float(score[name]) for name in OF_SAE}
    for label, scores in score["labels"].items():
        found |= {f"{label}{_SEPARATOR}{name}": float(value) for name, value in scores.items()}
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


def test(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
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
                "against": against,
                "k": k,
                "of": of,
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

    def curves(name: str) -> dict[str, dict[int, list[float]]]:
        return {of: {k: numbers[of][k][name] for k in ks} for of in SITES}

    def pairs(name: str) -> dict[str, dict[int, list[float]]]:
        lines = {(line["of"], line["k"]): line[name] for line in found["stability"]}
        return {of: {k: lines[of, k] for k in ks} for of in SITES}

    baselines = {line["of"]: line["labels"] for line in found["baselines"]}

    def levels(label: str, probe: str, name: str, chance: float) -> dict[str, float]:
        return {**{str(of): baselines[of][label][probe] for of in SITES}, name: chance}

    probes, sparse = {}, {}
    probe_levels, sparse_levels = {}, {}
    for label, by_chance in found["chance"].items():
        probes[label] = curves(f"{label}{_SEPARATOR}probe")
        probe_levels[label] = levels(label, "probe", "majority", by_chance["probe"])
        for n in SPARSE:
            title = f"{label}, {n} feature{'s' * (n > 1)}"
            sparse[title] = curves(f"{label}{_SEPARATOR}sparse_probe_{n}")
            sparse_levels[title] = levels(label, f"sparse_probe_{n}", "chance", 0.5)
    neighbours = {label: curves(f"{label}{_SEPARATOR}neighbours") for label in found["chance"]}
    chance = {label: {"chance": by["neighbours"]} for label, by in found["chance"].items()}
    return {
        "firing": plots.firing_by_k(
            {k: {of: [densities[of, k, s] for s in seeds] for of in SITES} for k in ks}
        ),
        "reconstruction": plots.scores_by_k({"explained variance": curves("explained_variance")}),
        "active": plots.scores_by_k(
            {OF_SAE[name]: curves(name) for name in ("n_fired", "n_dense")}
        ),
        "probes": plots.scores_by_k(probes, probe_levels, ylabel="accuracy"),
        "sparse_probes": plots.scores_by_k(sparse, sparse_levels, ylabel="balanced accuracy"),
        "neighbours": plots.scores_by_k(neighbours, chance, ylabel="share with the same label"),
        "stability": plots.scores_by_k(
            {"decoder cosine": pairs("cosine"), "feature correlation": pairs("correlation")},
            ylabel="mean largest, between seeds",
        ),
    }


def _table(module: str, found: Mapping[str, Any]) -> Table:
    columns = {
        "explained_variance": "var. expl.",
        "l0": "L0",
        "n_fired": "fire",
        "n_dense": "dense",
        **{f"{label}{_SEPARATOR}probe": f"{label}, probe" for label in found["chance"]},
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

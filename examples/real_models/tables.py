"""The results of `run.py` as tables in Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Found = dict[str, Any]
Rows = Iterator[list[str]]


def write_tables(out: Path, models: Sequence[str]) -> None:
    """``tables.md``: of each model what its steps found, and what they took."""
    parts = [_costs(out, models)]
    for kind, (title, columns, rows) in TABLES.items():
        lines = [
            [model, *row]
            for model in models
            for step in sorted((out / model).glob(f"{kind}*/results.json"), key=_when)
            for row in rows(json.loads(step.read_text(encoding="utf-8")))
        ]
        if lines:
            parts.append(_table(title, ["model", *columns], lines))
    (out / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"wrote {out / 'tables.md'}")


def _when(path: Path) -> float:
    return path.stat().st_mtime


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join([f"## {title}", "", *(f"| {' | '.join(line)} |" for line in lines)])


def _costs(out: Path, models: Sequence[str]) -> str:
    steps = [
        (model, json.loads(path.read_text(encoding="utf-8")))
        for model in models
        for path in sorted((out / model).glob("*.json"), key=_when)
    ]
    rows = [
        [model, s["step"], f"{s['seconds']:.0f}", f"{s['peak_bytes'] / 2**30:.1f}"]
        for model, s in steps
    ]
    whole = sum(s["seconds"] for _, s in steps)
    rows.append(["", "all", f"{whole:.0f}", ""])
    return _table("Time and memory", ["model", "step", "seconds", "peak, GiB"], rows)


def _exactness(found: Found) -> Rows:
    for row in found["rows"]:
        yield [row["site"], row["adapter"], str(row["layers"]), f"{row['error']:.1e}"]


def _evaluation(found: Found) -> Rows:
    of, run = found["evaluation"], found["run"]
    r_squared = {
        (fit["perturbation"], fit["size"]): fit["r_squared"]["SAE"]
        for fit in found["responses"] or []
    }
    yield [
        run["hook_name"],
        f"{of['explained_variance']:.3f}",
        f"{of['n_fired']} / {run['sae']['d_sae']}",
        *(
            f"{r_squared[kind, None]:.3f}" if (kind, None) in r_squared else "–"
            for kind in ("data", "isotropic")
        ),
    ]


def _comparison(found: Found) -> Rows:
    (component,), (compared,) = found["components"], found["comparisons"]
    for line in compared["summary"]:
        scores = line["scores"]
        yield [
            component["module"],
            line["of"],
            *(
                f"{scores[name]['mean']:.3f} ± {scores[name]['sd']:.3f}"
                for name in (
                    "explained_variance",
                    "label: probe",
                    "label: sparse_probe_1",
                    "label: neighbours",
                )
            ),
            f"{line['cosine']:.3f}",
        ]


def _circuit(found: Found) -> Rows:
    run, of = found["run"], found["circuit"]
    low, high = of["interval"]
    yield [
        run["task"],
        f"{of['n_nodes']:,} of {run['n_heads'] + run['n_neurons']:,}",
        f"{of['recovered']:.1%} [{low:.1%}, {high:.1%}]",
        f"{sum(of['random']) / len(of['random']):.1%}",
        f"{found['by_size']['cpr']:.3f}",
        f"{found['by_size']['cmd']:.3f}",
    ]


def _probe(found: Found) -> Rows:
    for one in found["results"]:
        yield [
            one["probe"],
            one["hook"],
            *(
                f"{100 * one['summary'][where][measure]['probe']['mean']:.1f}"
                for where in ("own", "others")
                for measure in ("accuracy", "auroc")
            ),
        ]


def _saliency(found: Found) -> Rows:
    for method, of in found["methods"].items():
        yield [method, f"{of['deletion_area']:.2f}", f"{of['insertion_area']:.2f}"]


#: By the beginning of a step's name: title, columns, and the rows of its results.
TABLES: dict[str, tuple[str, list[str], Callable[[Found], Rows]]] = {
    "exactness": (
        "Centroids beside autograd in float64",
        ["site", "adapter", "layers", "largest relative error"],
        _exactness,
    ),
    "evaluate": (
        "SAEs",
        [
            "trained on",
            "variance explained",
            "features that fire",
            "R² of responses, towards other inputs",
            "R², random directions",
        ],
        _evaluation,
    ),
    "compare": (
        "The same SAEs at matched sites (means and standard deviations of three seeds)",
        [
            "component",
            "SAE of its",
            "variance explained",
            "probe of the package",
            "probe on one feature",
            "neighbours agree",
            "cosine between seeds",
        ],
        _comparison,
    ),
    "circuit": (
        "Circuits",
        ["task", "nodes", "recovered [95 %]", "random circuits", "CPR", "CMD"],
        _circuit,
    ),
    "probe": (
        "Probes of truth, in %",
        ["probe", "at", "accuracy, own sets", "AUROC", "accuracy, other sets", "AUROC"],
        _probe,
    ),
    "saliency": (
        "Saliency: areas under deletion (lower is better) and insertion (higher is better)",
        ["method", "deletion", "insertion"],
        _saliency,
    ),
}

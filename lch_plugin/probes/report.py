"""What ``lch probe`` does: probes trained on one set of statements and tested on all, and a page.

1. Values of all statements at the matched parts of a component: centroid, input, output.
2. For each probe, layer and part the generalisation matrix, its control and its selectivity.
3. The same for probes on k coordinates.
4. ``report.html``, ``results.json`` and the plots, in one new directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from lch_plugin.adapters.transformer_lens import TransformerBridge
from lch_plugin.errors import InputError
from lch_plugin.files import claimed, portable, write_directory
from lch_plugin.probes import plots
from lch_plugin.probes.collecting import PARTS, Component, Token, check_token, collect, hook_names
from lch_plugin.probes.estimators import make_probe, sparse_probe
from lch_plugin.probes.generalisation import TRAIN_SHARE, Generalisation, generalise, over_seeds
from lch_plugin.probes.statements import Statements, check_apart
from lch_plugin.progress import track
from lch_plugin.report import write_report


def check(
    train: Sequence[Statements],
    test: Sequence[Statements] = (),
    *,
    components: Sequence[Component] = ("mlp",),
    probes: Sequence[str] = ("mass-mean",),
    token: Token = "last",
    seeds: int = 3,
    k: Sequence[int] = (),
) -> None:
    """Refuse what `run` cannot do, before a model is loaded.

    Raises:
        InputError: no set to train on, sets that share a name or a statement, unknown components,
            probes or tokens, fewer than 3 seeds, or a ``k`` below 1.
    """
    if not train:
        raise InputError("there is no set of statements to train on: name one.")
    check_apart([*train, *test])
    for component in components:
        hook_names(component, 0)
    for probe in probes:
        make_probe(probe)
    check_token(token)
    for what, chosen in (("component", components), ("probe", probes), ("k", k)):
        if len(set(chosen)) < len(chosen):
            raise InputError(f"a {what} is named twice: {', '.join(map(str, chosen))}.")
    if seeds < 3:
        raise InputError(f"seeds={seeds}: an interval over seeds needs at least 3.")
    if any(one < 1 for one in k):
        raise InputError(f"k={list(k)}: a probe reads at least 1 coordinate.")


def run(
    model: TransformerBridge,
    train: Sequence[Statements],
    out: str | Path,
    *,
    test: Sequence[Statements] = (),
    layers: Sequence[int] | None = None,
    components: Sequence[Component] = ("mlp",),
    probes: Sequence[str] = ("mass-mean",),
    token: Token = "last",
    seeds: int = 3,
    k: Sequence[int] = (),
    seed: int = 0,
    revision: str | None = None,
) -> dict[str, Any]:
    """Train probes on each set, test them on all, and write a report.

    Args:
        model: a TransformerBridge.
        train: sets to train on (80 %, tested on their rest), and to test on.
        out: directory to make.
        test: sets to test on alone.
        layers: blocks, negative counting from the end; all if None.
        components: whose centroids, inputs and outputs.
        probes: names of `PROBES`.
        token: as `collect`.
        seeds: how many splits, at least 3.
        k: numbers of coordinates of sparse probes; none if empty.
        seed: the first of the seeds.
        revision: of the model, for the record.

    Returns:
        What ``results.json`` holds.

    Raises:
        InputError: as `check` and `collect`.
        SiteError, VanishingCentroidError: as `lch_plugin.attach`.
        OutputError: ``out`` holds other content or cannot be written.
    """
    check(train, test, components=components, probes=probes, token=token, seeds=seeds, k=k)
    sets = [*train, *test]
    ends = np.cumsum([len(one) for one in sets])[:-1]
    numbers = range(seed, seed + seeds)
    with claimed(out) as out:
        texts = [text for one in sets for text in one.texts]
        sites: list[dict[str, Any]] = []
        values: dict[str, np.ndarray] = {}
        for component in components:
            found, records = collect(model, texts, layers=layers, component=component, token=token)
            values |= {name: rows.numpy() for name, rows in found.items()}
            for record in records:
                names = hook_names(component, record["layer"])
                for part in PARTS:
                    of_centroid = record if part == "centroid" else {"layer": record["layer"]}
                    sites.append(
                        {"component": component, "part": part, "hook": names[part], **of_centroid}
                    )
        labels = {one.name: one.labels for one in sets}

        def tested(hook: str, probe: Any) -> Generalisation:
            parts = np.split(values[hook], ends)
            by_set = {one.name: rows for one, rows in zip(sets, parts, strict=True)}
            return generalise(by_set, labels, probe, train=[s.name for s in train], seeds=numbers)

        results = [
            {"probe": name, **site, **_told(tested(site["hook"], make_probe(name)))}
            for name, site in track([(name, site) for name in probes for site in sites], "probes")
        ]
        asked = [n for n in sorted(k) if n < model.cfg.d_model]
        sparse = [
            {
                "probe": name,
                **site,
                "k": n,
                "summary": _summary(tested(site["hook"], sparse_probe(make_probe(name), n))),
            }
            for name, site, n in track(
                [(name, site, n) for name in probes for site in sites for n in asked],
                "sparse probes",
            )
        ]
        packages = ("lch-plugin", "torch", "transformer-lens", "transformers", "scikit-learn")
        content: dict[str, Any] = {
            "run": {
                "model": portable(model.cfg.model_name),
                "revision": revision,
                "n_layers": model.cfg.n_layers,
                "d_model": model.cfg.d_model,
                "dtype": str(model.cfg.dtype),
                "layers": sorted({site["layer"] for site in sites}),
                "components": list(components),
                "token": token,
                "seeds": list(numbers),
                "train_share": TRAIN_SHARE,
                "versions": {name: version(name) for name in packages},
            },
            "sets": [
                {
                    "name": one.name,
                    "is_trained_on": one in train,
                    "n": len(one),
                    "n_true": int(one.labels.sum()),
                    "n_repeats": one.n_repeats,
                }
                for one in sets
            ],
            "train": [one.name for one in train],
            "test": [one.name for one in sets],
            "results": results,
            "sparse": sparse,
        }
        figures = {f"layers_{name}": plots.by_layer(_of(results, name), name) for name in probes}
        figures |= {f"matrix_{name}": plots.matrices(content, name) for name in probes}
        if sparse:
            figures |= {f"sparse_{name}": plots.by_k(_of(sparse, name), name) for name in probes}
        write_directory(out, lambda it: write_report(it, "probes.html", content, figures))
    return content


def _of(results: list[dict[str, Any]], probe: str) -> list[dict[str, Any]]:
    return [one for one in results if one["probe"] == probe]


def _summary(found: Generalisation) -> dict[str, Any]:
    return {
        where: None if means is None else {name: one._asdict() for name, one in means.items()}
        for where, means in found.summary().items()
    }


def _told(found: Generalisation) -> dict[str, Any]:
    """A generalisation in terms of JSON: the summary, by row, and cell by cell."""
    kinds = {"accuracy": found.accuracy, "control": found.control, "selectivity": found.selectivity}
    rows = {}
    for i, name in enumerate(found.train):
        others = ~found.is_own[i]
        rows[name] = (
            {kind: over_seeds(v[:, i][:, others].mean(1))._asdict() for kind, v in kinds.items()}
            if others.any()
            else None
        )
    return {
        "summary": _summary(found),
        "trained_on": rows,
        **{kind: v.tolist() for kind, v in kinds.items()},
    }

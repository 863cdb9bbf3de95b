"""What ``lch probe`` does: probes trained on one set of statements and tested on all, and a page.

1. Values of all statements at the matched parts of a component: centroid, input, output.
2. For each probe, layer and part the generalisation matrix, its control and its selectivity.
3. The same for probes on k coordinates.
4. ``report.html``, ``results.json`` and the plots, in one new directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lch_plugin.adapters.transformer_lens import TransformerBridge
from lch_plugin.cotangents import AnyCotangent, as_cotangent
from lch_plugin.errors import InputError
from lch_plugin.files import claimed, portable, write_directory
from lch_plugin.probes import plots
from lch_plugin.probes.collecting import Component, Token, check_token, collect, hook_names
from lch_plugin.probes.estimators import make_probe, sparse_probe
from lch_plugin.probes.generalisation import (
    KINDS,
    MEASURES,
    TRAIN_SHARE,
    Generalisation,
    generalise,
)
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
    rank_by: str = "mean-difference",
) -> None:
    """Refuse what `run` cannot do, before a model is loaded.

    A statement longer than the model's context is not found here but by `run`, before the model
    runs: what counts are the tokens that TransformerLens makes of it, which may put one before, and
    the context that it reads from the model's config, once it has booted the model.

    Raises:
        InputError: no set to train on, sets that share a name or a statement, unknown components,
            probes, tokens or rankings, fewer than 3 seeds, or a ``k`` below 1.
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
    sparse_probe(None, 1, rank_by)


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
    rank_by: str = "mean-difference",
    centre: bool = False,
    cotangent: AnyCotangent | None = None,
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
        k: numbers of coordinates of sparse probes, below the model's width; none if empty.
        rank_by: how their coordinates are chosen, as `sparse_probe`.
        centre: whether each set is centred at its own mean, as `generalise`.
        cotangent: of the centroids; all ones if None.
        seed: the first of the seeds.
        revision: of the model, for the record.

    Returns:
        What ``results.json`` holds.

    Raises:
        InputError: as `check` and `collect`; a ``k`` of the model's width or more.
        SiteError, VanishingCentroidError: as `lch_plugin.attach`.
        OutputError: ``out`` holds other content or cannot be written.
    """
    check(
        train,
        test,
        components=components,
        probes=probes,
        token=token,
        seeds=seeds,
        k=k,
        rank_by=rank_by,
    )
    if k and max(k) >= model.cfg.d_model:
        raise InputError(
            f"k={list(k)}: this model has {model.cfg.d_model} coordinates, and a sparse probe "
            "reads fewer. Leave out what is not below."
        )
    sets = [*train, *test]
    trained_on = [one.name for one in train]
    ends = np.cumsum([len(one) for one in sets])[:-1]
    numbers = range(seed, seed + seeds)
    with claimed(out) as out:
        texts = [text for one in sets for text in one.texts]
        sites: list[dict[str, Any]] = []
        values: dict[str, np.ndarray] = {}
        for component in components:
            found, records = collect(
                model, texts, layers=layers, component=component, token=token, cotangent=cotangent
            )
            values |= {name: rows.numpy() for name, rows in found.items()}
            sites += records
        labels = {one.name: one.labels for one in sets}

        def tested(hook: str, probe: Any) -> Generalisation:
            parts = np.split(values[hook], ends)
            by_set = {one.name: rows for one, rows in zip(sets, parts, strict=True)}
            return generalise(by_set, labels, probe, train=trained_on, seeds=numbers, centre=centre)

        results = [
            {"probe": name, **site, **_cells(tested(site["hook"], make_probe(name)))}
            for name, site in track([(name, site) for name in probes for site in sites], "probes")
        ]
        sparse = [
            {
                "probe": name,
                **site,
                "k": n,
                "summary": _told(
                    tested(site["hook"], sparse_probe(make_probe(name), n, rank_by)).summary()
                ),
            }
            for name, site, n in track(
                [(name, site, n) for name in probes for site in sites for n in sorted(k)],
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
                "cotangent": as_cotangent(cotangent).name,
                "centre": centre,
                "rank_by": rank_by if k else None,
                "seeds": list(numbers),
                "train_share": TRAIN_SHARE,
                "versions": {name: version(name) for name in packages},
            },
            "sets": [
                {
                    "name": one.name,
                    "is_trained_on": one.name in trained_on,
                    "n": len(one),
                    "n_true": int(one.labels.sum()),
                    "n_repeats": one.n_repeats,
                }
                for one in sets
            ],
            "train": trained_on,
            "test": [one.name for one in sets],
            "results": results,
            "sparse": sparse,
        }
        write_directory(out, lambda it: write_report(it, "probes.html", content, _figures(content)))
    return content


def _figures(content: dict[str, Any]) -> dict[str, Figure]:
    """By ``KIND_PROBE_MEASURE``, as the template looks for them."""
    figures = {}
    for probe, measure in product({r["probe"]: None for r in content["results"]}, MEASURES):
        results, sparse = (
            [one for one in content[name] if one["probe"] == probe]
            for name in ("results", "sparse")
        )
        end = f"{probe}_{measure}"
        figures[f"layers_{end}"] = plots.by_layer(results, measure)
        figures[f"matrix_{end}"] = plots.matrices(
            results, measure, content["train"], content["test"]
        )
        if sparse:
            figures[f"sparse_{end}"] = plots.by_k(sparse, measure)
    return figures


def _told(summary: Any) -> Any:
    """Intervals at any depth of a dictionary, in terms of JSON."""
    if isinstance(summary, dict):
        return {name: _told(part) for name, part in summary.items()}
    return None if summary is None else summary._asdict()


def _cells(found: Generalisation) -> dict[str, Any]:
    """A generalisation in terms of JSON: the summary, by row, and cell by cell."""
    is_row = np.eye(len(found.train), dtype=bool)[:, :, None]
    rows = {
        name: found.over(one & ~found.is_own) for name, one in zip(found.train, is_row, strict=True)
    }
    return {
        "summary": _told(found.summary()),
        "trained_on": _told(rows),
        **{
            measure: {kind: getattr(getattr(found, measure), kind).tolist() for kind in KINDS}
            for measure in MEASURES
        },
    }

"""The same SAEs on the centroids of a component, on what it reads and on what it writes.

1. The values of each site, over training and held-out inputs, go to files.
2. For each k and seed SAELens trains one SAE a site: the same settings, the same initialisation
   where the sites are as wide, the same order of rows.
3. Each is saved, and scored on inputs held out: what it reconstructs, which features fire, what
   probes read from its features, and whether items with the same features have the same label.
4. Dictionaries of different seeds, and of different models, are compared with each other.
5. Sites are compared seed by seed, and everything goes into a report.

An SAE that is done is kept, and found again by the next call if this one is interrupted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lch_plugin.cluster import Cluster
from lch_plugin.errors import InputError
from lch_plugin.files import portable, resumable_directory
from lch_plugin.loading import LoadedModel
from lch_plugin.progress import each, progress
from lch_plugin.saes.comparison.components import make_component
from lch_plugin.saes.comparison.data import Labelled
from lch_plugin.saes.comparison.jobs import Job
from lch_plugin.saes.comparison.report import write
from lch_plugin.saes.comparison.scores import mean_max_correlation
from lch_plugin.saes.comparison.settings import SITES, ComparisonSettings

_PACKAGES = ("lch-plugin", "torch", "sae-lens", "transformers", "scikit-learn", "scipy", "numpy")


def compare(
    loaded: LoadedModel,
    module: str,
    train: Labelled,
    test: Labelled,
    out: str | Path,
    settings: ComparisonSettings | None = None,
    *,
    against: Sequence[tuple[LoadedModel, str]] = (),
    cluster: Cluster | None = None,
) -> dict[str, Any]:
    """Train the same SAEs on a component's centroids, input and output, and compare them.

    Scores are of held-out inputs throughout. ``out`` becomes a directory with ``report.html``, the
    plots as PNG, ``results.json`` and ``scores.csv`` with every SAE's scores, and the SAEs
    themselves as `sae_lens.SAE.load_from_disk` reads them. An interrupted call leaves
    ``.NAME.partial`` beside it, which the same call takes up again.

    While this runs, the rows of each site are kept on disk as float32, and of one SAE at a time
    ``2 * n_items`` activations of ``d_sae`` features in memory.

    Args:
        loaded: the model, as `lch_plugin.load` gives it.
        module: a component of it, as `lch_plugin.huggingface.attach` takes it.
        train: to train SAEs and probes on.
        test: held out.
        out: directory to make.
        settings: of all SAEs.
        against: other models, or the same with another component, on which the same SAEs are
            trained; features are compared by how they correlate over the held-out items.
        cluster: where SAEs are trained, each by one worker; in this process if None, which runs the
            model in any case. ``out`` has to be on a disk that all machines share.

    Returns:
        What ``results.json`` holds.

    Raises:
        InputError: inputs that the model cannot read, too few labels or items, values that are no
            rows, or inputs that are both trained on and held out.
        OutputError: ``out`` holds something, or unfinished work with other settings.
        SiteError, VanishingCentroidError: as `lch_plugin.huggingface.attach`.
        ClusterError: workers are lost again and again; what is finished is kept.
    """
    settings = settings or ComparisonSettings()
    main = make_component(loaded, module, train, test, settings)
    # Other tokenizers and patches make other rows of the same inputs.
    inputs = train.first(main.train.n_inputs), test.first(main.test.n_inputs)
    _check_held_out(*inputs)
    others = [make_component(*pair, *inputs, settings, whole=True) for pair in against]
    components = [main, *others]
    identity = {
        "settings": asdict(settings),
        "components": [component.identity() for component in components],
        "versions": {name: version(name) for name in _PACKAGES},
    }
    console = Console()
    with resumable_directory(out, identity) as directory:
        jobs = [
            Job(component, directory / (f"against-{i}" if i else "saes"), settings)
            for i, component in enumerate(components)
        ]
        _announce(console, jobs)
        if test.left_out:
            console.print(f"{test.left_out:,} inputs are not held out: training has the same")
        with progress("comparing", sum(job.n_saes for job in jobs), "SAEs") as advance:
            for job in jobs:
                job.store()
                for score in each(job.scores(cluster), advance):
                    console.print(_line(score), highlight=False)
            results = {
                **identity,
                "train": train.name,
                "test": test.name,
                "left_out": test.left_out,
                "components": [component.record() for component in components],
                "comparisons": [job.results() for job in jobs],
                "similarity": [line for job in jobs[1:] for line in similarity(jobs[0], job)],
            }
        for job in jobs:
            job.remove_values()
        densities = [job.densities() for job in jobs]
        results = write(directory, results, densities, console)
    console.print(f"Open [bold]{Path(out) / 'report.html'}[/bold]")
    return results


def similarity(job: Job, other: Job) -> Iterator[dict[str, Any]]:
    """How alike the features of two components are, by correlation over the same items.

    Yields:
        One record for each site, k and seed. ``chance`` is the same with the items of one in
        another order.
    """
    items, other_items = (next(iter(w.component.test.items.values())).keys for w in (job, other))
    _, mine, theirs = np.intersect1d(items, other_items, return_indices=True)
    shuffled = np.random.default_rng(job.settings.seed).permutation(len(mine))
    settings = job.settings
    for of, k, seed in itertools.product(SITES, settings.k, settings.seeds):
        feature_acts = job.test_feature_acts(of, k, seed)[mine]
        other_codes = other.test_feature_acts(of, k, seed)[theirs]
        yield {
            "against": other.directory.name,
            "model": portable(other.component.loaded.name),
            "module": other.component.module,
            "of": of,
            "k": k,
            "seed": seed,
            "n_items": len(mine),
            "correlation": mean_max_correlation(feature_acts, other_codes),
            "chance": mean_max_correlation(feature_acts, other_codes[shuffled]),
        }


def _check_held_out(train: Labelled, test: Labelled) -> None:
    known = set(train.contents())
    shared = sum(content in known for content in test.contents())
    if shared:
        raise InputError(
            f"{shared} of the {len(test.inputs)} held-out inputs are among the "
            f"{len(train.inputs)} to train on. Leave them out, by test.without(train)."
        )


def _announce(console: Console, jobs: Sequence[Job]) -> None:
    for job in jobs:
        component, settings = job.component, job.settings
        console.print(
            f"[bold]{component.module}[/bold] of {component.loaded.name}: {job.n_saes} SAEs of "
            f"{settings.d_sae} features; {component.train.n_rows:,} rows to train on, "
            f"{component.test.n_rows:,} held out, {job.n_bytes / 1e6:,.0f} MB on disk meanwhile",
            highlight=False,
        )


def _line(score: dict[str, Any]) -> str:
    probes = ", ".join(f"{name} {of['probe']:.1%}" for name, of in score["labels"].items())
    return (
        f"{score['of']:>8}  k {score['k']:<3} seed {score['seed']}  "
        f"explained variance {score['explained_variance']:.3f}  L0 {score['l0']:5.1f}  "
        f"{score['n_fired']} of {score['d_sae']} features fire  probe: {probes}"
    )

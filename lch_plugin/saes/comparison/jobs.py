"""The SAEs of one component: training, saving, scoring, and comparing those of different seeds."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from lch_plugin.cluster import Cluster, Shared, shared
from lch_plugin.files import new_directory, remove_directory, write_directory
from lch_plugin.progress import progress
from lch_plugin.saes.comparison.components import Component
from lch_plugin.saes.comparison.scores import (
    chance_agreement,
    majority_accuracy,
    mean_max_correlation,
    mean_max_cosine,
)
from lch_plugin.saes.comparison.settings import SITES, ComparisonSettings
from lch_plugin.saes.comparison.stored_component import (
    FIRING,
    SCORES,
    TEST,
    TRAIN,
    StoredComponent,
    Which,
    encoder,
    is_there,
    write_scores,
)
from lch_plugin.saes.comparison.stored_values import StoredValues, item_means, store_values
from lch_plugin.saes.sources.rows import Of


class Job:
    """What is done for one component, in a directory of its own."""

    def __init__(self, component: Component, directory: Path, settings: ComparisonSettings) -> None:
        self.component, self.directory, self.settings = component, directory, settings
        directory.mkdir(exist_ok=True)
        self.stored = StoredComponent(
            directory,
            settings,
            component.device,
            component.d_in,
            {of: component.rows(component.train, of).record() for of in SITES},
            component.train.items,
            component.test.items,
        )

    @property
    def n_saes(self) -> int:
        return len(self._all)

    @property
    def n_bytes(self) -> int:
        """Size of the values on disk."""
        n_rows = self.component.train.n_rows + self.component.test.n_rows
        return 4 * n_rows * sum(self.component.d_in.values())

    def store(self) -> None:
        """Write the values of every site to files, and score probes on them."""
        for of in SITES:
            if not is_there(self.stored.values(of)):
                with new_directory(self.stored.values(of)) as directory:
                    for name, split in (
                        (TRAIN, self.component.train),
                        (TEST, self.component.test),
                    ):
                        rows = self.component.rows(split, of)
                        what = f"running the model for each {of}"
                        with progress(what, split.n_rows, "rows") as advance:
                            store_values(rows, directory / name, split.n_rows, advance)
            if not is_there(self._baseline(of)):
                scores = {
                    "of": of,
                    "labels": self.stored.label_scores(of, lambda x: x, of_feature_acts=False),
                }
                write_directory(self._baseline(of), partial(write_scores, scores))

    def remove_values(self) -> None:
        """Leave no copy of the values behind."""
        for of in SITES:
            remove_directory(self.stored.values(of))

    def scores(self, cluster: Cluster | None = None) -> Iterator[dict[str, Any]]:
        """Train, save and score each SAE that is not there yet; the scores of all.

        Those of SAEs that are made on a cluster come as they are done.
        """
        there = [which for which in self._all if is_there(self.stored.sae(which))]
        missing = [which for which in self._all if which not in there]
        for which in itertools.chain(there, self._make(cluster, missing)):
            yield _read_json(self.stored.sae(which) / SCORES)

    def _make(self, cluster: Cluster | None, missing: list[Which]) -> Iterator[Which]:
        if cluster is None:
            for which in missing:
                self.stored.make(which)
                yield which
            return
        with (
            shared(self.directory) as place,
            closing(cluster.run(partial(_on_worker, place, self.stored), missing)) as done,
        ):
            for which, _ in done:
                yield which

    @property
    def _all(self) -> list[Which]:
        product = itertools.product(self.settings.k, self.settings.seeds, SITES)
        return [(of, k, seed) for k, seed, of in product]

    def results(self) -> dict[str, Any]:
        """Scores of all SAEs, of the values themselves, and by chance; and seeds compared."""
        return {
            "scores": list(self.scores()),
            "baselines": [_read_json(self._baseline(of) / SCORES) for of in SITES],
            "chance": {
                name: {
                    "probe": majority_accuracy(
                        self.component.train.items[name].labels, items.labels
                    ),
                    "neighbours": chance_agreement(items.labels),
                }
                for name, items in self.component.test.items.items()
            },
            "stability": [
                self._stability(of, k) for k, of in itertools.product(self.settings.k, SITES)
            ],
        }

    def densities(self) -> dict[tuple[Of, int, int], Float[Tensor, " d_sae"]]:
        """How often each feature fires, by site, k and seed."""
        return {
            which: load_file(self.stored.sae(which) / FIRING)["density"]
            for which in itertools.product(SITES, self.settings.k, self.settings.seeds)
        }

    def test_feature_acts(self, of: Of, k: int, seed: int) -> Float[np.ndarray, "n_items d_sae"]:
        """Held-out items of the first kind of label, as an SAE encodes them."""
        sae = self.stored.load((of, k, seed))
        items = next(iter(self.component.test.items.values()))
        return item_means(StoredValues(self.stored.values(of) / TEST), items, encoder(sae))

    def _stability(self, of: Of, k: int) -> dict[str, Any]:
        """How alike the dictionaries of different seeds are, pair by pair."""
        seeds = self.settings.seeds
        paths = {seed: self.stored.sae((of, k, seed)) for seed in seeds}
        fired = {seed: load_file(paths[seed] / FIRING)["density"] > 0 for seed in seeds}
        decoders = {s: self.stored.load((of, k, s)).W_dec.detach().cpu()[fired[s]] for s in seeds}
        feature_acts = {seed: self.test_feature_acts(of, k, seed) for seed in seeds}
        generator = torch.Generator().manual_seed(self.settings.seed)
        pairs = list(itertools.combinations(seeds, 2))
        random = [torch.randn(decoders[b].shape, generator=generator) for _, b in pairs]
        return {
            "of": of,
            "k": k,
            "pairs": [list(pair) for pair in pairs],
            "cosine": [mean_max_cosine(decoders[a], decoders[b]) for a, b in pairs],
            "cosine_with_random": [
                mean_max_cosine(decoders[a], other)
                for (a, _), other in zip(pairs, random, strict=True)
            ],
            "correlation": [
                mean_max_correlation(feature_acts[a], feature_acts[b]) for a, b in pairs
            ],
        }

    def _baseline(self, of: Of) -> Path:
        return self.directory / f"{of}-baseline"


def _on_worker(place: Shared, stored: StoredComponent) -> Callable[[Which], None]:
    place.check()
    return stored.make


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))

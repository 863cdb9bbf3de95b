"""The SAEs of one component: training, saving, scoring, and comparing those of different seeds."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sae_lens import SAE, TrainingSAE
from safetensors.torch import load_file, save_file
from torch import Tensor

from lch_plugin.files import check_contents, new_directory, remove_directory, write_directory
from lch_plugin.progress import progress
from lch_plugin.saes.comparison.components import Component
from lch_plugin.saes.comparison.scores import (
    chance_agreement,
    label_agreement,
    majority_accuracy,
    mean_max_correlation,
    mean_max_cosine,
    probe_scores,
)
from lch_plugin.saes.comparison.settings import SITES, ComparisonSettings
from lch_plugin.saes.comparison.stored_values import StoredValues, item_means, store_values
from lch_plugin.saes.evaluation.evaluate import evaluate
from lch_plugin.saes.sources.rows import Of
from lch_plugin.saes.training.on_rows import train_on

SCORES, FIRING = "scores.json", "firing.safetensors"
_TRAIN, _TEST = "train.npy", "test.npy"

Encoder = Callable[[Float[Tensor, "_ d_in"]], Float[Tensor, "_ d"]]


class Job:
    """What is done for one component, in a directory of its own."""

    def __init__(self, component: Component, directory: Path, settings: ComparisonSettings) -> None:
        self.component, self.directory, self.settings = component, directory, settings
        directory.mkdir(exist_ok=True)

    @property
    def n_saes(self) -> int:
        return len(SITES) * len(self.settings.k) * self.settings.n_seeds

    @property
    def n_bytes(self) -> int:
        """Size of the values on disk."""
        n_rows = self.component.train.n_rows + self.component.test.n_rows
        return 4 * n_rows * sum(self.component.d_in.values())

    def store(self) -> None:
        """Write the values of every site to files, and score probes on them."""
        for of in SITES:
            if not _is_there(self._values(of)):
                with new_directory(self._values(of)) as directory:
                    for name, split in (
                        (_TRAIN, self.component.train),
                        (_TEST, self.component.test),
                    ):
                        rows = self.component.rows(split, of)
                        what = f"running the model for each {of}"
                        with progress(what, split.n_rows, "rows") as advance:
                            store_values(rows, directory / name, split.n_rows, advance)
            if not _is_there(self._baseline(of)):
                scores = {
                    "of": of,
                    "labels": self._label_scores(of, lambda x: x, of_feature_acts=False),
                }
                write_directory(self._baseline(of), partial(_write_scores, scores))

    def remove_values(self) -> None:
        """Leave no copy of the values behind."""
        for of in SITES:
            remove_directory(self._values(of))

    def scores(self) -> Iterator[dict[str, Any]]:
        """Train, save and score each SAE that is not there yet; the scores of all."""
        for k, seed, of in itertools.product(self.settings.k, self.settings.seeds, SITES):
            path = self._sae(of, k, seed)
            if not _is_there(path):
                sae = self._train(of, k, seed)
                write_directory(path, partial(self._write_scored, sae, of, k, seed))
            yield _read_json(path / SCORES)

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
            (of, k, seed): load_file(self._sae(of, k, seed) / FIRING)["density"]
            for of, k, seed in itertools.product(SITES, self.settings.k, self.settings.seeds)
        }

    def test_feature_acts(self, of: Of, k: int, seed: int) -> Float[np.ndarray, "n_items d_sae"]:
        """Held-out items of the first kind of label, as an SAE encodes them."""
        sae = self._load(of, k, seed)
        items = next(iter(self.component.test.items.values()))
        return item_means(StoredValues(self._values(of) / _TEST), items, _encoder(sae))

    def _train(self, of: Of, k: int, seed: int) -> TrainingSAE[Any]:
        settings, component = self.settings, self.component
        # SAELens' own bar, one an SAE, and ours would overwrite each other.
        with contextlib.redirect_stderr(io.StringIO()):
            sae = train_on(
                StoredValues(self._values(of) / _TRAIN, seed=seed),
                settings.sae(component.d_in[of], k, component.device),
                settings.trainer(component.device),
                buffer_size=max(16 * settings.batch_size, 16_384),
                seed=seed,
            )
        record = component.rows(component.train, of).record()
        sae.cfg.metadata.lch_centroid = {**record, "seed": seed}
        return sae

    def _write_scored(
        self, trained: TrainingSAE[Any], of: Of, k: int, seed: int, directory: Path
    ) -> None:
        """An SAE, and the scores of what SAELens reads of it."""
        trained.save_inference_model(str(directory))
        sae = SAE.load_from_disk(str(directory), device=self.component.device)
        evaluation = evaluate(sae, StoredValues(self._values(of) / _TEST))
        scores = {
            "of": of,
            "k": k,
            "seed": seed,
            **evaluation.to_dict(),
            "labels": self._label_scores(of, _encoder(sae), of_feature_acts=True),
        }
        save_file({"density": evaluation.density}, directory / FIRING)
        _write_scores(scores, directory)

    def _label_scores(self, of: Of, encode: Encoder, *, of_feature_acts: bool) -> dict[str, Any]:
        found = {}
        for label, test_items in self.component.test.items.items():
            train_items = self.component.train.items[label]
            train, test = (
                item_means(StoredValues(self._values(of) / name), items, encode)
                for name, items in ((_TRAIN, train_items), (_TEST, test_items))
            )
            labels = train_items.labels, test_items.labels
            found[label] = probe_scores(
                train, labels[0], test, labels[1], of_feature_acts=of_feature_acts
            )
            if of_feature_acts:
                found[label]["neighbours"] = label_agreement(
                    test, labels[1], self.settings.n_neighbours
                )
        return found

    def _stability(self, of: Of, k: int) -> dict[str, Any]:
        """How alike the dictionaries of different seeds are, pair by pair."""
        seeds = self.settings.seeds
        fired = {seed: load_file(self._sae(of, k, seed) / FIRING)["density"] > 0 for seed in seeds}
        decoders = {s: self._load(of, k, s).W_dec.detach().cpu()[fired[s]] for s in seeds}
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

    def _load(self, of: Of, k: int, seed: int) -> SAE[Any]:
        return SAE.load_from_disk(str(self._sae(of, k, seed)), device=self.component.device)

    def _values(self, of: Of) -> Path:
        return self.directory / f"{of}-values"

    def _baseline(self, of: Of) -> Path:
        return self.directory / f"{of}-baseline"

    def _sae(self, of: Of, k: int, seed: int) -> Path:
        return self.directory / f"{of}-k{k}-seed{seed}"


def _is_there(part: Path) -> bool:
    """Whether a part is finished; one that is has to be what it was."""
    return part.exists() and check_contents(
        part, f"Remove {part} and repeat the call: it is made again, and only it."
    )


def _encoder(sae: SAE[Any]) -> Encoder:
    def encode(rows: Tensor) -> Tensor:
        with torch.no_grad():
            return sae.encode(rows.to(sae.device, sae.dtype))

    return encode


def _write_scores(scores: dict[str, Any], directory: Path) -> None:
    text = json.dumps(scores, indent=2, allow_nan=False)
    (directory / SCORES).write_text(text + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))

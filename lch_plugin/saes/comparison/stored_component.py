"""What SAEs of a component are made of when its values are on disk: no model is needed any more."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE, TrainingSAE
from safetensors.torch import save_file
from torch import Tensor

from lch_plugin.files import check_contents, write_directory
from lch_plugin.saes.comparison.data import Items
from lch_plugin.saes.comparison.scores import label_agreement, probe_scores
from lch_plugin.saes.comparison.settings import ComparisonSettings
from lch_plugin.saes.comparison.stored_values import StoredValues, item_means
from lch_plugin.saes.evaluation.evaluate import evaluate
from lch_plugin.saes.sources.rows import Of
from lch_plugin.saes.training.on_rows import train_on

SCORES, FIRING = "scores.json", "firing.safetensors"
TRAIN, TEST = "train.npy", "test.npy"

#: Which SAE: site, k and seed.
Which = tuple[Of, int, int]
Encoder = Callable[[Float[Tensor, "_ d_in"]], Float[Tensor, "_ d"]]


@dataclass(frozen=True, eq=False)
class StoredComponent:
    """The values of a component on disk, and everything else that its SAEs are made of.

    It travels to the workers of a cluster, which see the same directory.

    Attributes:
        directory: of the values, and of the SAEs that are made.
        settings: of all SAEs.
        device: where SAEs are trained.
        d_in: dimensions of each site.
        records: what the values of each site are of.
        train, test: labelled items, by name of the labels.
    """

    directory: Path
    settings: ComparisonSettings
    device: str
    d_in: Mapping[Of, int]
    records: Mapping[Of, dict[str, Any]]
    train: Mapping[str, Items]
    test: Mapping[str, Items]

    def values(self, of: Of) -> Path:
        """Where the values of a site are."""
        return self.directory / f"{of}-values"

    def sae(self, which: Which) -> Path:
        """Where an SAE is, or will be."""
        of, k, seed = which
        return self.directory / f"{of}-k{k}-seed{seed}"

    def make(self, which: Which) -> None:
        """Train, score and save an SAE."""
        trained = self._train(*which)
        write_directory(self.sae(which), partial(self._write_scored, trained, which))

    def load(self, which: Which) -> SAE[Any]:
        """An SAE as SAELens reads it."""
        return SAE.load_from_disk(str(self.sae(which)), device=self.device)

    def label_scores(self, of: Of, encode: Encoder, *, of_feature_acts: bool) -> dict[str, Any]:
        """How well labels are read from what ``encode`` makes of values, by name of the labels."""
        found = {}
        for label, test_items in self.test.items():
            train_items = self.train[label]
            train, test = (
                item_means(StoredValues(self.values(of) / name), items, encode)
                for name, items in ((TRAIN, train_items), (TEST, test_items))
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

    def _train(self, of: Of, k: int, seed: int) -> TrainingSAE[Any]:
        settings = self.settings
        # SAELens' own bar, one an SAE, and ours would overwrite each other.
        with contextlib.redirect_stderr(io.StringIO()):
            sae = train_on(
                StoredValues(self.values(of) / TRAIN, seed=seed),
                settings.sae(self.d_in[of], k, self.device),
                settings.trainer(self.device),
                buffer_size=max(16 * settings.batch_size, 16_384),
                seed=seed,
            )
        sae.cfg.metadata.lch_centroid = {**self.records[of], "seed": seed}
        return sae

    def _write_scored(self, trained: TrainingSAE[Any], which: Which, directory: Path) -> None:
        """An SAE, and the scores of what SAELens reads of it."""
        of, k, seed = which
        trained.save_inference_model(str(directory))
        sae = SAE.load_from_disk(str(directory), device=self.device)
        evaluation = evaluate(sae, StoredValues(self.values(of) / TEST))
        scores = {
            "of": of,
            "k": k,
            "seed": seed,
            **evaluation.to_dict(),
            "labels": self.label_scores(of, encoder(sae), of_feature_acts=True),
        }
        save_file({"density": evaluation.density}, directory / FIRING)
        write_scores(scores, directory)


def encoder(sae: SAE[Any]) -> Encoder:
    """What an SAE makes of rows on the CPU."""

    def encode(rows: Tensor) -> Tensor:
        with torch.no_grad():
            return sae.encode(rows.to(sae.device, sae.dtype))

    return encode


def is_there(part: Path) -> bool:
    """Whether a part is finished; one that is has to be what it was."""
    return part.exists() and check_contents(
        part, f"Remove {part} and repeat the call: it is made again, and only it."
    )


def write_scores(scores: dict[str, Any], directory: Path) -> None:
    """Write scores to a directory, in terms of JSON."""
    text = json.dumps(scores, indent=2, allow_nan=False)
    (directory / SCORES).write_text(text + "\n", encoding="utf-8")

"""What a comparison is made with: the same for every SAE in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from sae_lens import BatchTopKTrainingSAEConfig, TopKTrainingSAEConfig, TrainingSAEConfig
from sae_lens.config import SAETrainerConfig

from lch_plugin.errors import InputError
from lch_plugin.names import check_known
from lch_plugin.saes.sources.rows import Of

Architecture = Literal["topk", "batchtopk"]

#: The sites of a component, in the order of the tables.
SITES: tuple[Of, ...] = ("centroid", "input", "output")

_CONFIGS = {"topk": TopKTrainingSAEConfig, "batchtopk": BatchTopKTrainingSAEConfig}


@dataclass(frozen=True)
class ComparisonSettings:
    """ComparisonSettings of a comparison.

    Attributes:
        k: active features a row, of one SAE each.
        n_seeds: SAEs of each k and site; at least two, or there is no spread.
        d_sae: features of an SAE.
        architecture: SAELens' TopK or BatchTopK. The latter is scored as SAELens saves it, with a
            threshold in place of k, so that its L0 need not be k.
        n_rows: rows an SAE is trained on; fewer come again and again.
        n_test_rows: held-out rows that reconstruction and firing are measured on, at most.
        n_items: labelled items of each kind to train probes on, and as many to test them, at most.
        n_neighbours: nearest neighbours whose labels are compared.
        lr: learning rate.
        batch_size: rows of a training step.
        skip: tokens at the beginning of each input that make no rows: the CLS token, or the
            beginning of a text, which are unlike all others.
        seed: the first of the seeds.

    Raises:
        InputError: a number out of range.
    """

    k: tuple[int, ...] = (8, 16, 32, 64)
    n_seeds: int = 3
    d_sae: int = 512
    architecture: Architecture = "topk"
    n_rows: int = 300_000
    n_test_rows: int = 50_000
    n_items: int = 4_000
    n_neighbours: int = 10
    lr: float = 1e-3
    batch_size: int = 512
    skip: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        whole = ("n_seeds", "d_sae", "n_rows", "n_test_rows", "n_items", "n_neighbours")
        given = {name: getattr(self, name) for name in (*whole, "batch_size", "skip", "seed")}
        for name, value in (given | {f"k[{i}]": k for i, k in enumerate(self.k)}).items():
            if not isinstance(value, int):
                raise InputError(f"{name}={value!r} must be a whole number.")
        check_known("architecture", self.architecture, get_args(Architecture))
        if not self.k or len(set(self.k)) != len(self.k) or min(self.k) < 1:
            raise InputError(f"k={self.k} must be different numbers, at least 1.")
        if max(self.k) > self.d_sae:
            raise InputError(
                f"k={max(self.k)} of d_sae={self.d_sae} features cannot be active. Lower k, or "
                "raise d_sae."
            )
        if self.n_seeds < 2:
            raise InputError(
                f"n_seeds={self.n_seeds}: a comparison needs two or more to tell a difference from "
                "the spread between seeds."
            )
        least = {"n_rows": self.batch_size, "n_test_rows": 1, "n_items": 4, "n_neighbours": 1}
        for name, low in (least | {"batch_size": 1, "skip": 0, "seed": 0}).items():
            if getattr(self, name) < low:
                raise InputError(f"{name}={getattr(self, name)} must be at least {low}.")
        if self.seed + self.n_seeds > 2**32:
            raise InputError(
                f"seed={self.seed} and n_seeds={self.n_seeds}: the last seed must be below 2**32."
            )
        if not 0 < self.lr < math.inf:
            raise InputError(f"lr={self.lr} must be a finite number above 0.")

    @property
    def seeds(self) -> range:
        """Of the SAEs."""
        return range(self.seed, self.seed + self.n_seeds)

    def sae(self, d_in: int, k: int, device: str) -> TrainingSAEConfig:
        """SAELens' configuration of one SAE."""
        return _CONFIGS[self.architecture](
            d_in=d_in,
            d_sae=self.d_sae,
            k=k,
            device=device,
            normalize_activations="expected_average_only_in",
        )

    def trainer(self, device: str) -> SAETrainerConfig:
        """SAELens' configuration of its trainer."""
        n_steps = self.n_rows // self.batch_size
        return SAETrainerConfig(
            total_training_samples=self.n_rows,
            train_batch_size_samples=self.batch_size,
            lr=self.lr,
            lr_decay_steps=n_steps // 5,
            # SAELens' 1,000 steps are longer than a short run: no feature would count as dead, and
            # none be revived.
            dead_feature_window=max(1, min(1000, n_steps // 10)),
            device=device,
        )

"""SAEs on models without text: SAELens' trainer, on rows from anywhere.

SAELens' runner reads text. Its trainer takes rows, which its mixing buffer shuffles.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import TrainingSAE, TrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.mixing_buffer import mixing_buffer
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from lch_plugin.errors import InputError, NonFiniteError
from lch_plugin.progress import progress
from lch_plugin.saes.evaluation.sae_inputs import check_width
from lch_plugin.saes.sources.rows import Rows
from lch_plugin.saes.training.quiet import saelens_quiet
from lch_plugin.saes.training.starting import n_estimate_batches, start_at_data, starts_at_data
from lch_plugin.saes.training.watching import Watch, check_scale


def train_on(
    rows: Rows | Iterable[Float[Tensor, "_ d_in"]],
    sae: TrainingSAEConfig,
    config: SAETrainerConfig,
    *,
    buffer_size: int = 16_384,
    seed: int = 0,
) -> TrainingSAE[Any]:
    """Train an SAE on rows, with SAELens' own trainer, and return it.

    With the normalisations ``"none"`` and ``"expected_average_only_in"`` the decoder's bias starts
    at the mean of the rows, which of centroids is most of their norm; an SAE that starts from zero
    spends its features on it. Mean and scale are estimated from 16,384 rows, or from
    ``config.n_batches_for_norm_estimate`` batches if those are fewer. Of `Rows` the SAE carries
    ``cfg.metadata.lch_centroid``, the scale among it.

    ``save_inference_model(path)`` of what is returned writes it as `sae_lens.SAE.load_from_disk`
    reads it. BatchTopK is loaded as JumpReLU then, with a threshold that SAELens learns slowly:
    over some hundred steps.

    Args:
        rows: as many as ``config.total_training_samples`` takes and the estimate of the scale, or
            something to be iterated again and again until then.
        sae: SAELens' own configuration of any architecture.
        config: SAELens' own configuration of the trainer. To log to wandb, call ``wandb.init``
            first, which SAELens' runner does and its trainer does not.
        buffer_size: rows that are shuffled together; half of them stay for the next round.
        seed: of initialisation and shuffling; the global random state is left alone.

    Raises:
        InputError: rows of another width than ``sae.d_in``, too small a buffer, no rows, or one
            that is zero; or no feature fires any more.
        NonFiniteError: a row, the loss or the weights are NaN or infinite.
    """
    with torch.random.fork_rng(), torch.enable_grad(), saelens_quiet():
        torch.manual_seed(seed)
        d_in, batches = shuffled(rows, config.train_batch_size_samples, buffer_size)
        check_width("each row", sae.d_in, d_in)
        dictionary: TrainingSAE[Any] = TrainingSAE.from_dict(sae.to_dict())
        trainer = SAETrainer(with_lr_end(config), dictionary, batches)
        scaler = trainer.activation_scaler
        if starts_at_data(dictionary):
            sample = list(itertools.islice(batches, n_estimate_batches(config)))
            start_at_data(dictionary, scaler, sample)
            check_scale("", scaler)
        if isinstance(rows, Rows):
            record = {**rows.record(), "scale": scaler.scaling_factor, "seed": seed}
            dictionary.cfg.metadata.lch_centroid = record
        watch = Watch({"": trainer})
        with progress("training", config.total_training_samples, "rows") as watch.advance:
            trained = trainer.fit()
        watch.check()
        return trained


def with_lr_end(config: SAETrainerConfig) -> SAETrainerConfig:
    """With the last learning rate that SAELens' runner would set; its trainer needs a number."""
    lr_end = config.lr / 10 if config.lr_end is None else config.lr_end
    return dataclasses.replace(config, lr_end=lr_end)


def shuffled(
    rows: Iterable[Float[Tensor, "_ d_in"]], batch_size: int, buffer_size: int
) -> tuple[int, Iterator[Float[Tensor, "batch d_in"]]]:
    """Rows again and again, as SAELens' mixing buffer shuffles them.

    Returns:
        Their width, and batches.

    Raises:
        InputError: a buffer that holds no batch, something else than rows, or none; while they are
            read, that they came to an end.
    """
    if buffer_size < batch_size:
        raise InputError(
            f"buffer_size={buffer_size} holds no training batch of "
            f"train_batch_size_samples={batch_size}. Raise it."
        )
    stream = _endless(rows)
    first = next(stream)
    return first.shape[1], mixing_buffer(buffer_size, batch_size, itertools.chain([first], stream))


def _check_rows(x: Tensor, start: int) -> None:
    if x.ndim != 2:
        raise InputError(
            f"a batch of rows has shape {tuple(x.shape)}, and has to be (row, d_in): take "
            "x.flatten(0, -2)."
        )
    largest = x.abs().amax(-1)
    if not largest.isfinite().all():
        row = start + int((~largest.isfinite()).nonzero()[0])
        raise NonFiniteError(f"row {row} has NaN or infinite values. Leave such rows out.")
    if not largest.all():
        row = start + int((largest == 0).nonzero()[0])
        raise InputError(f"row {row} is zero, which has no direction to learn. Leave it out.")


def _endless(rows: Iterable[Tensor]) -> Iterator[Tensor]:
    while True:
        n_rows = 0
        for x in rows:
            _check_rows(x, n_rows)
            n_rows += len(x)
            yield x
        if not n_rows:
            raise InputError(
                "the rows came to an end before training did, or there were none. Pass batches "
                "that can be iterated again, such as a list, or more of them."
            )

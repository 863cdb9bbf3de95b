"""Where an SAE starts: at the scale and the mean of what it is trained on.

Norms of centroids differ by orders of magnitude between layers, and most of a centroid is the mean
of all centroids. SAELens' own scaling evens out the first, so that one learning rate serves every
layer; with the decoder's bias at the mean, no features are spent on the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

#: Tokens that scale and mean are estimated from. SAELens' default of 1,000 batches is as many as a
#: short training run; the mean norm of so many tokens has a standard error of about half a per cent
#: even where norms vary as much as their mean.
ESTIMATE_TOKENS = 16_384
# Normalisations under which the mean of what the SAE sees is that of the rows, scaled.
_AFFINE = ("none", "expected_average_only_in")


def starts_at_data(sae: TrainingSAE[Any]) -> bool:
    """Whether scale and mean of the data mean anything to an SAE, given its normalisation."""
    return sae.cfg.normalize_activations in _AFFINE


def n_estimate_batches(config: SAETrainerConfig) -> int:
    """How many batches to start from: those of `ESTIMATE_TOKENS`, or what it says if fewer."""
    wanted = -(-ESTIMATE_TOKENS // config.train_batch_size_samples)
    return min(wanted, config.n_batches_for_norm_estimate)


@torch.no_grad()
def start_at_data(
    sae: TrainingSAE[Any],
    scaler: ActivationScaler,
    sample: Sequence[Float[Tensor, "_ d_in"]],
    *,
    fresh: bool = True,
) -> None:
    """Set SAELens' scale and, of a fresh SAE, the decoder's bias, from a sample of the rows.

    The scale makes the mean norm ``sqrt(d_in)``, and SAELens folds it into the weights when
    training is done.

    Args:
        sae: about to be trained, for which `starts_at_data`.
        scaler: its trainer's.
        sample: rows, in batches of one size.
        fresh: whether the decoder's bias is still to be chosen.
    """
    sample = [rows.to(sae.device) for rows in sample]
    if sae.cfg.normalize_activations == "expected_average_only_in":
        scaler.estimate_scaling_factor(sae.cfg.d_in, iter(sample), len(sample))
    if fresh:
        mean = torch.stack([rows.double().mean(0) for rows in sample]).mean(0)
        sae.b_dec.copy_(scaler(mean))

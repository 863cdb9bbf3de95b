"""Everything about a training run that can be known to be wrong before it starts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens import (
    LanguageModelSAERunnerConfig,
    MultiSAETrainingRunnerConfig,
    TrainingSAEConfig,
)

from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.errors import InputError
from lch_plugin.files import check_contents
from lch_plugin.saes.evaluation.sae_inputs import check_width
from lch_plugin.saes.sources.hook_points import widths
from lch_plugin.saes.sources.hooked_model import HookedModel
from lch_plugin.saes.training.checkpoints import check_checkpoint, check_sae

# Tokens for each feature, below which none has been seen often enough to be learned.
_FEWEST = 4


def check_run(
    config: LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig,
) -> None:
    """Refuse a configuration that contradicts itself, or whose files are not there."""
    n_positions = len(range(config.context_size)[slice(*config.seqpos_slice)])
    if not n_positions:
        raise InputError(f"seqpos_slice={config.seqpos_slice} leaves no position. Widen it.")
    buffer = config.n_batches_in_buffer * n_positions
    if buffer < config.train_batch_size_tokens:
        raise InputError(
            f"n_batches_in_buffer * {n_positions} positions = {buffer} tokens hold no training "
            f"batch of train_batch_size_tokens={config.train_batch_size_tokens}. Raise "
            f"n_batches_in_buffer to {-(-config.train_batch_size_tokens // n_positions)} or more."
        )
    if config.resume_from_checkpoint:
        check_checkpoint(config, Path(config.resume_from_checkpoint))
    if isinstance(config, LanguageModelSAERunnerConfig) and config.from_pretrained_path:
        start = Path(config.from_pretrained_path)
        check_contents(start, "Give another SAE to start from.")
        check_sae(start, config.sae)
    n_tokens, n_batch = config.training_tokens, config.train_batch_size_tokens
    d_sae = max(sae.d_sae for sae in _saes(config))
    if n_tokens < n_batch or n_tokens < _FEWEST * d_sae:
        than = f"a batch of {n_batch:,}" if n_tokens < n_batch else f"{_FEWEST} for each feature"
        warnings.warn(
            f"training_tokens={n_tokens:,} are fewer than {than} (d_sae={d_sae:,}): such an SAE "
            "says nothing about the model. Train on more.",
            stacklevel=2,
        )


def _saes(
    config: LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig,
) -> list[TrainingSAEConfig]:
    return (
        list(config.saes.values())
        if isinstance(config, MultiSAETrainingRunnerConfig)
        else [config.sae]
    )


def check_hooks(
    model: LensModel | HookedModel,
    hooks: Mapping[str, tuple[str, int, int | None]],
    context_size: int,
) -> None:
    """Refuse SAEs that do not fit their hook points, each ``(hook, d_in, head)`` by its name."""
    for name in filter(None, hooks):
        if Path(name).name != name or name == "..":
            raise InputError(f"{name!r} names an SAE and its directory: give it a plain name.")
    found = widths(model, {hook: head for hook, _, head in hooks.values()}, context_size)
    for hook, d_in, _ in hooks.values():
        check_width(hook, d_in, found[hook])

"""SAELens' configuration, with defaults for a model and a dataset that are passed in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sae_lens import (
    LanguageModelSAERunnerConfig,
    MultiSAETrainingRunnerConfig,
    TrainingSAEConfig,
)
from sae_lens import LoggingConfig as LoggingConfig
from sae_lens.constants import DTYPE_MAP
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from lch_plugin.errors import InputError
from lch_plugin.names import did_you_mean

#: Names of the dtypes that an SAE can have.
DTYPES = tuple(DTYPE_MAP)


def runner_config(
    sae: TrainingSAEConfig, hook_name: str, *, training_tokens: int, **settings: Any
) -> LanguageModelSAERunnerConfig[Any]:
    """SAELens' configuration of a run, with what `lch_plugin.saes.train` usually wants.

    SAELens' own defaults load model and data from the hub, log to wandb and write to ``output``,
    and its buffer of 20 sequences holds no batch of its 4,096 tokens. Here wandb is off, nothing is
    written unless it is asked for, and the buffer holds at least four batches. Anything else is as
    SAELens has it.

    Args:
        sae: SAELens' configuration of any architecture. ``normalize_activations=
            "expected_average_only_in"`` lets one learning rate serve centroids of every layer.
        hook_name: a centroid hook, or any other.
        training_tokens: how many to train on.
        **settings: of ``LanguageModelSAERunnerConfig``, in place of these defaults.

    Example:
        >>> sae = BatchTopKTrainingSAEConfig(
        ...     d_in=768, d_sae=12_288, k=32, normalize_activations="expected_average_only_in"
        ... )
        >>> config = lch.saes.runner_config(
        ...     sae, "blocks.8.mlp.hook_centroid", training_tokens=100_000_000, output_path="sae"
        ... )
        >>> lch.saes.train(model, dataset, config)
    """
    return LanguageModelSAERunnerConfig(
        sae=sae,
        hook_name=hook_name,
        training_tokens=training_tokens,
        **{"model_from_pretrained_kwargs": {}, "verbose": False, **_defaults(settings), **settings},
    )


def layers_config(
    saes: Mapping[str, TrainingSAEConfig], *, training_tokens: int, **settings: Any
) -> MultiSAETrainingRunnerConfig:
    """As `runner_config`, of SAEs on several hook points, from one pass over the text.

    Args:
        saes: by hook point, which is what each is called too.
        training_tokens: how many to train on.
        **settings: of ``MultiSAETrainingRunnerConfig``, in place of the defaults.
    """
    return MultiSAETrainingRunnerConfig(
        saes=saes,
        hook_names={name: name for name in saes},
        training_tokens=training_tokens,
        **{**_defaults(settings), **settings},
    )


def _defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """In place of SAELens' own, given the settings that somebody chose."""
    seqpos = slice(*settings.get("seqpos_slice", (None,)))
    n_positions = len(range(settings.get("context_size", 128))[seqpos])
    batch_size = settings.get("train_batch_size_tokens", 4096)
    return {
        "dataset_path": "passed in",
        "model_name": "passed-in",  # Part of a name in wandb, where a space is refused.
        "streaming": False,
        "n_batches_in_buffer": max(20, -(-4 * batch_size // max(1, n_positions))),
        "checkpoint_path": None,
        "output_path": None,
        "logger": LoggingConfig(log_to_wandb=False),
    }


def sae_config(architecture: str, **settings: Any) -> TrainingSAEConfig:
    """SAELens' configuration of an architecture by its name, scaling what it reads.

    Args:
        architecture: any that SAELens trains: ``topk``, ``batchtopk``, ``jumprelu``...
        **settings: of that configuration, ``d_in`` and ``d_sae`` among them.

    Raises:
        InputError: no such architecture, or a setting that it does not have or take.
    """
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        raise InputError(
            f"architecture={architecture!r} is none that SAELens trains. "
            f"{did_you_mean(architecture, sorted(SAE_TRAINING_CLASS_REGISTRY))}"
        )
    config_class = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    known = {field.name for field in dataclasses.fields(config_class)}
    if unknown := settings.keys() - known:
        raise InputError(
            f"{sorted(unknown)} are no settings of {architecture}. "
            f"{did_you_mean(min(unknown), sorted(known))}"
        )
    defaults = {"normalize_activations": "expected_average_only_in"}
    try:
        return config_class(**{**defaults, **settings})
    except (TypeError, ValueError) as error:
        raise InputError(f"{settings} make no {architecture} SAE: {error}.") from error

"""SAELens' configuration, with defaults for a model and a dataset that are passed in."""

from __future__ import annotations

from typing import Any

from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, TrainingSAEConfig


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
    context_size = settings.get("context_size", 128)
    batch_size = settings.get("train_batch_size_tokens", 4096)
    defaults: dict[str, Any] = {
        "dataset_path": "passed in",
        "model_name": "passed in",
        "streaming": False,
        "n_batches_in_buffer": max(20, -(-4 * batch_size // context_size)),
        "checkpoint_path": None,
        "output_path": None,
        "verbose": False,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    return LanguageModelSAERunnerConfig(
        sae=sae,
        hook_name=hook_name,
        training_tokens=training_tokens,
        **{**defaults, **settings},
    )

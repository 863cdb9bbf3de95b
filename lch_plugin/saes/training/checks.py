"""Everything about a training run that can be known to be wrong before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig

from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.errors import InputError
from lch_plugin.files import check_new_directory
from lch_plugin.saes.sources.hooked import HookedModel
from lch_plugin.saes.sources.hooks import width


def check_width(hook: str, d_in: int, found: int) -> None:
    """Refuse an SAE that does not fit what it is to be trained on."""
    if d_in != found:
        raise InputError(f"sae.d_in={d_in}, but {hook} has {found} dimensions. Set d_in={found}.")


def check_run(
    config: LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig,
) -> None:
    """Refuse a configuration that contradicts itself, or whose files are not there."""
    buffer = config.n_batches_in_buffer * config.context_size
    if buffer < config.train_batch_size_tokens:
        raise InputError(
            f"n_batches_in_buffer * context_size = {buffer} tokens hold no training batch of "
            f"train_batch_size_tokens={config.train_batch_size_tokens}. Raise n_batches_in_buffer "
            f"to {-(-config.train_batch_size_tokens // config.context_size)} or more."
        )
    if config.resume_from_checkpoint and not Path(config.resume_from_checkpoint).is_dir():
        raise InputError(
            f"resume_from_checkpoint={config.resume_from_checkpoint!r} is no directory. Give one "
            "below checkpoint_path that holds trainer_state.pt."
        )
    if config.output_path is not None:
        check_new_directory(config.output_path)


def check_hooks(
    model: LensModel | HookedModel,
    hooks: Mapping[str, tuple[str, int, int | None]],
    context_size: int,
) -> None:
    """Refuse SAEs that do not fit their hook points, each ``(hook, d_in, head)`` by its name."""
    for name, (hook, d_in, head) in hooks.items():
        if name and (Path(name).name != name or name == ".."):
            raise InputError(f"{name!r} names an SAE and its directory: give it a plain name.")
        check_width(hook, d_in, width(model, hook, context_size, head))

"""Everything about a training run that can be known to be wrong before it starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens import (
    LanguageModelSAERunnerConfig,
    MultiSAETrainingRunnerConfig,
    TrainingSAEConfig,
)
from sae_lens.constants import (
    ACTIVATIONS_STORE_STATE_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    TRAINER_STATE_FILENAME,
)

from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.errors import InputError
from lch_plugin.files import check_new_directory
from lch_plugin.saes.sources.hooked import HookedModel
from lch_plugin.saes.sources.hooks import widths

# What decides which rows of a cache come when.
_ORDER = (
    "hook_name",
    "context_size",
    "train_batch_size_tokens",
    "n_batches_in_buffer",
    "exclude_special_tokens",
    "seed",
)


def check_width(hook: str, d_in: int, found: int) -> None:
    """Refuse an SAE that does not fit what it is to be trained on."""
    if d_in != found:
        raise InputError(f"sae.d_in={d_in}, but {hook} has {found} dimensions. Set d_in={found}.")


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
        _check_checkpoint(config, Path(config.resume_from_checkpoint))
    if isinstance(config, LanguageModelSAERunnerConfig) and config.from_pretrained_path:
        _check_sae(Path(config.from_pretrained_path), config.sae)
    if config.output_path is not None:
        check_new_directory(config.output_path)


def _check_checkpoint(
    config: LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig, checkpoint: Path
) -> None:
    if isinstance(config, MultiSAETrainingRunnerConfig):
        saes, is_cached = config.saes, False
    else:
        saes, is_cached = {"": config.sae}, config.use_cached_activations
    needed = [Path(name, TRAINER_STATE_FILENAME) for name in saes]
    if not is_cached:
        needed.append(Path(ACTIVATIONS_STORE_STATE_FILENAME))
    for file in needed:
        if not (checkpoint / file).is_file():
            raise InputError(
                f"resume_from_checkpoint={str(checkpoint)!r} is no directory with a file {file}, "
                "so no checkpoint of such a run. Give one below checkpoint_path that is named "
                "after its number of tokens."
            )
    if is_cached:
        wanted = config.to_dict()
        _check_same(checkpoint / RUNNER_CFG_FILENAME, {name: wanted[name] for name in _ORDER})
    for name, sae in saes.items():
        saved = _check_sae(checkpoint / name, sae)
        if saved["normalize_activations"] != sae.normalize_activations:
            raise InputError(
                f"resume_from_checkpoint={str(checkpoint)!r} has normalize_activations="
                f"{saved['normalize_activations']!r} and not {sae.normalize_activations!r}. If it "
                "was written when training was done, the scale is folded into its weights, and "
                "scaled once more they would be wrong: resume from one written on the way, or "
                "start from this one with from_pretrained_path."
            )


def _check_sae(directory: Path, sae: TrainingSAEConfig) -> dict[str, Any]:
    """Refuse a saved SAE of another kind than is to be trained; its configuration."""
    wanted = {"architecture": sae.architecture(), "d_in": sae.d_in, "d_sae": sae.d_sae}
    return _check_same(directory / SAE_CFG_FILENAME, wanted)


def _check_same(file: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(f"{file} does not exist: {file.parent} is none that SAELens wrote.")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for name, value in wanted.items():
        if found.get(name) != value:
            raise InputError(
                f"{name}={value!r}, but {file} has {found.get(name)!r}. Set it to that. (SAELens "
                "saves a finished BatchTopK SAE as a JumpReLU one; its checkpoints are BatchTopK.)"
            )
    return found


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

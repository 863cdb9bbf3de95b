"""Everything about a training run that can be known to be wrong before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from pyarrow import compute, types
from sae_lens import LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig

from lch_plugin.adapters.transformer_lens import LensModel, check_token_ids
from lch_plugin.errors import InputError
from lch_plugin.files import check_new_directory
from lch_plugin.saes.hooked import HookedModel
from lch_plugin.saes.hooks import d_vocab, width

# Columns that SAELens reads, in its order.
_TOKEN_COLUMNS = ("tokens", "input_ids")
_COLUMNS = (*_TOKEN_COLUMNS, "text", "problem", "messages", "conversation", "conversations")


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


def check_dataset(model: LensModel | HookedModel, dataset: Any, context_size: int) -> None:
    """Refuse a dataset without text or tokens, or with tokens that the model cannot read."""
    if not isinstance(dataset, Dataset):
        return  # A stream's columns need not be known before it is read.
    columns = [c for c in _COLUMNS if c in dataset.column_names]
    if len(dataset) == 0 or not columns:
        raise InputError(
            f"the dataset has {len(dataset)} rows and columns {dataset.column_names}: rows with "
            f"one of the columns {_COLUMNS} are needed."
        )
    if columns[0] not in _TOKEN_COLUMNS:
        return
    for batch in dataset.with_format("arrow").iter(10_000):
        rows = batch[columns[0]]
        if not (types.is_list(rows.type) or types.is_large_list(rows.type)) or not (
            types.is_integer(rows.type.value_type) and rows.null_count == 0
        ):
            raise InputError(
                f"column {columns[0]!r} of the dataset holds {rows.type} with {rows.null_count} "
                "missing rows; each row has to be a list of integers."
            )
        shortest = compute.min(compute.list_value_length(rows)).as_py()
        if shortest < context_size:
            raise InputError(
                f"a row of the dataset has {shortest} tokens, fewer than "
                f"context_size={context_size}. Lower context_size, or tokenise into longer rows."
            )
        ids = compute.min_max(compute.list_flatten(rows)).as_py()
        check_token_ids(d_vocab(model), ids["min"], ids["max"])

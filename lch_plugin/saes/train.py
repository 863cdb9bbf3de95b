"""Train a sparse autoencoder on a centroid hook with SAELens' own runner.

A centroid hook is an ordinary hook name, so SAELens' runner, activations store and saved format
serve as they are. What is added here: configuration checked before work starts, an evaluator
that fits a read-out, and metadata that say what the SAE was trained on.
"""

from __future__ import annotations

import copy
import re
import signal
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from pyarrow import compute, types
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.prefetch import PrefetchingIterator
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge

from lch_plugin.adapters import huggingface
from lch_plugin.adapters.transformer_lens import (
    LensModel,
    Reader,
    attach,
    attached_readers,
    check_token_ids,
    weight_processing,
)
from lch_plugin.errors import InputError, SiteError
from lch_plugin.files import check_new_directory, new_directory
from lch_plugin.saes.hooked import HookedModel
from lch_plugin.sites import Site

_DATASETS = (Dataset, DatasetDict, IterableDataset, IterableDatasetDict)
# Columns that SAELens reads, in its order.
_TOKEN_COLUMNS = ("tokens", "input_ids")
_COLUMNS = (*_TOKEN_COLUMNS, "text", "problem", "messages", "conversation", "conversations")
_CENTROID_HOOK = re.compile(r"blocks\.(\d+)\.(?:(mlp|attn)\.)?hook_centroid")


def train(
    model: LensModel | HookedModel, dataset: Any, config: LanguageModelSAERunnerConfig[Any]
) -> TrainingSAE[Any]:
    """Train the SAE that ``config`` describes, with SAELens' own runner, and return it.

    ``config.hook_name`` may be a centroid hook or any other hook of the model, so that one
    call trains both sides of a comparison. A model not attached at that layer is attached with
    the all-ones cotangent for as long as training takes.

    SAEs on centroid hooks carry ``cfg.metadata.lch_centroid``: site, cotangent, activation scale
    and plugin version; of TransformerLens models layer and weight processing too, of others the
    model. Scores of a loss after splicing the
    reconstruction in are not computed for them: nothing downstream reads a centroid, so there
    is no such loss.

    Ctrl-C raises KeyboardInterrupt; once training steps are under way, and with
    ``config.checkpoint_path`` set, it first saves a checkpoint that SAELens'
    ``resume_from_checkpoint`` takes. ``config.output_path`` appears only when training is done.

    Like SAELens' runner, this has to run in the main thread; it puts the signal handlers back
    that the runner replaces.

    Args:
        model: TransformerBridge or HookedTransformer, SAELens' subclass of either, or a
            `lch_plugin.saes.HookedModel` for models that TransformerLens does not know.
        dataset: a `datasets` dataset of text or tokens, as SAELens takes them.
        config: SAELens' own configuration; its ``model_name`` is only recorded.

    Raises:
        InputError: the dataset is no dataset, or the configuration does not fit the model, the
            dataset or itself.
        SiteError: the model has no such hook.
        OutputError: ``config.output_path`` holds other content or cannot be written.
    """
    if not isinstance(model, HookedModel | TransformerBridge | HookedTransformer):
        raise InputError(
            f"model is a {type(model).__name__}; SAELens reads models with hook points. Wrap a "
            "HuggingFace model as lch.saes.HookedModel(model, tokenizer), or load it into "
            "TransformerLens: lch.load(...).bridge()."
        )
    if not isinstance(dataset, _DATASETS):
        raise InputError(
            f"dataset is a {type(dataset).__name__}; SAELens takes those of the datasets library. "
            "Wrap a list of texts as datasets.Dataset.from_dict({'text': texts})."
        )
    match = _CENTROID_HOOK.fullmatch(config.hook_name)
    handle: AbstractContextManager[Any] = nullcontext()
    if match and not isinstance(model, HookedModel) and config.hook_name not in _readers(model):
        handle = attach(model, site=Site(match[2] or "block", int(match[1])))  # type: ignore[arg-type]
    with handle, torch.enable_grad():
        _check(model, dataset, config)
        reader = _readers(model).get(config.hook_name)
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            # A shallow copy: SAELens sets the format of the dataset it is given.
            return _Runner(config, copy.copy(dataset), model, reader).run()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


class _Runner(LanguageModelSAETrainingRunner):
    """SAELens' runner, with metadata, evaluation and output that suit a centroid hook."""

    def __init__(
        self,
        config: LanguageModelSAERunnerConfig[Any],
        dataset: Any,
        model: LensModel | HookedModel,
        reader: Reader | huggingface.Reader | None,
    ) -> None:
        super().__init__(config, override_dataset=dataset, override_model=model)
        self.reader = reader
        if reader is not None:
            self.evaluator = self._evaluate

    def run_trainer_with_interruption_handling(self, trainer: Any) -> TrainingSAE[Any]:
        scaler, sae = trainer.activation_scaler, trainer.sae
        if sae.cfg.normalize_activations == "expected_average_only_in":
            # The trainer does the same unless it finds a factor, and folds it into the weights
            # at the end: this is the place to learn it.
            if scaler.scaling_factor is None:
                scaler.estimate_scaling_factor(
                    d_in=sae.cfg.d_in,
                    data_provider=trainer.data_provider,
                    n_batches_for_norm_estimate=trainer.cfg.n_batches_for_norm_estimate,
                )
        if self.reader is not None:
            sae.cfg.metadata.lch_centroid = _provenance(self.model, self.reader, scaler)
        try:
            return super().run_trainer_with_interruption_handling(trainer)
        except (KeyboardInterrupt, InterruptedException) as interrupt:
            # SAELens has saved where it was in the text, but neither SAE nor optimizer.
            if self.cfg.checkpoint_path is not None:
                trainer.save_checkpoint(checkpoint_name=str(trainer.n_training_samples))
            raise KeyboardInterrupt from interrupt

    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        if checkpoint_path is not None:
            # SAELens takes it to exist, which on an interrupt it does not.
            checkpoint_path.mkdir(parents=True, exist_ok=True)
        super().save_checkpoint(checkpoint_path)

    def save_final_sae(self, sae: Any, output_path: str, log_feature_sparsity: Any = None) -> None:
        with new_directory(output_path) as directory:
            super().save_final_sae(sae, str(directory), log_feature_sparsity)

    def _evaluate(self, sae: Any, data_provider: Any, activation_scaler: Any) -> dict[str, Any]:
        """Reconstruction and sparsity; SAELens' default divides by an ablation loss of zero."""
        prefetching = isinstance(data_provider, PrefetchingIterator)
        with data_provider.paused() if prefetching else nullcontext():
            metrics, _ = run_evals(
                sae=sae,
                activation_store=self.activations_store,
                model=self.model,
                activation_scaler=activation_scaler,
                eval_config=EvalConfig(
                    batch_size_prompts=self.cfg.eval_batch_size_prompts,
                    n_eval_sparsity_variance_batches=self.cfg.n_eval_batches,
                    compute_l2_norms=True,
                    compute_sparsity_metrics=True,
                    compute_variance_metrics=True,
                ),
                model_kwargs=self.cfg.model_kwargs,
            )
        return metrics


def _readers(model: LensModel | HookedModel) -> Mapping[str, Reader | huggingface.Reader]:
    return model.readers if isinstance(model, HookedModel) else attached_readers(model)


def _provenance(
    model: LensModel | HookedModel, reader: Reader | huggingface.Reader, scaler: Any
) -> dict[str, Any]:
    if isinstance(reader, Reader):
        more: dict[str, Any] = {"weight_processing": weight_processing(model, reader.layer or 0)}
    else:
        more = {"model": huggingface.model_name(model.model)}
    return {
        **reader.record(),
        **more,
        "scale": scaler.scaling_factor,
        "lch_plugin_version": version("lch-plugin"),
    }


def _check(
    model: LensModel | HookedModel, dataset: Any, config: LanguageModelSAERunnerConfig[Any]
) -> None:
    """Everything about a configuration that can be known before work starts."""
    hook = config.hook_name
    n_ctx = model.n_ctx if isinstance(model, HookedModel) else model.cfg.n_ctx
    if hook not in model.hook_dict:
        place = hook.rpartition(".")[0]
        known = [name for name in model.hook_dict if name.rpartition(".")[0] == place]
        known = known or list(_readers(model))
        raise SiteError(
            f"hook_name={hook!r} is no hook point of this model. Beside it are {known}. Centroids "
            "of mlp, attn and block are attached for you; attach other sites with lch.attach "
            "first. A HookedModel has those it was made with."
        )
    if hook in _readers(model) and config.hook_head_index is not None:
        raise InputError(
            f"hook_head_index={config.hook_head_index}: a centroid has no heads. Set it to None."
        )
    if n_ctx is not None and config.context_size > n_ctx:
        raise InputError(
            f"context_size={config.context_size} is longer than the model's context of {n_ctx} "
            f"tokens. Set context_size to {n_ctx} or less."
        )
    with torch.no_grad():
        device = next(model.parameters()).device
        tokens = torch.zeros(1, config.context_size, dtype=torch.long, device=device)
        value = model.run_with_cache(tokens, names_filter=[hook])[1][hook]
    if value.ndim < 3:
        raise InputError(
            f"{hook} has shape {tuple(value.shape)}, not (batch, pos, d_in): there is nothing to "
            "train an SAE on."
        )
    # SAELens joins the head dimension to the last, unless it is told which head to take.
    width = value[0, 0].numel() if config.hook_head_index is None else value.shape[-1]
    if config.sae.d_in != width:
        raise InputError(
            f"sae.d_in={config.sae.d_in}, but {hook} has {width} dimensions. Set d_in={width}."
        )
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
    if isinstance(dataset, Dataset):
        _check_dataset(model, dataset, config.context_size)


def _check_dataset(model: LensModel | HookedModel, dataset: Dataset, context_size: int) -> None:
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
        check_token_ids(_d_vocab(model), ids["min"], ids["max"])


def _d_vocab(model: LensModel | HookedModel) -> int:
    if isinstance(model, HookedModel):
        return int(model.model.get_input_embeddings().num_embeddings)
    return int(model.cfg.d_vocab)

"""Train sparse autoencoders on centroid hooks with SAELens' own runners.

A centroid hook is an ordinary hook name, so SAELens' runners, activations store and saved format
serve as they are. What is added: configurations checked before work starts (`checks`), and what a
read-out, a start and an interrupt need (`runners`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias, overload

import torch
from sae_lens import LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.util import get_special_token_ids

from lch_plugin.adapters.states import evaluating
from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.errors import InputError
from lch_plugin.files import claimed
from lch_plugin.saes.caching.cache import Cache
from lch_plugin.saes.evaluation.sae_inputs import check_width
from lch_plugin.saes.sources.hook_points import attached, check_model
from lch_plugin.saes.sources.hooked_model import HookedModel
from lch_plugin.saes.sources.texts import check_dataset, load_text
from lch_plugin.saes.training.checks import check_hooks, check_run
from lch_plugin.saes.training.quiet import saelens_quiet
from lch_plugin.saes.training.runners import CachedRunner, MultiRunner, Runner

_Config: TypeAlias = LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig


@overload
def train(
    model: LensModel | HookedModel | None,
    dataset: Any,
    config: LanguageModelSAERunnerConfig[Any],
    *,
    checkpoint_minutes: float | None = None,
) -> TrainingSAE[Any]: ...


@overload
def train(  # type: ignore[overload-cannot-match]
    model: LensModel | HookedModel,
    dataset: Any,
    config: MultiSAETrainingRunnerConfig,
    *,
    checkpoint_minutes: float | None = None,
) -> dict[str, TrainingSAE[Any]]: ...


def train(
    model: LensModel | HookedModel | None,
    dataset: Any,
    config: _Config,
    *,
    checkpoint_minutes: float | None = None,
) -> TrainingSAE[Any] | dict[str, TrainingSAE[Any]]:
    """Train what ``config`` describes, with SAELens' own runner, and return it.

    ``config.hook_name`` may be a centroid hook or any other hook of the model, so that one
    call trains both sides of a comparison. Centroids of mlp, attn and block that nobody has
    attached are attached with the all-ones cotangent for as long as training takes, and the model
    is in evaluation mode meanwhile. A ``MultiSAETrainingRunnerConfig`` trains several SAEs, of
    several hooks, from one forward pass.

    SAEs start at their data: with the normalisations ``"none"`` and
    ``"expected_average_only_in"`` the decoder's bias starts at the mean, which of centroids is
    most of their norm, and SAELens' scale is estimated, from the same 16,384 tokens (or
    ``config.n_batches_for_norm_estimate`` batches, if those are fewer). The scale is folded into
    the weights at the end. ``config.seed`` seeds everything random, and the global random state
    is left alone.

    With ``config.use_cached_activations`` the SAE is trained on a `Cache`, or on what SAELens'
    ``CacheActivationsRunner`` wrote, and ``model`` and ``dataset`` may be None; a model that is
    given has to be the one the cache is of. All rows are shuffled then, by the seed and whatever
    ``activations_mixing_fraction`` says, and a run resumed from a checkpoint is bit for bit the run
    that was never interrupted (on a CPU). Resumed on a live model, SAELens goes on in the text
    where it was; tokens that were in its mixing buffer are not seen again, and the order differs.

    SAEs on centroid hooks carry ``cfg.metadata.lch_centroid``: site, cotangent, activation scale
    and plugin version; of TransformerLens models layer and weight processing too, of others the
    model. Scores of a loss after splicing the reconstruction in are not computed for them:
    nothing downstream reads a centroid, so there is no such loss.

    Ctrl-C (or SIGTERM) raises KeyboardInterrupt when the step under way is complete, and with
    ``config.checkpoint_path`` set first saves a checkpoint that ``resume_from_checkpoint`` takes.
    ``config.output_path`` appears only when training is done. Python hands signals to the main
    thread alone: in another one nobody interrupts training.

    Args:
        model: TransformerBridge or HookedTransformer, SAELens' subclass of either, or a
            `lch_plugin.saes.HookedModel` for models that TransformerLens does not know.
        dataset: a `datasets` dataset of text or tokens as SAELens takes them, or anything else that
            `lch_plugin.saes.load_text` takes.
        config: SAELens' own configuration; its ``model_name`` is only recorded.
        checkpoint_minutes: with ``config.checkpoint_path`` set, write a checkpoint every so many
            minutes, of which the newest is kept; beside those of ``config.n_checkpoints``.

    Returns:
        The SAE; of a ``MultiSAETrainingRunnerConfig`` each SAE by its name.

    Raises:
        InputError: the dataset holds no text, the configuration does not fit the model, the
            dataset, the cache or itself, a checkpoint is damaged; or no feature fires any more.
        SiteError: the model has no such hook.
        NonFiniteError: training diverged: the loss, or weights, are NaN or infinite.
        OutputError: ``config.output_path`` holds other content, cannot be written, or another
            process is at work on it. A finished SAE is kept all the same, where the error says.
    """
    output = config.output_path
    if checkpoint_minutes is not None and not checkpoint_minutes >= 0:
        raise InputError(f"checkpoint_minutes={checkpoint_minutes} must be zero or more.")
    with (
        nullcontext() if output is None else claimed(output),
        torch.enable_grad(),
        torch.random.fork_rng(),
        saelens_quiet(),
    ):
        torch.manual_seed(config.seed)
        if isinstance(config, LanguageModelSAERunnerConfig) and config.use_cached_activations:
            return _train_on_cache(model, config, checkpoint_minutes)
        check_model(model)
        assert model is not None
        dataset = load_text(dataset)
        hooks = _hooks(config)
        names = [hook for hook, *_ in hooks.values()]
        with attached(model, names), evaluating(model), _uncompiled(model):
            check_hooks(model, hooks, config.context_size)
            check_run(config)
            dataset = check_dataset(model, dataset, config.context_size, config.use_chat_formatting)
            # A shallow copy: SAELens sets the format of the dataset it is given.
            make = MultiRunner if isinstance(config, MultiSAETrainingRunnerConfig) else Runner
            runner = make(config, copy.copy(dataset), model)
            runner.checkpoint_minutes = checkpoint_minutes
            return runner.run()


@contextmanager
def _uncompiled(model: LensModel | HookedModel) -> Iterator[None]:
    """With ``compile_llm`` SAELens puts a compiled method on the model; take it off again."""
    attributes: dict[str, Any] = model.__dict__
    own = attributes.get("run_with_cache")
    try:
        yield
    finally:
        attributes.pop("run_with_cache", None)
        if own is not None:
            attributes["run_with_cache"] = own


def _hooks(config: _Config) -> dict[str, tuple[str, int, int | None]]:
    """Hook, width and head of each SAE, by name."""
    if isinstance(config, MultiSAETrainingRunnerConfig):
        heads = config.hook_head_indices_per_sae
        return {
            name: (hook, config.saes[name].d_in, heads[name])
            for name, hook in config.hook_names_per_sae.items()
        }
    return {"": (config.hook_name, config.sae.d_in, config.hook_head_index)}


def _train_on_cache(
    model: LensModel | HookedModel | None,
    config: LanguageModelSAERunnerConfig[Any],
    checkpoint_minutes: float | None,
) -> TrainingSAE[Any]:
    assert config.cached_activations_path is not None
    cache = Cache(config.cached_activations_path)
    cache.check_hook(config.hook_name)
    if config.hook_head_index is not None:
        raise InputError(
            f"hook_head_index={config.hook_head_index}: a cache holds heads side by side. Set it "
            f"to None, and d_in={cache.d_in[config.hook_name]}."
        )
    check_width(config.hook_name, config.sae.d_in, cache.d_in[config.hook_name])
    if config.context_size != cache.context_size or config.seqpos_slice != (None,):
        raise InputError(
            f"context_size={config.context_size} and seqpos_slice={config.seqpos_slice}, but the "
            f"cache holds whole sequences of {cache.context_size} tokens. Set context_size="
            f"{cache.context_size}, and leave seqpos_slice out."
        )
    if model is not None:
        check_model(model)
        cache.check(model)
    check_run(config)
    runner = CachedRunner(config, model, cache, _excluded(model, config))
    runner.checkpoint_minutes = checkpoint_minutes
    return runner.run()


def _excluded(
    model: LensModel | HookedModel | None, config: LanguageModelSAERunnerConfig[Any]
) -> list[int] | None:
    """Token ids that are not trained on."""
    if not isinstance(config.exclude_special_tokens, bool):
        return list(config.exclude_special_tokens)
    if not config.exclude_special_tokens:
        return None
    if model is None:
        raise InputError(
            "exclude_special_tokens=True: without a model nobody knows which tokens are special. "
            "Pass the model, or give their ids as a list."
        )
    return list(get_special_token_ids(model.tokenizer))

"""SAELens' two training runners, with what suits a centroid hook.

What differs from SAELens' own: where an SAE starts (`starting`), an evaluator that does not splice
a read-out in, metadata that say what the SAE was trained on, interrupts that wait for the step
under way, checkpoints that a run on a `Cache` can be resumed from bit for bit, and output that
appears only when it is complete.

Private names used, for want of a public way: of SAELens' ``MultiSAETrainingRunner`` the methods
``_run_with_interruption_handling``, ``_save_runner_checkpoint_files`` and ``_save_final_outputs``,
and of ``LanguageModelSAETrainingRunner`` ``_set_sae_metadata`` and ``_compile_llm_if_needed``
(SAELens 6.54).
"""

from __future__ import annotations

import copy
import itertools
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import (
    ActivationsStore,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.files import write_directory
from lch_plugin.progress import progress
from lch_plugin.saes.caching.cache import Cache, Stream
from lch_plugin.saes.evaluation.evaluate import evaluate
from lch_plugin.saes.sources.hook_points import provenance
from lch_plugin.saes.sources.hooked_model import HookedModel
from lch_plugin.saes.training.checkpoints import (
    Regularly,
    n_batches_taken,
    read_resume_file,
    save_resume_file,
    save_whole,
)
from lch_plugin.saes.training.starting import n_estimate_batches, start_at_data, starts_at_data
from lch_plugin.saes.training.watching import Watch, check_scale


class Runner(LanguageModelSAETrainingRunner):
    """SAELens' runner for one SAE on values as a model computes them."""

    def __init__(
        self,
        config: LanguageModelSAERunnerConfig[Any],
        dataset: Any,
        model: Any,
    ) -> None:
        super().__init__(config, override_dataset=dataset, override_model=model)
        self._n_estimate = 0
        self.checkpoint_minutes: float | None = None
        if self._provenance() is not None:
            self.evaluator = self._evaluate
        if config.resume_from_checkpoint and not config.use_cached_activations:
            _skip_what_was_read(self.activations_store, config.resume_from_checkpoint)

    def _provenance(self) -> dict[str, Any] | None:
        return provenance(self.model, self.cfg.hook_name)

    def run_trainer_with_interruption_handling(self, trainer: Any) -> TrainingSAE[Any]:
        self._n_estimate = _prepare(
            {"": trainer},
            lambda: {"": next(trainer.data_provider)},
            self.cfg.resume_from_checkpoint,
            fresh=self.cfg.from_pretrained_path is None,
        )
        _sign(trainer, self._provenance(), self.cfg.seed)
        return _fit(trainer, {"": trainer}, self.checkpoint_minutes)

    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        super().save_checkpoint(checkpoint_path)
        save_resume_file(checkpoint_path, self._n_estimate)

    def save_final_sae(self, sae: Any, output_path: str, log_feature_sparsity: Any = None) -> None:
        save = super().save_final_sae
        write_directory(output_path, lambda it: save(sae, str(it), log_feature_sparsity))

    def _evaluate(self, sae: Any, data_provider: Any, activation_scaler: Any) -> dict[str, Any]:
        with _paused(data_provider):
            return _metrics(sae, activation_scaler, self, is_read_out=True)


class CachedRunner(Runner):
    """SAELens' runner for one SAE on a `Cache`; neither model nor text is needed.

    Batches come from a seeded `Stream` that knows its position, where SAELens' mixing buffer takes
    them from the global random state: a run resumed from a checkpoint is, on a CPU, bit for bit
    the run that was never interrupted.
    """

    def __init__(
        self, config: LanguageModelSAERunnerConfig[Any], model: Any, cache: Cache, exclude: Any
    ) -> None:
        self.cache = cache
        # SAELens asks for a dataset and for a tokenizer, and reads neither.
        rows = Dataset.from_dict({"tokens": [[0] * config.context_size]})
        super().__init__(config, rows, _NoModel() if model is None else model)
        buffer_size = config.n_batches_in_buffer * config.context_size
        self._stream = lambda seed: cache.stream(
            config.hook_name,
            batch_size=config.train_batch_size_tokens,
            buffer_size=buffer_size,
            seed=seed,
            exclude_tokens=exclude,
        )
        stream = self._stream(config.seed)
        if config.resume_from_checkpoint:
            # Now, and not when SAELens says so: prefetching begins before that.
            stream.seek(n_batches_taken(config))
        self.activations_store = _CachedStore(stream)
        self.evaluator = self._evaluate

    def _compile_llm_if_needed(self) -> None:
        """No model runs."""

    def _provenance(self) -> dict[str, Any] | None:
        return self.cache.provenance(self.cfg.hook_name)

    def _set_sae_metadata(self) -> None:
        super()._set_sae_metadata()
        if self.cache.manifest is not None:
            # How sequences were made of the text is the cache's to say, not the configuration's.
            for name in ("prepend_bos", "sequence_separator_token", "disable_concat_sequences"):
                setattr(self.sae.cfg.metadata, name, self.cache.manifest["settings"][name])

    def _evaluate(self, sae: Any, data_provider: Any, activation_scaler: Any) -> dict[str, Any]:
        # In another order than training, so that evaluation takes no batch from it.
        batches = itertools.islice(self._stream(self.cfg.seed + 1), self.cfg.n_eval_batches)
        evaluation = evaluate(sae, (activation_scaler(x.to(sae.device)) for x in batches))
        return {f"evaluation/{name}": value for name, value in evaluation.to_dict().items()}


class MultiRunner(MultiSAETrainingRunner):
    """SAELens' runner for several SAEs, of several hook points, from one forward pass."""

    cfg: MultiSAETrainingRunnerConfig

    def __init__(
        self, config: MultiSAETrainingRunnerConfig, dataset: Any, model: LensModel | HookedModel
    ) -> None:
        super().__init__(config, override_dataset=dataset, override_model=model)
        self._n_estimate = 0
        self.checkpoint_minutes: float | None = None
        self.evaluator = self._evaluate
        if config.resume_from_checkpoint:
            _skip_what_was_read(self.activations_store, config.resume_from_checkpoint)

    def _run_with_interruption_handling(self, trainer: Any) -> dict[str, TrainingSAE[Any]]:
        hooks = self.cfg.hook_names_per_sae

        def draw() -> dict[str, Tensor]:
            batch = next(trainer.data_provider)
            return {name: batch[hook] for name, hook in hooks.items()}

        self._n_estimate = _prepare(
            trainer.trainers, draw, self.cfg.resume_from_checkpoint, fresh=True
        )
        for name, each in trainer.trainers.items():
            _sign(each, provenance(self.model, hooks[name]), self.cfg.seed)
        first = next(iter(trainer.trainers.values()))
        trainer.n_training_steps = first.n_training_steps
        return _fit(trainer, trainer.trainers, self.checkpoint_minutes)

    def _save_runner_checkpoint_files(self, checkpoint_path: Path | None) -> None:
        super()._save_runner_checkpoint_files(checkpoint_path)
        save_resume_file(checkpoint_path, self._n_estimate)

    def _save_final_outputs(self, saes: Any, trainer: Any) -> None:
        config = self.cfg
        output = config.output_path
        assert output is not None
        save = super()._save_final_outputs

        def write(directory: Path) -> None:
            self.cfg = copy.copy(config)
            self.cfg.output_path = str(directory)
            try:
                save(saes, trainer)
            finally:
                self.cfg = config
            (directory / RUNNER_CFG_FILENAME).write_text(json.dumps(config.to_dict()))

        write_directory(output, write)

    def _evaluate(
        self, saes: Any, data_provider: Any, activation_scalers: Any, hook_names: Any
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        with _paused(data_provider):
            for name, sae in saes.items():
                is_read_out = provenance(self.model, hook_names[name]) is not None
                found[name] = _metrics(sae, activation_scalers[name], self, is_read_out)
        if self.cfg.evaluator is not None:  # Takes batches itself, so nothing may be paused.
            for name, sae in saes.items():
                batches = (batch[hook_names[name]] for batch in data_provider)
                found[name] |= self.cfg.evaluator(sae, batches, activation_scalers[name])
        return {f"{name}/{key}": x for name, more in found.items() for key, x in more.items()}


def _metrics(
    sae: TrainingSAE[Any],
    scaler: Any,
    runner: LanguageModelSAETrainingRunner | MultiSAETrainingRunner,
    is_read_out: bool,
) -> dict[str, Any]:
    """SAELens' metrics, but the loss after splicing only where something reads the value."""
    config, special = runner.cfg, runner.activations_store.exclude_special_tokens
    metrics, _ = run_evals(
        sae=sae,
        activation_store=runner.activations_store,
        model=runner.model,
        activation_scaler=scaler,
        eval_config=EvalConfig(
            batch_size_prompts=config.eval_batch_size_prompts,
            n_eval_reconstruction_batches=config.n_eval_batches,
            n_eval_sparsity_variance_batches=config.n_eval_batches,
            # Nothing downstream reads a centroid, so the loss of its ablation, by which SAELens
            # divides, is zero.
            compute_ce_loss=not is_read_out,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
        ),
        model_kwargs=dict(config.model_kwargs),
        exclude_special_tokens=False if special is None else special.tolist(),
    )
    return {f"{group}/{name}": x for group, more in metrics.items() for name, x in more.items()}


def _paused(data_provider: Any) -> Any:
    """Prefetching and evaluation share one store."""
    if isinstance(data_provider, PrefetchingIterator):
        return data_provider.paused()
    return nullcontext()


def _prepare(
    trainers: Mapping[str, SAETrainer[Any, Any]],
    draw: Callable[[], dict[str, Tensor]],
    checkpoint: str | None,
    *,
    fresh: bool,
) -> int:
    """Start SAEs at their data, or go on where a checkpoint left off.

    Returns:
        How many batches are drawn to start from, by SAELens' whitening too.
    """
    config = next(iter(trainers.values())).cfg
    if checkpoint is not None:
        for trainer in trainers.values():
            # SAELens counts a step only after saving, so that a checkpoint is one behind.
            trainer.n_training_steps = trainer.n_training_samples // config.train_batch_size_samples
        state = read_resume_file(checkpoint)
        if state is None:
            return 0
        torch.set_rng_state(state["rng"])
        return int(state["n_estimate"])
    starting = {name: t for name, t in trainers.items() if starts_at_data(t.sae)}
    n_batches = n_estimate_batches(config) if starting else 0
    sample = [draw() for _ in range(n_batches)]
    for name, trainer in starting.items():
        rows = [batch[name] for batch in sample]
        start_at_data(trainer.sae, trainer.activation_scaler, rows, fresh=fresh)
        check_scale(name, trainer.activation_scaler)
    normalizations = {t.sae.cfg.normalize_activations for t in trainers.values()}
    whitened = "covariance_whitening" in normalizations
    return n_batches + (config.n_batches_for_norm_estimate if whitened else 0)


def _skip_what_was_read(store: ActivationsStore, checkpoint: str) -> None:
    """Go to where a checkpoint's run was in the text.

    SAELens does so only when it prefetches already, from the same generator in another thread, and
    then finds nothing left to skip.
    """
    store.load_from_checkpoint(checkpoint)


def _sign(trainer: SAETrainer[Any, Any], record: dict[str, Any] | None, seed: int) -> None:
    """Say in an SAE's metadata what it is trained on, if that is a centroid."""
    if record is not None:
        scale = trainer.activation_scaler.scaling_factor
        trainer.sae.cfg.metadata.lch_centroid = {**record, "scale": scale, "seed": seed}


def _fit(
    trainer: Any, parts: Mapping[str, SAETrainer[Any, Any]], checkpoint_minutes: float | None
) -> Any:
    """Train. Interrupted, save a checkpoint where no step is under way.

    Args:
        trainer: SAELens' trainer, of one SAE or of several.
        parts: the trainer of each SAE by its name; of one SAE the same.
        checkpoint_minutes: as `lch_plugin.saes.train`.

    Raises:
        NonFiniteError, InputError: training diverged.
    """
    first = next(iter(parts.values()))
    watch = Watch(parts, trainer.cfg.checkpoint_path)
    save_whole(trainer, watch.check)
    total = trainer.cfg.total_training_samples
    # SAELens does not ask, when it resumes, which checkpoints are still to come.
    thresholds = trainer.checkpoint_thresholds
    trainer.checkpoint_thresholds = [n for n in thresholds if n > trainer.n_training_samples]
    regularly = None
    if checkpoint_minutes is not None and trainer.cfg.checkpoint_path is not None:
        regularly = Regularly(trainer, checkpoint_minutes)
    with (
        _stopping_between_steps(first, regularly) as stopped,
        progress("training", total, "tokens") as advance,
    ):
        advance(trainer.n_training_samples)
        watch.advance = advance
        try:
            trained = trainer.fit()
            watch.check()
            return trained
        except KeyboardInterrupt:
            if stopped() and trainer.cfg.checkpoint_path is not None:
                trainer.save_checkpoint(checkpoint_name=str(trainer.n_training_samples))
            raise


@contextmanager
def _stopping_between_steps(
    trainer: SAETrainer[Any, Any], otherwise: Callable[[], None] | None
) -> Iterator[Callable[[], bool]]:
    """Make the first SIGINT or SIGTERM wait until the step under way is complete.

    In the midst of a step the weights, the optimizer and the counts do not belong together, and a
    checkpoint of them could not be resumed exactly. A second signal does not wait. Signals that are
    ignored stay so, and in another thread than the main one, where none arrive, nothing changes.
    While nobody asks to stop, ``otherwise`` is called between steps.

    Yields:
        Whether the loop was left between two steps.
    """
    asked, left = False, False
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    handlers = {n: h for n in numbers if (h := signal.getsignal(n)) not in (None, signal.SIG_IGN)}
    between_steps = trainer.full_sparsity_window_log  # What SAELens calls around each step.

    def ask(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    def check() -> dict[str, Any]:
        nonlocal left
        if asked:
            left = True
            raise KeyboardInterrupt
        if otherwise is not None:
            otherwise()
        return between_steps()

    trainer.full_sparsity_window_log = check
    for number in handlers:
        signal.signal(number, ask)
    try:
        yield lambda: left
    finally:
        del trainer.full_sparsity_window_log
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _CachedStore:
    """A stream in the place of SAELens' store."""

    exclude_special_tokens = None

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Tensor]:
        return self._stream

    def __next__(self) -> Tensor:
        return next(self._stream)

    def save_to_checkpoint(self, _checkpoint_path: Path) -> None:
        """The position follows from the number of tokens."""

    def load_from_checkpoint(self, _checkpoint_path: str) -> None:
        """The stream is at its position already."""


class _NoModel:
    """Stands where SAELens wants a model, for its tokenizer, though it reads a cache."""

    tokenizer = None

"""What training and caching would take: tokens, disk, memory, and time by a short trial."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import IterableDataset
from sae_lens import TrainingSAE, TrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from lch_plugin.adapters.states import evaluating
from lch_plugin.saes.caching.cache import Cache
from lch_plugin.saes.sources.hook_points import attached, d_vocab, n_ctx, widths
from lch_plugin.saes.sources.texts import check_dataset
from lch_plugin.saes.training.configs import runner_config
from lch_plugin.saes.training.on_rows import with_lr_end
from lch_plugin.saes.training.quiet import saelens_quiet
from lch_plugin.saes.training.starting import n_estimate_batches

# Texts whose tokens are counted, of those that are not counted one by one.
_SAMPLE = 200
_TRIALS = 3


@dataclass(frozen=True)
class Estimate:
    """What a run would take.

    Attributes:
        n_tokens: what it reads; None of a text of unknown length.
        disk: bytes that it writes; for each token where ``n_tokens`` is None.
        memory: bytes of weights, values and optimizer at once, without what libraries need.
        seconds: by a trial of some batches on this machine; for each million tokens where
            ``n_tokens`` is None. Reading text and writing to the disk are not in it.
    """

    n_tokens: int | None
    disk: int
    memory: int
    seconds: float

    def __str__(self) -> str:
        n, of = self.n_tokens, " a million tokens"
        disk = self.disk if n is not None else self.disk * 10**6
        return "\n".join(
            [
                f"tokens  {'all of the text' if n is None else f'{n:,}'}",
                f"disk    {_size(disk)}{'' if n is not None else of}",
                f"memory  about {_size(self.memory)}, beside what libraries need",
                f"time    about {_time(self.seconds)}{'' if n is not None else of}, by a trial of "
                f"{_TRIALS} batches; without reading text and writing files",
                "Nothing was written.",
            ]
        )


def caching_estimate(
    model: Any,
    text: Any,
    hook_names: Sequence[str],
    *,
    n_tokens: int | None,
    context_size: int | None,
    dtype: str,
    batch_size: int,
) -> Estimate:
    """What `lch_plugin.saes.cache` would take with these arguments."""
    context_size = context_size or n_ctx(model) or 128
    texts = check_dataset(model, text, context_size)
    n = n_tokens if n_tokens is not None else _count(model, texts)
    n = n if n is None else -(-n // context_size) * context_size
    with attached(model, hook_names), evaluating(model):
        d_in = sum(widths(model, dict.fromkeys(hook_names), context_size).values())
        batch = _tokens(model, batch_size, context_size)
        seconds = _median(lambda: _run(model, hook_names, batch)) / batch.numel()
    per_token = d_in * getattr(torch, dtype).itemsize + 4  # With the token's id.
    values = batch.numel() * (d_in * 4 + per_token)
    return Estimate(
        n_tokens=n,
        disk=per_token * (1 if n is None else n),
        memory=_weights(model) + values,
        seconds=seconds * (10**6 if n is None else n),
    )


def training_estimate(
    model: Any,
    text: Any,
    saes: Mapping[str, TrainingSAEConfig],
    settings: Mapping[str, Any],
    cache: Cache | None = None,
) -> Estimate:
    """What `lch_plugin.saes.train` would take, of an SAE on each of several hook points.

    Args:
        model: None with a cache.
        text: None with a cache; otherwise looked at as training does.
        saes: by hook point.
        settings: of `lch_plugin.saes.runner_config`, the same for all.
        cache: of the hook points, where training reads one.
    """
    hook_names = list(saes)
    n_tokens = int(settings["training_tokens"])
    weights = seconds = most = rows = 0.0
    with saelens_quiet():
        for name, sae in saes.items():
            config = runner_config(sae, name, **{**settings, "resume_from_checkpoint": None})
            own = sae.d_sae * (2 * sae.d_in + 1) * 4 + sae.d_in * 4
            weights, most = weights + own, max(most, own)
            rows += config.n_batches_in_buffer * config.context_size * sae.d_in * 4
            seconds += n_tokens / config.train_batch_size_tokens * _step(sae, config)
    n_read = n_tokens + n_estimate_batches(config.to_sae_trainer_config()) * (
        config.train_batch_size_tokens
    )
    if cache is None:
        check_dataset(model, text, config.context_size)
        with attached(model, hook_names), evaluating(model):
            batch = _tokens(model, config.store_batch_size_prompts, config.context_size)
            one = _median(lambda: _run(model, hook_names, batch)) / batch.numel()
        seconds += one * n_read
    # Weights, gradients and two averages of Adam's; from a cache one SAE after the other.
    at_once = 4 * (most if cache is not None else weights) + rows
    n_checkpoints = int(settings.get("n_checkpoints") or 0) + 1
    return Estimate(
        n_tokens=n_tokens,
        # Of a checkpoint also the averages.
        disk=int(weights + 3 * weights * n_checkpoints),
        memory=int(at_once) + (0 if cache is not None else _weights(model)),
        seconds=seconds,
    )


def _step(sae: TrainingSAEConfig, config: Any) -> float:
    """Seconds of a step of training, on rows drawn at random."""
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        rows = torch.randn(config.train_batch_size_tokens, sae.d_in)
        dictionary: Any = TrainingSAE.from_dict(copy.copy(sae).to_dict())
        trainer_config = with_lr_end(config.to_sae_trainer_config())
        trainer = SAETrainer(trainer_config, dictionary, iter(()))
        trainer.activation_scaler.scaling_factor = 1.0
        dictionary.to(config.device)
        return _median(lambda: trainer.step(rows))


def _run(model: Any, hook_names: Sequence[str], tokens: Tensor) -> None:
    from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name

    stops = [extract_stop_at_layer_from_tlens_hook_name(hook) for hook in hook_names]
    stop = None if None in stops else max(filter(None, stops), default=None)
    with torch.no_grad():
        _, found = model.run_with_cache(tokens, names_filter=list(hook_names), stop_at_layer=stop)
        float(found[hook_names[-1]].flatten()[0])  # On a GPU, when it is done.


def _tokens(model: Any, n_rows: int, context_size: int) -> Tensor:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    return torch.randint(d_vocab(model), (n_rows, context_size), generator=generator).to(device)


def _median(work: Callable[[], Any]) -> float:
    """Seconds, after one time that does not count."""
    seconds = []
    for _ in range(_TRIALS + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[_TRIALS // 2]


def _count(model: Any, texts: Any) -> int | None:
    """Tokens of a text, from some of its rows; None of a stream."""
    if isinstance(texts, IterableDataset):
        return None
    sample = texts.select(range(min(len(texts), _SAMPLE)))
    column = next(c for c in ("tokens", "input_ids", "text", "problem") if c in texts.column_names)
    n = 0
    for row in sample[column]:
        ids = model.tokenizer(row)["input_ids"] if isinstance(row, str) else row
        n += len(ids) + isinstance(row, str)  # Between texts there is a token.
    return round(n / len(sample) * len(texts))


def _weights(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _size(n: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit in ("bytes", "kB") else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

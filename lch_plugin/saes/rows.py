"""SAEs on models without text: images, sound, anything that comes in batches.

SAELens' runner reads text. Its trainer takes rows from anywhere, so here what a model computes
becomes rows, and SAELens' mixing buffer shuffles them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from sae_lens import TrainingSAE, TrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.mixing_buffer import mixing_buffer
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor, nn

from lch_plugin.adapters.arguments import input_of, output_of
from lch_plugin.adapters.huggingface import make_readers, model_name, resolve_arguments
from lch_plugin.adapters.states import evaluating
from lch_plugin.cotangents import Cotangent
from lch_plugin.errors import InputError
from lch_plugin.saes.starting import n_estimate_batches, start_at_data, starts_at_data

Of = Literal["centroid", "input", "output"]


class Rows:
    """What one component of a model has at each token, one row a token.

    An iterable over tensors of rows, one for each batch. While a batch is under way the model is in
    evaluation mode and stops after the component; between batches it is as it was.

    Attributes:
        model: any module.
        batches: the model's inputs, tensors or mappings of keyword arguments, on any device; or
            pairs of a tensor and labels, which are left alone, as a DataLoader gives them.
        module: name of the component, as in `lch_plugin.huggingface.attach`. Of one that is called
            several times in a pass, rows are of the first call.
        of: its centroid, what it reads (``"input"``), or what it writes (``"output"``).
        positions: which tokens count. Of a ViT ``slice(0, 1)`` is the CLS token and
            ``slice(1, None)`` are the patches. Padding never does, where a batch has an
            ``attention_mask``.

    Raises:
        InputError: ``of`` is none of the three, positions are no slice, or the name fits several
            components.
        SiteError, VanishingCentroidError: as `lch_plugin.huggingface.attach`.

    Example:
        >>> rows = lch.saes.Rows(model, pixel_values.split(64), "encoder.layer.2.mlp")
        >>> sae = lch.saes.train_on(rows, TopKTrainingSAEConfig(d_in=64, d_sae=512, k=8), config)
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Tensor | Mapping[str, Any] | Sequence[Any]],
        module: str,
        *,
        of: Of = "centroid",
        positions: slice = slice(None),
        cotangent: Float[Tensor, " d_out"] | Cotangent | None = None,
    ) -> None:
        """Choose what rows are of; nothing runs yet."""
        if of not in get_args(Of):
            raise InputError(f"of={of!r} is not known; use one of {get_args(Of)}.")
        if isinstance(batches, Tensor | Mapping):
            raise InputError(
                "batches is a single one: pass a list of batches, such as pixel_values.split(64)."
            )
        if not isinstance(positions, slice):
            raise InputError(f"positions={positions!r} must be a slice, such as slice(1, None).")
        targets, v = resolve_arguments(model, module, cotangent)
        if len(targets) > 1:
            raise InputError(f"module={module!r} fits {[t.name for t in targets]}: choose one.")
        self.model, self.batches, self.module = model, batches, module
        self.of, self.positions = of, positions
        self._first = model.get_submodule(targets[0].first)
        self._last = model.get_submodule(targets[0].last)
        self._found: list[Tensor] = []
        # An input or output has no cotangent that could be wrong for it.
        readers = (
            make_readers(model, targets, v, lambda _: (self._found.append, lambda: True))
            if of == "centroid"
            else []
        )
        self._reader = readers[0] if readers else None

    def __iter__(self) -> Iterator[Float[Tensor, "_ d_in"]]:
        for batch in self.batches:
            value = self._value(batch)
            if value.ndim not in (2, 3):
                raise InputError(
                    f"{self.module}: its {self.of} has shape {tuple(value.shape)}; rows are of "
                    "tokens, (batch, pos, d), or (batch, d). Name a component that reads those."
                )
            if value.ndim == 2:
                yield value
                continue
            is_token = torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            if isinstance(mask, Tensor) and mask.shape == is_token.shape:
                is_token = mask.to(value.device) != 0
            yield value[:, self.positions][is_token[:, self.positions]]

    def record(self) -> dict[str, Any]:
        """What the rows are of, in terms of JSON."""
        config = getattr(self.model, "config", None)
        return {
            **(self._reader.record() if self._reader else {"site": self.module}),
            "of": self.of,
            "positions": [self.positions.start, self.positions.stop, self.positions.step],
            "model": model_name(self.model),
            "revision": getattr(config, "_commit_hash", None),
            "lch_plugin_version": version("lch-plugin"),
        }

    def _value(self, batch: Tensor | Mapping[str, Any] | Sequence[Any]) -> Float[Tensor, ...]:
        self._found.clear()
        hooks = []
        if self.of == "input":
            hooks.append(self._first.register_forward_pre_hook(self._on_input, with_kwargs=True))
        elif self.of == "output":
            hooks.append(self._last.register_forward_hook(self._on_output))
        elif self._reader is not None:
            self._reader.install()
        hooks.append(self._last.register_forward_hook(_stop))
        try:
            with torch.no_grad(), evaluating(self.model):
                if isinstance(batch, Mapping):
                    self.model(**{key: self._on_device(value) for key, value in batch.items()})
                else:  # Of a DataLoader's pairs the first.
                    first = batch[0] if isinstance(batch, tuple | list) else batch
                    self.model(self._on_device(first))
        except _Stop:
            pass
        finally:
            for hook in hooks:
                hook.remove()
            if self._reader is not None:
                self._reader.remove()
        if not self._found:
            raise InputError(f"{self.module} was not called: the model's path does not lead there.")
        return self._found[0]

    def _on_device(self, value: Any) -> Any:
        device = next((p.device for p in self.model.parameters()), None)
        return value.to(device) if isinstance(value, Tensor) else value

    def _on_input(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self._found.append(input_of((args, kwargs), self.module)[0].detach())

    def _on_output(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._found.append(output_of(output, self.module).detach())


class _Stop(Exception):
    """Nothing after the component is wanted."""


def _stop(*_: Any) -> None:
    raise _Stop


def train_on(
    rows: Rows | Iterable[Float[Tensor, "_ d_in"]],
    sae: TrainingSAEConfig,
    config: SAETrainerConfig,
    *,
    buffer_size: int = 16_384,
    seed: int = 0,
) -> TrainingSAE[Any]:
    """Train an SAE on rows, with SAELens' own trainer, and return it.

    With the normalisations ``"none"`` and ``"expected_average_only_in"`` the decoder's bias starts
    at the mean of the rows, which of centroids is most of their norm; an SAE that starts from zero
    spends its features on it. Mean and scale are estimated from 16,384 rows, or from
    ``config.n_batches_for_norm_estimate`` batches if those are fewer. Of `Rows` the SAE carries
    ``cfg.metadata.lch_centroid``, the scale among it.

    ``save_inference_model(path)`` of what is returned writes it as `sae_lens.SAE.load_from_disk`
    reads it. BatchTopK is loaded as JumpReLU then, with a threshold that SAELens learns slowly:
    over some hundred steps.

    Args:
        rows: as many as ``config.total_training_samples`` takes and the estimate of the scale, or
            something to be iterated again and again until then.
        sae: SAELens' own configuration of any architecture.
        config: SAELens' own configuration of the trainer. To log to wandb, call ``wandb.init``
            first, which SAELens' runner does and its trainer does not.
        buffer_size: rows that are shuffled together; half of them stay for the next round.
        seed: of initialisation and shuffling; the global random state is left alone.

    Raises:
        InputError: rows of another width than ``sae.d_in``, too small a buffer, or no rows.
    """
    if buffer_size < config.train_batch_size_samples:
        raise InputError(
            f"buffer_size={buffer_size} holds no training batch of "
            f"train_batch_size_samples={config.train_batch_size_samples}. Raise it."
        )
    stream = endless(rows)
    first = next(stream)
    if first.shape[-1] != sae.d_in:
        raise InputError(
            f"sae.d_in={sae.d_in}, but the rows have {first.shape[-1]} dimensions. Set "
            f"d_in={first.shape[-1]}."
        )
    config = with_lr_end(config)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        dictionary: TrainingSAE[Any] = TrainingSAE.from_dict(sae.to_dict())
        batches = mixing_buffer(
            buffer_size,
            config.train_batch_size_samples,
            itertools.chain([first], stream),
        )
        trainer = SAETrainer(config, dictionary, batches)
        scaler = trainer.activation_scaler
        if starts_at_data(dictionary):
            sample = list(itertools.islice(batches, n_estimate_batches(config)))
            start_at_data(dictionary, scaler, sample)
        if isinstance(rows, Rows):
            record = {**rows.record(), "scale": scaler.scaling_factor, "seed": seed}
            dictionary.cfg.metadata.lch_centroid = record
        return trainer.fit()


def with_lr_end(config: SAETrainerConfig) -> SAETrainerConfig:
    """With the last learning rate that SAELens' runner would set; its trainer needs a number."""
    lr_end = config.lr / 10 if config.lr_end is None else config.lr_end
    return dataclasses.replace(config, lr_end=lr_end)


def endless(rows: Iterable[Tensor]) -> Iterator[Tensor]:
    """Rows again and again.

    Raises:
        InputError: there are none, or no more than once.
    """
    while True:
        n_rows = 0
        for x in rows:
            n_rows += len(x)
            yield x
        if not n_rows:
            raise InputError(
                "the rows came to an end before training did, or there were none. Pass batches "
                "that can be iterated again, such as a list, or more of them."
            )

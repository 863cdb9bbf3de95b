"""Sequences of tokens that a text makes, and what the hook points of a model have on them."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset, Features
from jaxtyping import Float, Int
from sae_lens import ActivationsStore
from torch import Tensor

from lch_plugin.adapters.transformer_lens import LensModel, check_token_ids
from lch_plugin.errors import InputError, NonFiniteError
from lch_plugin.saes.caching.shards import record_batch
from lch_plugin.saes.sources.hook_points import d_vocab
from lch_plugin.saes.sources.hooked_model import HookedModel

# What storing may change of values, relative to their norm. Of numbers in its range float16 keeps
# three digits.
_ROUNDING = 0.01
# Texts of a stream that are shuffled among each other.
_SHUFFLED = 10_000


@dataclass(frozen=True)
class Sequences:
    """Sequences of tokens, and what the hook points of a model have on them."""

    model: LensModel | HookedModel
    store: ActivationsStore
    columns: Features
    batch_size: int
    dtype: torch.dtype

    def tokens(self, size: int, n_sequences: int | None) -> Iterator[Int[Tensor, "_ pos"]]:
        """The tokens of each shard of ``size`` sequences; the last may have fewer."""
        sequences = itertools.islice(self._sequences(), n_sequences)
        while rows := list(itertools.islice(sequences, size)):
            tokens = torch.stack(rows)
            check_token_ids(d_vocab(self.model), int(tokens.min()), int(tokens.max()))
            yield tokens

    def _sequences(self) -> Iterator[Int[Tensor, " pos"]]:
        context_size = self.store.context_size
        while True:
            try:
                # One at a time: SAELens drops a last batch that is not full.
                row = self.store.get_batch_tokens(
                    1, raise_at_epoch_end=True, move_to_model_device=False
                )[0]
            except StopIteration:
                return
            if len(row) != context_size:
                raise InputError(
                    f"a row of the dataset has {len(row)} tokens, fewer than "
                    f"context_size={context_size}. Lower it, or tokenise into longer rows."
                )
            yield row

    def values(self, tokens: Int[Tensor, "n pos"]) -> Iterator[pa.RecordBatch]:
        """Run the model on them, a batch at a time."""
        device = next(self.model.parameters()).device
        for batch in tokens.split(self.batch_size):
            found = self.store.get_multi_hook_activations(batch.to(device))
            values = {hook: self._stored(hook, x) for hook, x in found.items()}
            yield record_batch(self.columns, batch, values)

    def _stored(
        self, hook: str, values: Float[Tensor, "n pos d_in"]
    ) -> Float[Tensor, "n pos d_in"]:
        """As they are written; refused where that is not what they are."""
        stored = values.to(self.dtype)
        extremes = torch.stack(stored.aminmax())  # NaN if there is one.
        if not extremes.isfinite().all():
            raise NonFiniteError(
                f"{hook} has NaN or infinite values as {stored.dtype}. In float16 numbers end at "
                "65,504: take dtype='float32' if the model itself computes finite ones."
            )
        if stored.dtype == torch.float16:
            lost = float((stored - values).norm() / values.norm().clamp(min=1e-30))
            if lost > _ROUNDING:
                raise InputError(
                    f"{hook} is too small for float16, which changes it by {lost:.1%}: below 6e-5 "
                    "digits are lost, and below 6e-8 all of it. Take dtype='float32'."
                )
        return stored.cpu().contiguous()


def store_of(
    model: LensModel | HookedModel,
    texts: Any,
    seed: int | None,
    d_in: dict[str, int],
    context_size: int,
    tokenization: dict[str, Any],
) -> ActivationsStore:
    """SAELens' own, which makes sequences of texts and runs the model on them."""
    if seed is None:
        texts = copy.copy(texts)  # SAELens sets the format of the dataset it is given.
    elif isinstance(texts, Dataset):
        texts = texts.shuffle(seed=seed, keep_in_memory=True)
    else:
        texts = texts.shuffle(seed=seed, buffer_size=_SHUFFLED)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Dataset is not tokenized")
            return ActivationsStore.from_config_multi_hook(
                model,
                dataset=texts,
                hook_names=list(d_in),
                hook_d_ins=d_in,
                context_size=context_size,
                total_training_tokens=0,  # Only for a warning that texts are few.
                **tokenization,
            )
    except ValueError as error:  # Of a shuffled stream another row is the first.
        raise InputError(f"the text cannot be read: {error} Pass another dataset.") from error

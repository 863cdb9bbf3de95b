"""Write what hook points have: values of many of them, from one pass over the text.

A cache grows in a directory of its own beside its final name. Each shard is written to a temporary
file, which takes its name when it is on the disk, and is then entered into the manifest, which is
replaced in one step. So whenever the process ends, each shard is either whole and known or not
there, and the next call computes what is missing: it makes the tokens again, which is cheap, and
runs the model only for shards that are not there. That the text is the same is seen by its tokens.
"""

from __future__ import annotations

import copy
import errno
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import torch
from datasets import Array2D, Dataset, Features, IterableDataset
from datasets.utils.py_utils import convert_file_size_to_int
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from sae_lens import ActivationsStore
from torch import Tensor

from lch_plugin.adapters.states import evaluating
from lch_plugin.adapters.transformer_lens import LensModel, check_token_ids
from lch_plugin.errors import InputError, LCHError, NonFiniteError, OutputError
from lch_plugin.files import check_new_directory, locked, remove_leftovers, sync_directory
from lch_plugin.records import read_json
from lch_plugin.saes.caching.cache import Cache
from lch_plugin.saes.caching.records import differences, record
from lch_plugin.saes.caching.shards import (
    MANIFEST,
    Shard,
    features,
    hash_tokens,
    is_ours,
    read_index,
    read_manifest,
    record_batch,
    write_index,
    write_manifest,
    write_shard,
)
from lch_plugin.saes.sources.hooked import HookedModel
from lch_plugin.saes.sources.hooks import attached, check_model, d_vocab, n_ctx, widths
from lch_plugin.saes.sources.texts import check_dataset, load_text

T = TypeVar("T")

_DTYPES = ("float32", "float16")
# What storing may change of values, relative to their norm. Of numbers in its range float16 keeps
# three digits.
_ROUNDING = 0.01
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_LIBRARIES = ("lch-plugin", "torch", "transformers", "transformer-lens", "sae-lens", "datasets")
# Texts of a stream that are shuffled among each other.
_SHUFFLED = 10_000


def cache(
    model: LensModel | HookedModel,
    dataset: Any,
    path: str | Path,
    *,
    hook_names: str | Sequence[str],
    n_tokens: int | None = None,
    context_size: int | None = None,
    dtype: str = "float32",
    seed: int | None = None,
    batch_size: int = 32,
    max_shard_size: int | str = "500MB",
    prepend_bos: bool = True,
    sequence_separator_token: int | Literal["bos", "eos", "sep"] | None = "bos",
    disable_concat_sequences: bool = False,
    use_chat_formatting: bool = False,
) -> Cache:
    """See that a directory holds the values of hook points on a text, and open it.

    Values of all hook points, centroids or others, and the token ids come from one pass, on the
    sequences that SAELens' store makes of the text. `Cache` reads the directory, and SAELens does
    with ``use_cached_activations``. Centroids of mlp, attn and block that are not attached are
    attached with the all-ones cotangent for as long as this takes. The model is in evaluation mode
    meanwhile.

    Interrupted in any way, killed included, a call with the same arguments goes on after the last
    complete shard. On a finished cache it runs no forward pass, but reads all of it, and computes
    alone those shards that are missing, truncated or altered. The files beside the shards that
    `datasets` reads are written again if they are damaged.

    Args:
        model: TransformerBridge or HookedTransformer, SAELens' subclass of either, or a
            `lch_plugin.saes.HookedModel`.
        dataset: anything that `lch_plugin.saes.load_text` takes.
        path: of the directory. Until it is complete it is ``.NAME.partial`` beside it.
        hook_names: which values.
        n_tokens: how many, rounded up to whole sequences; all that the text has if None.
        context_size: tokens in a sequence; the model's context if None.
        dtype: ``"float32"``, or ``"float16"`` for half the space.
        seed: texts are shuffled by it; they come in their order if None. Of a stream, 10,000 texts
            are shuffled at a time.
        batch_size: sequences in a forward pass.
        max_shard_size: of the files, in bytes or such as ``"500MB"``; a batch at the least.
        prepend_bos: as in SAELens' configuration, and so are the next three.

    Raises:
        InputError: the directory or its unfinished form is of another model, text or setting; a
            text without a column that can be read, too short, or with tokens unknown to the model;
            a setting out of range; or values too small for float16.
        SiteError: the model has no such hook point.
        VanishingCentroidError: as `lch_plugin.attach`.
        NonFiniteError: a value is NaN or infinite, as large ones are in float16.
        OutputError: the path holds something else, another process is at work on it, or the disk
            is full; what is complete is kept.
    """
    check_model(model)
    hook_names = [hook_names] if isinstance(hook_names, str) else list(dict.fromkeys(hook_names))
    context_size = _context_size(model, context_size)
    _check_settings(hook_names, n_tokens, dtype, batch_size)
    texts = check_dataset(model, load_text(dataset), context_size, use_chat_formatting)
    found = path, directory, before = _find(path)
    tokenization = {
        "prepend_bos": prepend_bos,
        "sequence_separator_token": sequence_separator_token,
        "disable_concat_sequences": disable_concat_sequences,
        "use_chat_formatting": use_chat_formatting,
    }
    with attached(model, hook_names), evaluating(model):
        known = {hook: entry["d_in"] for hook, entry in before.get("hooks", {}).items()}
        hook_names = sorted(hook_names, key=[*known, *hook_names].index)
        unknown = dict.fromkeys(h for h in hook_names if h not in known)
        if unknown:
            known |= widths(model, unknown, context_size)
        d_in = {hook: known[hook] for hook in hook_names}
        columns = features(context_size, d_in, dtype)
        settings = {
            "context_size": context_size,
            "dtype": dtype,
            "seed": seed,
            "batch_size": batch_size,
            "batches_per_shard": _batches_per_shard(max_shard_size, columns, batch_size),
            **tokenization,
        }
        manifest = {**record(model, d_in), "settings": settings, "n_tokens": n_tokens}
        is_finished = directory == path
        if before:
            _check_same(before, manifest, directory, is_finished)
        manifest |= {
            # Recorded, but not compared: a text is known by its tokens.
            "dataset": _describe(dataset, texts),
            "versions": {name: version(name) for name in _LIBRARIES},
            "n_sequences": before["n_sequences"] if is_finished else None,
            "shards": before.get("shards", []),
        }
        store = _store(model, texts, seed, d_in, context_size, tokenization)
        source = _Source(model, store, columns, batch_size, getattr(torch, dtype))
        _fill(found, manifest, source)
    return Cache(path)


@dataclass(frozen=True)
class _Source:
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


def _fill(
    found: tuple[Path, Path, dict[str, Any]], manifest: dict[str, Any], source: _Source
) -> None:
    """Compute the shards that are not there, and enter each into the manifest when it is whole.

    Then make them a dataset under the final name. ``found`` is what `_find` said.
    """
    path, directory, _ = found
    known = {shard["file"]: Shard(**shard) for shard in manifest["shards"]}
    damaged = [i for i, s in enumerate(known.values()) if s.fault(directory, read=True)]
    whole = set(known) - {list(known)[i] for i in damaged}
    size = manifest["settings"]["batch_size"] * manifest["settings"]["batches_per_shard"]
    context_size, n_tokens = source.store.context_size, manifest["n_tokens"]
    n_sequences = None if n_tokens is None else -(-n_tokens // context_size)
    is_finished = directory == path
    if is_finished:
        # The first shard in any case, to see that the text is the same.
        n_sequences = min(manifest["n_sequences"], size * (1 + max(damaged, default=0)))
    shards: list[Shard] = []
    n_found, is_read_only = 0, is_finished and not damaged and _has_index(directory)
    with nullcontext() if is_read_only else _alone(found), _progress(n_sequences) as advance:
        for index, tokens in enumerate(_ahead(source.tokens(size, n_sequences))):
            n_found += len(tokens)
            if n_sequences is not None and n_found < min(n_sequences, size * (index + 1)):
                break  # The text ends too early, and what is short is not written.
            file, ids = f"data-{index:05d}.arrow", hash_tokens(tokens.numpy())
            shard = known.get(file)
            is_of_size = shard is not None and shard.n_sequences == len(tokens)
            if shard is not None and is_of_size and shard.tokens != ids:
                raise _other_text(directory, f"it has other tokens in {file}")
            if shard is not None and is_of_size and file in whole:
                advance(len(tokens))
            else:
                batches = _each(source.values(tokens), lambda batch: advance(batch.num_rows))
                with _writing(directory):
                    written = write_shard(directory / file, source.columns.arrow_schema, batches)
                    shard = known[file] = Shard(file, len(tokens), *written, ids)
                    entries = [asdict(known[name]) for name in sorted(known)]
                    write_manifest(directory, {**manifest, "shards": entries})
            shards.append(shard)
        if n_found < (n_sequences or 1):
            n_texts = source.store.n_dataset_processed
            if is_finished:
                raise _other_text(directory, f"it has more tokens than these {n_texts} texts make")
            if n_sequences is None:
                raise InputError(
                    f"the {n_texts} texts do not fill a sequence of context_size={context_size}. "
                    "Pass more text, or lower context_size."
                )
            raise InputError(
                f"n_tokens={n_tokens}: the {n_texts} texts make {n_found * context_size} tokens, "
                f"in sequences of context_size={context_size}. Lower n_tokens or leave it out, and "
                "what is computed already is used; or pass more text."
            )
        if not is_read_only:
            whole_text = list(known.values()) if is_finished else shards
            _finish(directory, path, manifest, whole_text, source.columns)


def _has_index(directory: Path) -> bool:
    try:
        read_index(directory, "")
    except InputError:
        return False
    return True


def _other_text(directory: Path, reason: str) -> InputError:
    return InputError(
        f"{directory} was made of another text: {reason}. Pass the same text in the same order, or "
        "choose another path."
    )


def _finish(
    directory: Path, path: Path, manifest: dict[str, Any], shards: list[Shard], columns: Features
) -> None:
    """Make shards a dataset, and give the directory its name.

    Until it has it the manifest stays, by which the next call knows the shards.
    """
    manifest |= {
        "n_sequences": sum(shard.n_sequences for shard in shards),
        "shards": [asdict(shard) for shard in shards],
    }
    with _writing(directory):
        kept = {shard.file for shard in shards}
        remove_leftovers(directory)
        for file in directory.iterdir():  # What others put there is theirs.
            if is_ours(file.name) and file.name not in kept:
                file.unlink()
        write_index(directory, columns, shards)
        write_manifest(directory, manifest)
        directory.replace(path)
        sync_directory(path.parent)


def _find(path: str | Path) -> tuple[Path, Path, dict[str, Any]]:
    """The path, the directory that is or will be written, and its manifest if it has one."""
    path = Path(path).expanduser().resolve()
    if _is_cache(path):
        cure = "Choose another path, or remove it and make it again."
        return path, path, read_manifest(path, cure) or {}
    path = check_new_directory(path)
    partial = path.with_name(f".{path.name}.partial")
    cure = "Choose another path, or remove it: what it holds of this cache is lost."
    return path, partial, read_manifest(partial, cure) or {}


def _is_cache(path: Path) -> bool:
    """Whether there is a manifest that at least tries to be one of a cache."""
    try:
        content = read_json(path / MANIFEST, "")
    except InputError:
        return (path / MANIFEST).is_file()
    return isinstance(content, dict) and "shards" in content


def _check_same(
    before: dict[str, Any], now: dict[str, Any], directory: Path, is_finished: bool
) -> None:
    if not is_finished:  # What there is of another number of tokens is of use.
        now = {key: value for key, value in now.items() if key != "n_tokens"}
    found = differences(before, now)
    if found:
        raise InputError(
            f"{directory} holds {'a' if is_finished else 'an unfinished'} cache of something else. "
            f"{' '.join(found)} Repeat the call it was made by, choose another path, or remove it."
        )


def _context_size(model: LensModel | HookedModel, context_size: int | None) -> int:
    longest = n_ctx(model)
    size = longest if context_size is None else context_size
    if size is None:
        raise InputError("context_size=None: the model does not say how long its context is.")
    if size < 1 or (longest is not None and size > longest):
        raise InputError(
            f"context_size={size} has to be from 1 to the model's context of {longest}."
        )
    return size


def _check_settings(
    hook_names: Sequence[str], n_tokens: int | None, dtype: str, batch_size: int
) -> None:
    if not hook_names:
        raise InputError("hook_names=[] names no hook point whose values could be cached.")
    if dtype not in _DTYPES:
        raise InputError(f"dtype={dtype!r} cannot be stored; choose one of {_DTYPES}.")
    if batch_size < 1 or (n_tokens is not None and n_tokens < 1):
        raise InputError(f"batch_size={batch_size} and n_tokens={n_tokens} have to be at least 1.")


def _batches_per_shard(max_shard_size: int | str, columns: Features, batch_size: int) -> int:
    try:
        size = convert_file_size_to_int(max_shard_size)
    except ValueError as error:
        raise InputError(
            f"max_shard_size={max_shard_size!r} is no size: give bytes, or such as '500MB'."
        ) from error
    n_bytes = sum(
        math.prod(column.shape) * np.dtype(column.dtype).itemsize
        for column in columns.values()
        if isinstance(column, Array2D)
    )
    return max(1, size // (batch_size * n_bytes))


def _describe(dataset: Any, texts: Dataset | IterableDataset) -> dict[str, Any]:
    """Where a text is from, as far as it says."""
    info = texts.info
    return {
        "source": str(dataset) if isinstance(dataset, str | Path) else type(dataset).__name__,
        "name": info.dataset_name,
        "configuration": info.config_name,
        "split": None if texts.split is None else str(texts.split),
        "fingerprint": getattr(texts, "_fingerprint", None),
    }


def _store(
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


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made while the one before it is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _each(items: Iterable[T], then: Callable[[T], None]) -> Iterator[T]:
    for item in items:
        yield item
        then(item)


@contextmanager
def _alone(found: tuple[Path, Path, dict[str, Any]]) -> Iterator[None]:
    """Keep other processes from writing a cache at the same time, or just before."""
    path, directory, _ = found
    with locked(path):
        with _writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        try:
            if _find(path) != found:
                raise OutputError(
                    f"{directory} was written by another process since this call began. Call "
                    "lch.saes.cache again: what is there is used."
                )
            yield
        finally:
            with suppress(OSError):  # If there is anything of use in it, it stays.
                directory.rmdir()


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """What a disk refuses, as an error that says what to do."""
    try:
        yield
    except LCHError:
        raise
    except OSError as error:
        cure = "Make room" if error.errno in _NO_ROOM else "See that it can be written"
        raise OutputError(
            f"{directory} cannot be written: {error}. {cure} and call lch.saes.cache again with "
            "the same arguments: complete shards are kept, and it goes on after them."
        ) from error


@contextmanager
def _progress(n_sequences: int | None) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("caching"),
        BarColumn(),
        TextColumn("{task.completed:,} sequences"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=n_sequences)
        yield lambda n: progress.advance(task, n)

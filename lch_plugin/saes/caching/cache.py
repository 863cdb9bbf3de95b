"""Read what hook points had: a directory of values, without the model or the text."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Array2D, Features
from jaxtyping import Float, Int
from torch import Tensor

from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.errors import InputError
from lch_plugin.saes.caching.records import differences, record
from lch_plugin.saes.caching.shards import (
    TOKEN_IDS,
    Shard,
    column,
    features,
    hash_tokens,
    read_index,
    read_manifest,
    read_shard,
)
from lch_plugin.saes.sources.hooked_model import HookedModel

_CURE = "Call lch.saes.cache again with the arguments that made it: it computes this shard alone."


class Cache:
    """Values at hook points for sequences of tokens, in a directory.

    Made by `lch_plugin.saes.cache`; directories that SAELens' ``CacheActivationsRunner`` wrote are
    read too. Files are mapped into memory, so that opening a cache reads next to nothing. The size
    of each shard is checked at once and its hash when it is first read, where it is recorded.

    Attributes:
        path: the directory.
        manifest: what the values are of, in terms of JSON: model, hook points with each centroid's
            record, tokens, versions, shards. None in a directory that SAELens wrote.
        hook_names: in the order they were asked for.
        d_in: dimensions of the values, by hook point.
        context_size: tokens in a sequence.
        n_sequences: how many there are.

    Raises:
        InputError: the directory holds no finished cache, or a shard is missing or truncated.

    Example:
        >>> cache = lch.saes.Cache("centroids")
        >>> batches = cache.stream("blocks.2.mlp.hook_centroid", batch_size=4096, seed=0)
        >>> x = next(batches)  # (4096, d_in)
    """

    def __init__(self, path: str | Path) -> None:
        """Open a directory."""
        self.path = Path(path).expanduser().resolve()
        cure = (
            "lch.saes.cache makes one; interrupted, it goes on when it is called again with the "
            "same arguments."
        )
        try:
            columns, files = read_index(self.path, cure)
            manifest = read_manifest(self.path, cure)
        except InputError as error:
            raise InputError(f"{self.path} holds no finished cache: {error}") from error
        shapes = {name: c.shape for name, c in columns.items() if isinstance(c, Array2D)}
        if not shapes:
            raise InputError(
                f"{self.path} is a dataset of {list(columns)}, none of them an array "
                "(context_size, d_in) for each row: it is no cache of values at hook points."
            )
        self.hook_names = list(shapes)
        self.d_in = {name: int(shape[1]) for name, shape in shapes.items()}
        self.context_size = int(next(iter(shapes.values()))[0])
        self._has_token_ids = TOKEN_IDS in columns
        self.manifest = manifest
        self._checked: set[int] = set()
        self._opened: dict[tuple[int, str], list[np.ndarray[Any, np.dtype[Any]]]] = {}
        if manifest is not None:
            self._shards = [Shard(**shard) for shard in manifest["shards"]]
            for shard in self._shards:
                self._check(shard, read=False)
            self._check_index(columns, files)
        else:
            self._shards = [self._measure(file) for file in files]
        # Of each shard and of the end: how many sequences come before it.
        self._starts = np.cumsum([0, *(shard.n_sequences for shard in self._shards)])
        self.n_sequences = int(self._starts[-1])

    @property
    def n_tokens(self) -> int:
        """How many tokens there are, special ones included."""
        return self.n_sequences * self.context_size

    def __repr__(self) -> str:
        return f"Cache({str(self.path)!r}: {self.n_tokens:,} tokens at {self.hook_names})"

    def provenance(self, hook_name: str) -> dict[str, Any] | None:
        """What a centroid hook's values are of; None for other hooks and if nobody recorded it."""
        self.check_hook(hook_name)
        if self.manifest is None:
            return None
        centroid = self.manifest["hooks"][hook_name]["centroid"]
        return None if centroid is None else dict(centroid)

    def check_hook(self, hook_name: str) -> None:
        """See that values of a hook point are here.

        Raises:
            InputError: they are not; the message says which are.
        """
        if hook_name not in self.d_in:
            raise InputError(
                f"hook_name={hook_name!r} is not in the cache {self.path}, which has "
                f"{self.hook_names}."
            )

    def check(self, model: LensModel | HookedModel) -> None:
        """See that a model is the one the values are of, by its weights, tokenizer and centroids.

        Nothing can be checked of a directory that SAELens wrote.

        Raises:
            InputError: it is not; the message says what differs.
            SiteError: the model lacks one of the hook points.
        """
        if self.manifest is None:
            return
        found = differences(self.manifest, record(model, self.d_in))
        if found:
            raise InputError(
                f"{self.path} is not of this model. {' '.join(found)} Use the model it was made "
                "with, or make a cache of this one."
            )

    def values(
        self, hook_name: str, rows: Sequence[int] | slice = slice(None)
    ) -> Float[Tensor, "n context_size d_in"]:
        """What a hook point had, in the order of ``rows``, as float32.

        Args:
            hook_name: one of `hook_names`.
            rows: numbers of sequences; all of them by default, which may be more than memory holds.

        Raises:
            InputError: no such hook point or sequence, or a shard with other content than was
                written.
        """
        self.check_hook(hook_name)
        return torch.from_numpy(self._gather(hook_name, rows, (self.d_in[hook_name],), np.float32))

    def token_ids(self, rows: Sequence[int] | slice = slice(None)) -> Int[Tensor, "n context_size"]:
        """The tokens of sequences, in the order of ``rows``.

        Raises:
            InputError: there are none, which SAELens' format allows, or as `values`.
        """
        if not self._has_token_ids:
            raise InputError(f"{self.path} holds no token ids: it was written without them.")
        return torch.from_numpy(self._gather(TOKEN_IDS, rows, (), np.int64))

    def stream(
        self,
        hook_name: str,
        *,
        batch_size: int,
        buffer_size: int = 2**17,
        seed: int = 0,
        exclude_tokens: Iterable[int] | None = None,
    ) -> Stream:
        """Shuffled rows of one hook point, without end. See `Stream`.

        Args:
            hook_name: one of `hook_names`.
            batch_size: rows in a batch.
            buffer_size: tokens in memory at a time, whose rows are shuffled among each other.
            seed: of the order.
            exclude_tokens: ids of tokens whose rows are left out, special ones for example.

        Raises:
            InputError: no such hook point, numbers out of range, nothing left by
                ``exclude_tokens``, or no token ids to exclude any by.
        """
        return Stream(self, hook_name, batch_size, buffer_size, seed, exclude_tokens)

    def _check(self, shard: Shard, *, read: bool) -> None:
        fault = shard.fault(self.path, read=read)
        if fault is not None:
            raise InputError(f"shard {shard.file} of {self.path} {fault}. {_CURE}")

    def _check_index(self, columns: Features, files: list[str]) -> None:
        """What `datasets` is told and what the manifest says have to be the same."""
        assert self.manifest is not None
        settings = self.manifest["settings"]
        d_in = {hook: entry["d_in"] for hook, entry in self.manifest["hooks"].items()}
        n_sequences = sum(shard.n_sequences for shard in self._shards)
        if (
            columns != features(settings["context_size"], d_in, settings["dtype"])
            or files != [shard.file for shard in self._shards]
            or n_sequences != self.manifest["n_sequences"]
        ):
            raise InputError(
                f"{self.path}: dataset_info.json and state.json say something else than "
                "manifest.json. Call lch.saes.cache again with the arguments that made it."
            )

    def _measure(self, file: str) -> Shard:
        n_sequences = sum(map(len, self._read(file)))
        return Shard(file, n_sequences, (self.path / file).stat().st_size)

    def _columns(self, shard: int, name: str) -> list[np.ndarray[Any, np.dtype[Any]]]:
        """A column of a shard, an array for each record batch, checked when first asked for."""
        if (shard, name) not in self._opened:
            entry = self._shards[shard]
            if name != TOKEN_IDS and shard not in self._checked:
                self._check(entry, read=True)
                self._checked.add(shard)
            arrays = [column(batch, name) for batch in self._read(entry.file)]
            if sum(map(len, arrays)) != entry.n_sequences:
                raise InputError(
                    f"shard {entry.file} of {self.path} has {sum(map(len, arrays))} sequences and "
                    f"not {entry.n_sequences}. {_CURE}"
                )
            if name == TOKEN_IDS and entry.tokens not in (
                None,
                hash_tokens(np.concatenate(arrays)),
            ):
                raise InputError(
                    f"shard {entry.file} of {self.path} has other tokens than were written. {_CURE}"
                )
            self._opened[shard, name] = arrays
        return self._opened[shard, name]

    def _read(self, file: str) -> list[pa.RecordBatch]:
        try:
            return read_shard(self.path / file)
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(
                f"shard {file} of {self.path} cannot be read: {error}. {_CURE}"
            ) from error

    def _gather(
        self, name: str, rows: Sequence[int] | slice, shape: tuple[int, ...], dtype: Any
    ) -> np.ndarray[Any, np.dtype[Any]]:
        if isinstance(rows, slice):
            rows = range(self.n_sequences)[rows]
        wanted = np.asarray(rows)
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
            raise InputError(
                f"rows of shape {wanted.shape} and type {wanted.dtype}: give the numbers of "
                "sequences, as a slice or a list of integers."
            )
        wanted = wanted.astype(np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < self.n_sequences:
            raise InputError(
                f"rows {wanted.min()} to {wanted.max()} leave the {self.n_sequences} sequences of "
                f"{self.path}, which count from 0."
            )
        gathered = np.empty((len(wanted), self.context_size, *shape), dtype)
        owners = np.searchsorted(self._starts, wanted, side="right") - 1
        for shard in np.unique(owners):
            arrays = self._columns(int(shard), name)
            starts = np.cumsum([self._starts[shard], *map(len, arrays)]).tolist()
            for i in np.flatnonzero(owners == shard):
                batch = bisect_right(starts, wanted[i]) - 1
                gathered[i] = arrays[batch][wanted[i] - starts[batch]]
        return gathered


class Stream(Iterator[Tensor]):
    """Batches of rows of a `Cache`, without end, in an order that a seed decides.

    Each epoch goes once through all rows: sequences in random order, about ``buffer_size`` tokens
    of them in memory at a time, whose rows are shuffled. Batches go on over the end of an epoch, so
    that no row is left out. The order depends on nothing but the seed, ``buffer_size`` and which
    tokens are excluded: streams of two hook points with the same settings give the same tokens,
    and the global random state is left alone.

    Yields:
        Batches ``(batch_size, d_in)``, float32 on the CPU.

    Attributes:
        cache: where the rows are.
        position: batches handed out so far; `seek` moves it.
        rows_per_epoch: all rows but excluded ones.
    """

    def __init__(
        self,
        cache: Cache,
        hook_name: str,
        batch_size: int,
        buffer_size: int,
        seed: int,
        exclude_tokens: Iterable[int] | None,
    ) -> None:
        """Start at the first batch. `Cache.stream` says what is what."""
        cache.check_hook(hook_name)
        if batch_size < 1 or buffer_size < cache.context_size or seed < 0:
            raise InputError(
                f"batch_size={batch_size}, buffer_size={buffer_size}, seed={seed}: a batch takes "
                f"at least 1 row, the buffer at least a sequence of {cache.context_size} tokens, "
                "and the seed 0 or more."
            )
        self.cache, self.hook_name = cache, hook_name
        self.batch_size, self.seed = batch_size, seed
        self.position = 0
        self._excluded = None if exclude_tokens is None else torch.tensor(list(exclude_tokens))
        self._chunk_size = buffer_size // cache.context_size
        self._n_chunks = -(-cache.n_sequences // self._chunk_size)
        self._n_rows = self._count()
        self.rows_per_epoch = int(self._n_rows.sum())
        if not self.rows_per_epoch:
            raise InputError(f"exclude_tokens leaves none of the rows of {cache.path}.")
        self.seek(0)

    def seek(self, n_batches: int) -> None:
        """Go to where ``n_batches`` have been handed out; no values are read.

        Raises:
            InputError: a negative number.
        """
        if n_batches < 0:
            raise InputError(f"n_batches={n_batches}: a stream begins at 0.")
        self.position = n_batches
        self._epoch, row = divmod(n_batches * self.batch_size, self.rows_per_epoch)
        self._order = self._permutation(0, self.cache.n_sequences)
        firsts = np.arange(self._n_chunks) * self._chunk_size
        ends = np.cumsum(np.add.reduceat(self._n_rows[self._order], firsts))
        self._chunk = int(np.searchsorted(ends, row, side="right"))
        self._at = row - int(ends[self._chunk - 1]) if self._chunk else row
        self._rows: Tensor | None = None

    def __next__(self) -> Float[Tensor, "_ d_in"]:
        pieces: list[Tensor] = []
        n_missing = self.batch_size
        while n_missing:
            if self._rows is None:
                self._rows, self._shuffled = self._load()
            taken = self._shuffled[self._at : self._at + n_missing]
            pieces.append(self._rows[taken])
            self._at += len(taken)
            n_missing -= len(taken)
            if self._at == len(self._shuffled):
                self._advance()
        self.position += 1
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _advance(self) -> None:
        self._chunk, self._at, self._rows = self._chunk + 1, 0, None
        if self._chunk == self._n_chunks:
            self._epoch, self._chunk = self._epoch + 1, 0
            self._order = self._permutation(0, self.cache.n_sequences)

    def _load(self) -> tuple[Float[Tensor, "row d_in"], Int[Tensor, " shuffled"]]:
        """The rows of a chunk, and the order in which those that are wanted come."""
        first = self._chunk * self._chunk_size
        # Their order is shuffled away in any case; a disk likes them in its own.
        sequences = np.sort(self._order[first : first + self._chunk_size]).tolist()
        rows = self.cache.values(self.hook_name, sequences).flatten(0, 1)
        wanted = torch.arange(len(rows))
        if self._excluded is not None:
            ids = self.cache.token_ids(sequences).flatten()
            wanted = wanted[~torch.isin(ids, self._excluded)]
        return rows, wanted[self._permutation(1 + self._chunk, len(wanted))]

    def _permutation(self, purpose: int, n: int) -> np.ndarray[Any, np.dtype[Any]]:
        """Of the sequences of an epoch (0), or of the rows of each of its chunks (1 and on)."""
        return np.random.default_rng([self.seed, self._epoch, purpose]).permutation(n)

    def _count(self) -> np.ndarray[Any, np.dtype[Any]]:
        """How many rows of each sequence are wanted."""
        cache = self.cache
        if self._excluded is None:
            return np.full(cache.n_sequences, cache.context_size)
        counts = []
        for first in range(0, cache.n_sequences, self._chunk_size):
            ids = cache.token_ids(slice(first, first + self._chunk_size))
            counts.append((~torch.isin(ids, self._excluded)).sum(1).numpy())
        return np.concatenate(counts)

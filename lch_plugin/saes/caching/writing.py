"""Write what hook points have: values of many of them, from one pass over the text.

A cache grows in a directory of its own beside its final name. Each shard is written to a temporary
file, which takes its name when it is on the disk, and is then entered into the manifest, which is
replaced in one step. So whenever the process ends, each shard is either whole and known or not
there, and the next call computes what is missing: it makes the tokens again, which is cheap, and
runs the model only for shards that are not there. That the text is the same is seen by its tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from datasets import Array2D, Dataset, Features, IterableDataset
from datasets.utils.py_utils import convert_file_size_to_int
from sae_lens import ActivationsStore

from lch_plugin.adapters.states import evaluating
from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.cluster import Cluster
from lch_plugin.errors import InputError, OutputError
from lch_plugin.files import locked, remove_leftovers, sync_directory
from lch_plugin.progress import progress
from lch_plugin.saes.caching.cache import Cache
from lch_plugin.saes.caching.computing import (
    Load,
    Task,
    compute,
    compute_on,
    libraries,
    writing,
)
from lch_plugin.saes.caching.plan import Found, Plan
from lch_plugin.saes.caching.records import record
from lch_plugin.saes.caching.sequences import Sequences, store_of
from lch_plugin.saes.caching.shards import (
    Shard,
    features,
    hash_tokens,
    is_ours,
    write_index,
    write_manifest,
)
from lch_plugin.saes.sources.hook_points import attached, check_model, n_ctx, widths
from lch_plugin.saes.sources.hooked_model import HookedModel
from lch_plugin.saes.sources.texts import check_dataset, load_text

T = TypeVar("T")

_DTYPES = ("float32", "float16")


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
    cluster: Cluster | None = None,
    load: Load | None = None,
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

    On a ``cluster`` each worker computes whole shards, and this process makes the tokens and enters
    the shards. The files are those that one process writes, byte for byte, if workers compute with
    as many threads or on the same kind of GPU. A lost worker's shard is computed again. A worker's
    model has to be this one, by its weights, tokenizer and hook points, and so do its versions.

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
        cluster: where the model runs; in this process if None.
        load: makes the model on a worker of the cluster, from files that are there:
            ``lambda: lch.load("/models/gpt2", device="cuda").bridge()``. Sites other than all-ones
            centroids of mlp, attn and block have to be attached to what it returns.

    Raises:
        InputError: the directory or its unfinished form is of another model, text or setting; a
            text without a column that can be read, too short, or with tokens unknown to the model;
            a setting out of range; or values too small for float16.
        SiteError: the model has no such hook point.
        VanishingCentroidError: as `lch_plugin.attach`.
        NonFiniteError: a value is NaN or infinite, as large ones are in float16.
        OutputError: the path holds something else, another process is at work on it, or the disk
            is full; what is complete is kept.
        ClusterError: workers are lost again and again; what is complete is kept.
    """
    check_model(model)
    _check_place(path, cluster, load)
    hook_names = [hook_names] if isinstance(hook_names, str) else list(dict.fromkeys(hook_names))
    context_size = _context_size(model, context_size)
    _check_settings(hook_names, n_tokens, dtype, batch_size)
    texts = check_dataset(model, load_text(dataset), context_size, use_chat_formatting)
    found = Found.at(path)
    tokenization = {
        "prepend_bos": prepend_bos,
        "sequence_separator_token": sequence_separator_token,
        "disable_concat_sequences": disable_concat_sequences,
        "use_chat_formatting": use_chat_formatting,
    }
    with attached(model, hook_names), evaluating(model):
        known = {hook: entry["d_in"] for hook, entry in found.manifest.get("hooks", {}).items()}
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
        found.check_same(manifest)
        manifest |= {
            # Recorded, but not compared: a text is known by its tokens.
            "dataset": _describe(dataset, texts),
            "versions": libraries(),
            "n_sequences": found.manifest["n_sequences"] if found.is_finished else None,
            "shards": found.manifest.get("shards", []),
        }
        store = store_of(model, texts, seed, d_in, context_size, tokenization)
        source = Sequences(model, store, columns, batch_size, getattr(torch, dtype))
        _fill(Plan.of(found, manifest, context_size), manifest, source, cluster, load)
    return Cache(found.path)


def _fill(
    plan: Plan,
    manifest: dict[str, Any],
    source: Sequences,
    cluster: Cluster | None,
    load: Load | None,
) -> None:
    """Compute the shards that are not there, and enter each into the manifest when it is whole.

    Then make them a dataset under the final name.
    """
    directory, shards = plan.found.directory, dict(plan.known)
    seen: list[str] = []
    n_seen = 0

    def missing() -> Iterator[Task]:
        nonlocal n_seen
        for index, tokens in enumerate(_ahead(source.tokens(plan.shard_size, plan.n_sequences))):
            n_seen += len(tokens)
            if plan.is_short(index, n_seen):
                return  # The text ends too early, and what is short is not written.
            file = f"data-{index:05d}.arrow"
            seen.append(file)
            if plan.keeps(file, len(tokens), hash_tokens(tokens.numpy())):
                advance(len(tokens))
            else:
                yield file, tokens

    with (
        _alone(plan.found) if plan.writes else nullcontext(),
        progress("caching", plan.n_sequences, "sequences") as advance,
    ):
        if cluster is None or load is None or not plan.writes:
            written = _each_by(partial(compute, source, directory, then=advance), missing())
        else:
            written = compute_on(cluster, load, manifest, directory, missing(), advance)
        with closing(written):
            for shard in written:
                shards[shard.file] = shard
                entries = [asdict(shards[name]) for name in sorted(shards)]
                with writing(directory):
                    write_manifest(directory, {**manifest, "shards": entries})
        if n_seen < (plan.n_sequences or 1):
            raise _too_little(plan, manifest["n_tokens"], n_seen, source.store)
        if plan.writes:
            # Of a finished cache also those that were not looked at.
            stay = shards if plan.found.is_finished else seen
            _finish(plan.found, manifest, [shards[file] for file in stay], source.columns)


def _too_little(
    plan: Plan, n_tokens: int | None, n_seen: int, store: ActivationsStore
) -> InputError:
    """The error that a text ends before all that is asked for."""
    n_texts, context_size = store.n_dataset_processed, store.context_size
    if plan.found.is_finished:
        return plan.found.other_text(f"it has more tokens than these {n_texts} texts make")
    if n_tokens is None:
        return InputError(
            f"the {n_texts} texts do not fill a sequence of context_size={context_size}. "
            "Pass more text, or lower context_size."
        )
    return InputError(
        f"n_tokens={n_tokens}: the {n_texts} texts make {n_seen * context_size} tokens, in "
        f"sequences of context_size={context_size}. Lower n_tokens or leave it out, and what is "
        "computed already is used; or pass more text."
    )


def _finish(found: Found, manifest: dict[str, Any], shards: list[Shard], columns: Features) -> None:
    """Make shards a dataset, and give the directory its name.

    Until it has it the manifest stays, by which the next call knows the shards.
    """
    directory = found.directory
    manifest |= {
        "n_sequences": sum(shard.n_sequences for shard in shards),
        "shards": [asdict(shard) for shard in shards],
    }
    with writing(directory):
        kept = {shard.file for shard in shards}
        remove_leftovers(directory)
        for file in directory.iterdir():  # What others put there is theirs.
            if is_ours(file.name) and file.name not in kept:
                file.unlink()
        write_index(directory, columns, shards)
        write_manifest(directory, manifest)
        directory.replace(found.path)
        sync_directory(found.path.parent)


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


def _check_place(path: str | Path, cluster: Cluster | None, load: Load | None) -> None:
    if re.match(r"\w[\w+]+:/", str(path)):  # As of s3://bucket; C:/ is a disk.
        raise InputError(
            f"path={str(path)!r} is no directory, and a cache is mapped into memory from one. "
            "Write it to a disk that all machines share, or copy it when it is complete."
        )
    if (cluster is None) != (load is None):
        raise InputError(
            "cluster and load go together: on a cluster each worker loads the model itself, by "
            "calling load, such as lambda: lch.load('gpt2').bridge()."
        )


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


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made while the one before it is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _each_by(work: Callable[[Task], Shard], tasks: Iterable[Task]) -> Generator[Shard, None, None]:
    for task in tasks:
        yield work(task)


@contextmanager
def _alone(found: Found) -> Iterator[None]:
    """Keep other processes from writing a cache at the same time, or just before."""
    directory = found.directory
    with locked(found.path):
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        try:
            if Found.at(found.path) != found:
                raise OutputError(
                    f"{directory} was written by another process since this call began. Call "
                    "lch.saes.cache again: what is there is used."
                )
            yield
        finally:
            with suppress(OSError):  # If there is anything of use in it, it stays.
                directory.rmdir()

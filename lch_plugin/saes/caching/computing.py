"""Compute shards: one after another in this process, or on the workers of a cluster."""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor

from lch_plugin.adapters.states import evaluating
from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.cluster import Cluster, Shared, here, shared
from lch_plugin.errors import InputError, LCHError, OutputError
from lch_plugin.saes.caching.records import differences, record
from lch_plugin.saes.caching.sequences import Sequences, store_of
from lch_plugin.saes.caching.shards import Shard, features, hash_tokens, write_shard
from lch_plugin.saes.sources.hook_points import attached, check_model
from lch_plugin.saes.sources.hooked_model import HookedModel

#: A shard that is not there yet: the name of its file, and its tokens.
Task: TypeAlias = tuple[str, Int[Tensor, "n pos"]]
#: Makes the model on a worker.
Load: TypeAlias = Callable[[], LensModel | HookedModel]

_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_LIBRARIES = ("lch-plugin", "torch", "transformers", "transformer-lens", "sae-lens", "datasets")


def libraries() -> dict[str, str]:
    """Versions of what decides the values."""
    return {name: version(name) for name in _LIBRARIES}


def compute(
    source: Sequences, directory: Path, task: Task, then: Callable[[int], None] = lambda _: None
) -> Shard:
    """Run the model on the tokens of a shard, and write it.

    Args:
        source: runs the model.
        directory: of the file.
        task: what is to be made.
        then: called after each batch, with how many sequences it had.
    """
    file, tokens = task

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in source.values(tokens):
            yield batch
            then(batch.num_rows)

    with writing(directory):
        written = write_shard(directory / file, source.columns.arrow_schema, batches())
    return Shard(file, len(tokens), *written, hash_tokens(tokens.numpy()))


def compute_on(
    cluster: Cluster,
    load: Load,
    manifest: dict[str, Any],
    directory: Path,
    tasks: Iterable[Task],
    then: Callable[[int], None],
) -> Generator[Shard, None, None]:
    """The same on a cluster, a shard at a time on each worker, as they are done.

    Args:
        cluster: where.
        load: makes the model there.
        manifest: what the values are of: a worker's model is held to it.
        directory: of the files; one that all workers see.
        tasks: what is to be made.
        then: called after each shard, with how many sequences it has.
    """
    with (
        writing(directory),
        shared(directory) as place,
        closing(cluster.run(_Worker(load, manifest, place), tasks)) as done,
    ):
        for (_, tokens), shard in done:
            then(len(tokens))
            yield shard


@dataclass(frozen=True)
class _Worker:
    """What a worker gets, and does at first."""

    load: Load
    manifest: dict[str, Any]
    place: Shared

    def __call__(self) -> Callable[[Task], Shard]:
        """Load the model, and see that everything is here what it is where the call was made.

        Raises:
            InputError: the directory, the versions or the model are others.
        """
        settings, hooks = self.manifest["settings"], self.manifest["hooks"]
        self.place.check()
        self._refuse(differences(self.manifest, {"versions": libraries()}))
        try:
            model = self.load()
            check_model(model)
        except (LCHError, OSError) as error:
            raise InputError(
                f"the worker on {here()} cannot load the model: {error} Its files have to be on "
                "every machine of the cluster, at the same place."
            ) from error
        d_in = {hook: entry["d_in"] for hook, entry in hooks.items()}
        self._refuse(differences(self.manifest, record(model, d_in)))
        # Tokens come from where the call was made; SAELens wants to have seen one text.
        context_size = settings["context_size"]
        texts = Dataset.from_dict({"tokens": [[0] * context_size]})
        tokenization = {
            "prepend_bos": settings["prepend_bos"],
            "sequence_separator_token": None,
            "disable_concat_sequences": False,
            "use_chat_formatting": False,
        }
        store = store_of(model, texts, None, d_in, context_size, tokenization)
        columns = features(context_size, d_in, settings["dtype"])
        dtype = getattr(torch, settings["dtype"])
        source = Sequences(model, store, columns, settings["batch_size"], dtype)

        def work(task: Task) -> Shard:
            with attached(model, d_in), evaluating(model):
                return compute(source, self.place.directory, task)

        return work

    def _refuse(self, differing: list[str]) -> None:
        if differing:
            raise InputError(
                f"the worker on {here()} would compute something else. {' '.join(differing)} Have "
                "load make the same model, attached alike, and the same versions on all machines."
            )


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """What a disk refuses, as an error that says what to do.

    Raises:
        OutputError: in the place of another OSError.
    """
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

"""A component of a model with the inputs that it is run on, checked before work starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import xxhash

from lch_plugin.errors import InputError
from lch_plugin.files import portable
from lch_plugin.loading import LoadedModel
from lch_plugin.saes.caching.records import weights_fingerprint
from lch_plugin.saes.comparison.data import Items, Labelled, Split, prepare
from lch_plugin.saes.comparison.settings import SITES, ComparisonSettings
from lch_plugin.saes.sources.rows import Of, Rows


@dataclass(frozen=True, eq=False)
class Component:
    """One component of one model, with its inputs.

    Attributes:
        loaded: the model.
        module: name of the component.
        train, test: inputs to train on, and held out.
        d_in: dimensions of each site.
        skip: tokens at the beginning of each input that make no rows.
    """

    loaded: LoadedModel
    module: str
    train: Split
    test: Split
    d_in: Mapping[Of, int]
    skip: int

    @property
    def device(self) -> str:
        """Where the model is, and its SAEs will be."""
        return str(self.loaded.model.device)

    def rows(self, split: Split, of: Of) -> Rows:
        """Values of one site."""
        return _rows(self.loaded, split.batches, self.module, of, self.skip)

    def identity(self) -> dict[str, Any]:
        """What decides the values, in terms of JSON; not where model and data are kept."""
        return {
            "weights": weights_fingerprint(self.loaded.model),
            "dtype": str(self.loaded.model.dtype),
            "module": self.module,
            "d_in": dict(self.d_in),
            "train": _describe(self.train),
            "test": _describe(self.test),
        }

    def record(self) -> dict[str, Any]:
        """The same, with the names of things."""
        return {
            "model": portable(self.loaded.name),
            "revision": self.loaded.revision,
            "sites": {of: self.rows(self.train, of).record() for of in self.d_in},
            **self.identity(),
        }


def make_component(
    loaded: LoadedModel,
    module: str,
    train: Labelled,
    test: Labelled,
    settings: ComparisonSettings,
    *,
    whole: bool = False,
) -> Component:
    """Prepare the inputs, and run the first of them to see that every site has rows.

    Args:
        loaded: the model.
        module: name of the component.
        train, test: inputs, with the same kinds of labels.
        settings: of the comparison.
        whole: take all inputs, however many rows they have.

    Raises:
        InputError: inputs that the model cannot read, too few labels or items, or sites with
            different numbers of rows.
        SiteError, VanishingCentroidError: as `lch_plugin.huggingface.attach`.
    """
    ready = partial(
        prepare,
        loaded,
        module=module,
        skip=settings.skip,
        n_items=settings.n_items,
        seed=settings.seed,
    )
    to_train = ready(train, n_rows=None if whole else settings.n_rows)
    to_test = ready(test, n_rows=None if whole else settings.n_test_rows)
    for split, use in ((to_train, "train"), (to_test, "test")):
        for name, items in split.items.items():
            _check_items(name, items, use, settings.n_neighbours)
    for name, items in to_test.items.items():
        if not np.intersect1d(to_train.items[name].labels, items.labels).size:
            raise InputError(
                f"no label of {name!r} is both among the {len(to_train.items[name].labels)} items "
                f"to train on and the {len(items.labels)} to test on. Take more items or rows."
            )
    first = [next(iter(to_train.batches))]
    shapes = {of: next(iter(_rows(loaded, first, module, of, settings.skip))).shape for of in SITES}
    if len({n_rows for n_rows, _ in shapes.values()}) > 1:
        raise InputError(
            f"{module} has other tokens where it reads than where it writes, so that its sites "
            f"cannot be compared: { ({of: n for of, (n, _) in shapes.items()}) } rows of a batch. "
            "Choose a component that keeps tokens apart, such as an MLP, attention or a block."
        )
    d_in = {of: d for of, (_, d) in shapes.items()}
    return Component(loaded, module, to_train, to_test, d_in, settings.skip)


def _rows(loaded: LoadedModel, batches: Any, module: str, of: Of, skip: int) -> Rows:
    return Rows(loaded.model, batches, module, of=of, positions=slice(skip, None))


def _check_items(name: str, items: Items, use: str, n_neighbours: int) -> None:
    labels = np.unique(items.labels)
    if len(labels) < 2:
        raise InputError(
            f"{name!r} has {len(labels)} label(s) among the {len(items.labels)} items to {use} "
            f"on, {labels.tolist()}: there have to be two or more to tell apart. Take more rows, "
            "or another column."
        )
    if len(items.labels) <= n_neighbours:
        raise InputError(
            f"{name!r} has {len(items.labels)} items to {use} on, not enough for "
            f"n_neighbours={n_neighbours}. Take more rows, or lower it."
        )


def _describe(split: Split) -> dict[str, Any]:
    xxh3 = xxhash.xxh3_128()
    for items in split.items.values():
        xxh3.update(json.dumps(items.labels.tolist()).encode())
        xxh3.update(items.of_row.tobytes())
    for batch in split.batches if isinstance(split.batches, list) else ():  # Of texts.
        xxh3.update(batch["input_ids"].numpy().tobytes())
    return {
        "n_inputs": split.n_inputs,
        "n_rows": split.n_rows,
        "items": {
            name: {
                label: int(n)
                for label, n in zip(*np.unique(items.labels, return_counts=True), strict=True)
            }
            for name, items in split.items.items()
        },
        "fingerprint": xxh3.hexdigest(),
    }

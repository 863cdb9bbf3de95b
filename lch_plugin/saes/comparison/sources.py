"""Labelled data sets, wherever they are kept."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset

from lch_plugin.errors import InputError
from lch_plugin.saes.comparison.data import Labelled
from lch_plugin.saes.sources.texts import load_text

# Of a data set that is not split, what is held out.
_TEST_FRACTION = 0.2
# Written by `save_to_disk`; a directory without them may hold folders of images.
_SAVED = ("dataset_info.json", "dataset_dict.json")


def load_labelled(
    source: str | Path | Dataset,
    label: str,
    *,
    column: str | None = None,
    split: str = "train",
    test_split: str | None = None,
    seed: int = 0,
) -> tuple[Labelled, Labelled]:
    """Load labelled texts or images, shuffled, to train on and held out.

    A column of lists of words is joined by spaces, and a list of labels beside it has one a word.

    Args:
        source: what `lch_plugin.saes.load_text` takes, other than lists of texts; or a
            directory with a folder of images for each label.
        label: column of labels.
        column: of texts or images; ``image`` if there is one, else ``text``.
        split: to train on.
        test_split: held out, of a source with several splits; if None, a fifth of ``split``, chosen
            at random.
        seed: of the order and of that choice.

    Raises:
        InputError: the data set cannot be read, has no such split or column, or has the same rows
            for both splits.
    """
    data = _load(source, split)
    if test_split is not None:
        held_out = _load(source, test_split)
        # Of a file, or a data set that is there already, no split is chosen. (A private name of
        # `datasets`, which has no public one.)
        if held_out._fingerprint == data._fingerprint:
            raise InputError(
                f"split={split!r} and test_split={test_split!r} are the same rows, so that nothing "
                "would be held out. Leave test_split out, and a fifth is held out; or name two "
                "splits of a data set that has them."
            )
        train, test = data.shuffle(seed=seed), held_out.shuffle(seed=seed)
    elif len(data) < 2:
        raise InputError(f"{source} has {len(data)} rows, of which none can be held out.")
    else:
        parts = data.train_test_split(_TEST_FRACTION, seed=seed)
        train, test = parts["train"], parts["test"]
    name = f"{source}, {label}" if isinstance(source, str | Path) else label
    held_out = test_split or f"{_TEST_FRACTION:.0%} of {split}"
    return (
        _labelled(train, label, column, f"{name} ({split})"),
        _labelled(test, label, column, f"{name} ({held_out}, held out)"),
    )


def _load(source: str | Path | Dataset, split: str) -> Dataset:
    if isinstance(source, str | Path) and Path(source).expanduser().is_dir():
        path = Path(source).expanduser()
        if not any((path / name).exists() for name in _SAVED):
            try:
                return datasets.load_dataset(str(path), split=split)
            except Exception as error:  # Of any type, and all of them about the files.
                raise InputError(f"{path} cannot be read as a data set: {error}") from error
    data = load_text(source, split=split)
    if isinstance(data, IterableDataset):
        raise InputError("a streamed data set has no split to hold out: pass one in memory.")
    return data


def _labelled(data: Dataset, label: str, column: str | None, name: str) -> Labelled:
    column = column or ("image" if "image" in data.column_names else "text")
    for wanted in (label, column):
        if wanted not in data.column_names:
            raise InputError(
                f"the data set has no column {wanted!r}, but {data.column_names}. Name one of them."
            )
    feature = data.features[label]
    labels = list(data[label])
    names = getattr(getattr(feature, "feature", feature), "names", None)
    if names:
        labels = [_named(entry, names) for entry in labels]
    first = data[0][column]
    if isinstance(first, str):
        return Labelled(list(data[column]), {label: labels}, name)
    if isinstance(first, list):
        pairs = [_join(*pair) for pair in zip(data[column], labels, strict=True)]
        return Labelled([text for text, _ in pairs], {label: [entry for _, entry in pairs]}, name)
    images = data.select_columns([column])
    if column != "image":
        images = images.rename_column(column, "image")
    return Labelled(images, {label: labels}, name)


def _named(entry: Any, names: list[str]) -> Any:
    if isinstance(entry, list):
        return [_named(each, names) for each in entry]
    return names[entry] if isinstance(entry, int) and entry >= 0 else None


def _join(words: list[str], labels: Any) -> tuple[str, Any]:
    """A text, and its labels by the characters of each word."""
    text = " ".join(words)
    if not isinstance(labels, list):
        return text, labels
    if len(labels) != len(words):
        raise InputError(f"there are {len(labels)} labels for the words {words}.")
    ends = list(itertools.accumulate(len(word) + 1 for word in words))
    return text, [
        (end - 1 - len(word), end - 1, label)
        for word, end, label in zip(words, ends, labels, strict=True)
    ]

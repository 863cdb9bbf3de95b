"""Labelled inputs, and which rows of a component's values each label is about.

A label is about an *item*: an image, a text, a stretch of characters in a text (a word, a
sentence), or a token. An item has one or more tokens, and a component's values have a row for each
token; what an SAE says of an item is the mean of its features over the item's rows.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from reprlib import repr as shortened
from typing import Any

import numpy as np
import torch
import xxhash
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from lch_plugin.adapters.huggingface import context_length
from lch_plugin.errors import InputError
from lch_plugin.loading import LoadedModel
from lch_plugin.saes.sources.images import Images
from lch_plugin.saes.sources.rows import Rows
from lch_plugin.saes.sources.texts import is_empty

BATCH_SIZE = 32
# Of a batch of texts, padding among them.
_BATCH_TOKENS = 4096
_TEXTS_AT_ONCE = 256
# As tokenizers' users write "no label" for a token.
_NO_LABEL = (None, -100, "-100", "")


@dataclass(frozen=True)
class Labelled:
    """Inputs of a model, and what is known of them.

    Attributes:
        inputs: texts; or images, as `lch_plugin.saes.Images` takes them.
        labels: by name, for each input either one label; or, of a text, a list of
            ``(start, end, label)`` for stretches of its characters that do not overlap; or of a
            text a list with one label a token, those that the tokenizer adds left out. Labels are
            strings or integers; None and -100 mean that there is none.
        name: of the data, for the record.
        left_out: inputs that are not among these because others, to train on, are the same.

    Raises:
        InputError: no inputs, no labels, not as many labels as inputs, or among texts or images in
            a list one that is missing, empty or no text where others are.
    """

    inputs: Any
    labels: Mapping[str, Sequence[Any]]
    name: str
    left_out: int = 0

    def __post_init__(self) -> None:
        if not len(self.inputs) or not self.labels:
            raise InputError(
                f"there are {len(self.inputs)} inputs with labels {list(self.labels)}: inputs and "
                "at least one kind of label are needed."
            )
        for name, labels in self.labels.items():
            if len(labels) != len(self.inputs):
                raise InputError(
                    f"{name!r} has {len(labels)} entries for {len(self.inputs)} inputs: there has "
                    "to be one for each."
                )
        if isinstance(self.inputs, Dataset | Tensor | np.ndarray):
            return
        is_text = any(isinstance(one, str) for one in self.inputs)
        for i, one in enumerate(self.inputs):
            if is_empty(one) or isinstance(one, str) != is_text:
                raise InputError(
                    f"input {i} of {self.name or 'the inputs'} is {shortened(one)}, which is no "
                    f"{'text' if is_text else 'image'}. Leave it out, and its labels."
                )

    def first(self, n: int) -> Labelled:
        """The first ``n`` inputs with their labels."""
        return self.select(range(min(n, len(self.inputs))))

    def select(self, indices: Sequence[int]) -> Labelled:
        """Some of the inputs with their labels, in the order given."""
        inputs: Any
        if isinstance(self.inputs, Dataset):
            inputs = self.inputs.select(indices)
        elif isinstance(self.inputs, Tensor | np.ndarray):
            inputs = self.inputs[list(indices)]
        else:
            inputs = [self.inputs[i] for i in indices]
        labels = {name: [of[i] for i in indices] for name, of in self.labels.items()}
        return replace(self, inputs=inputs, labels=labels)

    def contents(self) -> list[Hashable]:
        """Of each input what is equal for two inputs that are the same.

        The same are texts without the white space around them, and images by size and pixels: those
        of a picture in RGB, as models get it. Nothing else is made alike.
        """
        is_dataset = isinstance(self.inputs, Dataset)
        inputs = (row["image"] for row in self.inputs) if is_dataset else self.inputs
        return [_content(one) for one in inputs]

    def without(self, train: Labelled) -> Labelled:
        """Those inputs that are not among the ones to train on; `left_out` counts the others.

        Raises:
            InputError: there are none.
        """
        known = set(train.contents())
        kept = [i for i, content in enumerate(self.contents()) if content not in known]
        if not kept:
            raise InputError(
                f"each of the {len(self.inputs)} inputs of {self.name} is also in {train.name}, so "
                "that nothing would be held out. Name two splits of a data set that differ; or "
                "leave test_split out, and a fifth is held out."
            )
        return replace(self.select(kept), left_out=self.left_out + len(self.inputs) - len(kept))


@dataclass(frozen=True, eq=False)
class Items:
    """The labelled items of a split.

    Attributes:
        keys: which item this is among all that the inputs have; the same for every model.
        labels: of each item.
        of_row: for each row of the values the index of its item, or -1.
    """

    keys: Int[np.ndarray, " n_items"]
    labels: np.ndarray
    of_row: Int[np.ndarray, " n_rows"]


@dataclass(frozen=True, eq=False)
class Split:
    """Inputs made ready for one model.

    Attributes:
        batches: as the model takes them; to be iterated again and again.
        n_inputs: inputs in them.
        n_rows: rows that the model's values will have.
        items: by name of the labels.
    """

    batches: Iterable[Any]
    n_inputs: int
    n_rows: int
    items: Mapping[str, Items]


def _content(one: Any) -> Hashable:
    """As `Labelled.contents`."""
    if isinstance(one, str):
        return one.strip()
    if hasattr(one, "convert"):
        one = one.convert("RGB")
    pixels = one.double().numpy(force=True) if isinstance(one, Tensor) else np.asarray(one)
    return pixels.shape, xxhash.xxh3_128_digest(pixels.tobytes())


def prepare(
    loaded: LoadedModel,
    data: Labelled,
    *,
    module: str,
    skip: int,
    n_rows: int | None,
    n_items: int,
    seed: int,
) -> Split:
    """Tokenise texts or measure images, and find the rows of every item.

    Texts begin with the tokenizer's beginning-of-sequence token if there is one, and are cut at the
    model's context.

    Args:
        loaded: a model, with the tokenizer or image processor that the inputs need.
        data: what it is to read.
        module: whose values the rows will be.
        skip: tokens at the beginning of each input that make no rows.
        n_rows: take the first inputs that have so many rows between them; all of them if None.
        n_items: take at most so many items of each kind, at random.
        seed: of that choice, which depends on the inputs and not on the model.

    Raises:
        InputError: the model cannot read such inputs, or labels do not fit the tokens.
        SiteError: there is no such module.
    """
    if isinstance(data.inputs[0], str):
        ids, ends = _tokenise(loaded, data.inputs, skip, n_rows)
        batches: Iterable[Any] = _pad(ids, loaded.processor)
    else:
        n_patches = _n_patches(loaded, data, module)
        n = len(data.inputs)
        if n_rows is not None and n_patches > skip:
            n = min(n, -(-n_rows // (n_patches - skip)))
        ends = [[_ADDED] * n_patches] * n
        batches = Images(data.first(n).inputs, loaded.processor, batch_size=BATCH_SIZE)
    rows = sum(max(0, len(tokens) - skip) for tokens in ends)
    if not rows:
        raise InputError(f"skip={skip} leaves no token of any input. Lower it.")
    items = {
        name: _items(name, labels[: len(ends)], ends, skip, n_items, seed)
        for name, labels in data.labels.items()
    }
    return Split(batches, len(ends), rows, items)


# In place of where a token ends in its text: a token that the tokenizer added, or a patch.
_ADDED = -1


def _n_patches(loaded: LoadedModel, data: Labelled, module: str) -> int:
    """Tokens of an image at a module, those that are no patches among them."""
    if loaded.model.main_input_name != "pixel_values":
        raise InputError(
            f"{loaded.name} reads {loaded.model.main_input_name}, and the inputs are no texts. "
            "Give texts as strings, or a model of images."
        )
    first = Images(data.first(1).inputs, loaded.processor, batch_size=1)
    (rows,) = Rows(loaded.model, first, module, of="output")
    return len(rows)


def _tokenise(
    loaded: LoadedModel, texts: Sequence[str], skip: int, n_rows: int | None
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of each text, and where in it each token ends."""
    tokenizer, n_ctx = loaded.processor, context_length(loaded.model)
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.is_fast:
        raise InputError(
            f"{loaded.name} has a {type(tokenizer).__name__} beside it: labels of texts need a "
            "fast tokenizer of transformers, which says where in the text its tokens are."
        )
    ids, ends, total = [], [], 0
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        encoded = tokenizer(
            list(texts[start : start + _TEXTS_AT_ONCE]),
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            truncation=n_ctx is not None,
            max_length=n_ctx,
            verbose=False,
        )
        fields = ("input_ids", "offset_mapping", "special_tokens_mask")
        for tokens, offsets, added in zip(*(encoded[field] for field in fields), strict=True):
            own = [_ADDED if a else end for (_, end), a in zip(offsets, added, strict=True)]
            bos = tokenizer.bos_token_id
            if bos is not None and tokens[:1] != [bos]:
                tokens, own = [bos, *tokens][:n_ctx], [_ADDED, *own][:n_ctx]
            ids.append(tokens)
            ends.append(own)
            total += max(0, len(tokens) - skip)
            if n_rows is not None and total >= n_rows:
                return ids, ends
    return ids, ends


def _pad(ids: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Tensor]]:
    """Batches, padded on the right: models with learned positions count them from the left."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    batches = []
    for texts in _chunks(ids):
        chunk = [torch.tensor(tokens) for tokens in texts]
        mask = [torch.ones_like(tokens) for tokens in chunk]
        batches.append(
            {
                "input_ids": pad_sequence(chunk, batch_first=True, padding_value=pad),
                "attention_mask": pad_sequence(mask, batch_first=True),
            }
        )
    return batches


def _chunks(ids: list[list[int]]) -> Iterator[list[list[int]]]:
    """Neighbours, so many that one long text does not make padding of most of a batch."""
    chunk: list[list[int]] = []
    longest = 0
    for tokens in ids:
        longest = max(longest, len(tokens))
        if chunk and (len(chunk) == BATCH_SIZE or (len(chunk) + 1) * longest > _BATCH_TOKENS):
            yield chunk
            chunk, longest = [], len(tokens)
        chunk.append(tokens)
    if chunk:
        yield chunk


def _items(
    name: str, labels: Sequence[Any], ends: list[list[int]], skip: int, n_items: int, seed: int
) -> Items:
    """The labelled items with rows, at most so many, and where their rows are."""
    known: list[Any] = []
    key_of_row: list[int] = []
    for i, (entry, tokens) in enumerate(zip(labels, ends, strict=True)):
        try:
            found, of_token = _assign(entry, tokens)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name!r} of input {i}: {error}") from error
        key_of_row += [len(known) + item if item >= 0 else -1 for item in of_token[skip:]]
        known += found
    of_row = np.array(key_of_row)
    # What differs from itself is NaN, as which tables keep an empty cell.
    usable = np.array([x not in _NO_LABEL and x == x for x in known], dtype=bool)
    usable &= np.isin(np.arange(len(known)), of_row)
    order = np.random.default_rng(seed).permutation(len(known))
    keys = np.sort(order[usable[order]][:n_items])
    index = np.full(len(known) + 1, -1)  # One more, for rows of no item.
    index[keys] = np.arange(len(keys))
    return Items(keys, np.array([str(known[key]) for key in keys]), index[of_row])


def _assign(entry: Any, ends: list[int]) -> tuple[list[Any], list[int]]:
    """The labels of one input, and for each of its tokens which of them it has, or -1."""
    if not isinstance(entry, list | tuple | np.ndarray):
        return [entry], [0] * len(ends)
    labels = list(entry)
    if labels and all(isinstance(label, list | tuple) for label in labels):
        spans = sorted((int(start), int(stop), label) for start, stop, label in labels)
        starts, stops = [s[0] for s in spans], [s[1] for s in spans]
        if any(start < stop for start, stop in zip(starts[1:], stops, strict=False)):
            raise ValueError("two of its stretches of characters overlap.")
        # The span in which a token ends: tokens begin with the space before a word.
        found = [bisect_left(starts, end) - 1 for end in ends]
        return [s[2] for s in spans], [
            i if i >= 0 and end <= stops[i] else -1 for i, end in zip(found, ends, strict=True)
        ]
    numbers = itertools.accumulate((end != _ADDED for end in ends), initial=0)
    of_token = [n if end != _ADDED else -1 for n, end in zip(numbers, ends, strict=False)]
    n_own = sum(end != _ADDED for end in ends)
    if len(labels) < n_own:
        raise ValueError(
            f"there are {len(labels)} labels for {n_own} tokens. Give one a token of this model's "
            "tokenizer, or (start, end, label) for stretches of characters."
        )
    return labels, of_token

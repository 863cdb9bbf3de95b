"""Values of a component on disk, to be read again and again without holding them in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lch_plugin.errors import InputError
from lch_plugin.progress import Advance
from lch_plugin.saes.comparison.data import Items
from lch_plugin.saes.sources.rows import Rows

# Rows read at once: neighbours on disk, mixed with others by SAELens' buffer.
_BLOCK = 1024


class StoredValues:
    """Rows of float32 in a ``.npy`` file, mapped into memory.

    Iterating gives them in blocks: in the order of the file, or in another order each time around,
    if there is a seed. The same seed gives the same orders.
    """

    def __init__(self, path: Path, seed: int | None = None) -> None:
        """Open a file; nothing is read yet."""
        self.path, self.seed = path, seed
        self.rows = np.load(path, mmap_mode="r")
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Float[Tensor, "_ d_in"]]:
        n_blocks = -(-len(self.rows) // _BLOCK)
        order = torch.arange(n_blocks)
        if self._generator is not None:
            order = torch.randperm(n_blocks, generator=self._generator)
        for i in order.tolist():
            yield torch.from_numpy(np.array(self.rows[i * _BLOCK : (i + 1) * _BLOCK]))


def store_values(rows: Rows, path: Path, n_rows: int, advance: Advance = lambda n: None) -> None:
    """Run a model and write the rows of one of its components.

    Args:
        rows: of the component.
        path: file to make.
        n_rows: how many there will be.
        advance: called with the number of rows of each batch that is written.

    Raises:
        InputError: there are more or fewer.
    """
    end = 0
    # Written and not mapped: a disk that is full then is an error, and not the end of the process.
    with path.open("wb") as file:
        for batch in rows:
            values = batch.float().cpu().numpy()
            if not end:
                np.lib.format.write_array_header_1_0(
                    file,
                    {
                        "descr": np.lib.format.dtype_to_descr(values.dtype),
                        "fortran_order": False,
                        "shape": (n_rows, values.shape[1]),
                    },
                )
            end += len(values)
            if end > n_rows:
                break
            file.write(np.ascontiguousarray(values).data)
            advance(len(values))
    if end != n_rows:
        raise InputError(
            f"{rows.module}: its {rows.of} has {end} rows or more where {n_rows} were expected. "
            "Every token that the model reads has to have one, and images as many each."
        )


def item_means(
    values: StoredValues,
    items: Items,
    encode: Callable[[Float[Tensor, "_ d_in"]], Float[Tensor, "_ d"]],
) -> Float[np.ndarray, "n_items d"]:
    """Of each item the mean over its rows of what ``encode`` makes of them."""
    wanted = np.flatnonzero(items.of_row >= 0)
    of_row = torch.from_numpy(items.of_row[wanted])
    total: Tensor | None = None
    for start in range(0, len(wanted), _BLOCK):
        chunk = slice(start, start + _BLOCK)
        encoded = encode(torch.from_numpy(values.rows[wanted[chunk]])).float().cpu()
        if total is None:
            total = torch.zeros(len(items.keys), encoded.shape[1])
        total.index_add_(0, of_row[chunk], encoded)
    assert total is not None  # Items have rows.
    counts = torch.bincount(of_row, minlength=len(items.keys))
    return (total / counts[:, None]).numpy()

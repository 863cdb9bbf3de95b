"""Reading what a .gguf file says once, for us and for transformers.

``gguf.GGUFReader`` walks a vocabulary string by string, and transformers makes three more of them
for one model. So while a file is loaded, the two public names of ``gguf`` whose calls cost most
give what is known already: the reader of this very file, and the names of tensors, which
transformers asks for once a module. A version of transformers that does not look there reads on its
own, more slowly and to the same end.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# One load at a time: each puts back what it found.
_turn = threading.Lock()


class FastReader(gguf.GGUFReader):
    """The same, over a plain array: every slice of a memory map runs Python code of numpy's."""

    @property
    def data(self) -> Any:
        """The bytes of the file, mapped as before."""
        return self._data

    @data.setter
    def data(self, mapped: Any) -> None:
        self._data = mapped.view(np.ndarray)


@contextmanager
def read_once(path: Path) -> Iterator[Any]:
    """Read a file; within the block, whoever reads it gets the same reader.

    Raises:
        OSError, ValueError, KeyError, IndexError: it is no whole .gguf file.
    """
    reader = FastReader(path)

    def shared(asked: Any, mode: Any = "r") -> Any:
        is_ours = mode == "r" and Path(asked).resolve() == path.resolve()
        return reader if is_ours else stock[0](asked, mode)

    with _turn:
        stock = gguf.GGUFReader, gguf.get_tensor_name_map
        names = functools.cache(gguf.get_tensor_name_map)
        vars(gguf).update(GGUFReader=shared, get_tensor_name_map=names)
        try:
            yield reader
        finally:
            vars(gguf).update(GGUFReader=stock[0], get_tensor_name_map=stock[1])

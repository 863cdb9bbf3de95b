"""Whether a model's weights fit into memory, asked before they are read.

Only what is certain is refused: weights that alone are more than what is free. Activations, graphs
and centroids come on top.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path

import psutil
import torch
from safetensors import safe_open

from lch_plugin.errors import InputError

_GB = 1e9


def count_weights(files: Iterable[Path]) -> tuple[int, int]:
    """Numbers and bytes in files of safetensors, from their headers alone."""
    n = n_bytes = 0
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  It is no dict.
                tensor = tensors.get_slice(key)
                count = prod(tensor.get_shape())
                n += count
                n_bytes += count * _itemsize(tensor.get_dtype())
    return n, n_bytes


def check_memory(name: str, n: int, n_bytes: int, device: torch.device) -> None:
    """Refuse a model whose weights cannot fit.

    They are read into the machine's memory first, also those for a GPU.

    Args:
        name: of the model.
        n: how many numbers its weights are.
        n_bytes: how many bytes they take, in the dtype that is wanted.
        device: where they go in the end.

    Raises:
        InputError: they take more than is free.
    """
    places = {"of memory": psutil.virtual_memory().available}
    if device.type == "cuda":
        places[f"on {device}"] = torch.cuda.mem_get_info(device)[0]
    for where, free in places.items():
        if n_bytes > free:
            half = f"dtype='bfloat16' ({2 * n / _GB:.1f} GB), " if n_bytes > 2 * n else ""
            raise InputError(
                f"the weights of {name} take {n_bytes / _GB:.1f} GB, and {free / _GB:.1f} GB "
                f"{where} are free. Give {half}device_map='auto' where there are several devices, "
                "or a smaller model."
            )


def _itemsize(dtype: str) -> int:
    """Bytes of a number, by safetensors' name of its type, such as BF16 or F8_E4M3."""
    digits = dtype.partition("_")[0].lstrip("BFIUOLC")
    return max(1, int(digits) // 8) if digits.isdigit() else 1

"""Options that several commands have, the same everywhere, and what a value of each kind may be.

Values are looked at as the command line is parsed: nothing is loaded or written for a wrong one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from lch_plugin.errors import InputError
from lch_plugin.names import did_you_mean

if TYPE_CHECKING:
    from lch_plugin.cluster import Cluster

T = TypeVar("T", str, Path, None)

#: More than any disk holds, and still a number that every library can count to.
MOST = 10**12
#: Bounds of numbers, for `typer.Option`.
COUNT: dict[str, Any] = {"min": 1, "max": MOST}
COUNT_OR_NONE: dict[str, Any] = {"min": 0, "max": MOST}
#: Of a file of a cache, by default.
SHARD_SIZE = "500MB"
#: What torch, numpy and scikit-learn all take.
SEED: dict[str, Any] = {"min": 0, "max": 2**32 - 1}


def above_zero(value: float | None) -> float | None:
    """Of an option, a number above 0; NaN and infinity are not."""
    if value is not None and not 0 < value <= MOST:
        raise typer.BadParameter(f"{value} is no number above 0 and up to {MOST:g}: give one.")
    return value


def zero_or_more(value: float | None) -> float | None:
    """Of an option, a number that is not negative, NaN or infinite."""
    if value is not None and not 0 <= value <= MOST:
        raise typer.BadParameter(f"{value} is no number from 0 to {MOST:g}: give one.")
    return value


def one_of(*names: str) -> Callable[[str], str]:
    """Of an option, one of these names."""

    def check(value: str) -> str:
        if value not in names:
            raise typer.BadParameter(f"{value!r} is unknown. {did_you_mean(value, names)}")
        return value

    return check


def n_bytes(value: str) -> str:
    """Of an option, a size of files."""
    if value == SHARD_SIZE:
        return value
    from datasets.utils.py_utils import convert_file_size_to_int

    try:
        is_size = 0 < convert_file_size_to_int(value) <= MOST * 1000
    except ValueError:
        is_size = False
    if not is_size:
        raise typer.BadParameter(f"{value!r} is no size of a file: give such as 500MB or 2GiB.")
    return value


def source(value: T) -> T:
    """Of an option, a path or a name: one that can be looked for."""
    try:
        Path(value or "").expanduser().exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise typer.BadParameter(
            f"{str(value)!r} can be neither a path nor a name: {error}. Give another."
        ) from error
    return value


def directory(value: Path) -> Path:
    """Of an option, a directory that can be made, with ~ in full."""
    try:
        if value.resolve().name:
            return value.expanduser()
        reason = "it is where all paths begin."
    except (OSError, ValueError, RuntimeError) as error:
        reason = f"{error}."
    raise typer.BadParameter(f"{str(value)!r} cannot be made: {reason} Give another path.")


def device_here(value: str) -> str:
    """Of an option, a device that tensors can live on, on this machine."""
    if value == "cpu":
        return value  # As by default, and no reason to wait for torch.
    from lch_plugin.devices import check_device

    try:
        check_device(value)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    return value


def dtype_of_weights(value: str | None) -> str | None:
    """Of an option, a floating-point type of torch that a model can have."""
    if value is not None:
        import torch

        dtype = getattr(torch, value.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
            raise typer.BadParameter(
                f"{value!r} is no type that weights can have: give float32, bfloat16, float16 or "
                "float64."
            )
    return value


Model = Annotated[
    str,
    typer.Option(
        help="Name on the hub, local directory, or .gguf file; the embedded one if none.",
        callback=source,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16...; the checkpoint's by default.", callback=dtype_of_weights
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps...", callback=device_here)]
Seed = Annotated[int, typer.Option(help="Of everything random.", **SEED)]


def head_of_ray(value: str | None) -> str | None:
    """Of an option, where the head of a Ray cluster may be."""
    from lch_plugin.cluster import Cluster

    try:
        Cluster(value)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    return value


Workers = Annotated[
    int | None,
    typer.Option(help="Processes of a Ray cluster to run on, in place of this one.", **COUNT),
]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Head of the cluster; Ray is started on this machine if none.",
        callback=lambda value: value and head_of_ray(value),
    ),
]
LearningRate = Annotated[float, typer.Option(help="Learning rate.", callback=above_zero)]
Out = Annotated[Path, typer.Option(help="Directory to make.", callback=directory)]


def cluster(ray: str | None, workers: int | None, device: str) -> Cluster | None:
    """Where ``--ray`` and ``--workers`` say that work runs; on a GPU each, if it is for GPUs."""
    from lch_plugin.cluster import Cluster

    if ray is None and workers is None:
        return None
    return Cluster(ray, workers or 2, num_gpus=float(device.startswith("cuda")))

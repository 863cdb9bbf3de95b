"""What an SAE can read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sae_lens import SAE, Transcoder
from torch import Tensor

from lch_plugin.errors import InputError


@contextmanager
def heads_joined(sae: SAE[Any]) -> Iterator[None]:
    """While open, an SAE reads and writes rows in which heads are joined.

    Those that SAELens has for ``hook_z`` expect them apart and join them themselves.
    """
    joins = sae.cfg.reshape_activations == "hook_z"
    if joins:
        sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        if joins:
            sae.turn_on_forward_pass_hook_z_reshaping()


def check_dictionary(sae: Any) -> None:
    """Refuse what has no directions that it both reads and writes.

    Raises:
        InputError: no SAE of SAELens, or a transcoder.
    """
    if not isinstance(sae, SAE) or isinstance(sae, Transcoder):
        raise InputError(
            f"sae is a {type(sae).__name__}. A feature is a direction that an SAE both reads and "
            "writes: pass one of SAELens', such as SAE.load_from_disk(...)."
        )


def check_width(name: str, d_in: int, found: int) -> None:
    """Refuse an SAE that does not fit what it is to read."""
    if d_in != found:
        raise InputError(f"sae.d_in={d_in}, but {name} has {found} dimensions. Set d_in={found}.")


def check_rows(sae: SAE[Any], batch: Tensor) -> None:
    """Refuse rows that an SAE cannot read.

    Raises:
        InputError: not a floating-point matrix of the SAE's width.
    """
    if batch.ndim != 2 or batch.shape[-1] != sae.cfg.d_in or not batch.is_floating_point():
        raise InputError(
            f"rows of shape {tuple(batch.shape)} and dtype {batch.dtype}: this SAE reads "
            f"floating-point rows of shape (n, {sae.cfg.d_in})."
        )

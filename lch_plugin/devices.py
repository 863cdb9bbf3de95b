"""Where tensors can live on this machine."""

from __future__ import annotations

import torch

from lch_plugin.errors import InputError


def check_device(device: str | torch.device) -> torch.device:
    """A device, tried before any work starts.

    Raises:
        InputError: tensors cannot live there.
    """
    try:
        found = torch.zeros(1, device=device)
        found.item()
    except Exception as error:  # Each kind of device has its own.
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(
            f"device={str(device)!r} cannot be used here: {reason}. Use device='cpu', or one that "
            "this PyTorch was built for."
        ) from error
    return found.device

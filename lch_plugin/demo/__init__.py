"""A small GPT-2, trained on generated text, that ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lch_plugin.adapters.transformer_lens import TransformerBridge

DEMO_MODEL_DIR = Path(__file__).parent / "model"


def load_demo_model(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> TransformerBridge:
    """Load the demo model into TransformerLens, without a network."""
    from lch_plugin.adapters.transformer_lens import TransformerBridge

    return TransformerBridge.boot_transformers(str(DEMO_MODEL_DIR), device=device, dtype=dtype)

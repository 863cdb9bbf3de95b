"""What of TransformerLens is used, on versions 3 and 4: the one module that imports it.

Version 4 has no HookedTransformer. Its name stands for a class there that nothing is an instance
of, so that whoever asks whether a model is one needs no version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from transformer_lens.hook_points import HookPoint, LensHandle
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformer_lens.model_bridge.generalized_components import MLPBridge, MoEBridge
from transformer_lens.tools.analysis import JacobianLens

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer, loading_from_pretrained
    from transformer_lens.components import MLP as HookedMLP
    from transformer_lens.components import GatedMLP as HookedGatedMLP
else:
    try:
        from transformer_lens import HookedTransformer, loading_from_pretrained
        from transformer_lens.components import MLP as HookedMLP
        from transformer_lens.components import GatedMLP as HookedGatedMLP
    except ImportError:
        loading_from_pretrained = None

        class HookedTransformer:
            """TransformerLens 4 has none."""

        class HookedMLP:
            """TransformerLens 4 has none."""

        class HookedGatedMLP:
            """TransformerLens 4 has none."""


__all__ = [
    "HookPoint",
    "HookedGatedMLP",
    "HookedMLP",
    "HookedTransformer",
    "JacobianLens",
    "LensHandle",
    "LensModel",
    "MLPBridge",
    "MoEBridge",
    "StopAtLayerException",
    "TransformerBridge",
    "loading_from_pretrained",
]

#: The models that TransformerLens has, SAELens' subclasses included.
LensModel: TypeAlias = TransformerBridge | HookedTransformer

"""Models of every toolkit, and what tests of attaching share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lch_plugin.adapters.transformer_lens.toolkit import HookedTransformer
from tests import models

NAMES = [f"blocks.{layer}.mlp.hook_centroid" for layer in range(models.N_LAYERS)]


BACKENDS: dict[str, Callable[..., Any]] = {
    "TransformerBridge": lambda **kw: models.bridge("gpt2", **kw),
    "SAETransformerBridge": models.sae_bridge,
    "HookedTransformer": models.hooked,
    "HookedSAETransformer": models.hooked_sae_transformer,
}


IDS = models.tokens()


def cached(model: Any, names: Any = None, ids: Tensor = IDS, **kw: Any) -> Any:
    return model.run_with_cache(ids, names_filter=names or NAMES, **kw)[1]


def pre_activation_name(model: Any) -> str:
    """SAELens' bridge lists canonical names alone, without TransformerLens' aliases."""
    hooked = isinstance(model, HookedTransformer)
    return "blocks.1.mlp.hook_pre" if hooked else "blocks.1.mlp.in.hook_out"


def snapshot(model: Any) -> dict[str, Any]:
    """Everything attaching could disturb, by identity where there is one."""
    return {
        "hook_dict": {k: id(v) for k, v in model.hook_dict.items()},
        "modules": [(name, id(m)) for name, m in model.named_modules()],
        "attributes": {
            name: {k for k in vars(m) if k != "_fired_hook_out"}
            for name, m in model.named_modules()
        },
        "hooks": {
            name: (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks))
            for name, m in model.named_modules()
        },
        "registries": {
            name: set(vars(m)["_hook_registry"])
            for name, m in model.named_modules()
            if "_hook_registry" in vars(m)
        },
        "state": {k: (id(v.untyped_storage()), v._version) for k, v in model.state_dict().items()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
    }

"""Models, and gradients taken outside the package, that tests of sites share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens.toolkit import HookedTransformer
from lch_plugin.sites import Site
from tests import models

IDS = models.tokens(batch=2, pos=6)


F64 = torch.float64


BUILDS: dict[str, Callable[[], Any]] = {
    "bridge-gpt2": lambda: models.bridge("gpt2", F64),
    "hooked-gpt2": lambda: models.hooked(F64),
    "bridge-llama": lambda: models.bridge("llama", F64),
    "bridge-gemma2": lambda: models.bridge("gemma2", F64),
    "bridge-gpt_neox": lambda: models.bridge("gpt_neox", F64),
}


@cache
def built(name: str) -> Any:
    """Built once: every test leaves a model as it found it."""
    return BUILDS[name]()


def read(model: Any, *sites: Site, ids: Tensor = IDS, **kw: Any) -> dict[str, Tensor]:
    """Centroids of sites by hook name, as a user without gradients gets them."""
    with lch.attach(model, site=sites), torch.no_grad():
        return dict(model.run_with_cache(ids, names_filter=lambda n: "hook_centroid" in n, **kw)[1])


def names(model: Any) -> dict[str, str]:
    """Hook points of a component's input and output."""
    if isinstance(model, HookedTransformer):
        return {
            "resid_pre": "blocks.{}.hook_resid_pre",
            "resid_post": "blocks.{}.hook_resid_post",
            "attn_out": "blocks.{}.hook_attn_out",
            "mlp_out": "blocks.{}.hook_mlp_out",
            "embed": "hook_embed",
        }
    return {
        "resid_pre": "blocks.{}.hook_in",
        "resid_post": "blocks.{}.hook_out",
        "attn_out": "blocks.{}.attn.hook_out",
        "mlp_out": "blocks.{}.mlp.hook_out",
        "embed": "embed.hook_out",
    }


def graph(model: Any, ids: Tensor = IDS, **kw: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Every hook point's value within one graph, and the logits: the truth to differentiate."""
    values: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        values[hook.name] = value

    with torch.enable_grad():
        logits = model.run_with_hooks(ids, fwd_hooks=[(lambda name: True, keep)], **kw)
    return values, logits


def gradient(y: Tensor, x: Tensor, v: Tensor | None = None) -> Tensor:
    v = torch.ones_like(y) if v is None else v.to(y).expand_as(y)
    return torch.autograd.grad(y, x, v, retain_graph=True)[0]


def assert_close(value: Tensor, truth: Tensor, tolerance: float = 1e-10) -> None:
    assert value.shape == truth.shape
    assert models.relative_error(value, truth) < tolerance


def tolerance(model: Any) -> float:
    """HuggingFace's RMS norms compute in float32, and so do their gradients."""
    return 1e-6 if "RMS" in type(getattr(model, "ln_final", None)).__name__ else 1e-10


def held(layers: Any = None, index: Any = 0, **kw: Any) -> Site:
    """Heads with their patterns held."""
    return Site("head", layers, index, linearization="detached", **kw)


def causal_block() -> Callable[[Tensor], Tensor]:
    """Block 1 of the HuggingFace model, with the mask that the whole model would give it."""
    block = models.huggingface("gpt2", F64).transformer.h[1]

    def run(x: Tensor) -> Tensor:
        later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        mask = torch.zeros(later.shape, dtype=F64).masked_fill(later, torch.finfo(F64).min)
        return block(x, attention_mask=mask[None, None])

    return run


SITES = (Site("attn"), Site("block"), Site("span", (0, 2)), Site("model"), Site("mlp"))


def read_names(model: Any, hook_names: list[str]) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(model.run_with_cache(IDS, names_filter=hook_names)[1])

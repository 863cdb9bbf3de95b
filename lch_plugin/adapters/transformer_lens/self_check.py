"""Prove on three tokens that every site is what it is taken for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from lch_plugin.adapters.transformer_lens.sites import CentroidSite, LensModel
from lch_plugin.errors import SiteError
from lch_plugin.mlp import mlp_centroid

# Largest relative distance between the closed form and autograd that is accepted: well above
# rounding, and far below what a wrong activation or layout gives.
_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


def self_check(model: LensModel, sites: Sequence[CentroidSite]) -> None:
    """Compare every site's closed form with autograd through the model's own MLP.

    Three tokens run through the model, in evaluation mode, with all hooks on hook points silenced:
    those belong to the user's own forward passes. Of an attached site, what its hook point gives is
    compared too.

    Gradients are on only between an MLP's entry and its exit. So one forward pass serves all
    sites, and no module outside sees a tensor with a graph (a bridge that kept one could no
    longer be deep-copied).

    Raises:
        SiteError: a site is not run, or computes something other than its closed form.
    """
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Any] = {}
    centroids: dict[int, Tensor] = {}

    def enter(layer: int, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        torch.set_grad_enabled(True)
        inputs[layer] = args[0].detach().requires_grad_()
        return (inputs[layer], *args[1:])

    def leave(layer: int, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        torch.set_grad_enabled(False)
        outputs[layer] = output
        return output.detach() if isinstance(output, Tensor) else output

    def listen(layer: int, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        centroids[layer] = output

    device = next(model.parameters()).device
    tokens = torch.arange(3, device=device)[None] % model.cfg.d_vocab
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        _evaluating(model),
        _silenced(model),
    ):
        hooks = [
            hook
            for s in sites
            for hook in (
                s.entry.register_forward_pre_hook(partial(enter, s.layer)),
                s.exit.register_forward_hook(partial(leave, s.layer)),
            )
        ]
        hooks += [
            s.point.register_forward_hook(partial(listen, s.layer)) for s in sites if s.installed
        ]
        try:
            model(tokens, return_type=None)
        finally:
            for hook in hooks:
                hook.remove()
        for s in sites:
            _compare(s, inputs.get(s.layer), outputs.get(s.layer), centroids.get(s.layer))


def _compare(site: CentroidSite, x: Tensor | None, y: Any, hooked: Tensor | None) -> None:
    kind = type(site.component).__name__
    if x is None or not isinstance(y, Tensor) or (site.installed and hooked is None):
        raise SiteError(
            f"self-check of {site.name}: a forward pass of three tokens did not run this {kind} "
            "the way its closed form expects (its input, pre-activations or output never passed "
            "the hook points). Pass layers=[...] without it."
        )
    v = torch.ones_like(y) if site.cotangent is None else site.cotangent.to(y).expand_as(y)
    (truth,) = torch.autograd.grad(y, x, v)
    mlp = site.weights
    closed = mlp_centroid(mlp, mlp.pre_activations(x), site.cotangent)
    tolerance = _TOLERANCE[x.dtype]
    for mu in (closed,) if hooked is None else (closed, hooked):
        error, norm = float((mu - truth.to(mu)).norm()), float(truth.to(mu).norm())
        if not error <= tolerance * norm:  # Not `>`: NaN has to fail as well.
            raise SiteError(
                f"self-check of {site.name}: the closed form and autograd through this {kind} are "
                f"{error:.1e} apart, at a norm of {norm:.1e}; {tolerance:.0e} of it is allowed in "
                f"{x.dtype}. The {kind} computes something other than a plain or gated MLP, or a "
                "hook on one of its modules changes what it does. Pass layers=[...] without it."
            )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, no random numbers), each module restored to its own mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _silenced(model: nn.Module) -> Iterator[None]:
    """No hook on any hook point fires inside."""
    points = [module for module in model.modules() if isinstance(module, HookPoint)]
    saved = [(point._forward_hooks, point._backward_hooks) for point in points]
    for point in points:
        point._forward_hooks, point._backward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for point, (forward, backward) in zip(points, saved, strict=True):
            point._forward_hooks, point._backward_hooks = forward, backward

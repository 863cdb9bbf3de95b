"""The leading singular triples of a component's Jacobian: what it listens to, and what it says."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lch_plugin.adapters.states import without_autocast
from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.errors import InputError
from lch_plugin.lens.asked import indices, one_prompt, text
from lch_plugin.lens.components import component_map
from lch_plugin.lens.passes import ResidualPass
from lch_plugin.linear_maps import LinearMap, graphs_that_last
from lch_plugin.mlp import at_least_float32
from lch_plugin.sites import Site

# Directions beside those that are wanted: the iteration converges by what it leaves out.
_OVERSAMPLING = 8
_MAX_ITERATIONS = 60


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum:
    """``J = sum_i s_i u_i v_i^T``, the terms with the largest ``s_i``.

    Attributes:
        values: ``s``, the largest first.
        inputs: ``v``, of norm 1 over all positions together.
        outputs: ``u``, of norm 1; of all positions together if no one position was asked for.
        coefficients: ``v . x``, how much of ``v`` the prompt has in what the component reads. Signs
            are such that it is not negative. With a detached site ``sum_i s_i (v_i . x) u_i`` is
            the part of the output that these terms write.
        residual: the largest ``|J v - s u| / s``, 0 of exact triples.
        position: of the outputs; None for all.
        prompt: texts of the prompt's tokens.
    """

    values: Float[Tensor, " k"]
    inputs: Float[Tensor, "k pos d_in"]
    outputs: Float[Tensor, "k ..."]
    coefficients: Float[Tensor, " k"]
    residual: float
    position: int | None
    prompt: tuple[str, ...]
    _model: LensModel = field(repr=False)
    _ids: Int[Tensor, "1 pos"] = field(repr=False)
    _site: Site = field(repr=False)

    def reads(self, i: int, k: int = 5) -> tuple[str, list[str]]:
        """Where the prompt ``v_i`` is largest, and the tokens whose embeddings it fits best there.

        Embeddings are what the residual stream before the first block is made of. Later it has
        drifted from them, and the tokens are a hint.

        Args:
            i: which triple.
            k: how many tokens.

        Returns:
            The prompt's token at that position, and those of the vocabulary by ``W_E v``.

        Raises:
            InputError: the component does not read vectors of the residual stream's size.
        """
        v = self.inputs[i]
        at = int(v.norm(dim=-1).argmax())
        W_E = self._model.W_E.detach()
        if W_E.shape[-1] != v.shape[-1]:
            raise InputError(f"inputs of {v.shape[-1]} numbers are not in the space of embeddings.")
        found = (W_E.to(v) @ v[at]).topk(k).indices.tolist()
        return self.prompt[at], [text(self._model, j) for j in found]

    @graphs_that_last()
    def writes(self, i: int, k: int = 5) -> list[str]:
        """The tokens whose logits ``u_i`` raises most, by the final norm frozen on this prompt.

        Args:
            i: which triple.
            k: how many tokens.

        Raises:
            InputError: all positions were asked for at once, or the component does not write to the
                residual stream.
        """
        if self.position is None:
            raise InputError("outputs of all positions together: ask for the spectrum of one.")
        u = self.outputs[i]
        if self._site.kind != "model":
            if self._site.of_kind.residual is None or self._site.kind == "neuron":
                raise InputError(f"a {self._site.kind} does not write to the residual stream.")
            run = ResidualPass(self._model, self._ids, "detached")
            last = len(run.streams) - 1
            x = torch.zeros_like(run.streams[last])
            x.reshape(run.n_pos, -1)[self.position] = u.to(x)
            u = run.span([self.position]).push(x[None], last)[0, 0]
        return [text(self._model, j) for j in u.topk(k).indices.tolist()]

    def __repr__(self) -> str:
        return f"Spectrum({', '.join(f'{s:.3g}' for s in self.values.tolist())})"


@without_autocast()
@graphs_that_last()
def spectrum(
    model: LensModel,
    site: Site,
    tokens: str | Int[Tensor, "*one pos"],
    k: int = 8,
    *,
    position: int | None = -1,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Spectrum:
    """The largest singular values of a component's Jacobian on a prompt, and their vectors.

    By randomised subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061), with products
    from both sides, ``J d`` and ``J^T v``: the Jacobian is never written out.

    Args:
        model: TransformerBridge or HookedTransformer.
        site: one component; ``linearization="detached"`` for its exact affine map.
        tokens: text, or the ids of one prompt without padding.
        k: how many.
        position: whose output counts, for all of the prompt as input; None for all outputs.
        tolerance: of ``|J v - s u| / s``; the error of a singular value is of the order of its
            square. After 60 iterations it is taken as it is: see `Spectrum.residual`.
        seed: of the directions it starts from.

    Raises:
        InputError: no such prompt or position, or k below 1 or more than the map has.
        SiteError: no such component.

    Example:
        >>> site = lch.Site("span", (1, 2), linearization="detached")
        >>> found = lch.spectrum(lch.load_demo_model(), site, "Tom saw an apple", k=3)
        >>> found.values.shape, found.outputs.shape
        (torch.Size([3]), torch.Size([3, 128]))
    """
    ids = one_prompt(model, tokens)
    at = None if position is None else indices(position, ids.shape[1], "position")[0]
    whole = component_map(model, site, ids)
    x = whole.xs[0]
    # OPT joins batch and position in what an MLP reads and writes.
    y = whole.y.reshape(*ids.shape, -1)
    found = LinearMap(y if at is None else y[0, at], [x])
    smallest = min(x.numel(), found.y.numel())
    if not 1 <= k <= smallest:
        raise InputError(f"k={k} must be from 1 to {smallest}, the singular values that there are.")
    s, u, v, residual = _leading(found, k, min(k + _OVERSAMPLING, smallest), tolerance, seed)
    values = x.detach().to(v).flatten()
    sign = torch.where(v @ values < 0, -1.0, 1.0).to(v)[:, None]
    u, v = u * sign, v * sign
    return Spectrum(
        values=s,
        inputs=v.reshape(k, ids.shape[1], -1),
        outputs=u.reshape(k, *(ids.shape[1:] if at is None else ()), -1),
        coefficients=v @ values,
        residual=residual,
        position=at,
        prompt=tuple(text(model, i) for i in ids[0].tolist()),
        _model=model,
        _ids=ids,
        _site=site,
    )


def _leading(
    J: LinearMap, k: int, n: int, tolerance: float, seed: int
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Singular values and both vectors, as rows, and how far they are from being exact.

    Each turn takes the span of ``J v`` for the best ``n`` directions so far, and in it the exact
    triples of ``J`` projected onto it; then ``J^T u = s v``, and ``J v - s u`` is what is missing.
    """
    x, y = J.xs[0], J.y
    dtype = at_least_float32(x)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(x.numel(), n, generator=generator, dtype=torch.float64)
    v = torch.linalg.qr(start.to(x.device, dtype)).Q.T
    s = u = None
    residual = float("inf")
    for _ in range(_MAX_ITERATIONS):
        pushed = J.push(v.reshape(n, *x.shape)).reshape(n, -1).to(dtype)
        if s is not None and u is not None:
            off = (pushed - s[:, None] * u)[:k].norm(dim=-1)
            residual = float((off / s[:k].clamp_min(torch.finfo(dtype).tiny)).max())
            if residual <= tolerance:
                break
        basis = torch.linalg.qr(pushed.T).Q.T
        pulled = J.pull(basis.reshape(n, *y.shape))[0].reshape(n, -1).to(dtype)
        mixed, s, v = torch.linalg.svd(pulled, full_matrices=False)
        u = mixed.T @ basis
    assert s is not None
    assert u is not None
    return s[:k], u[:k], v[:k], residual

"""How well a reconstructed centroid predicts what the component does when its input is perturbed.

A centroid says how a component responds to small changes of its input::

    v . f(x + d) - v . f(x)  =  mu . d  +  O(|d|^2),        mu = J_f(x)^T v

so a reconstruction ``mu_hat`` is as good as ``mu_hat . d`` predicts that response. Squared error
weighs all directions of the input space alike; the component's own inputs do not, so perturbations
are of two kinds: random directions, and differences between the inputs of two tokens. Responses are
taken to first order, and as they are at finite distances, where the exact centroid errs as well.

An SAE on the component's *inputs* has no centroids of its own. What it says about the component is
the centroid at the input it reconstructs, ``mu(x_hat) . d``, and that can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from sae_lens import SAE
from scipy.stats import spearmanr
from sklearn.metrics import r2_score
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from lch_plugin.adapters.arguments import Call, input_of, is_cache, output_of
from lch_plugin.adapters.hooked import real_tokens
from lch_plugin.adapters.states import evaluating
from lch_plugin.centroids import centroid, fit_cotangent
from lch_plugin.cotangents import Cotangent
from lch_plugin.errors import InputError, NonFiniteError, SiteError
from lch_plugin.progress import progress
from lch_plugin.saes.evaluation.sae_inputs import check_rows
from lch_plugin.saes.sources.rows import Rows

Perturbation = Literal["isotropic", "data"]
#: Baselines beside every prediction: the exact centroid, and the mean of all exact centroids.
EXACT, MEAN = "exact centroid", "mean centroid"


@dataclass(frozen=True)
class ResponseFit:
    """How well centroids predict a component's responses to perturbations of one kind and size.

    Attributes:
        perturbation: ``"isotropic"``, uniform on the sphere, or ``"data"``, towards the input of
            another token.
        size: norm of each perturbation over that of the input it is added to; None for the response
            to first order, which is in proportion to it.
        r_squared: by prediction, one minus its squared error over the variance of the responses: 1
            is perfect, 0 no better than their mean.
        rank_correlation: by prediction, Spearman's, which a wrong scale does not lower.
        n: responses.
    """

    perturbation: Perturbation
    size: float | None
    r_squared: dict[str, float]
    rank_correlation: dict[str, float]
    n: int


def predicted_responses(
    fn: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*batch d_in"],
    predictions: Mapping[str, Float[Tensor, "*batch d_in"]],
    *,
    cotangent: Float[Tensor, ...] | Cotangent | None = None,
    sizes: Sequence[float] = (0.01, 0.1, 0.3),
    n_perturbations: int = 8,
    mixes_positions: bool = False,
    generator: torch.Generator | None = None,
) -> list[ResponseFit]:
    """Compare predictions ``mu_hat . d`` with the responses of ``fn`` to perturbations ``d``.

    The exact centroid and the mean of all exact centroids are among the predictions. Everything is
    computed in the dtype of ``x``; in half precision, responses to small perturbations are
    rounding.

    Args:
        fn: the component; rows of ``x`` are independent items unless it mixes positions.
        x: inputs.
        predictions: by name, in place of the centroid at each ``x``.
        cotangent: ``v``, as `lch_plugin.centroid`.
        sizes: of perturbations, relative to the norm of each input.
        n_perturbations: of each kind, for each item; the same for every size.
        mixes_positions: whether ``fn`` is a component such as attention or a block, and ``x`` of
            shape ``(batch, pos, d_in)``: then one token of each sequence is perturbed at a time,
            chosen at random, and the response is summed over all positions, as the centroid is.
        generator: source of the randomness, on the device of ``x``.

    Returns:
        For each kind of perturbation a fit to first order, and one for each size.

    Raises:
        InputError: fewer than two inputs, predictions of another shape, sizes or
            ``n_perturbations`` that are not positive, or responses that do not vary.
        NonFiniteError: a response or prediction is NaN or infinite.
        NotDifferentiableError: as `lch_plugin.centroid`.
    """
    _check(x, predictions, sizes, n_perturbations, mixes_positions)
    mu = centroid(fn, x, cotangent)
    mean = mu.mean(tuple(range(mu.ndim - 1)), keepdim=True).expand_as(mu)
    centroids = {**predictions, EXACT: mu, MEAN: mean}
    fits = []
    kinds = get_args(Perturbation)
    n_steps = len(kinds) * n_perturbations
    with torch.no_grad(), progress("perturbing", n_steps, "perturbations") as advance:
        y = fn(x)
        v = fit_cotangent(cotangent, y).double()
        for kind in kinds:
            predicted: dict[str, list[Tensor]] = {name: [] for name in centroids}
            responses: dict[float, list[Tensor]] = {size: [] for size in sizes}
            for d in _perturbations(kind, x, n_perturbations, mixes_positions, generator):
                for name, values in predicted.items():
                    values.append(_sum(centroids[name].to(x).double() * d, mixes_positions))
                for size, changes in responses.items():
                    change = v * (fn(x + size * d) - y)
                    changes.append(_sum(change, mixes_positions) / size)
                advance(1)
            predictors = {name: torch.cat(values) for name, values in predicted.items()}
            fits.append(_fit(kind, None, predictors[EXACT], predictors))
            fits += [_fit(kind, s, torch.cat(c), predictors) for s, c in responses.items()]
    return fits


class CapturedComponent:
    """One component as a model runs it on some inputs, as a function of what it reads.

    Calling it runs the component alone, with masks, positions and rotary embeddings as the model
    passed them, in evaluation mode. For `lch_plugin.centroid`, `predicted_responses` and the like.

    Attributes:
        x: what the component reads there at the chosen positions, ``(batch, pos, d_in)``.
        mixes_positions: whether what it writes at one position depends on what it reads at others;
            found out by trying. If so the output has all positions, else the chosen ones.

    Example:
        >>> component = CapturedComponent(model, tokens.split(16), "blocks.2.mlp")
        >>> mu = lch.centroid(component, component.x)
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Tensor | Mapping[str, Any] | Sequence[Any]],
        module: str,
        *,
        positions: slice = slice(None),
    ) -> None:
        """Run the model up to the component, once, and remember how it was called.

        Args:
            model: any module, TransformerLens' models included.
            batches: its inputs, as `lch_plugin.saes.Rows`.
            module: name of the component in the model.
            positions: the tokens that count, of each sequence.

        Raises:
            InputError: as `lch_plugin.saes.Rows`, no batches, batches of several lengths or with
                padding, or a component that does not read ``(batch, pos, d_in)``.
            SiteError: as `lch_plugin.saes.Rows`, or a stretch of modules, which cannot be called.
        """
        batches = list(batches)
        rows = Rows(model, batches, module, of="input")
        if rows._first is not rows._last:
            raise SiteError(
                f"{module} is a stretch of modules, which cannot be called by itself. Name a "
                "single module."
            )
        # An id that text may have as well has the benefit of the doubt.
        padded = (real_tokens(model, batch, packed=True) is not None for batch in batches)
        if not batches or any(padded):
            raise InputError(
                f"{len(batches)} batches, some of them with padding: give at least one, and join "
                "or cut texts to one length."
            )
        self._model, self._name, self._positions = model, module, positions
        self._module = rows._first
        self._calls: list[tuple[Call, Tensor]] = []
        for batch in batches:
            self._calls.append(self._capture(rows, batch))
        full = [x for _, x in self._calls]
        if full[0].ndim != 3 or any(x.shape[1:] != full[0].shape[1:] for x in full):
            raise InputError(
                f"{module} reads tensors of shapes {[tuple(x.shape) for x in full]} on these "
                "batches: all have to be (batch, pos, d_in) with the same pos. Join or cut texts "
                "to one length."
            )
        self.x: Float[Tensor, "batch pos d_in"] = torch.cat(full)[:, positions]
        if not self.x.shape[1]:
            raise InputError(f"positions={positions!r} leave nothing of {full[0].shape[1]} tokens.")
        self.mixes_positions = True
        self.mixes_positions = self._depends_on_others()

    def __call__(self, x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos_out d_out"]:
        """What the component writes where it reads ``x`` at the chosen positions."""
        outputs = []
        with evaluating(self._model):
            parts = x.split([len(full) for _, full in self._calls])
            for (call, full), part in zip(self._calls, parts, strict=True):
                whole = full.to(x.dtype, copy=True)
                whole[:, self._positions] = part
                args, kwargs = input_of(call, self._name)[1](whole)
                outputs.append(output_of(self._module(*args, **kwargs), self._name))
        y = torch.cat(outputs)
        return y if self.mixes_positions else y[:, self._positions]

    def _capture(self, rows: Rows, batch: Any) -> tuple[Call, Tensor]:
        calls: list[Call] = []
        hook = self._module.register_forward_pre_hook(
            lambda _module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        try:
            x = rows.value(batch)
        finally:
            hook.remove()
        args, kwargs = calls[0]
        # A key-value cache would grow with every call.
        kept = {key: None if is_cache(value) else value for key, value in kwargs.items()}
        return (tuple(None if is_cache(value) else value for value in args), kept), x

    def _depends_on_others(self) -> bool:
        """Whether moving the first token moves what is written at any other."""
        with torch.no_grad():
            moved = self.x.clone()
            moved[:, 0] = -moved[:, 0]
            before, after = self(self.x), self(moved)
        others = torch.ones(before.shape[1], dtype=torch.bool, device=before.device)
        others[range(len(others))[self._positions][0]] = False
        return not torch.equal(before[:, others], after[:, others])


def reconstructed_centroids(
    sae: SAE[Any],
    component: CapturedComponent,
    of: Literal["centroid", "input"] = "centroid",
    *,
    cotangent: Float[Tensor, ...] | Cotangent | None = None,
) -> Float[Tensor, "batch pos d_in"]:
    """What an SAE makes of a component's centroids, for `predicted_responses`.

    Args:
        sae: trained on centroids of the component, or on what it reads.
        component: on held-out inputs.
        of: what the SAE was trained on. Of an SAE on inputs, the centroid at the reconstructed
            input.
        cotangent: ``v`` of the centroids.

    Raises:
        InputError: ``of`` is neither, or the SAE does not fit the component.
    """
    if of not in ("centroid", "input"):
        raise InputError(f"of={of!r} is not known; use 'centroid' or 'input'.")

    def reconstruct(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        check_rows(sae, rows)
        with torch.no_grad():
            rows_hat = sae.decode(sae.encode(rows.to(sae.device, sae.dtype)))
        return rows_hat.view(x.shape).to(x)

    if of == "input":
        return centroid(component, reconstruct(component.x), cotangent)
    return reconstruct(centroid(component, component.x, cotangent))


def _perturbations(
    kind: Perturbation,
    x: Tensor,
    n: int,
    mixes_positions: bool,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """Displacements as long as the inputs they belong to."""
    rows = x.flatten(0, -2)
    options: Any = {"device": x.device, "generator": generator}
    index = torch.arange(len(rows), device=x.device)
    for _ in range(n):
        if kind == "isotropic":
            d = torch.randn(rows.shape, dtype=x.dtype, **options)
        else:
            others = (index + torch.randint(1, len(rows), (len(rows),), **options)) % len(rows)
            d = rows[others] - rows
        d = (normalize(d, dim=-1) * rows.norm(dim=-1, keepdim=True)).view(x.shape)
        if mixes_positions:
            chosen = torch.randint(x.shape[1], (len(x),), **options)
            d = d * one_hot(chosen, x.shape[1])[..., None]
        yield d


def _sum(values: Tensor, mixes_positions: bool) -> Float[Tensor, " n"]:
    """One response for each item: a row, or a sequence."""
    return (values.flatten(1).sum(1) if mixes_positions else values.sum(-1)).flatten()


def _fit(
    kind: Perturbation,
    size: float | None,
    responses: Float[Tensor, " n"],
    predictions: Mapping[str, Float[Tensor, " n"]],
) -> ResponseFit:
    truth = responses.double().cpu()
    values = {name: predicted.cpu() for name, predicted in predictions.items()}
    if not all(bool(t.isfinite().all()) for t in (truth, *values.values())):
        raise NonFiniteError(
            f"responses to {kind} perturbations of size {size}, or predictions of them, are NaN or "
            "infinite. Look for what overflowed, in half precision above all."
        )
    if float(truth.std()) == 0:
        raise InputError(
            f"the responses to {kind} perturbations are all the same, so there is nothing to "
            "predict: the component ignores its input, or inputs are zero or all alike."
        )
    return ResponseFit(
        perturbation=kind,
        size=size,
        r_squared={name: float(r2_score(truth, p)) for name, p in values.items()},
        rank_correlation={
            # What is constant puts nothing in order.
            name: float(spearmanr(truth, p).statistic) if float(p.std()) else 0.0
            for name, p in values.items()
        },
        n=len(truth),
    )


def _check(
    x: Tensor,
    predictions: Mapping[str, Tensor],
    sizes: Sequence[float],
    n_perturbations: int,
    mixes_positions: bool,
) -> None:
    if x.ndim < 2 or x[..., 0].numel() < 2 or (mixes_positions and x.ndim != 3):
        raise InputError(
            f"x has shape {tuple(x.shape)}: at least two inputs are needed, and of a component "
            "that mixes positions (batch, pos, d_in)."
        )
    for name, prediction in predictions.items():
        if prediction.shape != x.shape:
            raise InputError(
                f"prediction {name!r} has shape {tuple(prediction.shape)}, but x has "
                f"{tuple(x.shape)}: a centroid has the shape of the input."
            )
    if not all(math.isfinite(size) and size > 0 for size in sizes):
        raise InputError(f"sizes={list(sizes)}: each has to be a finite number above zero.")
    if n_perturbations < 1:
        raise InputError(f"n_perturbations={n_perturbations} must be at least 1.")

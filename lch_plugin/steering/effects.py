"""What moving along directions does to a model's predictions, beside random directions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy.stats import false_discovery_control
from torch import Tensor, nn
from torch.nn.functional import normalize

from lch_plugin.adapters.hooked import real_tokens, unwrapped
from lch_plugin.adapters.states import evaluating
from lch_plugin.errors import InputError, SiteError
from lch_plugin.progress import each, progress
from lch_plugin.statistics import ROUNDING
from lch_plugin.steering.editing import (
    EVERYWHERE,
    Positions,
    edited_input,
    entry_of,
    joined,
    steering,
)
from lch_plugin.steering.skipping import later_passes

Batch = Tensor | Mapping[str, Any]
# Numbers in float64 at a time.
_CHUNK = 2**16


@dataclass(frozen=True, eq=False)
class SteeringEffects:
    """What moving along some directions does to a model's predictions, beside random directions.

    All are means over the tokens at which the model was steered, in each sequence, and then over
    sequences unless these are told apart. Changes of logits are relative to their mean over the
    vocabulary, since a shift of all logits alike changes no prediction.

    Attributes:
        strengths: norms of what was added, over ``input_norm``.
        input_norm: mean norm of what the component reads.
        kl: ``KL(clean || steered)`` of the predictions, in nats.
        random_kl: of each random direction.
        logit_change: absolute change of a logit, mean over the vocabulary.
        random_logit_change: of each random direction.
        logit_shift: change of each token's logit, signed.
    """

    strengths: tuple[float, ...]
    input_norm: float
    kl: Float[Tensor, "n_directions n_strengths n_sequences"]
    random_kl: Float[Tensor, "n_random n_strengths n_sequences"]
    logit_change: Float[Tensor, "n_directions n_strengths"]
    random_logit_change: Float[Tensor, "n_random n_strengths"]
    logit_shift: Float[Tensor, "n_directions n_strengths d_vocab"]

    @property
    def ratios(self) -> Float[Tensor, "n_directions n_strengths"]:
        """KL of each direction over that of the median random one, on the same text.

        Means over sequences of the logarithm of the ratio in each sequence, so that no sequence
        counts for more because the model is easily moved there. NaN at strength 0.
        """
        median = self.random_kl.quantile(0.5, dim=0)
        return (self.kl / median).log().mean(-1).exp()

    @property
    def p_values(self) -> Float[Tensor, "n_directions n_strengths"]:
        """How often a random direction's mean KL is at least as large, with the direction itself
        among them: one-sided permutation p-values, no smaller than ``1 / (1 + n_random)``. What is
        smaller by rounding alone is as large."""
        own = self.kl.mean(-1)
        least = own * (1 - ROUNDING * torch.finfo(own.dtype).eps)
        as_large = ~(self.random_kl.mean(-1)[:, None] < least)  # So too where one is NaN.
        return (1 + as_large.sum(0)) / (1 + len(self.random_kl))

    @property
    def corrected_p_values(self) -> Float[Tensor, "n_directions n_strengths"]:
        """`p_values`, corrected for the number of directions and strengths.

        By Benjamini and Hochberg's method, as scipy has it: where all effects with at most 0.05 are
        called larger than random ones, at most a twentieth of them are not, on average. Holm's
        correction, which allows for no false one at all, could find none with fewer than
        ``20 * n_directions * n_strengths - 1`` random directions.
        """
        p = self.p_values
        corrected = false_discovery_control(p.flatten().double().numpy())
        return torch.from_numpy(corrected).to(p).view(p.shape)

    def promoted(self, direction: int, strength: int = -1, k: int = 8) -> Int[Tensor, " k"]:
        """Ids of the tokens whose logits rise most, by indices of direction and strength."""
        return self.logit_shift[direction, strength].topk(k).indices

    def suppressed(self, direction: int, strength: int = -1, k: int = 8) -> Int[Tensor, " k"]:
        """Ids of the tokens whose logits fall most."""
        return (-self.logit_shift[direction, strength]).topk(k).indices


def steering_effects(
    model: nn.Module,
    batches: Iterable[Batch],
    component: str,
    directions: Float[Tensor, "n_directions d_in"],
    *,
    strengths: Sequence[float] = (0.1, 0.3, 1.0),
    positions: Positions = EVERYWHERE,
    n_random: int = 20,
    generator: torch.Generator | None = None,
) -> SteeringEffects:
    """Steer a model along each direction and along random ones, and compare its predictions.

    Takes ``(n_directions + n_random) * n_strengths`` forward passes a batch, which begin at the
    component's block. The random directions are uniform on the sphere; every one has the norm of
    the directions it stands beside.

    Args:
        model: with logits for an output; as `steering`.
        batches: the model's inputs: token ids, or mappings of keyword arguments. Padding does not
            count where a mapping has an ``attention_mask``.
        component: as `steering`.
        directions: one a row, of any length; for features of an SAE ``sae.W_dec[features]``.
        strengths: norms of what is added, in units of the mean norm of what the component reads at
            these positions; negative ones go the other way.
        positions: where to steer, and where to look at the predictions.
        n_random: random directions to compare with.
        generator: source of the randomness, on the CPU.

    Returns:
        The effects, on the CPU.

    Raises:
        InputError: no batches, directions that are zero, not finite or of another width, strengths
            that are missing or not finite, ``n_random`` below 1, positions that do not exist, or a
            model without logits.
        SiteError: there is no such component, or the model does not call it.

    Example:
        >>> effects = lch.steering.steering_effects(
        ...     model, tokens.split(16), "blocks.2.mlp", sae.W_dec[[3, 17]]
        ... )
        >>> model.to_string(effects.promoted(0))
    """
    batches = list(batches)
    directions = _unit(directions)
    if not batches:
        raise InputError("there are no batches: pass some of the model's inputs.")
    check_steering(strengths, n_random)
    noise = torch.randn(n_random, directions.shape[-1], generator=generator, dtype=torch.float64)
    n, moved = len(directions), torch.cat([directions, normalize(noise, dim=-1)])
    kls, changes, shift = [], [], torch.zeros(())
    with torch.no_grad(), evaluating(unwrapped(model)):
        input_norm = _mean_norm(model, batches, component, positions, directions.shape[-1])
        lengths = torch.tensor(strengths, dtype=torch.float64) * input_norm
        vectors = (moved[:, None] * lengths[:, None]).flatten(0, 1)
        with progress("steering", len(batches) * len(vectors), "passes") as advance:
            for batch in batches:
                own = each(vectors, advance)
                kl, change, of_batch = _effects_on(
                    model, batch, component, own, positions, n_shifts=n * len(strengths)
                )
                kls.append(kl.cpu())
                changes.append(change.cpu())
                shift = shift + of_batch.cpu()
    kl, change = (
        torch.cat(parts, dim=1).unflatten(0, (len(moved), len(strengths)))
        for parts in (kls, changes)
    )
    return SteeringEffects(
        strengths=tuple(map(float, strengths)),
        input_norm=input_norm,
        kl=kl[:n],
        random_kl=kl[n:],
        logit_change=change[:n].mean(2),
        random_logit_change=change[n:].mean(2),
        logit_shift=shift.unflatten(0, (n, len(strengths))) / kl.shape[2],
    )


def check_steering(strengths: Sequence[float], n_random: int) -> None:
    """Refuse settings of `steering_effects` that mean nothing.

    Raises:
        InputError: strengths that are missing or not finite, or ``n_random`` below 1.
    """
    if not strengths or not all(map(math.isfinite, strengths)):
        raise InputError(f"strengths={list(strengths)}: at least one, and all finite, are needed.")
    if n_random < 1:
        raise InputError(f"n_random={n_random} must be at least 1.")


def _effects_on(
    model: nn.Module,
    batch: Batch,
    component: str,
    vectors: Iterable[Float[Tensor, " d_in"]],
    positions: Positions,
    n_shifts: int,
) -> tuple[
    Float[Tensor, "n_vectors batch"],
    Float[Tensor, "n_vectors batch"],
    Float[Tensor, "n_shifts d_vocab"],
]:
    """Of each vector KL and absolute change of a logit, sequence by sequence.

    And of the first ``n_shifts`` vectors the shift of each logit, summed over sequences.
    """
    entry = entry_of(model, component)
    kls, changes = [], []
    shifts: list[Tensor] = []
    with later_passes(unwrapped(model), entry, lambda: _logits(model, batch)) as clean:
        # Of a classifier there is one prediction, wherever it is steered.
        counts = _counts(model, batch, clean, positions if clean.shape[1] > 1 else EVERYWHERE)
        weights = (counts / counts.sum(1, keepdim=True)).to(clean.dtype)
        p = clean.softmax(-1)
        for vector in vectors:
            with steering(model, component, vector, positions):
                steered = _logits(model, batch)
            kl = clean.new_zeros(clean.shape[:2])
            change = torch.zeros_like(kl)
            for own in _chunks(clean):
                moved = steered[own].double() - clean[own]
                kl[own] = _kl(p[own], moved).to(kl)
                change[own] = (moved - moved.mean(-1, keepdim=True)).abs().mean(-1).to(kl)
            kls.append((kl * weights).sum(1))
            changes.append((change * weights).sum(1))
            if len(shifts) < n_shifts:
                shift = torch.einsum("bpv,bp->v", steered - clean, weights)
                shifts.append(shift - shift.mean())
    return torch.stack(kls), torch.stack(changes), torch.stack(shifts)


def _chunks(logits: Float[Tensor, "batch pos d_vocab"]) -> Iterator[tuple[int, slice]]:
    """Of all positions, some at a time, which a processor's cache holds in float64."""
    n = max(1, _CHUNK // logits.shape[-1])
    for row in range(logits.shape[0]):
        for start in range(0, logits.shape[1], n):
            yield row, slice(start, start + n)


def _kl(
    p: Float[Tensor, "pos d_vocab"], moved: Float[Tensor, "pos d_vocab"]
) -> Float[Tensor, " pos"]:
    """``KL(p || q)`` where the logits of ``q`` are those of ``p``, moved.

    That is ``log E_p[exp m] - E_p[m]``, computed about the mean of ``m``. In float64: it is of
    second order in a small change, which in float32 is lost in the rounding of the sum, and may
    come out negative.
    """
    p = p.double()
    p = p / p.sum(-1, keepdim=True)
    moved = moved - (p * moved).sum(-1, keepdim=True)
    rest = (p * moved).sum(-1)  # What rounding has left of the mean.
    return ((p * moved.expm1()).sum(-1).log1p() - rest).clamp_min(0)


def _mean_norm(
    model: nn.Module,
    batches: Sequence[Batch],
    component: str,
    positions: Positions,
    d_in: int,
) -> float:
    """Mean norm of what a component reads, at the tokens that count."""
    total, n = 0.0, 0.0
    seen: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        seen.append(joined(x, d_in))
        return x

    for batch in batches:
        seen.clear()
        with edited_input(model, component, look):
            _run(model, batch)
        if not seen:
            raise SiteError(
                f"the model did not call {component} on these inputs, so it cannot be steered "
                "there. Name a module that it calls."
            )
        # OPT's blocks join batch and position.
        x = seen[0] if seen[0].ndim > 2 else seen[0][:, None]
        counts = _counts(model, batch, x, positions)
        total += float((x.double().norm(dim=-1) * counts).sum())
        n += float(counts.sum())
    return total / n


def _counts(
    model: nn.Module, batch: Batch, values: Tensor, positions: Positions
) -> Float[Tensor, "batch pos"]:
    """1 at the tokens that count, 0 at others and at padding."""
    counts = torch.zeros(values.shape[:-1], dtype=torch.float64, device=values.device)
    try:
        counts[:, positions] = 1
    except IndexError as error:
        raise InputError(
            f"positions={positions!r} do not exist in sequences of {counts.shape[1]} tokens."
        ) from error
    tokens = real_tokens(model, batch)
    if tokens is not None and tokens.shape == counts.shape:
        counts *= tokens.to(counts)
    if not bool(counts.any(1).all()):
        raise InputError(
            f"positions={positions!r} leave a sequence without tokens. Choose others, or pass no "
            "sequence that is padding there."
        )
    return counts


def _logits(model: nn.Module, batch: Batch) -> Float[Tensor, "batch pos d_vocab"]:
    output = _run(model, batch)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3):
        raise InputError(
            f"the model returned a {type(output).__name__} without logits, (batch, pos, d_vocab) "
            "or (batch, class). Load it with its head."
        )
    logits = logits if logits.ndim == 3 else logits[:, None]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _run(model: nn.Module, batch: Batch) -> Any:
    root = unwrapped(model)
    device = next((p.device for p in root.parameters()), None)
    if isinstance(batch, Mapping):
        return root(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    return root(batch.to(device))


def _unit(directions: Tensor) -> Float[Tensor, "n_directions d_in"]:
    directions = directions.detach().double().cpu()
    bad = (~(directions.norm(dim=-1) > 0) | ~directions.isfinite().all(-1)).nonzero().flatten()
    if directions.ndim != 2 or not len(directions) or len(bad):
        raise InputError(
            f"directions of shape {tuple(directions.shape)}, of which rows {bad.tolist()} are zero "
            "or not finite: one direction a row is needed, (n_directions, d_in)."
        )
    return normalize(directions, dim=-1)

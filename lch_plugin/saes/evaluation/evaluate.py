"""How well an SAE reconstructs rows it may not have seen, how sparsely, and with which features.

Reconstruction and sparsity alone do not say whether a dictionary has found anything: see
`lch_plugin.saes.evaluation.functional` for what its reconstructions predict of a component's
behaviour, and `lch_plugin.steering` for what its features do to the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from jaxtyping import Float, Int
from sae_lens import SAE, Transcoder
from torch import Tensor, nn

from lch_plugin.adapters.states import without_autocast
from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.centroids import Spread
from lch_plugin.errors import InputError, NonFiniteError
from lch_plugin.saes.evaluation.sae_inputs import check_rows, heads_joined
from lch_plugin.saes.evaluation.token_rows import TokenRows
from lch_plugin.saes.sources.hooked_model import HookedModel
from lch_plugin.statistics import ROUNDING

#: A feature that fires on more than this share of rows is dense: it says little about any one.
DENSE = 0.1
_BINS_PER_DECADE = 4
_MAX_COSINES = 2**26  # Computed at once: 256 MB.
_QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What an SAE does with rows.

    Attributes:
        explained_variance: one minus the summed squared error over the summed squared distance of
            the rows from their mean: 1 is perfect, 0 no better than the mean.
        l0: active features a row, on average.
        n_rows: rows seen.
        density: share of rows on which each feature fires (is not zero).
        decoder_cosines: of each feature's decoder row, the largest cosine with any other's. Near 1,
            two features are one; features split or repeated move the upper quantiles.
    """

    explained_variance: float
    l0: float
    n_rows: int
    density: Float[Tensor, " d_sae"]
    decoder_cosines: Float[Tensor, " d_sae"]

    @property
    def n_fired(self) -> int:
        """Features that fired at least once."""
        return int((self.density > 0).sum())

    @property
    def n_dead(self) -> int:
        """Features that never fired. Few rows make rare features look dead."""
        return len(self.density) - self.n_fired

    @property
    def n_dense(self) -> int:
        """Features that fired on more than `DENSE` of the rows."""
        return int((self.density > DENSE).sum())

    @property
    def density_histogram(self) -> tuple[Int[Tensor, " bins"], Float[Tensor, " bins+1"]]:
        """Features that fired by ``log10`` of their density: counts, and edges of the bins.

        Four bins a decade, from the decade of ``1 / n_rows`` to 0.
        """
        decades = max(1, math.ceil(math.log10(self.n_rows)))
        edges = torch.linspace(-decades, 0, decades * _BINS_PER_DECADE + 1, dtype=torch.float64)
        fired = self.density[self.density > 0].double().log10()
        # A feature that fired once lies on the lowest edge, but for rounding.
        counts, _ = torch.histogram(fired.clamp_min(-decades), edges)
        return counts.long(), edges

    def to_dict(self) -> dict[str, Any]:
        """In terms of JSON: the numbers, the histogram, and quantiles of the decoder cosines."""
        counts, edges = self.density_histogram
        levels = self.decoder_cosines.new_tensor(_QUANTILES)
        cosines = torch.quantile(self.decoder_cosines, levels).tolist()
        return {
            "explained_variance": self.explained_variance,
            "l0": self.l0,
            "n_rows": self.n_rows,
            "d_sae": len(self.density),
            "n_fired": self.n_fired,
            "n_dead": self.n_dead,
            "n_dense": self.n_dense,
            "dense_above": DENSE,
            "log10_density": {"counts": counts.tolist(), "edges": edges.tolist()},
            "decoder_cosines": {f"{q:g}": c for q, c in zip(_QUANTILES, cosines, strict=True)},
        }


@overload
def evaluate(sae: SAE[Any], source: Iterable[Float[Tensor, "_ d_in"]]) -> Evaluation: ...


@overload
def evaluate(
    sae: SAE[Any],
    source: LensModel | HookedModel,
    texts: str | Sequence[str] | Int[Tensor, "row pos"],
    *,
    hook_name: str | None = None,
    special_tokens: bool = False,
    batch_size: int = 16,
) -> Evaluation: ...


def evaluate(
    sae: SAE[Any],
    source: Iterable[Float[Tensor, "_ d_in"]] | LensModel | HookedModel,
    texts: str | Sequence[str] | Int[Tensor, "row pos"] | None = None,
    *,
    hook_name: str | None = None,
    special_tokens: bool = False,
    batch_size: int = 16,
) -> Evaluation:
    """Run an SAE over rows, or over a model's tokens, in one pass and constant memory.

    The variance is summed in float64 as squared distances from a running mean. SAELens' own
    calculator takes the difference of two float32 sums, which of rows far from zero (centroids have
    most of their norm in their mean) loses digits, and calls any variance below 1e-10 zero, which
    small centroids have.

    A BatchTopK SAE fresh from training chooses among the rows of each batch, so that ``l0`` is k by
    construction; saved by SAELens and loaded it has a threshold instead.

    Args:
        sae: of any architecture that reconstructs what it reads.
        source: batches of rows, such as `lch_plugin.saes.Rows` or a list of tensors; or a model, of
            which a hook point is read on ``texts``. Centroids of mlp, attn and block that are not
            attached are attached for as long as it takes.
        texts: each a prompt of its own, as the model's ``to_tokens`` reads it; or token ids. No
            padding is among the rows, and no position that the SAE was trained without.
        hook_name: what to read; what the SAE was trained on if None.
        special_tokens: whether tokens that begin, end or separate texts are among the rows.
        batch_size: texts that run together, at most.

    Returns:
        An `Evaluation`, its tensors on the CPU.

    Raises:
        InputError: no rows, rows of another width than the SAE's, rows that are all the same (they
            have no variance to explain), a transcoder, or texts beside rows or none beside a model.
        NonFiniteError: rows or reconstructions with NaN or infinite values.
        SiteError, VanishingCentroidError: as `lch_plugin.attach`, of a model.

    Example:
        >>> lch.saes.evaluate(sae, model, texts).explained_variance
    """
    if isinstance(source, nn.Module) != (texts is not None):
        raise InputError(
            f"source is a {type(source).__name__} with{'out' if texts is None else ''} texts: pass "
            "batches of rows alone, or a model and texts."
        )
    if texts is None and (hook_name is not None or special_tokens):
        raise InputError(
            f"hook_name={hook_name!r} and special_tokens={special_tokens} are of a model and "
            "texts, and rows are what they are. Leave them out."
        )
    rows: Iterable[Tensor] = source
    if texts is not None:
        rows = TokenRows(
            source, sae, texts, hook_name, special_tokens=special_tokens, batch_size=batch_size
        )
    if isinstance(sae, Transcoder):
        raise InputError(
            f"a {type(sae).__name__} predicts what a component writes, and evaluate compares an "
            "SAE with what it reads. Pass an SAE."
        )
    spread = Spread()
    residual, size, rounding, n_active, n_rows = 0.0, 0.0, 0.0, 0, 0
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.long, device=sae.device)
    with torch.no_grad(), without_autocast():
        for batch in rows:
            check_rows(sae, batch)
            if len(batch) == 0:
                continue
            with heads_joined(sae):
                features = sae.encode(batch.to(sae.device, sae.dtype))
                x, x_hat = batch.to(sae.device).double(), sae.decode(features).double()
            error = float((x - x_hat).square().sum())
            if not math.isfinite(error):
                raise NonFiniteError(
                    f"rows {n_rows} to {n_rows + len(x) - 1}, or what the SAE makes of them, have "
                    "NaN or infinite values. Look for what overflowed, in half precision above all."
                )
            spread.update(x)
            size, rounding = size + float(x.square().sum()), torch.finfo(batch.dtype).eps
            residual += error
            active = features.to_dense() != 0  # SAELens' TopK can give them sparse in training.
            fired += active.sum(0)
            n_active += int(active.sum())
            n_rows += len(x)
    if not n_rows:
        raise InputError("there are no rows: the batches are empty.")
    variance = float(spread.squares.sum())
    if variance <= (ROUNDING * rounding) ** 2 * size:
        raise InputError(
            f"all {n_rows} rows are the same but for rounding, so there is no variance to explain. "
            "Pass rows of several tokens."
        )
    return Evaluation(
        explained_variance=1 - residual / variance,
        l0=n_active / n_rows,
        n_rows=n_rows,
        density=(fired.double() / n_rows).float().cpu(),
        decoder_cosines=decoder_cosines(sae.W_dec),
    )


@without_autocast()
def decoder_cosines(W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, " d_sae"]:
    """Largest cosine of each decoder row with any other; -1 where there is no other.

    Returns:
        The cosines, float32, on the CPU.
    """
    directions = torch.nn.functional.normalize(W_dec.detach().float(), dim=-1)
    largest = []
    # In chunks: all pairs of a wide dictionary at once would not fit.
    size = max(1, _MAX_COSINES // max(1, len(directions)))
    for start in range(0, len(directions), size):
        chunk = directions[start : start + size]
        cosines = chunk @ directions.T
        cosines.diagonal(start).fill_(-1)
        largest.append(cosines.amax(-1))
    return torch.cat(largest).clamp(-1, 1).cpu()

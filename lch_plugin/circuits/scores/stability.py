"""Does a ranking of neurons depend on the neighbourhood, or on the points drawn from it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy.stats import spearmanr
from torch import Tensor

from lch_plugin.adapters.states import without_autocast
from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.circuits.scores.neurons import NeuronAttribution, read_neurons
from lch_plugin.cotangents import Metric
from lch_plugin.errors import InputError
from lch_plugin.sites import Linearization, integers
from lch_plugin.statistics import varies


@dataclass(frozen=True, eq=False)
class Stability:
    """How far neuron scores rank alike, over radii and seeds, beside a reference.

    The reference has a draw of its own: no seed shares its points, and the values at its own radius
    say what sampling alone does.

    Attributes:
        radii: of the neighbourhoods, one a row.
        seeds: of the points drawn, one a column.
        reference_radius: of the scores that all others are compared with.
        n_top: neurons whose overlap is counted.
        spearman: by layer, the rank correlation of all neurons' scores with the reference.
        overlap: by layer, the share of the reference's top neurons that are top neurons here.
    """

    radii: tuple[float, ...]
    seeds: tuple[int, ...]
    reference_radius: float
    n_top: int
    spearman: dict[int, Float[Tensor, "n_radii n_seeds"]]
    overlap: dict[int, Float[Tensor, "n_radii n_seeds"]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON; one row a radius, one column a seed."""
        return {
            "radii": list(self.radii),
            "seeds": list(self.seeds),
            "reference_radius": self.reference_radius,
            "n_top": self.n_top,
            "layers": {
                str(layer): {
                    "spearman": self.spearman[layer].tolist(),
                    "overlap": self.overlap[layer].tolist(),
                }
                for layer in self.spearman
            },
        }


@without_autocast()
def stability(
    model: LensModel,
    tokens: str | Int[Tensor, "*batch pos"],
    layers: int | Sequence[int] | None = None,
    position: int | Sequence[int] | None = -1,
    n_samples: int = 256,
    *,
    radii: Sequence[float] = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0),
    seeds: Sequence[int] = (0, 1, 2),
    reference_radius: float = 0.25,
    n_top: int = 10,
    cotangent: Float[Tensor, " d_model"] | None = None,
    metric: Metric | None = None,
    linearization: Linearization = "detached",
) -> Stability:
    """Score neurons at several radii and seeds, and compare their ranks with a reference.

    The model runs once. Spearman's rank correlation is scipy's. The radii are those over which the
    paper (arXiv 2604.11962) calls its ranking stable.

    Args:
        model, tokens, layers, position, n_samples: as `neuron_attribution`.
        radii: of the neighbourhoods.
        seeds: of the points drawn at each radius.
        reference_radius: of the scores to compare with.
        n_top: neurons whose overlap is counted.
        cotangent, metric, linearization: as `neuron_attribution`.

    Raises:
        InputError: no radius or seed, ``n_top`` out of range, scores that are all the same and so
            have no ranks, or as `neuron_attribution`.
        SiteError, VanishingCentroidError: as `neuron_attribution`.
    """
    drawn = integers(seeds)
    if not drawn or not radii:
        raise InputError(f"radii={radii}, seeds={seeds}: at least one of each is needed.")
    if n_top < 1:
        raise InputError(f"n_top={n_top} must be at least 1.")
    reading = read_neurons(
        model,
        tokens,
        layers,
        position,
        cotangent=cotangent,
        metric=metric,
        linearization=linearization,
    )

    def scored(radius: float, seed: int) -> NeuronAttribution:
        generator = torch.Generator(model.cfg.device).manual_seed(seed)
        return reading.attribution(radius, n_samples, generator)

    reference = scored(reference_radius, max(drawn) + 1)
    fewest = min(map(len, reference.scores.values()))
    if n_top > fewest:
        raise InputError(f"n_top={n_top}: a layer scored here has {fewest} neurons.")
    cells = [[scored(radius, seed) for seed in drawn] for radius in radii]
    return Stability(
        radii=tuple(radii),
        seeds=tuple(drawn),
        reference_radius=reference_radius,
        n_top=n_top,
        spearman={
            layer: torch.tensor([[_spearman(c, reference, layer) for c in row] for row in cells])
            for layer in reference.scores
        },
        overlap={
            layer: torch.tensor(
                [[_overlap(c, reference, layer, n_top) for c in row] for row in cells]
            )
            for layer in reference.scores
        },
    )


def _spearman(one: NeuronAttribution, other: NeuronAttribution, layer: int) -> float:
    scores = [a.scores[layer].cpu() for a in (one, other)]
    if not all(varies(values.numpy()) for values in scores):
        raise InputError(
            f"the neurons of layer {layer} all score the same, so they have no ranks to compare. "
            "Leave the layer out; for a metric, choose positions that it depends on."
        )
    return float(spearmanr(*scores).statistic)


def _overlap(one: NeuronAttribution, other: NeuronAttribution, layer: int, n_top: int) -> float:
    top, wanted = ({n.index for n in a.top(n_top, layer)} for a in (one, other))
    return len(top & wanted) / len(wanted)

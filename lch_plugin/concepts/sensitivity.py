"""Testing with concept activation vectors: whether a class's logit rises along a concept.

The directional derivative of a class's logit along a concept is ``mu . c``, with ``mu = J^T e_k``
the centroid of what lies between the layer and the logit, its cotangent the class's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lch_plugin.concepts.directions import Concept, cav
from lch_plugin.concepts.rows import Labels, Rows, check_rows, checked
from lch_plugin.errors import InputError
from lch_plugin.statistics import holm


@dataclass(frozen=True, eq=False)
class TCAV:
    """Scores of one concept for each class, beside those of directions of no concept.

    Attributes:
        concept: the direction.
        classes: names of the classes.
        n_examples: of each class.
        scores: share of a class's examples whose logit rises along the concept, as `tcav_score`.
        random_scores: of directions found in the same way after labels were shuffled.
    """

    concept: Concept
    classes: tuple[str, ...]
    n_examples: tuple[int, ...]
    scores: Float[Tensor, " n_classes"]
    random_scores: Float[Tensor, "n_random n_classes"]

    @property
    def p_values(self) -> dict[str, float]:
        """How often shuffled labels give a score as far from a half, the true ones among them.

        Two-sided permutation p-values, no smaller than ``1 / (1 + n_random)``. A half is the middle
        because a direction and its opposite are equally likely of no concept.
        """
        n = torch.tensor(self.n_examples, dtype=torch.float64)
        # Examples that rise less those that fall, whole numbers: what is as far is as far.
        own, others = (((2 * s - 1) * n).round().abs() for s in (self.scores, self.random_scores))
        p = (1 + (others >= own).sum(0).double()) / (1 + len(others))
        return dict(zip(self.classes, p.tolist(), strict=True))

    @property
    def corrected_p_values(self) -> dict[str, float]:
        """`p_values`, corrected for the number of classes by Holm's method."""
        p = self.p_values
        return dict(zip(p, holm(list(p.values())), strict=True))


def tcav_score(mu: Float[Tensor, "n d_in"], direction: Float[Tensor, " d_in"]) -> Float[Tensor, ""]:
    """Share of examples whose logit rises along a direction: Kim et al., equation 2.

    An example whose logit neither rises nor falls, as where a ReLU is off, counts half: so the
    opposite direction has one less the score. In the paper it counts as falling.

    Args:
        mu: centroids ``J^T e_k`` at the layer, one example a row.
        direction: of the concept; its length does not count.

    Raises:
        InputError: shapes that do not match, values that are not finite, or a direction of zero.

    Example:
        >>> mu = lch.centroid(head, x, cotangent=torch.nn.functional.one_hot(k, 10).float())
        >>> lch.concepts.tcav_score(mu, concept.direction)
    """
    check_rows(mu, "mu")
    if direction.shape != mu.shape[1:] or not bool(direction.isfinite().all()):
        raise InputError(
            f"a direction of shape {tuple(direction.shape)} for centroids of {mu.shape[1]} values: "
            "as many, all finite, are needed. Take both at the same place of the model."
        )
    if not bool(direction.any()):
        raise InputError("the direction is zero: nothing rises or falls along it.")
    along = mu.detach().double().cpu() @ direction.detach().double().cpu()
    return (1 + along.sign()).mean() / 2


def tcav(
    mu: Mapping[str, Float[Tensor, "_ d_in"]],
    x: Rows,
    labels: Labels,
    *,
    estimator: Callable[[Tensor, Tensor], Concept] = cav,
    n_random: int = 100,
    generator: torch.Generator | None = None,
) -> TCAV:
    """TCAV scores of a concept for some classes, with permutation tests.

    Random concepts are found by the same estimator after the labels of the pooled examples are
    shuffled. Where all centroids of a class are much the same, as of a linear head, so are the
    signs of ``mu . c`` along any direction: scores are 0 or 1 of random concepts too, and no
    concept is significant. The paper's t-test may say otherwise.

    Args:
        mu: by class, centroids of the class's logit at the layer, one example a row.
        x, labels: examples with the concept and without it, at the same layer.
        estimator: of the direction, from rows and labels.
        n_random: shuffled labels. With fewer than ``20 * len(mu) - 1`` none can be significant
            at 0.05 after Holm's correction.
        generator: source of the shuffling, on the CPU.

    Raises:
        InputError: as `cav` and `tcav_score`; no classes, or ``n_random`` below 1.

    Example:
        >>> found = lch.concepts.tcav({"zebra": mu}, x, has_stripes, n_random=199)
        >>> found.scores, found.p_values
    """
    if not mu or n_random < 1:
        raise InputError(
            f"{len(mu)} classes and n_random={n_random}: at least one of each is needed."
        )
    _, index = checked(x, labels)
    concept = estimator(x, labels)

    def scores(found: Concept) -> Tensor:
        return torch.stack([tcav_score(rows, found.direction) for rows in mu.values()])

    own = scores(concept)
    shuffled = [
        scores(estimator(x, index[torch.randperm(len(x), generator=generator)]))
        for _ in range(n_random)
    ]
    sizes = tuple(len(rows) for rows in mu.values())
    return TCAV(concept, tuple(mu), sizes, own, torch.stack(shuffled))

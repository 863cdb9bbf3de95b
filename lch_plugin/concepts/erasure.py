"""Take a concept out of rows by an affine map, and see whether a new probe finds it again."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.stats import binomtest
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from lch_plugin.concepts.rows import (
    Labels,
    Rows,
    check_regularization,
    checked,
    is_rounding,
    logistic,
)
from lch_plugin.errors import InputError, ToolkitError
from lch_plugin.mlp import at_least_float32


@dataclass(frozen=True, eq=False)
class Erasure:
    """An affine map that takes a concept out: ``x -> x - (x - mean) removed``.

    Computed in at least float32, and returned in the type of what it is called with.

    Called with rows, or with whatever a component reads, ``(batch, pos, d_in)``: it is an edit for
    `lch_plugin.steering.edited_input`.

    Attributes:
        removed: ``(d_in, d_in)``, what is taken off, of low rank.
        mean: of the rows it was fitted on, which stays what it is.
        rank: dimensions taken out.
        method: ``"leace"`` or ``"inlp"``.
    """

    removed: Float[Tensor, "d_in d_in"]
    mean: Float[Tensor, " d_in"]
    rank: int
    method: str

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        if x.shape[-1:] != self.mean.shape:
            raise InputError(
                f"values of shape {tuple(x.shape)} for an erasure of {len(self.mean)} dimensions: "
                "give what the component reads that it was fitted at."
            )
        wide = x.to(at_least_float32(x))
        return (wide - (wide - self.mean.to(wide)) @ self.removed.to(wide)).to(x)


def leace(x: Rows, labels: Labels) -> Erasure:
    """The smallest affine change after which no linear probe finds the labels.

    LEACE, by the package concept-erasure: Belrose et al., "LEACE: Perfect linear concept erasure in
    closed form" (arXiv 2306.03819). On the rows it is fitted on all classes then have the same
    mean, and every linear classifier is at chance; on others as far as means and covariances are
    the same there. In units of the covariance the difference of two means has noise of squared
    length ``4 d_in / n``, to be set against that of the true difference, 4 where a probe is right
    in 84 %. So it takes about a hundred times as many rows as dimensions to come near chance, and
    of no more rows than dimensions a warning is given: check with `refit`.

    Args:
        x: centroids or activations of a component.
        labels: of two or more classes.

    Raises:
        InputError: as `lch_plugin.concepts.difference_of_means`; means that are the same.
        ToolkitError: concept-erasure is not installed.

    Example:
        >>> erasure = lch.concepts.leace(x, labels)
        >>> with lch.steering.edited_input(model, "blocks.2.mlp", erasure):
        ...     logits = model(tokens)
    """
    rows, index = checked(x, labels, binary=False)
    try:
        from concept_erasure import LeaceFitter
    except ImportError as error:
        raise ToolkitError(
            "leace needs concept-erasure: pip install 'lch-plugin[concepts]'. inlp does without."
        ) from error
    n, d_in = rows.shape
    if n <= d_in:
        warnings.warn(
            f"leace of {n} rows in {d_in} dimensions takes out what these rows have by chance, and "
            "a probe will find the labels in others. Give many more rows than dimensions, and "
            "check with lch.concepts.refit on rows held out.",
            stacklevel=2,
        )
    means = torch.stack([rows[index == i].mean(0) for i in index.unique()])
    if is_rounding(means - means.mean(0), x):
        raise InputError("the means of all classes are the same: there is nothing to erase.")
    # Of one scale, as concept-erasure's threshold is absolute. Its constraint of the trace mixes in
    # another projection, which leaves some of the concept.
    scale = (rows - rows.mean(0)).square().mean().sqrt()
    fitter = LeaceFitter.fit(
        rows / scale,
        torch.nn.functional.one_hot(index).to(rows),
        svd_tol=1e-9,
        constrain_cov_trace=False,
    )
    left, right = fitter.eraser.proj_left, fitter.eraser.proj_right
    rank = int((left.norm(dim=0) > 0).sum())
    return _erasure(x, (left @ right).mT, rows, rank, "leace")


def inlp(x: Rows, labels: Labels, *, n_rounds: int = 8, regularization: float = 1.0) -> Erasure:
    """Project out the normal of a linear classifier, of another one on the rest, and so on.

    Iterative null-space projection: Ravfogel et al., "Null It Out" (arXiv 2004.07667). Takes out
    more than `leace` does and guarantees nothing, but needs no package and no covariance.

    Args:
        x, labels: as `leace`.
        n_rounds: classifiers, at most; ends before where one finds nothing.
        regularization: as `lch_plugin.concepts.cav`.

    Raises:
        InputError: as `lch_plugin.concepts.difference_of_means`; no classifier finds anything,
            ``n_rounds`` below 1, or a regularization that is not positive.
    """
    check_regularization(regularization)
    if n_rounds < 1:
        raise InputError(f"n_rounds={n_rounds} must be at least 1.")
    rows, index = checked(x, labels, binary=False)
    centred = rows - rows.mean(0)
    if is_rounding(centred, x):
        raise InputError("all rows are the same: there is nothing to erase.")
    normals = rows.new_zeros(0, rows.shape[1])
    for _ in range(n_rounds):
        rest = centred - centred @ normals.T @ normals
        if is_rounding(rest, x):
            break
        fitted, _, _ = logistic(rest, index, regularization)
        found = torch.from_numpy(fitted.coef_).to(rows)
        # Of several classes the normals sum to zero; singular vectors are those that count.
        found = found - found @ normals.T @ normals
        _, sizes, right = torch.linalg.svd(found, full_matrices=False)
        normals = torch.cat([normals, right[sizes > 1e-6]])
        if not bool((sizes > 1e-6).any()):
            break
    if not len(normals):
        raise InputError("no classifier tells the classes apart: there is nothing to erase.")
    # Orthonormal up to rounding by construction; now in one step.
    normals = torch.linalg.qr(normals.T)[0].T
    return _erasure(x, normals.T @ normals, rows, len(normals), "inlp")


def _erasure(x: Tensor, removed: Tensor, rows: Tensor, rank: int, method: str) -> Erasure:
    kept, mean = (t.to(x.device, at_least_float32(x)) for t in (removed, rows.mean(0)))
    return Erasure(kept, mean, rank, method)


@dataclass(frozen=True)
class Refit:
    """What a new linear probe finds before and after an erasure.

    Attributes:
        before, after: cross-validated accuracy.
        chance: share of the commonest class.
        n: rows.
        p_value: of an accuracy this much above chance by luck, one-sided, by the binomial
            distribution; a little too small or large, as folds share rows.
    """

    before: float
    after: float
    chance: float
    n: int
    p_value: float


def refit(
    erasure: Erasure,
    x: Rows,
    labels: Labels,
    *,
    n_folds: int = 5,
    regularization: float = 1.0,
    seed: int = 0,
) -> Refit:
    """Fit a new linear probe after an erasure, on rows that the erasure has not seen.

    On the rows that LEACE was fitted on a probe is at chance by construction, and a cross-validated
    one below it, as the means of folds cancel; held-out rows are the test. The probe is fitted on
    all folds of them but one and judged on that one.

    Args:
        erasure: as `leace` or `inlp` returns it.
        x, labels: held-out rows.
        n_folds: of the cross-validation, each with rows of every class.
        regularization: as `lch_plugin.concepts.cav`.
        seed: of the folds.

    Raises:
        InputError: as `leace`; fewer rows of a class than folds, or fewer than two folds.

    Example:
        >>> lch.concepts.refit(lch.concepts.leace(x[:200], labels[:200]), x[200:], labels[200:])
    """
    check_regularization(regularization)
    if n_folds < 2:
        raise InputError(f"n_folds={n_folds} must be at least 2.")
    rows, index = checked(x, labels, per_class=n_folds, binary=False)
    folds = list(StratifiedKFold(n_folds, shuffle=True, random_state=seed).split(rows, index))

    def n_right(values: Tensor) -> int:
        right = 0
        for train, test in folds:
            fitted, mean, scale = logistic(values[train], index[train], regularization)
            guesses = fitted.predict(((values[test] - mean) / scale).numpy())
            right += int((guesses == index[test].numpy()).sum())
        return right

    erased = erasure(rows)
    if is_rounding(erased - erased.mean(0), x):
        # Nothing is left: a probe of one scale would blow up the rounding, and read that.
        erased = torch.zeros_like(rows)
    n, chance = len(rows), float(index.bincount().max()) / len(rows)
    after = n_right(erased)
    p = binomtest(after, n, chance, alternative="greater").pvalue
    return Refit(n_right(rows) / n, after / n, chance, n, float(p))

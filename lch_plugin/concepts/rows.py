"""Rows with labels, checked, and the linear classifier that all of them are given."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from lch_plugin import statistics
from lch_plugin.errors import InputError

Rows = Float[Tensor, "n d_in"]
Labels = Int[Tensor, " n"] | Bool[Tensor, " n"]


def check_rows(x: Tensor, what: str = "x") -> None:
    """Refuse what is no table of finite numbers.

    Raises:
        InputError: not ``(n, d_in)``, without rows or columns, not floating point or not finite.
    """
    if x.ndim != 2 or not x.numel() or not x.is_floating_point():
        raise InputError(
            f"{what} of shape {tuple(x.shape)} and dtype {x.dtype}: floating point rows "
            "(n, d_in) are needed. Choose one position of each example, or flatten them."
        )
    bad = (~x.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise InputError(
            f"{what} has {len(bad)} rows that are not finite, the first of them {bad[0]}: leave "
            "them out, or load the model in float32."
        )


def checked(
    x: Rows, labels: Labels, *, per_class: int = 2, binary: bool = True
) -> tuple[Float[Tensor, "n d_in"], Int[Tensor, " n"]]:
    """Rows in float64 and the index of each one's class, on the CPU.

    Args:
        x: centroids or activations.
        labels: of each row; of two classes the larger one has the concept.
        per_class: rows that each class has to have.
        binary: whether two classes are all there may be.

    Raises:
        InputError: as `check_rows`; labels that are not ``(n,)`` integers or booleans, of one
            class, of more than two where ``binary``, or with too few rows.
    """
    check_rows(x)
    if labels.shape != x.shape[:1] or labels.is_floating_point():
        raise InputError(
            f"labels of shape {tuple(labels.shape)} and dtype {labels.dtype} for {len(x)} rows: "
            "one integer or boolean a row is needed."
        )
    classes, index, counts = labels.detach().cpu().unique(return_inverse=True, return_counts=True)
    if len(classes) < 2 or (binary and len(classes) > 2):
        needed = "two" if binary else "two or more"
        raise InputError(
            f"labels are of {len(classes)} classes, {classes.tolist()[:5]}: {needed} are needed. "
            "Rows with the concept have 1, and others 0."
        )
    if int(counts.min()) < per_class:
        raise InputError(
            f"class {classes[counts.argmin()].item()} has {int(counts.min())} rows, fewer than "
            f"{per_class}: give more examples of it."
        )
    return x.detach().double().cpu(), index


def is_rounding(difference: Tensor, x: Rows) -> bool:
    """Whether a difference of rows is no more than the rounding of their own type.

    Coordinate by coordinate: a large one, as residual streams have, says nothing of the others.
    """
    size = x.detach().double().cpu().abs().amax(0)
    return statistics.is_rounding(difference, size, x.dtype)


def logistic(
    x: Float[Tensor, "n d_in"], index: Int[Tensor, " n"], regularization: float
) -> tuple[LogisticRegression, Float[Tensor, " d_in"], float]:
    """scikit-learn's logistic regression on rows of one scale, and what rows were scaled by.

    Rows are centred and divided by one number, so that a direction does not depend on the units
    of the rows: centroids may be a thousand times smaller than activations.

    Args:
        x, index: as `checked` returns them.
        regularization: penalty of the squared norm; scikit-learn's ``1 / C``.

    Returns:
        The classifier of ``(x - mean) / scale``, the mean and the scale.
    """
    mean = x.mean(0)
    scale = float((x - mean).square().mean().sqrt()) or 1.0
    fitted = LogisticRegression(C=1 / regularization, max_iter=5000)
    return fitted.fit(((x - mean) / scale).numpy(), index.numpy()), mean, scale


def check_regularization(regularization: float) -> None:
    """Refuse a penalty that is no positive number.

    Raises:
        InputError: it is not.
    """
    if not 0 < regularization < float("inf"):
        raise InputError(f"regularization={regularization} must be a positive number.")

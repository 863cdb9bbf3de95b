"""Cotangents that are known only once the model has run to its end, and what waits for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lch_plugin.cotangents import Metric
from lch_plugin.errors import InputError, NonFiniteError, NotDifferentiableError


@dataclass(frozen=True, eq=False)
class Deferred:
    """A centroid that waits for its cotangent.

    Attributes:
        y: the component's output, a tensor of the graph that leads to the logits.
        finish: computes and shows the centroid, given ``v`` of the shape of ``y``.
    """

    y: Float[Tensor, "batch pos d_out"]
    finish: Callable[[Tensor], None]


def of_metric(
    metric: Metric,
    logits: Float[Tensor, "*batch_read_d_vocab"],
    ys: Sequence[Float[Tensor, ...]],
    names: Sequence[str],
    tokens: Bool[Tensor, "batch pos"] | None,
) -> list[Float[Tensor, ...]]:
    """The gradient of a metric in what components have written, each in the shape of that.

    Args:
        metric: of the logits.
        logits: of the model, or those of its last positions.
        ys: what the components have written, in the graph of the logits.
        names: of the components, for messages.
        tokens: which positions that the model reads are tokens; all if None.

    Raises:
        InputError: there are no logits, it reads some at padding, or as `Metric.value`.
        NotDifferentiableError: it does not depend on what a component writes.
        NonFiniteError: the gradient is NaN or infinite.
    """
    if logits.ndim < 2:
        raise InputError(
            f"metric {metric.name!r}: what the model returned first has shape "
            f"{tuple(logits.shape)}, which is no logits. Call it without labels, or with "
            "return_dict=True."
        )
    with torch.enable_grad():
        value = metric.value(logits.clone(), tokens)  # The metric may write to its copy.
    of_logits, *vs = torch.autograd.grad(value, [logits, *ys], retain_graph=True, allow_unused=True)
    check_no_padding(metric, of_logits, tokens)
    found = []
    for name, v in zip(names, vs, strict=True):
        if v is None:
            raise NotDifferentiableError(
                f"metric {metric.name!r} does not depend on what {name} writes."
            )
        if not bool(v.isfinite().all()):
            raise NonFiniteError(
                f"metric {metric.name!r}: its gradient in what {name} writes has "
                f"{int((~v.isfinite()).sum())} of {v.numel()} values NaN or infinite."
            )
        found.append(v)
    return found


def check_no_padding(
    metric: Metric,
    gradient: Float[Tensor, "batch *read d_vocab"] | None,
    tokens: Bool[Tensor, "batch read"] | None,
) -> None:
    """Refuse a metric that reads logits at padding.

    Args:
        metric: which.
        gradient: its gradient in the logits, if it depends on them.
        tokens: which positions are tokens; all if None.

    Raises:
        InputError: it does.
    """
    # Logits of a sequence as a whole, (batch, n_labels), are at no position.
    if tokens is None or gradient is None or gradient.ndim != 3:
        return
    padding = ~tokens.to(gradient.device)[:, -gradient.shape[1] :]
    read = gradient.ne(0).any(-1) & padding
    if bool(read.any()):
        row, position = read.nonzero()[0].tolist()
        raise InputError(
            f"metric {metric.name!r} reads logits at padding (row {row}, position {position}), "
            "which are no prompt's. Give it the position it is about, as in Metric(fn, "
            "position=-1), and it is given the logits of each prompt's own last token."
        )

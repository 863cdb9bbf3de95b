"""Centroids, inputs and outputs of components on statements: one row a statement.

Statements run in batches of one length, without padding, so that a statement's values do not depend
on what it runs with, whatever the model does at padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lch_plugin.adapters.checks import check_finite
from lch_plugin.adapters.transformer_lens import TransformerBridge, attach
from lch_plugin.cotangents import AnyCotangent, Cotangent, as_cotangent
from lch_plugin.errors import InputError, SiteError
from lch_plugin.names import did_you_mean
from lch_plugin.progress import track

Component = Literal["mlp", "attn", "block"]
Token = Literal["last", "mean"] | int
#: What is looked at of one component: the three are matched.
PARTS = ("centroid", "input", "output")


def hook_names(component: Component, layer: int) -> dict[str, str]:
    """By part of `PARTS`, the hook point of one component where it is.

    That is where centroids are, unless their cotangent is of the logits (`Logit`, `Metric`): those
    are at hook points of the model, which the records of `collect` name.

    Raises:
        InputError: no such component.
    """
    if component not in get_args(Component):
        raise InputError(
            f"component {component!r} is not known. {did_you_mean(component, get_args(Component))}"
        )
    path = f"blocks.{layer}" if component == "block" else f"blocks.{layer}.{component}"
    return dict(
        zip(PARTS, (f"{path}.hook_{end}" for end in ("centroid", "in", "out")), strict=True)
    )


def check_token(token: Token) -> None:
    """Refuse what says no tokens.

    Raises:
        InputError: neither ``"last"`` nor ``"mean"`` nor a number of at least 1.
    """
    if token not in ("last", "mean") and (not isinstance(token, int) or token < 1):
        raise InputError(f"token {token!r} is not known: give last, mean, or how many of the last.")


def collect(
    model: TransformerBridge,
    texts: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    component: Component = "mlp",
    token: Token = "last",
    cotangent: AnyCotangent | None = None,
    batch_size: int = 32,
) -> tuple[dict[str, Float[Tensor, "statement d_model"]], list[dict[str, Any]]]:
    """What a component reads and writes on statements, and its centroid.

    Args:
        model: a TransformerBridge, as `lch_plugin.LoadedModel.bridge` gives it.
        texts: the statements.
        layers: blocks, negative counting from the end; all if None.
        component: whose centroid, input and output.
        token: ``"last"``; ``"mean"`` over all tokens of the statement, which a token that the
            tokenizer puts before every text is none of; or a number, the mean over so many of the
            last, and over all where there are fewer.
        cotangent: of the centroids; all ones if None. The function of a `Metric` gets the logits of
            the statements that run together, whichever they are, and gives each a number.
        batch_size: statements that run together.

    Returns:
        Values by hook name, in float32 on the CPU; and a record of each: its component, layer,
        part and hook, and of centroids what they are of.

    Raises:
        InputError: the model is no TransformerBridge, no such component or token, or a statement
            that has no tokens or more than the model's context.
        SiteError, VanishingCentroidError: as `lch_plugin.attach`.
        NonFiniteError: what is read is not finite.

    Example:
        >>> model = lch.load_demo_model()
        >>> values, _ = lch.probes.collect(model, ["Tom saw an apple.", "Eva sat."], layers=[2])
        >>> {name: tuple(rows.shape) for name, rows in values.items()}["blocks.2.mlp.hook_out"]
        (2, 128)
    """
    if not isinstance(model, TransformerBridge):
        raise InputError(
            f"probes read a TransformerBridge, not a {type(model).__name__}: "
            "lch.load(...).bridge() gives one."
        )
    check_token(token)
    hook_names(component, 0)
    ids = [_ids(model, text) for text in texts]
    rows_by_length: dict[int, list[int]] = {}
    for row, one in enumerate(ids):
        rows_by_length.setdefault(len(one), []).append(row)
    batches = [
        rows[i : i + batch_size]
        for _, rows in sorted(rows_by_length.items())
        for i in range(0, len(rows), batch_size)
    ]
    chosen = None if layers is None else list(layers)
    v = as_cotangent(cotangent)
    with attach(model, layers=chosen, site=component, cotangent=v) as handle:
        records: list[dict[str, Any]] = []
        for name, of_centroid in zip(handle.centroid_names, handle.records(), strict=True):
            at = {"component": component, "layer": of_centroid["layer"]}
            hooks = hook_names(component, at["layer"]) | {"centroid": name}
            records += [{**at, "part": part, "hook": hook} for part, hook in hooks.items()]
            records[-len(PARTS)] |= of_centroid
        names = [record["hook"] for record in records]
        # Nothing after the last component is wanted, but for a cotangent of the logits.
        end = max(record["layer"] for record in records) + 1
        is_early = isinstance(v, Cotangent) and end < model.cfg.n_layers
        values = {name: torch.empty(len(ids), model.cfg.d_model) for name in names}
        for rows in track(batches, "reading statements"):
            tokens = torch.stack([ids[row] for row in rows])
            with torch.no_grad():
                _, cache = model.run_with_cache(
                    tokens, names_filter=names, stop_at_layer=end if is_early else None
                )
            for name in names:
                if name not in cache:
                    raise SiteError(
                        f"hook point {name} did not fire: this model has no such place."
                    )
                found = cache[name].float()
                check_finite(name, found)
                for row, at_row in zip(rows, found, strict=True):
                    values[name][row] = _chosen(model, ids[row], at_row, token).cpu()
    return values, records


def _ids(model: TransformerBridge, text: str) -> Int[Tensor, " pos"]:
    """Token ids of one statement, as the model's own `to_tokens` has them."""
    ids: Tensor = model.to_tokens(text, truncate=False)[0]
    if len(ids) > model.cfg.n_ctx:
        raise InputError(
            f"the statement {text[:40]!r}... has {len(ids)} tokens, more than the model's context "
            f"of {model.cfg.n_ctx}. Shorten it, or take it out."
        )
    if len(ids) == _n_before(model, ids):
        raise InputError(f"the statement {text!r} has no tokens. Take it out.")
    return ids


def _n_before(model: TransformerBridge, ids: Int[Tensor, " pos"]) -> int:
    """How many tokens are put before every text: one at most."""
    bos = getattr(model.tokenizer, "bos_token_id", None)
    return int(bos is not None and len(ids) > 0 and int(ids[0]) == bos)


def _chosen(
    model: TransformerBridge,
    ids: Int[Tensor, " pos"],
    values: Float[Tensor, "pos d_model"],
    token: Token,
) -> Float[Tensor, " d_model"]:
    own = values[_n_before(model, ids) :]
    if token == "mean":
        return own.mean(0)
    return own[-(token if isinstance(token, int) else 1) :].mean(0)

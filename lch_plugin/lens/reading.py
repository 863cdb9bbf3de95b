"""What the residual stream at each layer and position adds to the logits: `read` and `Reading`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import get_args

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from lch_plugin.adapters.states import without_autocast
from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.adapters.transformer_lens.architecture import check_model
from lch_plugin.errors import InputError
from lch_plugin.lens.asked import Prompt, as_prompt, indices, text, token_ids
from lch_plugin.lens.drawing import heat_table
from lch_plugin.lens.exactness import check_exact, is_off, off_by
from lch_plugin.lens.passes import ResidualPass
from lch_plugin.linear_maps import LinearMap, graphs_that_last
from lch_plugin.mlp import at_least_float32
from lch_plugin.names import check_known
from lch_plugin.sites import Linearization

# Tokens that are read if none are named: the likeliest.
_N_TOKENS = 10


@dataclass(frozen=True, eq=False, repr=False)
class Reading:
    """What each cell, the residual stream at one layer and position, adds to the target's logits.

    Layer ``l`` is the residual stream that block ``l`` reads; the last, ``n_layers`` of the model,
    is what the last block leaves. At every layer the readings of all positions and the offset add
    up to the model's logits, ``logits.sum(1) + offset == model_logits``. It keeps the graph of its
    forward pass, for `top`.

    Attributes:
        logits: what each cell adds to the logit of each token; 0 at padding.
        offset: what is left at each layer. Detached, what the biases after it add to each logit
            (and values of earlier blocks that pass beside the residual stream, where layers share
            keys and values); with the Jacobian, the constant of the expansion to first order.
        model_logits: of each token at the target.
        layers, positions: of the first two dimensions, counted from 0.
        token_ids, tokens: of the third, and their texts.
        target: the position whose logits are read, counted from 0.
        prompt: texts of the prompt's tokens, ``"[padding]"`` elsewhere.
        linearization: of everything between a cell and the logits.
    """

    logits: Float[Tensor, "layer pos token"]
    offset: Float[Tensor, "layer token"]
    model_logits: Float[Tensor, " token"]
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    target: int
    prompt: tuple[str, ...]
    linearization: Linearization
    _run: ResidualPass = field(repr=False)
    _span: LinearMap = field(repr=False)
    _prompt: Prompt = field(repr=False)
    _model: LensModel = field(repr=False)

    def top(self, layer: int, pos: int, k: int = 10) -> list[tuple[str, float]]:
        """The tokens of the whole vocabulary whose logits one cell raises most, and by how much.

        A number that a cell adds to all logits alike changes no probability. So values are less
        their mean over the vocabulary.

        Args:
            layer, pos: of the cell, among `layers` and `positions`; negative counts from the end of
                the model's layers and of the prompt.
            k: how many tokens.

        Raises:
            InputError: no such cell, or k below 1 or above the vocabulary.

        Example:
            >>> reading = lch.lens.read(lch.load_demo_model(), "Tom saw an apple and picked an")
            >>> token, value = reading.top(-1, -1, k=1)[0]
            >>> token == reading.tokens[0]
            True
        """
        cell = self.top_cells([layer], [pos], k)
        ids, values = cell.ids[0, 0].tolist(), cell.values[0, 0].tolist()
        return [(text(self._model, i), v) for i, v in zip(ids, values, strict=True)]

    @graphs_that_last()
    def top_cells(
        self,
        layers: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        k: int = 1,
    ) -> TopTokens:
        """`top` of many cells: forward products through the frozen span, batched over positions.

        Args:
            layers, positions: of the cells; those of the reading if None.
            k: tokens of each.

        Raises:
            InputError: as `top`.
        """
        chosen_layers = self.layers if layers is None else self._layers(layers)
        chosen = self.positions if positions is None else self._positions(positions)
        if not 1 <= k <= self._span.y.shape[-1]:
            raise InputError(f"k={k} must be from 1 to {self._span.y.shape[-1]}, the vocabulary.")
        rows = [self._vocabulary(layer, chosen).topk(k) for layer in chosen_layers]
        return TopTokens(
            torch.stack([r.values for r in rows]), torch.stack([r.indices for r in rows])
        )

    def _vocabulary(self, layer: int, positions: Sequence[int]) -> Float[Tensor, "pos d_vocab"]:
        """What cells of a layer add to all logits, less the mean of each."""
        is_token = self._prompt.is_token[list(positions)]
        places = [self._prompt.place(p) for p in positions if self._prompt.is_token[p]]
        y = self._span.y
        whole = y.new_zeros(len(positions), y.shape[-1], dtype=at_least_float32(y))
        if places:  # Padding adds nothing.
            with without_autocast():
                found = self._span.push(self._run.cells(layer, places), layer)[:, 0].to(whole)
            whole[is_token.to(whole.device)] = found - found.mean(-1, keepdim=True)
        return whole

    def _layers(self, layers: Sequence[int]) -> tuple[int, ...]:
        return indices(layers, len(self._run.streams), "layers")

    def _positions(self, positions: Sequence[int]) -> tuple[int, ...]:
        return indices(positions, len(self.prompt), "positions")

    def _repr_html_(self) -> str:
        """What each cell adds to the logit of the first token."""
        said = f"{self.tokens[0]!r} after {''.join(self.prompt[: self.target + 1])!r}"
        caption = f"what each cell adds to the logit of {said}, {float(self.model_logits[0]):.2f}"
        words = [self.prompt[i] for i in self.positions]
        return heat_table(self.logits[..., 0], self.offset[:, 0], self.layers, words, caption)

    def __repr__(self) -> str:
        n_layers, n_pos, _ = self.logits.shape
        return (
            f"Reading({n_layers} layers, {n_pos} positions, of position {self.target}: "
            f"{', '.join(map(repr, self.tokens))})"
        )


@dataclass(frozen=True, eq=False)
class TopTokens:
    """Tokens whose logits each cell raises most.

    Attributes:
        values: by how much, less the cell's mean over the vocabulary.
        ids: of the tokens.
    """

    values: Float[Tensor, "layer pos k"]
    ids: Int[Tensor, "layer pos k"]


@graphs_that_last()
def read(
    model: LensModel,
    prompt: str | Int[Tensor, "*one pos"],
    layers: int | Sequence[int] | None = None,
    positions: int | Sequence[int] | None = None,
    target: int = -1,
    tokens: str | int | Sequence[str | int] | None = None,
    linearization: Linearization = "detached",
    attention_mask: Shaped[Tensor, ...] | None = None,
) -> Reading:
    """What the residual stream at each layer and position adds to the logits of the target.

    Between layer ``l`` and the logits, with attention patterns, norm scales and gates held at their
    values on this prompt, lies an affine map, ``z = sum_p W_U A_p x_(l,p) + c_l``
    (`lch_plugin.linearization`; Golden, arXiv 2505.24293). What a cell adds to the logit of a token
    is ``w^T A_p x_(l,p)``: the centroid of the span with that token's cotangent, times the
    residual stream. One backward pass a token gives it for all layers and positions. Nothing is
    fitted, and nothing is left out: at every layer the parts add up to the logits, which is
    checked. A soft cap on the logits (Gemma 2) is one more factor: capped over uncapped.

    Args:
        model: TransformerBridge or HookedTransformer.
        prompt: text, or the ids of one prompt. It may be filled up on one side: then everything is
            as without its padding, whose readings are 0.
        layers: which to keep, negative counting from the last, which is after the last block; all
            if None.
        positions: whose readings to keep, negative counting from the end; all if None.
        target: position whose logits are read, negative counting from the end.
        tokens: whose logits, as texts of one token or ids; the ten likeliest if None.
        linearization: ``"jacobian"`` for the true Jacobian at this prompt.
        attention_mask: 1 at tokens and 0 at padding, for ids. Ids that ``to_tokens`` made of
            several texts while `lch_plugin.attach` was on, and padding with an id that no text has,
            need none.

    Raises:
        InputError: a prompt that the model cannot read, a position or layer that is not there, a
            target that is padding, a text that is not one token, or an id outside the vocabulary.
        SiteError: the model has no blocks between which the residual stream passes, or the parts do
            not add up: its detached span is not affine.

    Example:
        >>> model = lch.load_demo_model()
        >>> reading = lch.lens.read(model, "Tom saw an apple and picked an", tokens=[" apple"])
        >>> total = reading.logits.sum(1) + reading.offset
        >>> torch.allclose(total, reading.model_logits.expand_as(total), atol=1e-3)
        True
    """
    check_lens(model, linearization)
    given = as_prompt(model, prompt, attention_mask)
    n_layers, n_pos = model.cfg.n_layers + 1, given.n_pos
    at = given.target(target)
    kept_layers = tuple(range(n_layers)) if layers is None else indices(layers, n_layers, "layers")
    kept = tuple(range(n_pos)) if positions is None else indices(positions, n_pos, "positions")
    chosen = None if tokens is None else token_ids(model, tokens)
    run = ResidualPass(model, given.ids, linearization)
    return reading_of(model, run, given, at, chosen, kept_layers, kept)


def check_lens(model: LensModel, linearization: Linearization) -> None:
    """Refuse what a lens cannot read.

    Raises:
        InputError: no model of language, or no such linearisation.
    """
    check_model(model)
    if any(getattr(model.cfg, kind, False) for kind in ("is_visual_model", "is_audio_model")):
        raise InputError(f"{model.cfg.model_name} reads no text: a lens is for language models.")
    check_known("linearization", linearization, get_args(Linearization))


def reading_of(
    model: LensModel,
    run: ResidualPass,
    prompt: Prompt,
    target: int,
    chosen: Sequence[int] | None,
    layers: Sequence[int],
    positions: Sequence[int],
) -> Reading:
    """The reading of one target, from a pass; everything counted from 0.

    Raises:
        SiteError: as `read`.
    """
    at = prompt.place(target)
    span = run.span([at])
    z = span.y[0].detach().to(at_least_float32(span.y))
    chosen = likeliest(z) if chosen is None else list(chosen)
    logits, offset = run.parts(span, at, chosen)
    if run.linearization == "detached":
        dtype = span.y.dtype
        off = off_by(torch.cat([logits, offset[:, None]], 1), z[chosen])
        for layer in is_off(off, dtype).nonzero().flatten().tolist():
            offset[layer] = run.constant(layer)[at, chosen]
        off = off_by(torch.cat([logits, offset[:, None]], 1), z[chosen])
        check_exact(str(model.cfg.model_name), off, dtype)
    whole = prompt.spread(logits.movedim(1, 0)).movedim(0, 1)
    return Reading(
        logits=whole[list(layers)][:, list(positions)],
        offset=offset[list(layers)],
        model_logits=z[chosen].to(logits),
        layers=tuple(layers),
        positions=tuple(positions),
        token_ids=tuple(chosen),
        tokens=tuple(text(model, i) for i in chosen),
        target=target,
        prompt=prompt.texts(model),
        linearization=run.linearization,
        _run=run,
        _span=span,
        _prompt=prompt,
        _model=model,
    )


def likeliest(z: Float[Tensor, " d_vocab"]) -> list[int]:
    """Ids of the tokens that are read if none are named."""
    return z.topk(min(_N_TOKENS, len(z))).indices.tolist()

"""One forward pass in which the residual stream between any two blocks is a variable.

Layer ``l`` is the residual stream that block ``l`` reads; the last layer, one more than there are
blocks, is what the last block leaves. With patterns, norm scales and gates frozen
(`lch_plugin.linearization`) the logits are affine in each of them::

    z = J_l x_l + c_l

``c_l`` is what the biases after layer ``l`` add. It is found without ``J_l x_l``: in a second pass
with the factors of the first, block ``m`` reads zero and leaves ``b_m``, what its biases write, and
the final norm and unembedding make ``b`` of zero. Then ``c_l = b + sum_(m >= l) J_(m+1) b_m``. So
``J_l x_l + c_l = z`` is no definition, and a model can fail it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from lch_plugin.adapters.states import evaluating, without_autocast
from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.adapters.transformer_lens.architecture import block_input, block_output, stacks
from lch_plugin.adapters.transformer_lens.gates import Act, Gate
from lch_plugin.errors import SiteError
from lch_plugin.linear_maps import LinearMap, graphs_that_last
from lch_plugin.linearization import DetachedMode
from lch_plugin.mlp import at_least_float32
from lch_plugin.sites import Linearization


class ResidualPass:
    """The logits of one prompt, differentiable in the residual stream at every layer.

    Attributes:
        tokens: ids of the prompt.
        linearization: of the gradients.
        streams: the residual stream at each layer, as the model has it.
        logits: of every position.

    Raises:
        SiteError: the model has no blocks, is an encoder-decoder, or does not pass the hook points
            between its blocks.
    """

    def __init__(
        self, model: LensModel, tokens: Int[Tensor, "1 pos"], linearization: Linearization
    ) -> None:
        self._model, self.tokens, self.linearization = model, tokens, linearization
        mode = DetachedMode() if linearization == "detached" else None
        self.streams, self.logits = self._run(mode, zero=False)
        self._constants: tuple[list[Tensor], Tensor] | None = None
        if mode is not None:
            left, logits = self._run(DetachedMode(mode.recorded), zero=True)
            self._constants = left[1:], logits.detach()[0]

    @property
    def n_pos(self) -> int:
        """Positions of the prompt."""
        return self.tokens.shape[1]

    def span(self, targets: Sequence[int]) -> LinearMap:
        """From the residual stream at every layer to the logits of some positions."""
        return LinearMap(self.logits[0, list(targets)], self.streams)

    def cells(self, layer: int, positions: Sequence[int]) -> Float[Tensor, "n *x"]:
        """The residual stream of a layer at one position each, zero elsewhere."""
        x = self.streams[layer].detach()
        rows = x.reshape(self.n_pos, -1)
        spread = rows.new_zeros(len(positions), *rows.shape)
        spread[range(len(positions)), list(positions)] = rows[list(positions)]
        return spread.reshape(-1, *x.shape)

    def parts(
        self, span: LinearMap, target: int, tokens: Sequence[int]
    ) -> tuple[Float[Tensor, "layer pos token"], Float[Tensor, "layer token"]]:
        """What each cell adds to the logits of some tokens, and what is left at each layer.

        Args:
            span: to the logits of the target.
            target: position.
            tokens: ids.
        """
        cotangents = span.y.new_zeros(len(tokens), *span.y.shape)
        cotangents[range(len(tokens)), 0, list(tokens)] = 1
        with without_autocast():
            centroids = [self._rows(mu) for mu in span.pull(cotangents)]
        logits = torch.stack(
            [
                einsum(mu, self._rows(x.detach())[0], "token pos d, pos d -> pos token")
                for mu, x in zip(centroids, self.streams, strict=True)
            ]
        )
        if self._constants is None:
            return logits, span.y.detach()[0, list(tokens)].to(logits) - logits.sum(1)
        left, constant = self._constants
        offset = [constant[target, list(tokens)].to(logits)]
        for mu, b in zip(reversed(centroids[1:]), reversed(left), strict=True):
            offset.append(offset[-1] + einsum(mu, self._rows(b)[0], "token pos d, pos d -> token"))
        return logits, torch.stack(offset[::-1])

    def _rows(self, x: Float[Tensor, "*x"]) -> Float[Tensor, "n pos d"]:
        """By position, at least in float32, whatever else the model has in its residual stream."""
        return rearrange(
            x.to(at_least_float32(x)).flatten(), "(n pos d) -> n pos d", pos=self.n_pos, d=self._d
        )

    @property
    def _d(self) -> int:
        return self.streams[0].numel() // self.n_pos

    def _run(self, mode: DetachedMode | None, *, zero: bool) -> tuple[list[Tensor], Tensor]:
        """Streams and logits; where each block is to read zero, what they leave of it."""
        blocks = stacks(self._model, "blocks")["blocks"]
        gates = [*map(block_input, blocks), block_output(blocks[-1], last=True)]
        seen: dict[int, Tensor] = {}

        def pass_on(layer: int, x: Tensor) -> Tensor:
            cut = zero or layer == 0
            y = torch.zeros_like(x) if zero else x.detach() if cut else x
            y = y.requires_grad_() if cut else y
            if cut and mode is not None:
                mode.follow(y)
            seen[layer] = x if zero else y
            return y.clone() if cut else y

        acts = [partial(pass_on, layer) for layer in range(len(gates))]
        with _watching(list(zip(gates, acts, strict=True))), evaluating(self._model):
            with without_autocast(), graphs_that_last(), mode or nullcontext():
                try:
                    logits = self._model(self.tokens, return_type="logits")
                except StopIteration:
                    raise SiteError(
                        "the model computes something else once its factors are fixed, so it has "
                        "no detached linearisation."
                    ) from None
        if len(seen) < len(gates):
            raise SiteError(
                f"the residual stream did not pass the hook points of layers "
                f"{sorted(set(range(len(gates))) - set(seen))}, so it cannot be read there."
            )
        return [seen[layer].detach() if zero else seen[layer] for layer in range(len(gates))], logits


@contextmanager
def _watching(acts: list[tuple[Gate, Act]]) -> Iterator[None]:
    try:
        for gate, act in acts:
            gate.install(lambda: True, act)
        yield
    finally:
        for gate, _ in acts:
            gate.remove()

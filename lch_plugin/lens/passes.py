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

from collections.abc import Collection, Iterator, Sequence
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
        self.streams, self.logits = self._run(mode)
        # Factors held fixed; what each block leaves of zero, and the logits of zero.
        self._factors = None if mode is None else mode.recorded
        self._constants: tuple[list[Tensor], Tensor] | None = None
        if mode is not None:
            left, logits = self._replay(range(len(self.streams)))
            self._constants = left[1:], logits

    @property
    def n_pos(self) -> int:
        """Positions of the prompt."""
        return self.tokens.shape[1]

    def span(self, targets: Sequence[int]) -> LinearMap:
        """From the residual stream at every layer to the logits of some positions."""
        return LinearMap(self.logits[0, list(targets)], self.streams)

    def cells(self, layer: int, positions: Sequence[int]) -> Float[Tensor, "n ..."]:
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
            centroids = [self.rows(mu) for mu in span.pull(cotangents)]
        logits = torch.stack(
            [
                einsum(mu, self.rows(x.detach())[0], "token pos d, pos d -> pos token")
                for mu, x in zip(centroids, self.streams, strict=True)
            ]
        )
        if self._constants is None:
            return logits, span.y.detach()[0, list(tokens)].to(logits) - logits.sum(1)
        left, constant = self._constants
        offset = [constant[target, list(tokens)].to(logits)]
        for mu, b in zip(reversed(centroids[1:]), reversed(left), strict=True):
            offset.append(offset[-1] + einsum(mu, self.rows(b)[0], "token pos d, pos d -> token"))
        return logits, torch.stack(offset[::-1])

    def biases(self) -> tuple[list[Tensor], Float[Tensor, "pos d_vocab"]]:
        """What biases alone make of each layer, and of the logits after zero at the last layer.

        One forward pass, from an embedding of zero. Detached alone.
        """
        assert self._constants is not None
        first, *rest = self._replay([0])[0]
        return [torch.zeros_like(first), *rest], self._constants[1]

    def constant(self, layer: int) -> Float[Tensor, "pos d_vocab"]:
        """The frozen logits with zero in place of the residual stream of a layer.

        As the offset of `parts`, but where values of earlier blocks pass beside the residual stream
        (layers that share keys and values): these count here. One forward pass for each layer.
        """
        return self._replay([layer])[1]

    def rows(self, x: Float[Tensor, "*x"]) -> Float[Tensor, "n pos d"]:
        """By position, at least in float32, whatever else the model has in its residual stream."""
        d = self.streams[0].numel() // self.n_pos
        return rearrange(
            x.to(at_least_float32(x)).flatten(), "(n pos d) -> n pos d", pos=self.n_pos, d=d
        )

    def _replay(self, zeros: Collection[int]) -> tuple[list[Tensor], Float[Tensor, "pos d_vocab"]]:
        """What reaches each layer, and the logits, with the factors fixed and zeros at layers."""
        assert self._factors is not None
        try:
            streams, logits = self._run(DetachedMode(self._factors), zeros)
        except (StopIteration, RuntimeError) as error:
            raise SiteError(
                "once its factors are fixed the model computes something else at another input, so "
                f"it has no detached linearisation: {error}"
            ) from None
        return [x.detach() for x in streams], logits.detach()[0]

    def _run(
        self, mode: DetachedMode | None, zeros: Collection[int] = ()
    ) -> tuple[list[Tensor], Tensor]:
        """What reaches each layer, and the logits, where zeros are read at some layers instead."""
        blocks = stacks(self._model, "blocks")["blocks"]
        gates = [*map(block_input, blocks), block_output(blocks[-1], last=True)]
        seen: dict[int, Tensor] = {}

        def pass_on(layer: int, x: Tensor) -> Tensor:
            if layer > 0 and layer not in zeros:
                seen[layer] = x
                return x
            y = (torch.zeros_like(x) if layer in zeros else x.detach()).requires_grad_()
            seen[layer] = x if layer in zeros else y
            if mode is not None:
                mode.follow(y)
            return y.clone()

        acts = [partial(pass_on, layer) for layer in range(len(gates))]
        with (
            watching(list(zip(gates, acts, strict=True))),
            evaluating(self._model),
            without_autocast(),
            graphs_that_last(),
            mode or nullcontext(),
        ):
            logits = self._model(self.tokens, return_type="logits")
        missed = sorted(set(range(len(gates))) - set(seen))
        if missed:
            raise SiteError(
                f"the residual stream did not pass the hook points of layers {missed}, so it "
                "cannot be read there. If an SAE stands there, call reset_saes() first."
            )
        return [seen[layer] for layer in range(len(gates))], logits


@contextmanager
def watching(acts: Sequence[tuple[Gate, Act]]) -> Iterator[None]:
    """While this lasts, each gate shows its act what passes."""
    try:
        for gate, act in acts:
            gate.install(lambda: True, act)
        yield
    finally:
        for gate, _ in acts:
            gate.remove()

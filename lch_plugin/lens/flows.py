"""Which prompt tokens a logit comes from, through which layers: `flow` and `Flow`.

With patterns, norm scales and gates frozen (`lch_plugin.linearization`) the residual stream at
every layer is affine in the embeddings ``E_p`` of the prompt's tokens. So what block ``m`` writes,
``x_(m+1) - x_m``, is a sum over these tokens and a part that biases alone make. With ``g``, the
gradient of a target's logit in the residual stream after the last block (the frozen final norm and
the unembedding),

    z = sum_p g . E_p  +  sum_(m, p) g . W_m E_p  +  sum_m g . b_m  +  c

``W_m E_p`` is what block ``m`` writes of token ``p``, however it came to the block, and ``b_m``
what it writes of biases, its own and those of blocks before it; ``c`` is what the final norm and
the unembedding add. ``b_m`` and ``c`` are measured in a pass that reads an embedding of zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from lch_plugin.adapters.states import without_autocast
from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.lens.asked import as_prompt, text, token_ids
from lch_plugin.lens.drawing import flow_table
from lch_plugin.lens.exactness import check_exact, off_by
from lch_plugin.lens.passes import ResidualPass
from lch_plugin.lens.reading import check_lens, likeliest
from lch_plugin.linear_maps import LinearMap, graphs_that_last
from lch_plugin.mlp import at_least_float32
from lch_plugin.sites import Linearization


@dataclass(frozen=True, eq=False, repr=False)
class Flow:
    """Which prompt tokens the logits of a target come from, and through which layers.

    All numbers together are the model's logits: ``logits.sum((0, 1)) + biases.sum(0) ==
    model_logits``. Summed over layers, ``logits.sum(0)`` is what a `Reading` has at layer 0. A
    difference of two tokens is that of their columns.

    Attributes:
        logits: what each layer writes of each prompt token, in the logit of each token. First the
            embedding, which comes from the target's own token alone, last the final norm and the
            unembedding, which write biases alone.
        biases: what each layer writes of biases, its own and those of layers before it. With the
            Jacobian, the constant of the expansion to first order.
        model_logits: of each token at the target.
        layers: names of the first dimension: ``"embed"``, the numbers of the blocks, ``"unembed"``.
        token_ids, tokens: of the last dimension, and their texts.
        target: the position whose logits these are, counted from 0.
        prompt: texts of the prompt's tokens, ``"[padding]"`` elsewhere.
        linearization: of everything between the embeddings and the logits.
    """

    logits: Float[Tensor, "layer pos token"]
    biases: Float[Tensor, "layer token"]
    model_logits: Float[Tensor, " token"]
    layers: tuple[str, ...]
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    target: int
    prompt: tuple[str, ...]
    linearization: Linearization

    def _repr_html_(self) -> str:
        """Where the logit of the first token comes from."""
        said = f"{self.tokens[0]!r} after {''.join(self.prompt[: self.target + 1])!r}"
        caption = f"where the logit of {said}, {float(self.model_logits[0]):.2f}, comes from"
        words = self.prompt[: self.target + 1]
        parts = self.logits[:, : len(words), 0]
        if self.logits[:, len(words) :].any():  # A model that reads what follows.
            words, parts = self.prompt, self.logits[..., 0]
        return flow_table(parts, self.biases[:, 0], self.layers, words, caption)

    def __repr__(self) -> str:
        n_layers, n_pos, _ = self.logits.shape
        return (
            f"Flow({n_layers - 2} blocks, {n_pos} positions, to position {self.target}: "
            f"{', '.join(map(repr, self.tokens))})"
        )


@graphs_that_last()
def flow(
    model: LensModel,
    prompt: str | Int[Tensor, "*one pos"],
    target: int = -1,
    tokens: str | int | Sequence[str | int] | None = None,
    linearization: Linearization = "detached",
    attention_mask: Shaped[Tensor, ...] | None = None,
) -> Flow:
    """Which prompt tokens the logits of a target come from, through which layers, and from biases.

    Of each token's logit, what each block writes of each prompt token: the block's direct write to
    the residual stream at the target, through the frozen final norm and the unembedding, split by
    the prompt token whose embedding it is made of (direct logit attribution, of Golden's frozen
    model, arXiv 2505.24293). How the embedding came to the block, through which heads and MLPs
    before, is summed. An embedding is what the first block reads at a position: where a model adds
    embeddings of positions, these count in it. All parts add up to the logit, which is checked.

    Args:
        model: TransformerBridge or HookedTransformer.
        prompt: as `read`.
        target: position whose logits are taken apart, negative counting from the end.
        tokens: whose logits, as texts of one token or ids; the ten likeliest if None.
        linearization: ``"jacobian"`` for the true Jacobian at this prompt.
        attention_mask: as `read`.

    Raises:
        InputError, SiteError: as `read`.

    Example:
        >>> model = lch.load_demo_model()
        >>> flow = lch.lens.flow(model, "Tom saw an apple and picked an", tokens=[" apple"])
        >>> total = flow.logits.sum((0, 1)) + flow.biases.sum(0)
        >>> torch.allclose(total, flow.model_logits, atol=1e-3)
        True
    """
    check_lens(model, linearization)
    given = as_prompt(model, prompt, attention_mask)
    target = given.target(target)
    chosen = None if tokens is None else token_ids(model, tokens)
    run = ResidualPass(model, given.ids, linearization)
    at = given.place(target)
    z = run.logits[0, at].detach().to(at_least_float32(run.logits))
    chosen = likeliest(z) if chosen is None else chosen
    cotangents = z.new_zeros(len(chosen), len(z))
    cotangents[range(len(chosen)), chosen] = 1
    logits, biases = flows_of(model, run, [at] * len(chosen), cotangents)
    return Flow(
        logits=given.spread(logits.movedim(1, 0)).movedim(0, 1),
        biases=biases,
        model_logits=z[chosen].to(logits),
        layers=layer_names(run),
        token_ids=tuple(chosen),
        tokens=tuple(text(model, i) for i in chosen),
        target=target,
        prompt=given.texts(model),
        linearization=linearization,
    )


def layer_names(run: ResidualPass) -> tuple[str, ...]:
    """What writes to the residual stream, one after the other, and what reads it in the end."""
    return ("embed", *map(str, range(len(run.streams) - 1)), "unembed")


@graphs_that_last()
def flows_of(
    model: LensModel,
    run: ResidualPass,
    targets: Sequence[int],
    cotangents: Float[Tensor, "n d_vocab"],
) -> tuple[Float[Tensor, "layer token n"], Float[Tensor, "layer n"]]:
    """Where each of several mixes of logits comes from.

    Args:
        model: whose pass this is.
        run: the pass.
        targets: the position of each mix.
        cotangents: weights of the logits in each.

    Returns:
        What each of `layer_names` writes of each token of the prompt, and of biases.

    Raises:
        SiteError: they do not add up.
    """
    read = sorted(set(targets))
    last = LinearMap(run.logits[0, read], run.streams[-1:])
    vs = last.y.new_zeros(len(targets), *last.y.shape)
    vs[range(len(targets)), [read.index(target) for target in targets]] = cotangents.to(vs)
    z = einsum(cotangents, run.logits.detach()[0, list(targets)].to(cotangents), "n d, n d -> n")
    with without_autocast():
        g = run.rows(last.pull(vs)[0])
        streams = [einsum(g, run.rows(x)[0], "n pos d, pos d -> n") for x in run.streams]
        embeddings = run.cells(0, range(run.n_pos))
        of_tokens = LinearMap(torch.stack(streams), run.streams[:1]).push(embeddings)
    of_tokens = of_tokens.movedim(0, 1)
    if run.linearization == "detached":
        left, logits = run.biases()
        of_biases = torch.stack([einsum(g, run.rows(b)[0], "n pos d, pos d -> n") for b in left])
        final = einsum(cotangents, logits[list(targets)].to(cotangents), "n d, n d -> n")
    else:
        whole = torch.stack(streams).detach()
        of_biases, final = whole - of_tokens.sum(1), z.to(whole) - whole[-1]
    parts = _written(of_tokens, torch.zeros_like(of_tokens[0]))
    biases = _written(of_biases, final.to(of_biases))
    if run.linearization == "detached":
        total = torch.cat([parts.flatten(0, 1), biases])
        check_exact(str(model.cfg.model_name), off_by(total, z.to(total)), run.logits.dtype)
    return parts, biases


def _written(
    left: Float[Tensor, "layer ..."], final: Float[Tensor, ...]
) -> Float[Tensor, "layers ..."]:
    """From what is left at each layer, what is written there; then what comes after the last."""
    return torch.cat([left[:1], left.diff(dim=0), final[None]])

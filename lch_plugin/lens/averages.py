"""Lenses averaged over texts, as TransformerLens' own `JacobianLens`.

The Jacobian lens (Gurnee et al., "Verbalizable Representations Form a Global Workspace in Language
Models", Transformer Circuits Thread, 2026) maps a block's output to the last block's by the mean of
the true Jacobian over a corpus. `JacobianLens.fit` of TransformerLens computes it. Here the same
fit runs on the frozen model too: then the mean is that of the exact maps of `lch_plugin.lens.read`,
each of which reproduces its own prompt (relevance patching in place of attribution patching: Jafari
et al., arXiv 2508.21258).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import get_args

from torch import Tensor

from lch_plugin.adapters.states import evaluating
from lch_plugin.adapters.transformer_lens import TransformerBridge
from lch_plugin.adapters.transformer_lens.architecture import block_output, layer_indices, stacks
from lch_plugin.adapters.transformer_lens.toolkit import JacobianLens
from lch_plugin.errors import InputError
from lch_plugin.lens.passes import watching
from lch_plugin.lens.reading import read
from lch_plugin.linear_maps import graphs_that_last
from lch_plugin.linearization import DetachedMode
from lch_plugin.names import did_you_mean
from lch_plugin.sites import Linearization

# An average of one is a reading.
_FEWEST = 2


def average(
    model: TransformerBridge,
    texts: Sequence[str],
    linearization: Linearization = "detached",
    layers: int | Sequence[int] | None = None,
    *,
    corpus: str = "texts",
    n_tokens: int = 128,
    skip_first: int = 16,
    batch_size: int = 8,
) -> JacobianLens:
    """The mean over texts of what lies between each block's output and the last block's.

    ``J_l = mean over texts and positions p of sum over targets t >= p of d x_(L,t) / d x_(l,p)``.
    Layers are those of `JacobianLens`: ``l`` is the output of block ``l``, which is layer ``l + 1``
    of a `lch_plugin.lens.Reading`. ``d_model / batch_size`` backward passes a text.

    Args:
        model: a TransformerBridge with the weights as they were saved.
        texts: those with no more than ``skip_first + 1`` tokens are left out.
        linearization: ``"detached"`` for the mean of the frozen maps; ``"jacobian"`` for the
            Jacobian lens itself, from its own ``fit``.
        layers: which blocks' outputs; all but the last if None.
        corpus: name of the texts, for the record.
        n_tokens: longer texts are cut.
        skip_first: positions left out at the beginning, whose residual streams are not typical.
        batch_size: backward passes at once.

    Returns:
        With the linearisation in its ``metadata``, so that it is not merged with others, unless it
        is the Jacobian.

    Raises:
        InputError: fewer than two texts long enough, or a model that the Jacobian lens does not
            support.
        SiteError: as `lch_plugin.lens.read`.

    Example:
        >>> texts = ["Tom saw an apple and picked an apple. " * 2] * 2
        >>> average = lch.lens.average(lch.load_demo_model(), texts, layers=[2])
        >>> average.jacobians[2].shape
        torch.Size([128, 128])
    """
    if linearization not in get_args(Linearization):
        raise InputError(
            f"linearization={linearization!r} is not known. "
            f"{did_you_mean(linearization, get_args(Linearization))}"
        )
    if not isinstance(model, TransformerBridge):
        raise InputError(
            f"a Jacobian lens is of a TransformerBridge, not of a {type(model).__name__}."
        )
    long = _long_enough(model, texts, skip_first)
    blocks = stacks(model, "blocks")["blocks"]
    chosen = layer_indices(blocks, range(len(blocks) - 1) if layers is None else layers)
    detached = linearization == "detached"
    if detached:  # A mean of maps that are not exact would be of nothing.
        read(model, model.to_tokens(long[0])[:, :n_tokens], layers=0, tokens=0)
    scope = _frozen(blocks[chosen[0]]) if detached else nullcontext()
    try:
        with evaluating(model), graphs_that_last(), scope:
            return JacobianLens.fit(
                model,
                long,
                corpus=corpus,
                source_layers=chosen,
                dim_batch=batch_size,
                max_seq_len=n_tokens,
                skip_first_positions=skip_first,
                show_progress=False,
                metadata={"linearization": linearization, "lch-plugin": version("lch-plugin")}
                if detached
                else None,
            )
    except (TypeError, ValueError) as error:
        raise InputError(f"TransformerLens fits no lens here: {error}") from error


def load(path: str | Path, model: TransformerBridge) -> JacobianLens:
    """A lens from a file, ours or a published one, if it is one of this model.

    Args:
        path: of a ``.pt`` file, as `JacobianLens.save` writes it.
        model: a TransformerBridge with the weights as they were saved.

    Raises:
        InputError: no such file, no lens in it, or one of another model or basis.
    """
    try:
        lens = JacobianLens.load(str(path))
    except Exception as error:  # Torch and pickle have an error for everything a file can be.
        raise InputError(f"{path} holds no lens: {_first_line(error)}") from error
    try:
        return lens.validate_model(model)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} is a lens of another model or basis: {error}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _long_enough(model: TransformerBridge, texts: Sequence[str], skip_first: int) -> list[str]:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise InputError("texts must be a list of strings.")
    long = [text for text in texts if model.to_tokens(text).shape[1] > skip_first + 1]
    if len(long) < _FEWEST:
        raise InputError(
            f"{len(long)} of {len(texts)} texts have more than {skip_first + 1} tokens, too few "
            f"to average over: give at least {_FEWEST}, and for a lens to use about 100. One "
            "prompt is read by lch.lens.read."
        )
    return long


@contextmanager
def _frozen(block: object) -> Iterator[None]:
    """Gradients from the output of a block on are those of the detached linearisation."""
    mode = DetachedMode()

    def begin(x: Tensor) -> Tensor:
        mode.recorded.clear()  # Of the text before.
        return mode.follow(x.detach().requires_grad_())

    with watching([(block_output(block), begin)]), mode:
        yield

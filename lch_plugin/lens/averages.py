"""Lenses averaged over texts, as TransformerLens' own `JacobianLens`.

The Jacobian lens (Gurnee et al., "Verbalizable Representations Form a Global Workspace in Language
Models", Transformer Circuits Thread, 2026) maps a block's output to the last block's by the mean of
the true Jacobian over a corpus. `JacobianLens.fit` of TransformerLens computes it. Here the same
fit runs on the frozen model too: then the mean is that of the exact maps of `lch_plugin.lens.read`,
each of which reproduces its own prompt (relevance patching in place of attribution patching: Jafari
et al., arXiv 2508.21258).

`JacobianLens` begins after a block and ends after the last. From the residual stream after
attention, or up to an earlier block, `lch_plugin.lens.spans` takes the same mean. A `JacobianLens`
carries these matrices too: its ``transport``, ``merge``, ``save`` and ``load`` hold of them. Its
``readout`` would take the wrong residual stream, or unembed one that is not the last. So the target
in the metadata is then one that its own ``validate_model`` refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lch_plugin.adapters.states import evaluating
from lch_plugin.adapters.transformer_lens import TransformerBridge
from lch_plugin.adapters.transformer_lens.architecture import block_output, layer_indices, stacks
from lch_plugin.adapters.transformer_lens.toolkit import JacobianLens
from lch_plugin.errors import InputError
from lch_plugin.lens.passes import watching
from lch_plugin.lens.reading import read
from lch_plugin.lens.spans import Place, Span, mean_jacobians
from lch_plugin.linear_maps import graphs_that_last
from lch_plugin.linearization import DetachedMode
from lch_plugin.names import check_known
from lch_plugin.sites import Linearization

# An average of one is a reading.
_FEWEST = 2


def average(
    model: TransformerBridge,
    texts: Sequence[str],
    linearization: Linearization = "detached",
    layers: int | Sequence[int] | None = None,
    *,
    site: Place = "resid_post",
    end: int = -1,
    corpus: str = "texts",
    n_tokens: int = 128,
    skip_first: int = 16,
    batch_size: int = 8,
) -> JacobianLens:
    """The mean over texts of what lies between the residual stream in each block and a later block.

    ``J_l = mean over texts and positions p of sum over targets t >= p of d x_(end,t) / d x_(l,p)``.
    Layers are those of `JacobianLens`: ``l`` is the output of block ``l``, which is layer ``l + 1``
    of a `lch_plugin.lens.Reading`. ``d_model / batch_size`` backward passes a text.

    What a block writes goes on as the residual stream does. So ``transport`` of the average at
    ``"resid_mid"`` maps what attention or a single head writes, and that at ``"resid_post"`` what
    an MLP writes. Where a norm stands between (Gemma 2 and 3), it maps what comes after the norm.

    Args:
        model: a TransformerBridge with the weights as they were saved.
        texts: those with no more than ``skip_first + 1`` tokens are left out.
        linearization: ``"detached"`` for the mean of the frozen maps; ``"jacobian"`` for the
            Jacobian lens itself, from its own ``fit`` where that reaches.
        layers: which blocks; all before ``end`` if None. At ``"resid_mid"`` it may be ``end``.
        site: after the block (``"resid_post"``), or after its attention (``"resid_mid"``).
        end: the block up to whose output, negative counting from the last.
        corpus: name of the texts, for the record.
        n_tokens: longer texts are cut.
        skip_first: positions left out at the beginning, whose residual streams are not typical.
        batch_size: backward passes at once.

    Returns:
        With the linearisation, the site and the end in its ``metadata``, where they are not those
        of a Jacobian lens, so that it is not merged with others. With another site or end,
        ``transport``, ``merge`` and ``save`` hold of it, and `load` of its file; what reads the
        model's own residual streams (``readout``, hooks) raises ValueError.

    Raises:
        InputError: fewer than two texts long enough, no such site or end, or a model that the
            Jacobian lens does not support.
        SiteError: as `lch_plugin.lens.read`, or a block without a residual stream after attention.

    Example:
        >>> texts = ["Tom saw an apple and picked an apple. " * 2] * 2
        >>> average = lch.lens.average(lch.load_demo_model(), texts, layers=[2])
        >>> average.jacobians[2].shape
        torch.Size([128, 128])
    """
    check_known("linearization", linearization, get_args(Linearization))
    check_known("site", site, get_args(Place))
    if not isinstance(model, TransformerBridge):
        raise InputError(
            f"a Jacobian lens is of a TransformerBridge, not of a {type(model).__name__}."
        )
    long = _long_enough(model, texts, skip_first)
    blocks = stacks(model, "blocks")["blocks"]
    (last,) = layer_indices(blocks, end)
    n_before = last + (site == "resid_mid")
    chosen = layer_indices(blocks, range(n_before) if layers is None else layers)
    if chosen[-1] >= n_before:
        raise InputError(
            f"{site} of block {chosen[-1]} is not before the output of block {last}, where end="
            f"{end} is: take layers below {n_before}."
        )
    with _refusals("TransformerLens fits no lens here"):
        _lens_of(model).validate_model(model)
    ids = [model.to_tokens(text)[:, :n_tokens] for text in long]
    if linearization == "detached":  # A mean of maps that are not exact would be of nothing.
        read(model, ids[0], layers=0, tokens=0)
    added: dict[str, Any] = {
        "linearization": linearization,
        "lch-plugin": version("lch-plugin"),
    }
    if site == "resid_post" and last == len(blocks) - 1:
        detached = linearization == "detached"
        scope = _frozen(blocks[chosen[0]]) if detached else nullcontext()
        refusals = _refusals("TransformerLens fits no lens here")
        with refusals, evaluating(model), graphs_that_last(), scope:
            return JacobianLens.fit(
                model,
                long,
                corpus=corpus,
                source_layers=chosen,
                dim_batch=batch_size,
                max_seq_len=n_tokens,
                skip_first_positions=skip_first,
                show_progress=False,
                metadata=added if detached else None,
            )
    span = Span(tuple(chosen), site, last, linearization)
    means = mean_jacobians(model, ids, span, skip_first=skip_first, batch_size=batch_size)
    config = getattr(model.original_model, "config", None)
    added |= {
        "site": site,
        # What is no number, `JacobianLens` refuses to read with.
        "target_layer": last if site == "resid_post" else f"block {last}, from {site}",
        "model_name": model.cfg.model_name,
        "model_revision": getattr(config, "_commit_hash", None),
        "transformer_lens_version": version("transformer-lens"),
        "corpus": corpus,
        "n_prompts": len(long),
        "fit_dtype": str(model.W_U.dtype).removeprefix("torch."),
        "max_seq_len": n_tokens,
        "skip_first_positions": skip_first,
    }
    return _lens_of(model, means, len(long), added)


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
    with _refusals(f"{path} is a lens of another model or basis"):
        if "site" not in lens.metadata:
            return lens.validate_model(model)
        known = {k: v for k, v in lens.metadata.items() if k != "target_layer"}
        of_width = {0: torch.zeros(lens.d_model, lens.d_model)}
        _lens_of(model, of_width, lens.n_prompts, known).validate_model(model)
        if lens.source_layers[-1] >= model.cfg.n_layers:
            raise ValueError(f"it has layers {lens.source_layers}, the model {model.cfg.n_layers}.")
    return lens


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """TransformerLens' refusals as ours."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}: {error}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _lens_of(
    model: TransformerBridge,
    matrices: dict[int, Tensor] | None = None,
    n_prompts: int = 1,
    metadata: dict[str, Any] | None = None,
) -> JacobianLens:
    """A lens of these matrices; without any, one to ask whether the model can have a lens."""
    d_model = model.cfg.d_model if matrices is None else next(iter(matrices.values())).shape[0]
    matrices = {0: torch.eye(d_model)} if matrices is None else matrices
    return JacobianLens(matrices, n_prompts=n_prompts, d_model=d_model, metadata=metadata)


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

"""What a model has to offer: its sites, how each centroid is computed and why, and what it costs.

`inspect_model` asks the adapters themselves. It attaches every kind of site, so that what it says
has passed their self-checks, and measures one short forward pass with each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from lch_plugin.adapters import huggingface
from lch_plugin.adapters.states import evaluating
from lch_plugin.adapters.transformer_lens import (
    Handle,
    LensModel,
    attach,
    disagreements,
    locate_mlps,
    weight_processing,
)
from lch_plugin.errors import InputError, LCHError, SiteError
from lch_plugin.files import portable
from lch_plugin.loading import LoadedModel
from lch_plugin.records import reason
from lch_plugin.sites import KINDS, Site

# Tokens of the passes that are timed.
_N_TOKENS = 32
_CLOSED = "closed form"
_BY_WEIGHTS = (
    "activation derivatives of the pass itself, times the weights; it agrees with autograd"
)
_WHY = {
    "mlp": _BY_WEIGHTS,
    "neuron": _BY_WEIGHTS,
    "attn": "the pattern depends on the input: a product on the graph of the pass",
    "head": "the pattern depends on the input: a product on the graph of the pass",
    "head, detached": "with its pattern held a head is linear: the pattern times the weights",
    "block": "several non-linear parts: a product on the graph of the pass",
    "span": "several non-linear parts: a product on the graph of the pass",
    "model": "several non-linear parts: a product on the graph of the pass",
}


@dataclass(frozen=True)
class SiteInfo:
    """One kind of site of a model.

    Attributes:
        site: the kind, with its linearisation where that is not the Jacobian.
        reads, writes: its input, whose shape a centroid has, and its output, in words.
        methods: by hook point or name of the module, ``"closed form"`` or ``"VJP"``.
        why: the reason of the method; of several, each with its own.
        problem: why there is none, or none at some layers; None if there is at all.
        shape: of a centroid of one prompt, ``[1, pos, d]``; None if it was not run.
        n_bytes: of one centroid at one position, in the dtype it comes in; None as above.
        seconds: of a pass with all of these centroids; None as above.
    """

    site: str
    reads: str
    writes: str
    methods: dict[str, str]
    why: str
    problem: str | None = None
    shape: list[int] | None = None
    n_bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class ModelInfo:
    """What `inspect_model` finds.

    Attributes:
        model, revision: where it came from.
        architecture: its class.
        adapter: ``"lch.attach"`` or ``"lch.huggingface.attach"``, which the sites are of.
        why_adapter: why it is not the first; None if it is.
        n_parameters, weight_bytes, dtype, device: of the weights, each counted once.
        n_layers, d_model, d_mlp, context: sizes; None where the model does not say.
        processing: whether the weights were processed, and whether the writing weights are
            centred, which makes the all-ones centroid vanish; None of a model of HuggingFace.
        residual_bytes, neuron_bytes: of one position at one layer, in the model's dtype.
        n_positions, seconds: of the pass that was timed, without centroids; None if none was.
        sites: by kind.
        versions: of the packages.
    """

    model: str
    revision: str | None
    architecture: str
    adapter: str
    why_adapter: str | None
    n_parameters: int
    weight_bytes: int
    dtype: str
    device: str
    n_layers: int | None
    d_model: int | None
    d_mlp: int | None
    context: int | None
    processing: dict[str, bool] | None
    residual_bytes: int | None
    neuron_bytes: int | None
    n_positions: int | None
    seconds: float | None
    sites: tuple[SiteInfo, ...]
    versions: dict[str, str]

    def record(self) -> dict[str, Any]:
        """All of it, in terms of JSON."""
        return asdict(self)


def inspect_model(loaded: LoadedModel) -> ModelInfo:
    """What a model has to offer, found by attaching to it and by a few short passes.

    A language model that TransformerLens knows is handed to it, which takes it over; any other is
    looked at as HuggingFace has it, MLPs by name.

    Args:
        loaded: as `lch_plugin.load` gives it.

    Raises:
        SiteError: it is none of TransformerLens', and no MLP in it has a closed form.

    Example:
        >>> from lch_plugin.demo import DEMO_MODEL_DIR
        >>> found = inspect_model(lch.load(DEMO_MODEL_DIR))
        >>> {site.site: set(site.methods.values()) for site in found.sites}["mlp"]
        {'closed form'}
    """
    model, config = loaded.model, loaded.model.config
    weights = list(model.parameters())
    general: dict[str, Any] = {
        "model": portable(loaded.name),
        "revision": loaded.revision,
        "architecture": type(model).__name__,
        "n_parameters": sum(p.numel() for p in weights),
        "weight_bytes": sum(p.nbytes for p in weights),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "context": huggingface.context_length(model),
        "versions": {n: version(n) for n in ("lch-plugin", "torch", "transformers")},
    }
    why: str | None = None
    processing: dict[str, bool] | None = None
    try:
        bridge = _bridge(loaded)
    except InputError as error:
        cfg = config.get_text_config()
        n_positions, seconds, sites = _modules(model)
        why = reason(error)
        names = ("num_hidden_layers", "hidden_size", "intermediate_size")
    else:
        cfg = bridge.cfg
        if hasattr(bridge, "blocks"):
            processing = weight_processing(bridge, 0)
        n_positions, seconds, sites = _sites(bridge)
        names = ("n_layers", "d_model", "d_mlp")
    n_layers, d_model, d_mlp = (getattr(cfg, name, None) for name in names)
    return ModelInfo(
        **general,
        adapter="lch.attach" if why is None else "lch.huggingface.attach",
        why_adapter=why,
        n_layers=n_layers,
        d_model=d_model,
        d_mlp=d_mlp,
        processing=processing,
        residual_bytes=d_model and d_model * model.dtype.itemsize,
        neuron_bytes=d_mlp and d_mlp * model.dtype.itemsize,
        n_positions=n_positions,
        seconds=seconds,
        sites=sites,
    )


def _bridge(loaded: LoadedModel) -> LensModel:
    if loaded.model.main_input_name != "input_ids":
        raise InputError("TransformerLens is for language models, and this one reads no tokens.")
    return loaded.bridge()


def _sites(model: LensModel) -> tuple[int | None, float | None, tuple[SiteInfo, ...]]:
    """Positions and seconds of a pass, and every kind of site."""
    if hasattr(model, "encoder_blocks"):  # Its two stacks have inputs of their own.
        return None, None, tuple(_site(model, site, None) for site in _asked(model))
    n = min(_N_TOKENS, model.cfg.n_ctx)
    tokens = torch.arange(n, device=model.cfg.device)[None] % model.cfg.d_vocab
    with evaluating(model), torch.no_grad():
        seconds = _seconds(lambda: model(tokens))
    return n, seconds, tuple(_site(model, site, tokens) for site in _asked(model))


def _asked(model: LensModel) -> Iterator[Site]:
    """One of each kind, at every layer; of several in a block the first."""
    last = model.cfg.n_layers - 1
    for kind, known in KINDS.items():
        site = Site(
            kind,
            (0, last) if known.layers == "ends" else None,
            index=0 if known.is_indexed else None,
        )
        yield site
        if "jacobian" not in known.closed_forms and known.closed_forms:
            yield replace(site, linearization=known.closed_forms[0])


def _site(model: LensModel, site: Site, tokens: Tensor | None) -> SiteInfo:
    name = site.kind if site.linearization == "jacobian" else f"{site.kind}, {site.linearization}"
    methods: dict[str, str] = {}
    problems: list[str] = []
    values: dict[str, Tensor] = {}
    seconds = None
    with ExitStack() as stack:
        for handle in _handles(model, site, problems):
            methods |= stack.enter_context(handle).methods
        if methods and tokens is not None:
            stack.enter_context(evaluating(model))
            stack.enter_context(torch.no_grad())
            hooks = [(hook, lambda mu, hook: values.update({hook.name: mu})) for hook in methods]
            seconds = _seconds(lambda: model.run_with_hooks(tokens, fwd_hooks=hooks))
    mu = next(iter(values.values()), None)
    return SiteInfo(
        *(name, site.of_kind.reads, site.of_kind.writes, methods),
        why=_reasons(model, name, site, methods),
        problem="; ".join(dict.fromkeys(problems)) or None,
        shape=None if mu is None else [*mu.shape],
        n_bytes=None if mu is None else mu.shape[-1] * mu.element_size(),
        seconds=seconds,
    )


def _handles(model: LensModel, site: Site, problems: list[str]) -> list[Handle]:
    """The site attached, or at those layers alone that have it; what others lack is noted."""

    def attached(one: Site) -> list[Handle]:
        try:
            return [attach(model, site=one)]
        except LCHError as error:
            problems.append(reason(error))
            return []

    if (found := attached(site)) or site.of_kind.layers != "list":
        return found
    problems.clear()
    return [h for i in range(model.cfg.n_layers) for h in attached(replace(site, layers=i))]


def _reasons(model: LensModel, name: str, site: Site, methods: dict[str, str]) -> str:
    """Why the methods are what they are."""
    if not methods:
        return ""
    if site.kind != "mlp" or set(methods.values()) == {_CLOSED}:
        return _WHY[name]
    layers = [int(part) for hook in methods for part in hook.split(".")[1:2]]
    return "; ".join(dict.fromkeys(filter(None, (_without_form(model, i) for i in layers))))


def _without_form(model: LensModel, layer: int) -> str | None:
    """Why an MLP has no closed form, if it has none."""
    try:
        parts = locate_mlps(model, layer)
    except SiteError as error:
        return reason(error)
    return next((reason(e) for e in disagreements(model, parts).values() if e is not None), None)


def _modules(model: nn.Module) -> tuple[int | None, float | None, tuple[SiteInfo, ...]]:
    """Positions and seconds of a pass of HuggingFace's model, and its MLPs."""
    inputs = _inputs(model)
    n_positions = seconds = with_centroids = mu = None
    with huggingface.attach(model) as handle:
        methods = dict(handle.methods)
        if inputs is not None:
            with evaluating(model), torch.no_grad():
                with_centroids = _seconds(lambda: model(**inputs))
            mu = next((m for m in handle.cache.values()), None)
    if inputs is not None:
        with evaluating(model), torch.no_grad():
            seconds = _seconds(lambda: model(**inputs))
    if mu is not None and mu.ndim == 3:
        n_positions = mu.shape[1]
    kind = KINDS["mlp"]
    site = SiteInfo(
        *("mlp", kind.reads, kind.writes, methods),
        why=f"{_WHY['mlp']}; any other module can be named: a VJP",
        shape=None if mu is None else [*mu.shape],
        n_bytes=None if mu is None else mu.shape[-1] * mu.element_size(),
        seconds=with_centroids,
    )
    return n_positions, seconds, (site,)


def _inputs(model: Any) -> dict[str, Tensor] | None:
    """Something the model reads; None where its config does not say what."""
    config = model.config
    if config.is_encoder_decoder:
        return None
    if model.main_input_name == "input_ids":
        n = min(_N_TOKENS, huggingface.context_length(model) or _N_TOKENS)
        ids = torch.arange(n, device=model.device)[None] % config.get_text_config().vocab_size
        return {"input_ids": ids}
    if model.main_input_name == "pixel_values" and hasattr(config, "image_size"):
        size: Any = config.image_size
        height, width = size if isinstance(size, Sequence) else (size, size)
        shape = (1, config.num_channels, height, width)
        return {"pixel_values": torch.zeros(shape, device=model.device, dtype=model.dtype)}
    return None


def _seconds(run: Callable[[], Any]) -> float:
    """Of a pass that is not the first, which waits for much that later ones find ready."""
    run()
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin

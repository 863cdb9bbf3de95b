"""Centroids inside an nnsight trace.

``centroid(envoy)`` is a value like ``envoy.output``: it waits until the model gets there, sees what
the trace has edited so far, and is kept with ``.save()``. With `CentroidEnvoy` every module of a
model has it as a property.

An MLP's centroid comes from the outputs of its own projections, in closed form (`lch_plugin.mlp`).
Any other module's takes its inputs and one vector-Jacobian product through the module, called anew
with them, while the trace stands down as it does for nnsight's own ad-hoc calls: the module's place
in the forward pass stays free. The graph is of that call only, and gone when it is done.

For ``remote=True`` code travels by value: ``nnsight.register("lch_plugin")`` once, and call
`centroid` by a name of its own (``centroid = lch.nnsight.centroid``), or as a `CentroidEnvoy`'s;
written out, ``lch.nnsight.centroid`` would take along all that the package holds. Nothing here may
depend on what a server lacks: torch, transformers and nnsight are there, jaxtyping and
TransformerLens are not, and so no annotation in a nested function, which would be evaluated.

Private attributes used, for want of a public way:
    ``Envoy._module``, and `Mediator` and `Interleaver` as the envoys have them (nnsight);
    ``Module._forward_hooks`` and ``._forward_pre_hooks``, and ``torch._guards.detect_fake_mode``
    as nnsight has it (torch).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from nnsight import Envoy
from nnsight.intervention.interleaver import Mediator, OutOfOrderError
from nnsight.util import apply
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lch_plugin.adapters.arguments import (
    Call,
    arguments_of,
    caches,
    input_of,
    is_cache,
    output_of,
    padding_finder,
    token_mask,
    with_output,
)
from lch_plugin.adapters.checks import (
    check_cotangent,
    check_finite,
    check_loaded,
    check_mlp_cotangent,
)
from lch_plugin.adapters.deferred import of_metric
from lch_plugin.adapters.grad_scope import gradients
from lch_plugin.adapters.structure import Structure, recognise
from lch_plugin.centroids import centroid as vjp
from lch_plugin.cotangents import (
    AnyCotangent,
    Cotangent,
    Logit,
    Metric,
    Ones,
    Vector,
    as_cotangent,
    evaluate,
    is_fixed,
)
from lch_plugin.errors import InputError, SiteError
from lch_plugin.mlp import MLP, at_least_float32, centroid_of_neurons, read_direction
from lch_plugin.padding import Finder, blank, spread
from lch_plugin.weak_cache import WeakCache

# Each beside the ids of the modules it was recognised in.
_structures: WeakCache[tuple[tuple[int, ...], Structure | None]] = WeakCache()
# Names of cotangents, by module.
_seen: WeakCache[set[str]] = WeakCache()
# What finds the padding of a model's inputs, by model.
_finders: WeakCache[Finder] = WeakCache()
# Which positions of the whole batch are tokens, by the batcher of a trace.
_tokens_of: WeakCache[Bool[Tensor, "batch pos"] | None] = WeakCache()


def centroid(
    envoy: Envoy | Sequence[Envoy],
    cotangent: Float[Tensor, " d_out"] | AnyCotangent | None = None,
) -> Float[Tensor, ...]:
    """Centroid of a module, or of several in a row, inside a trace.

    Reads what the module computes, in the order it does: of an MLP with a closed form the outputs
    of its input projections, of any other module its inputs. So ask for centroids in the order the
    model runs, like for any value, and edit before you ask: what a trace changes within a module
    after that is not seen, and of an edit of a pre-activation its value is, not its derivative.
    Hooks of torch's are part of the model. They may run an additional time, and an MLP with hooks
    within, or with dropout in training mode, is a module like any other.

    Of a module that runs several times (tied layers, generation) it is the first call's, or the one
    that ``tracer.iter`` is at. Each invoke gets its own rows, padding included; outputs at padding
    do not count, and centroids there are zero.

    A cotangent that is known only from the logits waits for them, so nothing that comes before may
    be asked for after it: one such centroid a trace, or an invoke. It takes gradients, which a
    trace has unless it runs under ``torch.no_grad()``.

    Args:
        envoy: of the module, as in ``model.transformer.h[5].mlp``; or a span, several modules of
            which each reads what the one before it returns, as in ``model.transformer.h[2:5]``.
        cotangent: ``v`` of the centroid ``J^T v``: shape ``(d_out,)``, or from
            `lch_plugin.cotangents`; all ones if None. A `Logit` is of blocks, and spans of them.

    Returns:
        Shape of what the module reads, ``(batch, pos, d_model)`` for the parts of a transformer; in
        at least float32, without a graph.

    Raises:
        InputError: outside a trace or in a scan, not an envoy, a module that reads no
            floating-point tensor, or no cotangent that works here.
        SiteError: the module does not run, or ran before this point of the trace; its weights are
            not loaded or quantised; or a module within is unknown to nnsight.
        VanishingCentroidError: the cotangent reads nothing of what the module writes.
        NotDifferentiableError: no gradient leads from what it writes to what it reads.
        NonFiniteError: the centroid has NaN or infinite values.

    Example:
        >>> with model.trace("I climbed up the pear tree"):
        ...     mu = lch.nnsight.centroid(model.transformer.h[5].mlp).save()
    """
    envoys = [envoy] if isinstance(envoy, Envoy) else list(envoy)
    v = _check(envoys, cotangent)
    envoy = envoys[-1]
    structure = _structure_of(envoy) if len(envoys) == 1 else None
    try:
        if isinstance(v, Logit | Metric):
            return _from_the_logits(envoys, structure, v)
        if structure is None:
            return _by_vjp(envoys, v)
        return _in_closed_form(envoy, structure, v)
    except OutOfOrderError as error:
        if Mediator.current(envoy.path).iteration != 0:
            raise  # The end of a loop over steps, which nnsight knows how to take.
        raise SiteError(
            f"{envoy.path} does not run after this point of the trace. Either the model does not "
            "call it at all, or something asked for before it runs later: ask in the order the "
            "model runs, and for what a module reads before its centroid."
        ) from error


class CentroidEnvoy(Envoy):
    """An envoy with its module's centroid as a property, for nnsight's ``envoys=``.

    Attributes:
        cotangent: as in `centroid`, for a subclass to choose.

    Example:
        >>> model = TransformersModel("gpt2", envoys=lch.nnsight.CentroidEnvoy)
        >>> with model.trace("I climbed up the pear tree"):
        ...     mu = model.transformer.h[5].mlp.centroid.save()
    """

    cotangent: Tensor | AnyCotangent | None = None

    @property
    def centroid(self) -> Float[Tensor, ...]:
        """The module's centroid, inside a trace."""
        try:
            return centroid(self, self.cotangent)
        except AttributeError as error:  # An envoy would look for `centroid` in its module instead.
            raise RuntimeError(f"centroid of {self.path}: {error}") from error


def wrap(model: PreTrainedModel, processor: Any, name: str, **kwargs: Any) -> Any:
    """A model for nnsight, with its tokenizer or image processor if it has one.

    Args:
        model: of transformers; it stays as it is.
        processor: what reads its inputs; None, or of another kind, for a plain NNsight.
        name: of the model, for errors.
        **kwargs: for the wrapper, in place of what is found out here.

    Raises:
        InputError: nnsight cannot wrap the model so.
    """
    from nnsight import NNsight
    from nnsight.modeling.transformers import TransformersModel
    from transformers.pipelines import PipelineException

    headless = type(model).__name__.endswith("Model") and not model.can_generate()
    # Left to itself, nnsight's pipeline moves the model to the first GPU.
    defaults: dict[str, Any] = {"device": model.device}
    if isinstance(processor, PreTrainedTokenizerBase):
        defaults["tokenizer"] = processor
        task = "feature-extraction"
    elif processor is not None and model.main_input_name == "pixel_values":
        defaults["image_processor"] = processor
        task = "image-feature-extraction"
    else:
        return NNsight(model, **kwargs)
    if headless:  # nnsight tells tasks by the heads.
        defaults["task"] = task
    try:
        return TransformersModel(model, **{**defaults, **kwargs})
    except (ValueError, PipelineException) as error:
        raise InputError(
            f"nnsight cannot wrap {name}, a {type(model).__name__}: {error} Give another task=, or "
            "wrap the model itself as nnsight.NNsight(loaded.model)."
        ) from error


def _check(envoys: list[Any], cotangent: Any) -> AnyCotangent:
    for envoy in envoys or [None]:
        if not isinstance(envoy, Envoy):
            raise InputError(
                f"centroid takes an envoy, such as model.transformer.h[5].mlp, or several, not a "
                f"{type(envoy).__name__}. Pass the module's envoy, without .output or .input."
            )
    v, path = as_cotangent(cotangent), _path(envoys)
    try:
        Mediator.current(path)
    except ValueError as error:
        raise InputError(
            f"the centroid of {path} was asked for outside a trace, where there is no "
            "forward pass. Put it in `with model.trace(...):`."
        ) from error
    if detect_fake_mode() is not None:
        raise InputError(
            f"a scan computes shapes and no values. The centroid of {path} has the shape of "
            "what the module reads."
        )
    if isinstance(v, Logit | Metric) and not torch.is_grad_enabled():
        raise InputError(
            f"cotangent {v.name!r} is known only from the logits, which takes gradients: run the "
            "trace without torch.no_grad() around it."
        )
    for envoy in envoys:
        check_loaded(envoy._module, envoy.path)
    return v


def _path(envoys: list[Envoy]) -> str:
    """Name of a module, or of the span of several."""
    return envoys[0].path if len(envoys) == 1 else f"{envoys[0].path}:{envoys[-1].path}"


def _structure_of(envoy: Envoy) -> Structure | None:
    """How a module is an MLP with a closed form; None if it is not, or not in this very pass.

    Recognised in evaluation mode and without hooks: what dropout, or a hook of somebody's, does on
    the way only the module itself knows.
    """
    modules = list(envoy._module.modules())
    ids = tuple(map(id, modules))
    if _structures.get(envoy._module, (None, None))[0] != ids:
        # Aside, so that no module or activation within counts as called by the model.
        found = _aside(envoy, recognise, envoy._module, at_once=True)
        _structures[envoy._module] = ids, found
    for m in modules:
        if m.training and isinstance(m, nn.Dropout) and m.p > 0:
            return None
        if m is not envoy._module and (m._forward_hooks or m._forward_pre_hooks):
            return None
    return _structures[envoy._module][1]


def _in_closed_form(envoy: Envoy, structure: Structure, v: Cotangent) -> Tensor:
    mlp = structure.weights
    is_new = _key(v) not in _seen.get(envoy._module, ())
    if is_fixed(v) and is_new:
        check_mlp_cotangent(envoy.path, mlp, v)
    # Copies: the model, or an activation in place, may write to them before they are all there.
    outputs = [_envoy_of(envoy, module).output.detach().clone() for module in structure.inputs]
    pre = structure.pre_activations(outputs)
    if isinstance(v, Ones):
        w = None
    elif is_fixed(v):
        w = evaluate(v, mlp.W_out[0])
    else:  # It depends on what the module writes, and waits for it.
        y = output_of(envoy.output, envoy.path)
        w = evaluate(v, y).to(y).expand_as(y)
    mu = blank(_aside(envoy, _closed_form, mlp, pre, w), _tokens(envoy))
    if is_new and not is_fixed(v):
        assert w is not None
        check_cotangent(
            envoy.path, w, mu, lambda r: _aside(envoy, _closed_form, mlp, pre, r), w.dtype
        )
    check_finite(envoy.path, mu)
    _seen.setdefault(envoy._module, set()).add(_key(v))
    return mu


def _closed_form(mlp: MLP, pre: tuple[Tensor, ...], w: Tensor | None) -> Tensor:
    return centroid_of_neurons(mlp, pre, read_direction(mlp, w))


def _by_vjp(envoys: list[Envoy], v: Cotangent) -> Tensor:
    component, path = _Span(envoys), _path(envoys)
    seen, key = _seen.setdefault(envoys[-1]._module, set()), f"{path} {_key(v)}"
    weighed = _Weighed(v, component.tokens)
    with _Uncounted(envoys), component.backward:
        mu = vjp(component, component.x, weighed)
        if key not in seen:
            assert weighed.v is not None
            check_cotangent(path, weighed.v, mu, lambda r: vjp(component, component.x, r), mu.dtype)
    mu = blank(mu, component.tokens)
    check_finite(path, mu)
    seen.add(key)
    return mu.to(at_least_float32(mu))


def _from_the_logits(envoys: list[Envoy], structure: Structure | None, v: Logit | Metric) -> Tensor:
    """A centroid whose cotangent is known once the model has got to its end."""
    last, path, root = envoys[-1], _path(envoys), _root(envoys[-1])
    norm = _final_norm(root, last, v) if isinstance(v, Logit) else None
    if structure is None:
        component = _Span(envoys)
        if component.writes_in_place or any(_is_training(e) for e in envoys if _counts(e)):
            raise SiteError(
                f"{path} writes in place to what its gradient needs, which cannot wait for the "
                f"logits. Compute the direction of {v.name!r} in a first trace, and pass a tensor."
            )
        with torch.enable_grad():
            x = component.x.detach().clone().requires_grad_()
            written = component(x)
    else:
        outputs = [_envoy_of(last, module).output.detach().clone() for module in structure.inputs]
    output = last.output
    y = output_of(output, path)
    tokens = _tokens(last)
    if tokens is None and structure is None:
        tokens = component.tokens
    _check_positions(root, v, tokens, path)
    if norm is not None:
        assert isinstance(v, Logit)
        w = _of_logit(root, norm, v, tokens)
        if w.shape != y.shape:
            raise SiteError(
                f"{path} writes {tuple(y.shape)}, and the final norm reads {tuple(w.shape)}: it is "
                "no block of the stack that the unembedding reads."
            )
    else:
        assert isinstance(v, Metric)
        # Added to what is written: other graphs of the user's stay whole.
        change = torch.zeros_like(y).requires_grad_()
        last.output = with_output(output, y, y + change)
        (w,) = of_metric(v, output_of(root.output, "the model"), [change], [path], tokens)
    w = blank(w, tokens)
    if structure is not None:
        pre = structure.pre_activations(outputs)
        mu = _aside(last, _closed_form, structure.weights, pre, w)
    else:
        (mu,) = gradients(path, written, [x], w.to(written), keep=False)
    mu = blank(mu.detach(), tokens)
    check_finite(path, mu)
    return mu.to(at_least_float32(mu))


def _check_positions(root: Envoy, v: Logit | Metric, tokens: Any, path: str) -> None:
    """Refuse to count positions where nothing says which of them are tokens."""
    model = root._module
    is_around = not isinstance(model, PreTrainedModel) and any(
        isinstance(m, PreTrainedModel) for m in model.modules()
    )
    if is_around and v.position is not None and tokens is None:
        raise SiteError(
            f"{path}: {v.name!r} counts positions among tokens, and what padding the model within "
            f"this {type(model).__name__} reads is not known. Wrap the model itself in nnsight."
        )


def _root(envoy: Envoy) -> Envoy:
    """The envoy of the whole model."""
    while envoy.parent is not None:
        envoy = envoy.parent
    return envoy


def _final_norm(root: Envoy, last: Envoy, v: Logit) -> Envoy:
    """The norm in front of the unembedding: the one outside all lists of blocks."""
    model = root._module
    listed = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    inner = {m for blocks in listed for block in blocks for m in block.modules()} - {
        block for blocks in listed for block in blocks
    }
    # Not what is listed within a block, as experts are.
    blocks = [b for b in listed if b not in inner]
    if not any(last._module is block for one in blocks for block in one):
        raise InputError(
            f"cotangent {v.name!r} lies in the residual stream, and what {last.path} writes may "
            "pass a norm before it gets there: take a block, or a span of blocks, or a Metric "
            "(lch.cotangents.logit_difference)."
        )
    within = {m for one in blocks for m in one.modules()}
    get_head = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    norms = [
        m
        for m in model.modules()
        if m not in within
        and not list(m.children())
        and isinstance(weight := getattr(m, "weight", None), Tensor)
        and weight.ndim == 1
    ]
    if head is None or len(norms) != 1:
        raise SiteError(
            f"cotangent {v.name!r} goes through the final norm and the unembedding, and this "
            f"{type(model).__name__} does not say which they are. Use a Metric "
            "(lch.cotangents.logit_difference)."
        )
    return _envoy_of(root, norms[0])


def _of_logit(root: Envoy, norm: Envoy, v: Logit, tokens: Any) -> Tensor:
    """The direction in which the residual stream raises a logit, at each position."""
    head = root._module.get_output_embeddings()
    W_U, ids = head.weight, [v.token] + ([] if v.foil is None else [v.foil])
    if any(not 0 <= i < len(W_U) for i in ids):
        raise InputError(f"{v} names a token outside 0 to {len(W_U) - 1}.")
    x, _ = input_of(norm.inputs, norm.path)
    normed = output_of(norm.output, norm.path)
    read, _ = input_of(_envoy_of(root, head).inputs, "the unembedding")
    # A model may unembed the last positions alone.
    if not torch.equal(read, normed[:, -read.shape[1] :]):
        raise SiteError(
            f"{norm.path} is not what the unembedding reads. Use a Metric "
            "(lch.cotangents.logit_difference)."
        )
    w = W_U[v.token] if v.foil is None else W_U[v.token] - W_U[v.foil]
    w = spread(w.detach(), normed, tokens, None if v.position is None else [v.position])
    return _aside(norm, vjp, norm._module.forward, x, w)


class _Uncounted:
    """Running statistics count the model's own call, and not ours.

    A class and not a decorated generator: nnsight sends functions without their decorators.
    """

    def __init__(self, envoys: list[Envoy]) -> None:
        counting = (e for e in envoys if _is_training(e))
        self._buffers = [b for e in counting for b in e._module.buffers()]

    def __enter__(self) -> None:
        self._before = [b.clone() for b in self._buffers]

    def __exit__(self, *_: object) -> None:
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before)


class _Span:
    """Modules in a row, each of which reads what the one before it returns, as one function.

    Attributes:
        x: what the first reads in the model's own call.
        tokens: which positions are tokens; None if all are, or nothing says.
        writes_in_place: whether a module writes to what its gradient needs.

    Raises:
        SiteError: one reads something else than the one before it returns.
    """

    def __init__(self, envoys: list[Envoy]) -> None:
        self._components = [_Component(envoys[0])]
        for before, envoy in pairwise(envoys):
            returned = output_of(before.output, before.path)
            component = _Component(envoy)
            if not torch.equal(component.x, returned):
                raise SiteError(
                    f"{envoy.path} does not read what {before.path} returns, so they are no span. "
                    "Pass modules that follow each other, such as blocks."
                )
            self._components.append(component)
        self.x = self._components[0].x
        self.tokens = next((c.tokens for c in self._components if c.tokens is not None), None)
        self.writes_in_place = any(c.writes_in_place for c in self._components)

    @property
    def backward(self) -> Any:
        """Context for a gradient through it."""
        if self.writes_in_place:
            return torch.autograd.graph.allow_mutation_on_saved_tensors()
        return nullcontext()

    def __call__(self, x: Tensor) -> Tensor:
        for component in self._components:
            x = component(x)
        return x


class _Component:
    """A module with the arguments of its call, as a function of what it reads.

    Attributes:
        x: what it reads in the model's own call.
        tokens: which positions are tokens; None if all are, or nothing says.
        writes_in_place: whether it writes to what its gradient needs.
    """

    def __init__(self, envoy: Envoy) -> None:
        self._envoy = envoy
        call: Call = envoy.inputs
        args, kwargs = call
        # As they are before this module adds to them, which of a span others may run after.
        args = tuple(_for_us_alone(envoy, a) if is_cache(a) else a for a in args)
        kwargs = {k: _for_us_alone(envoy, a) if is_cache(a) else a for k, a in kwargs.items()}
        self.x, self._call_with = input_of((args, kwargs), envoy.path)
        self.tokens = _tokens(envoy)
        if self.tokens is None and self.x.ndim == 3:
            self.tokens = token_mask(call, self.x.shape[1])
        # Linear attention writes to states in place that its gradient needs.
        self.writes_in_place = any(
            hasattr(layer, "recurrent_states")
            for cache in caches([*call[0], *call[1].values()])
            for i, layer in enumerate(getattr(cache, "layers", ()))
            if i in _layers(envoy)
        )

    def __call__(self, x: Tensor) -> Tensor:
        args, kwargs = self._call_with(x)
        args = tuple(_for_us_alone(self._envoy, value) for value in args)
        kwargs = {key: _for_us_alone(self._envoy, value) for key, value in kwargs.items()}
        module = self._envoy._module
        # The numbers that dropout is about to draw in the model's own call, and for it to draw.
        random = torch.random.fork_rng(
            [x.device] if x.is_cuda else [], enabled=_is_training(self._envoy)
        )
        with random:
            # Not the module: its arguments are as its pre-hooks left them.
            output = _aside(self._envoy, module.forward, *args, **kwargs)
        return output_of(output, self._envoy.path)


class _Weighed:
    """A cotangent that leaves padding out.

    Attributes:
        v: as it was last evaluated, in the shape of the output.
    """

    def __init__(self, cotangent: Cotangent, tokens: Bool[Tensor, "batch pos"] | None) -> None:
        self.name = cotangent.name
        self.v: Tensor | None = None
        self._cotangent, self._tokens = cotangent, tokens

    def at(self, y: Tensor) -> Tensor:
        self.v = spread(evaluate(self._cotangent, y), y, self._tokens)
        return self.v


def _tokens(envoy: Envoy) -> Bool[Tensor, "batch pos"] | None:
    """Which positions of our rows are tokens; None if all are, or nothing says.

    The model may have read its inputs already, so the trace is asked to put them together again.
    """
    batcher = envoy.interleaver.batcher
    if batcher is None:
        return None
    model = batcher.envoy._module
    config = getattr(model, "config", None)
    reads_ids = getattr(model, "main_input_name", None) == "input_ids"
    # Of the two sequences of an encoder-decoder the modules' own arguments say which is which.
    if not reads_ids or getattr(config, "is_encoder_decoder", False):
        return None
    if batcher not in _tokens_of:
        if model not in _finders:
            _finders[model] = padding_finder(config)
        args, kwargs = batcher.assemble("forward")
        named = arguments_of(type(model).forward, ((model, *args), kwargs))
        ids, embeds = named.get("input_ids"), named.get("inputs_embeds")
        _tokens_of[batcher] = _finders[model].tokens(
            embeds if ids is None else ids, named.get("attention_mask")
        )
    tokens = _tokens_of[batcher]
    return None if tokens is None else batcher.narrow(tokens, _group(envoy))


def _group(envoy: Envoy) -> Any:
    """Which rows of the batch are of our invoke."""
    return Mediator.current(envoy.path).batch_group


def _counts(envoy: Envoy) -> bool:
    """Whether a module keeps running statistics, which its own call writes to."""
    return any(getattr(m, "track_running_stats", False) for m in envoy._module.modules())


def _is_training(envoy: Envoy) -> bool:
    return any(m.training for m in envoy._module.modules())


def _key(v: Cotangent) -> str:
    """Tells cotangents apart whose centroids are to be checked once each."""
    return f"{v.name} {hash(tuple(v.v.tolist()))}" if isinstance(v, Vector) else v.name


def _aside(envoy: Envoy, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function gives while the trace stands down, as ``Envoy.__call__`` has it.

    Modules it calls, activations too, would otherwise count as calls of the model's own.
    """
    interleaver = envoy.interleaver
    interleaving, interleaver.interleaving = interleaver.interleaving, False
    try:
        return fn(*args, **kwargs)
    finally:
        interleaver.interleaving = interleaving


def _envoy_of(envoy: Envoy, module: nn.Module) -> Envoy:
    """The envoy of a module within another's, whatever it is called there."""
    for e in envoy.modules():
        if e._module is module:
            return e
    raise SiteError(
        f"{envoy.path} has a {type(module).__name__} that nnsight does not know: the model was "
        "changed after it was wrapped. Wrap it anew."
    )


def _for_us_alone(envoy: Envoy, argument: Any) -> Any:
    """An argument that a call of ours may use up.

    Tokens would be added to a key-value cache twice, and nnsight does not cut it to the rows of an
    invoke, as it does tensors. And this is outside of inference mode, where its tensors are no use.
    """
    if not is_cache(argument):
        return apply(argument, lambda t: t.clone() if t.is_inference() else t, Tensor)
    return _copy_of_cache(envoy, argument, _layers(envoy))


def _layers(envoy: Envoy) -> set[int | None]:
    """Where the modules within keep what they remember in a key-value cache."""
    return {getattr(module, "layer_idx", None) for module in envoy._module.modules()}


def _copy_of_cache(envoy: Envoy, cache: Any, layers: set[int | None]) -> Any:
    """A copy of a key-value cache in which these layers are our own, and of our rows."""
    mine = copy.copy(cache)
    for name, value in vars(cache).items():
        if name == "layers":
            mine.layers = [
                _copy_of_layer(envoy, layer) if i in layers else layer
                for i, layer in enumerate(value)
            ]
        elif is_cache(value):  # Of an encoder-decoder, one for each attention.
            setattr(mine, name, _copy_of_cache(envoy, value, layers))
        elif isinstance(value, dict):
            setattr(mine, name, dict(value))
    return mine


def _copy_of_layer(envoy: Envoy, layer: Any) -> Any:
    batcher = envoy.interleaver.batcher
    group = _group(envoy)

    # No annotations: see above.
    def of_our_rows(tensor):  # type: ignore[no-untyped-def]
        rows = tensor if batcher is None or not tensor.ndim else batcher.narrow(tensor, group)
        return rows.detach().clone()

    mine = copy.copy(layer)
    # In dictionaries too: the states of linear attention.
    vars(mine).update(apply(vars(layer), of_our_rows, Tensor))
    return mine

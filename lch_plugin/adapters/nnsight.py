"""Centroids inside an nnsight trace.

``centroid(envoy)`` is a value like ``envoy.output``: it waits until the model gets there, sees what
the trace has edited so far, and is kept with ``.save()``. With `CentroidEnvoy` every module of a
model has it as a property.

An MLP's centroid comes from the outputs of its own projections, in closed form (`lch_plugin.mlp`).
Any other module's takes its inputs and one vector-Jacobian product through the module, called anew
with them: nnsight's own way to apply a module ad hoc, which leaves its place in the forward pass
alone. The graph is of that call only, and gone when it is done.

For ``remote=True`` code travels by value: ``nnsight.register("lch_plugin")`` once, and call
`centroid` by a name of its own (``centroid = lch.nnsight.centroid``). Nothing here may depend on
what a server lacks: torch, transformers and nnsight are there, jaxtyping and TransformerLens are
not, and so no annotation in a nested function, which would be evaluated.
"""

from __future__ import annotations

import copy
from typing import Any

from jaxtyping import Bool, Float
from nnsight import Envoy
from nnsight.intervention.interleaver import Mediator, OutOfOrderError
from nnsight.util import apply
from torch import Tensor, nn

from lch_plugin.adapters.arguments import (
    Call,
    input_of,
    is_cache,
    output_of,
    token_mask,
    without_padding,
)
from lch_plugin.adapters.checks import (
    check_cotangent,
    check_finite,
    check_loaded,
    check_mlp_cotangent,
)
from lch_plugin.adapters.structure import Structure, recognise
from lch_plugin.centroids import centroid as vjp
from lch_plugin.cotangents import Cotangent, Logit, Metric, Ones, as_cotangent, evaluate, is_fixed
from lch_plugin.errors import InputError, SiteError
from lch_plugin.memo import Memo
from lch_plugin.mlp import at_least_float32, centroid_of_neurons, read_direction

_structures: Memo[Structure | None] = Memo()
# Names of cotangents, by module.
_seen: Memo[set[str]] = Memo()


def centroid(
    envoy: Envoy, cotangent: Float[Tensor, " d_out"] | Cotangent | None = None
) -> Float[Tensor, ...]:
    """Centroid of a module, inside a trace.

    Reads what the module computes, in the order it does: of an MLP with a closed form the outputs
    of its input projections, of any other module its inputs. So ask for centroids in the order the
    model runs, like for any value, and edit before you ask. Of a module that runs several times
    (tied layers, generation) it is the first call's, or the one that ``tracer.iter`` is at. Each
    invoke gets its own rows, padding included; outputs at padding do not count where positions mix.

    Args:
        envoy: of the module, as in ``model.transformer.h[5].mlp``.
        cotangent: ``v`` of the centroid ``J^T v``: shape ``(d_out,)``, or from
            `lch_plugin.cotangents` but for `Logit` and `Metric`; all ones if None.

    Returns:
        Shape of what the module reads, ``(batch, pos, d_model)`` for the parts of a transformer; in
        at least float32, without a graph.

    Raises:
        InputError: outside a trace, not an envoy, or no cotangent that works here.
        SiteError: the module does not run, or ran before this point of the trace; or its weights
            are not loaded or quantised.
        VanishingCentroidError: the cotangent reads nothing of what the module writes.

    Example:
        >>> with model.trace("I climbed up the pear tree"):
        ...     mu = lch.nnsight.centroid(model.transformer.h[5].mlp).save()
    """
    v = _check(envoy, cotangent)
    if envoy._module not in _structures:
        _structures[envoy._module] = recognise(envoy._module, call=envoy)
    structure = _structures[envoy._module]
    try:
        if structure is None:
            return _by_vjp(envoy, v)
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

    cotangent: Tensor | Cotangent | None = None

    @property
    def centroid(self) -> Float[Tensor, ...]:
        """The module's centroid, inside a trace."""
        return centroid(self, self.cotangent)


def _check(envoy: Envoy, cotangent: Any) -> Cotangent:
    if not isinstance(envoy, Envoy):
        raise InputError(
            f"centroid takes an envoy, such as model.transformer.h[5].mlp, not a "
            f"{type(envoy).__name__}. Pass the module's envoy, without .output or .input."
        )
    v = as_cotangent(cotangent)
    if isinstance(v, Logit | Metric):
        raise InputError(
            f"cotangent {v.name!r} is known only once the model has run to its end, and a trace "
            "cannot go back. Compute the direction in a first trace and pass it as a tensor."
        )
    try:
        Mediator.current(envoy.path)
    except ValueError as error:
        raise InputError(
            f"the centroid of {envoy.path} was asked for outside a trace, where there is no "
            "forward pass. Put it in `with model.trace(...):`."
        ) from error
    check_loaded(envoy._module, envoy.path)
    return v


def _in_closed_form(envoy: Envoy, structure: Structure, v: Cotangent) -> Tensor:
    mlp = structure.weights
    if is_fixed(v) and _is_new(envoy, v):
        check_mlp_cotangent(envoy.path, mlp, v)
    outputs = [_envoy_of(envoy, module).output.detach() for module in structure.inputs]
    if isinstance(v, Ones):
        w = None
    elif is_fixed(v):
        w = evaluate(v, mlp.W_out[0])
    else:  # It depends on what the module writes, and waits for it.
        w = evaluate(v, output_of(envoy.output, envoy.path))
    mu = centroid_of_neurons(mlp, structure.pre_activations(outputs), read_direction(mlp, w))
    check_finite(envoy.path, mu)
    return mu


def _by_vjp(envoy: Envoy, v: Cotangent) -> Tensor:
    component = _Component(envoy)
    weighed = _Weighed(v, component.mask)
    mu = vjp(component, component.x, weighed)
    if _is_new(envoy, v):
        assert weighed.v is not None
        check_cotangent(
            envoy.path, weighed.v, mu, lambda r: vjp(component, component.x, r), mu.dtype
        )
    check_finite(envoy.path, mu)
    return mu.to(at_least_float32(mu))


class _Component:
    """A module with the arguments of its call, as a function of what it reads.

    Attributes:
        x: what it reads in the model's own call.
        mask: which positions are tokens.
    """

    def __init__(self, envoy: Envoy) -> None:
        self._envoy = envoy
        call: Call = envoy.inputs
        self.x, self._call_with = input_of(call, envoy.path)
        self.mask = token_mask(call, self.x.shape[1]) if self.x.ndim == 3 else None

    def __call__(self, x: Tensor) -> Tensor:
        args, kwargs = self._call_with(x)
        args = tuple(_for_us_alone(self._envoy, value) for value in args)
        kwargs = {key: _for_us_alone(self._envoy, value) for key, value in kwargs.items()}
        return output_of(self._envoy(*args, **kwargs), self._envoy.path)


class _Weighed:
    """A cotangent that leaves padding out.

    Attributes:
        v: as it was last evaluated, in the shape of the output.
    """

    def __init__(self, cotangent: Cotangent, mask: Bool[Tensor, "batch pos"] | None) -> None:
        self.name = cotangent.name
        self.v: Tensor | None = None
        self._cotangent, self._mask = cotangent, mask

    def at(self, y: Tensor) -> Tensor:
        self.v = without_padding(evaluate(self._cotangent, y), y, self._mask)
        return self.v


def _is_new(envoy: Envoy, v: Cotangent) -> bool:
    """Whether a module is asked for a centroid through a cotangent of this name for the first time.

    What is checked only then is more than noise stays so.
    """
    names = _seen.setdefault(envoy._module, set())
    is_new = v.name not in names
    names.add(v.name)
    return is_new


def _envoy_of(envoy: Envoy, module: nn.Module) -> Envoy:
    """The envoy of a module within another's, whatever it is called there."""
    return next(e for e in envoy.modules() if e._module is module)


def _for_us_alone(envoy: Envoy, argument: Any) -> Any:
    """An argument that a call of ours may use up.

    Tokens would be added to a key-value cache twice, and nnsight does not cut it to the rows of an
    invoke, as it does tensors. And this is outside of inference mode, where its tensors are no use.
    """
    if not is_cache(argument):
        return apply(argument, lambda t: t.clone() if t.is_inference() else t, Tensor)
    layers = {getattr(module, "layer_idx", None) for module in envoy._module.modules()}
    return _copy_of_cache(envoy, argument, layers)


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
    group = Mediator.current(envoy.path).batch_group
    mine = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            value = value if batcher is None else batcher.narrow(value, group)
            setattr(mine, name, value.detach().clone())
    return mine

"""Which plain PyTorch modules are MLPs with a closed form, found by what they compute.

Families name the parts of an MLP as they like: ``c_fc`` and ``c_proj``, ``gate_proj``, ``up_proj``
and ``down_proj``, ``fc1`` and ``fc2``, ``weights_in`` and ``weights_out``, the numbers of a
``Sequential``. So names are not looked at. A module with two or three linear maps and an
activation can be a plain or gated MLP in a few ways; each way's closed form, from what the
projections give when the module runs on noise, is compared with a gradient through the module
itself, and the one that agrees is what the module is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lch_plugin.adapters.checks import TOLERANCE, check_loaded, noise
from lch_plugin.centroids import centroid
from lch_plugin.mlp import MLP, Activation, GatedMLP, PlainMLP, at_least_float32, mlp_centroid

# For modules that call a function rather than keep it.
_FUNCTIONS: tuple[Activation, ...] = (
    lambda z: F.relu(z),
    lambda z: F.gelu(z),
    lambda z: F.gelu(z, approximate="tanh"),
    lambda z: F.silu(z),
    lambda z: torch.tanh(z),
)
# Rows to try for each standard deviation of pre-activations, and the most to scale them by. Where
# they are near zero activations differ most; far out are clamps, as DeepSeek's at 10.
_N_ROWS, _SPREADS, _LARGEST_SCALE = 16, (2.0, 32.0), 1e3
# What a module keeps of its mode, of hooks and of compiled code, and what stands there while it is
# tried out.
_SILENCED: dict[str, Callable[[], Any]] = {
    "training": bool,
    "_forward_hooks": OrderedDict,
    "_forward_pre_hooks": OrderedDict,
    "_backward_hooks": OrderedDict,
    "_backward_pre_hooks": OrderedDict,
    "_compiled_call_impl": lambda: None,
}
# What a module keeps that runs the module.
_FORWARDS = ("forward", "_old_forward", "_compiled_call_impl")


@dataclass(frozen=True, eq=False)
class Structure:
    """How a module is a plain or gated MLP.

    Attributes:
        inputs: its input projections, in the order they run. A plain MLP has one, a gated MLP the
            gate's and the other's, or one that holds both.
        output: its output projection.
        act: its activation function.
        gate: which input projection is the gate's, or which half of the one; None of a plain MLP.
    """

    inputs: tuple[nn.Module, ...]
    output: nn.Module
    act: Activation
    gate: int | None

    @property
    def weights(self) -> MLP:
        """The MLP's weights as they are now, without a copy."""
        pairs = [_weight_and_bias(projection) for projection in self.inputs]
        W_out, _ = _weight_and_bias(self.output)
        if self.gate is None:
            return PlainMLP(*pairs[0], W_out, self.act)
        if len(pairs) == 1:
            (W, b) = pairs[0]
            biases = (None, None) if b is None else b.chunk(2, dim=-1)
            pairs = list(zip(W.chunk(2, dim=-1), biases, strict=True))
        return GatedMLP(*pairs[self.gate], *pairs[1 - self.gate], W_out, self.act)

    def pre_activations(self, outputs: list[Tensor]) -> tuple[Tensor, ...]:
        """Pre-activations as `lch_plugin.mlp` takes them.

        Args:
            outputs: what the input projections gave, each of shape ``(*batch, d)``.
        """
        if self.gate is None:
            return (outputs[0],)
        halves = list(outputs[0].chunk(2, dim=-1)) if len(outputs) == 1 else outputs
        return halves[self.gate], halves[1 - self.gate]


def recognise(
    first: nn.Module, last: nn.Module | None = None, *, at_once: bool = False
) -> Structure | None:
    """How a module is an MLP with a closed form; None if it is not.

    Args:
        first: the module, or the first of two of which the second reads what the first gives
            (BERT's ``intermediate`` and ``output.dense``).
        last: the second.
        at_once: whether readers get what a projection gives when it returns, as in a trace. A
            watched module waits for its end, and what is written in place until then is part of it.

    Raises:
        SiteError: weights that are not loaded, or quantised.
    """
    modules = [first] if last is None else [first, last]
    linear = [m for module in modules for m in module.modules() if _is_linear(m)]
    parameters = {id(p) for module in modules for p in module.parameters()}
    if len(linear) not in (2, 3) or len(parameters) != len({id(p) for p in _parameters(linear)}):
        return None
    for module in modules:
        check_loaded(module, type(module).__name__)
    run = first if last is None else lambda x: last(first(x))
    ran: dict[nn.Module, Tensor] = {}
    with _Laboratory(modules):
        x = _random_input(linear[0])

        def note(m, _args, output):  # type: ignore[no-untyped-def]
            ran[m] = output.detach().clone() if at_once else output.detach()

        hooks = [m.register_forward_hook(note) for m in linear]
        try:
            y = run(x)
        except Exception:  # It takes more than one tensor, other shapes, or no noise.
            return None
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(y, Tensor) or y.shape[:-1] != x.shape[:-1] or len(ran) != len(linear):
            return None
        v = noise(y[0, 0])
        try:
            truth = centroid(run, x, v)
        except Exception:
            return None
        if not bool(truth.any()):
            return None  # Zero weights, with which every activation agrees.
        outputs = [ran[m] for m in ran]
        for candidate in _candidates([*ran], [*_activations(modules), *_FUNCTIONS]):
            if _agrees(candidate, outputs[:-1], v, truth):
                return candidate
    return None


def stand_ins(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """What was put in place of a module's ``forward``, the last first, and what it stands for."""
    forward = vars(module).get("forward")
    while forward is not None:
        yield forward
        forward = getattr(forward, "__wrapped__", None)


def is_watching(forward: Callable[..., Any]) -> bool:
    """Whether it is a `lch_plugin.adapters.huggingface.calls.WatchedForward`."""
    # By the class: functools.wraps copies attributes.
    return hasattr(type(forward), "is_asleep")


def _candidates(ran: list[nn.Module], acts: list[Activation]) -> Iterator[Structure]:
    """Every way in which linear maps, in the order they ran, can be an MLP."""
    *inputs, output = ran
    shapes, d_mlp = [_shape(m) for m in inputs], _shape(output)[0]
    for act in acts:
        if shapes == [(shapes[0][0], d_mlp)]:
            yield Structure((inputs[0],), output, act, None)
        elif shapes == [(shapes[0][0], 2 * d_mlp)] or shapes == [(shapes[0][0], d_mlp)] * 2:
            for gate, _ in permutations((0, 1)):
                yield Structure(tuple(inputs), output, act, gate)


def _agrees(candidate: Structure, outputs: list[Tensor], v: Tensor, truth: Tensor) -> bool:
    try:
        mu = mlp_centroid(candidate.weights, candidate.pre_activations(outputs), v)
    except Exception:  # Whatever a module keeps may be called here, activation or not.
        return False
    if mu.shape != truth.shape:
        return False
    # For each spread on its own: the larger one's gradients may be larger by far, or (tanh) vanish.
    by_spread = (len(_SPREADS), -1)
    errors = (mu - truth).reshape(by_spread).norm(dim=-1)
    norms = truth.reshape(by_spread).norm(dim=-1)
    return bool((errors <= TOLERANCE[truth.dtype] * norms.clamp(min=norms[0])).all())


def _random_input(projection: nn.Module) -> Float[Tensor, "1 pos d_in"]:
    """Noise whose pre-activations are so large that one activation is not taken for another."""
    W, _ = _weight_and_bias(projection)
    rows = noise(W.new_empty(_N_ROWS, W.shape[0]))
    unit = (1 / (rows @ W).std()).clamp(max=_LARGEST_SCALE / _SPREADS[0])
    return torch.cat([rows * (unit * spread) for spread in _SPREADS])[None]


def _activations(modules: list[nn.Module]) -> Iterator[Activation]:
    """What the modules keep that could be an activation."""
    for module in (m for top in modules for m in top.modules()):
        is_leaf = not any(True for _ in module.children())
        if is_leaf and not any(True for _ in module.parameters()) and module not in modules:
            # Not the module, nor a watched forward: these belong to the model's own call.
            yield next((f for f in stand_ins(module) if not is_watching(f)), module.forward)
        for name, value in vars(module).items():
            if callable(value) and not isinstance(value, type) and name not in _FORWARDS:
                yield value


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight in the orientation of `lch_plugin.mlp`, ``(d_in, d_out)``, and bias."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    return (weight if isinstance(module, Conv1D) else weight.T), bias


def _shape(module: nn.Module) -> tuple[int, int]:
    d_in, d_out = _weight_and_bias(module)[0].shape
    return d_in, d_out


def _parameters(modules: list[nn.Module]) -> Iterator[Tensor]:
    return (p for module in modules for p in module.parameters())


class Alone:
    """Modules run without anybody's hooks or watchers, in evaluation mode, without autocast.

    A class and not a decorated generator: nnsight sends functions without their decorators.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self._every = list(dict.fromkeys(m for module in modules for m in module.modules()))
        kept = [(vars(m), _SILENCED.keys() & vars(m)) for m in self._every]
        self._kept = [(state, {name: state[name] for name in names}) for state, names in kept]
        self._watching = [f for m in self._every for f in stand_ins(m) if is_watching(f)]
        self._modes = ExitStack()

    def __enter__(self) -> None:
        self._modes.enter_context(torch.inference_mode(False))
        self._modes.enter_context(torch.no_grad())
        for device in {p.device.type for m in self._every for p in m.parameters(recurse=False)}:
            self._modes.enter_context(torch.autocast(device, enabled=False))
        for state, kept in self._kept:
            state.update({name: _SILENCED[name]() for name in kept})
        for forward in self._watching:
            forward.is_asleep = True  # type: ignore[attr-defined]

    def __exit__(self, *_: object) -> None:
        for forward in self._watching:
            forward.is_asleep = False  # type: ignore[attr-defined]
        for state, kept in self._kept:
            state.update(kept)
        self._modes.close()


class _Laboratory:
    """The same in at least float32: in half precision activations cannot be told apart.

    One MLP's weights are converted at a time, and nothing of that is left. Not a subclass: nnsight
    sends classes by value, in which ``super`` has no meaning.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self._alone = Alone(modules)
        self._weights = {p: p.data for module in modules for p in module.parameters()}

    def __enter__(self) -> None:
        self._alone.__enter__()
        for p, data in self._weights.items():
            p.data = data.to(at_least_float32(data))

    def __exit__(self, *_: object) -> None:
        for p, data in self._weights.items():
            p.data = data
        self._alone.__exit__()

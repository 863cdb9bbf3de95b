"""Which plain PyTorch modules are MLPs with a closed form, found by what they compute.

Families name the parts of an MLP as they like: ``c_fc`` and ``c_proj``, ``gate_proj``, ``up_proj``
and ``down_proj``, ``fc1`` and ``fc2``, ``weights_in`` and ``weights_out``, the numbers of a
``Sequential``. So names are not looked at. A module with two or three linear maps and an
activation can be a plain or gated MLP in a few ways; each way's closed form is compared with a
gradient through the module itself, and the one that agrees is what the module is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
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
from lch_plugin.errors import LCHError
from lch_plugin.mlp import MLP, Activation, GatedMLP, PlainMLP, at_least_float32, mlp_centroid

# For modules that call a function rather than keep it.
_FUNCTIONS: tuple[Activation, ...] = (
    lambda z: F.relu(z),
    lambda z: F.gelu(z),
    lambda z: F.gelu(z, approximate="tanh"),
    lambda z: F.silu(z),
    lambda z: torch.tanh(z),
)
# Rows to try, the standard deviation of their pre-activations, and the most to scale them by.
_N_ROWS, _SPREAD, _LARGEST_SCALE = 4, 2.0, 1e3


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
    first: nn.Module, last: nn.Module | None = None, call: Callable[[Tensor], Any] | None = None
) -> Structure | None:
    """How a module is an MLP with a closed form; None if it is not.

    Args:
        first: the module, or the first of two of which the second reads what the first gives
            (BERT's ``intermediate`` and ``output.dense``).
        last: the second.
        call: runs the two, if calling the modules would not do.

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
    run = call or (first if last is None else lambda x: last(first(x)))
    x = _random_input(linear[0])
    ran: list[nn.Module] = []
    with _Laboratory(modules):
        hooks = [m.register_forward_hook(lambda m, _i, _o: ran.append(m)) for m in linear]
        try:
            y = run(x)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return None  # It takes more than one tensor, or other shapes.
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(y, Tensor) or len(ran) != len(linear) or set(ran) != set(linear):
            return None
        v = noise(y[0, 0])
        try:
            truth = centroid(run, x, v)
        except (LCHError, RuntimeError):
            return None
        for candidate in _candidates(ran, [*_activations(modules), *_FUNCTIONS]):
            if _agrees(candidate, x, v, truth):
                return candidate
    return None


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


def _agrees(candidate: Structure, x: Tensor, v: Tensor, truth: Tensor) -> bool:
    mlp = candidate.weights
    try:
        mu = mlp_centroid(mlp, mlp.pre_activations(x), v)
    except Exception:  # Whatever a module keeps may be called here, activation or not.
        return False
    if mu.shape != truth.shape:
        return False
    truth = truth.to(at_least_float32(truth))
    return bool((mu - truth).norm() <= TOLERANCE[x.dtype] * truth.norm())


def _random_input(projection: nn.Module) -> Float[Tensor, "1 pos d_in"]:
    """Noise whose pre-activations are so large that one activation is not taken for another."""
    W, b = _weight_and_bias(projection)
    with torch.no_grad():
        x = noise(W.new_empty(1, _N_ROWS, W.shape[0]))
        z = x @ W if b is None else x @ W + b
        return x * float((_SPREAD / z.std()).clamp(max=_LARGEST_SCALE))


def _activations(modules: list[nn.Module]) -> Iterator[Activation]:
    """What the modules keep that could be an activation."""
    for module in (m for top in modules for m in top.modules()):
        is_leaf = not any(True for _ in module.children())
        if is_leaf and not any(True for _ in module.parameters()) and module not in modules:
            yield module.forward  # Not the module: hooks on it belong to the model's own call.
        for name, value in vars(module).items():
            if callable(value) and not isinstance(value, type) and name != "forward":
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


class _Laboratory:
    """Evaluation mode, no hooks of anybody's, no gradients kept.

    A class and not a decorated generator: nnsight sends functions without their decorators.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        every = dict.fromkeys(m for module in modules for m in module.modules())
        self._kept = [(m, m.training, m._forward_hooks, m._forward_pre_hooks) for m in every]
        self._no_grad = torch.no_grad()

    def __enter__(self) -> None:
        self._no_grad.__enter__()
        for m, _, _, _ in self._kept:
            m.training = False
            m._forward_hooks, m._forward_pre_hooks = OrderedDict(), OrderedDict()

    def __exit__(self, *_: object) -> None:
        for m, training, hooks, pre_hooks in self._kept:
            m.training, m._forward_hooks, m._forward_pre_hooks = training, hooks, pre_hooks
        self._no_grad.__exit__(None, None, None)

"""Exact affine experts of smooth networks: gates, attention patterns and norm scales held fixed.

The Jacobian of a smooth component gives an affine map that agrees with it to first order only. The
*detached* linearisation (Golden, "Equivalent Linear Mappings of Large Language Models", arXiv
2505.24293) instead holds every nonlinear factor at the value it has at ``x``. What is left is
affine in ``x``, and reproduces the output exactly: for a component without biases
``f(x) = A x``, and ``J^T v`` of what is left is a row combination of that very ``A``.

While `DetachedMode` is on, torch functions keep their values to the last bit and change their
gradients alone:

- ``softmax`` and ``scaled_dot_product_attention``: the attention pattern is a constant
- ``layer_norm``, ``rms_norm`` and anything over a ``sqrt``, ``rsqrt`` or ``norm``: the scale is
- ``gelu``, ``silu``, ``relu``, ``tanh`` and the like: ``act(z) = z * (act(z) / z)``, the second
  factor constant
- ``sigmoid``, ``erf``, ``softplus``, ``logsigmoid``, ``exp``: factors of hand-written activations
  and gates, constant as a whole
- a product of two tensors that both depend on ``x``: the gate (whatever came out of an activation,
  or of linear functions of a ``tanh`` alone) is a constant, or the first of the two where neither
  is one; of a matrix product the first, but for such a gate
- ``topk`` and ``clamp``: which entries are taken, or within the bounds

Other piecewise-linear functions (max, sort) keep their Jacobians, which are exact within a piece.
So does every function that is not named here, and then what is left is *not* affine:
`lch_plugin.attach` finds out, `detached` takes your word for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lch_plugin.errors import NotDifferentiableError
from lch_plugin.mlp import at_least_float32


def detached(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` with the same values and the gradients of its detached linearisation.

    For `lch_plugin.centroid` and `lch_plugin.affine_expert`: ``lch.affine_expert(detached(fn), x)``
    is the expert ``v . f(x) = mu . x + offset`` in which the offset is due to biases alone, if
    ``fn`` is made of linear functions and those that this module names.

    Raises (when called):
        NotDifferentiableError: an in-place product of two tensors that both depend on ``x``.

    Example:
        Without biases the parts add up to the output.

        >>> gelu, x = torch.nn.GELU(), torch.randn(2, 3)
        >>> mu = lch.centroid(lch.detached(gelu), x)
        >>> torch.allclose((mu * x).sum(-1), gelu(x).sum(-1), atol=1e-6)
        True
    """

    def linear(x: Tensor) -> Tensor:
        with DetachedMode() as mode:
            return fn(mode.follow(x.view_as(x)))

    return linear


class DetachedMode(TorchFunctionMode):
    """While on, gradients are those of the detached linearisation.

    Only what depends on a tensor given to `follow` is touched. `recorded` collects every factor
    held fixed, in the order of the calls. A mode made with ``replay=mode.recorded`` uses these in
    place of the factors at its own input: then the component *is* the affine map, at any input.

    Args:
        replay: factors recorded elsewhere.
        through_patterns: let gradients pass through attention patterns as well, which makes
            attention bilinear: to first order in the pattern and in the values, and affine no more.
            A pattern is the softmax of scores, a product of two tensors that both depend on ``x``;
            other softmaxes (of a router, of SoLU) are held fixed all the same.
    """

    def __init__(
        self, replay: Iterable[Tensor] | None = None, *, through_patterns: bool = False
    ) -> None:
        super().__init__()
        self._through_patterns = through_patterns
        self.recorded: list[Tensor] = []
        self._replay = None if replay is None else iter(list(replay))
        self._paused = False

    def follow(self, x: Tensor) -> Tensor:
        """``x``, whose dependents this mode is about; weights may require gradients as well."""
        x._lch_follows = True  # type: ignore[attr-defined]
        return x

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused or not any(_varies(a) or _is_gate(a) for a in _tensors(args, kwargs)):
            return func(*args, **kwargs)
        rule = _RULES.get(func)
        scores = self._through_patterns and _makes_scores(rule, args, kwargs)
        squashed = _is_squashed(rule, func, args, kwargs)
        if self._through_patterns and (rule in _OF_PATTERNS or (scores and func in _SOFTMAX)):
            rule = None
        if rule is not None:  # The rules take what they look at by position.
            named = [kwargs.pop(name) for name in ("input", "other") if name in kwargs]
            args = (*named, *args) if len(named) < 2 or not args else (*args, *named)
        result = func(*args, **kwargs) if rule is None else rule(self, func, *args, **kwargs)
        if any(_varies(a) for a in _tensors(args, kwargs)):
            for tensor in _tensors((result,), {}):
                if tensor.requires_grad:
                    self.follow(tensor)
                    if scores and func not in _SOFTMAX:
                        tensor._lch_scores = True  # type: ignore[attr-defined]
                    if squashed:
                        tensor._lch_squashed = True  # type: ignore[attr-defined]
        return result

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Gradients as usual, for computations that are not the component's own."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def fix(self, factor: Tensor) -> Tensor:
        """``factor`` as a constant: its own value, or the one recorded elsewhere."""
        constant = factor.detach() if self._replay is None else next(self._replay)
        self.recorded.append(constant)
        return constant

    def with_gradient_of(self, value: Tensor, linear: Tensor) -> Tensor:
        """``value`` to the last bit, with the gradient of ``linear``, equal to it but for rounding.

        In a replay only ``linear`` is right.
        """
        linear = linear.to(value.dtype)
        if self._replay is not None:
            return linear
        result: Tensor = _Linear.apply(value.detach(), linear)
        return result


def _tensors(args: Any, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (v for v in value if isinstance(v, Tensor))


def _varies(value: Any) -> bool:
    """Whether this depends on what is followed."""
    return isinstance(value, Tensor) and value.requires_grad and hasattr(value, "_lch_follows")


def _is_gate(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "_lch_gate")


def _makes_scores(rule: Any, args: Any, kwargs: Any) -> bool:
    """Whether this contracts two tensors that depend on what is followed, or reads the result."""
    tensors = list(_tensors(args, kwargs))
    if rule is _contraction:
        return sum(map(_varies, tensors)) > 1
    return any(hasattr(tensor, "_lch_scores") for tensor in tensors)


def _is_squashed(rule: Any, func: Any, args: Any, kwargs: Any) -> bool:
    """Whether this is a tanh, or made of nothing else by linear functions.

    It may be an activation or a soft cap, which goes on by itself, or a gate, which meets in a
    product what it gates. Only then is it known.
    """
    tensors = list(_tensors(args, kwargs))[: 1 if func in _AS else None]
    varying = list(filter(_varies, tensors))
    linear = rule in (None, _sum, _contraction) and bool(varying)
    return func in _TANH or (linear and all(hasattr(t, "_lch_squashed") for t in varying))


def _gating(value: Any) -> int:
    """How much more of a gate than of a value this is."""
    return 2 * _is_gate(value) + hasattr(value, "_lch_squashed")


def _mark(tensor: Tensor) -> Tensor:
    """Remember that this came out of an activation: in a product it is the gate."""
    tensor._lch_gate = True  # type: ignore[attr-defined]
    return tensor


class _Linear(torch.autograd.Function):
    """A value, with the gradient of ``linear``, another tensor that (up to rounding) equals it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, linear: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


def _activation(mode: DetachedMode, func: Any, z: Tensor, *args: Any, **kwargs: Any) -> Any:
    kwargs.pop("inplace", None)
    value = func(z, *args, **kwargs)
    if not _varies(z):
        return value
    with torch.no_grad():
        # At zero the ratio has the derivative as its limit.
        near = torch.full_like(z, 1e-3)
        limit = (func(near, *args, **kwargs) - func(-near, *args, **kwargs)) / (2 * near)
        ratio = torch.where(z == 0, limit, value / z)
    return _mark(mode.with_gradient_of(value, z * mode.fix(ratio)))


def _factor(mode: DetachedMode, func: Any, *args: Any, **kwargs: Any) -> Any:
    value = func(*args, **kwargs)
    return _mark(mode.fix(value)) if any(map(_varies, args)) else value


def _product(mode: DetachedMode, func: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    marks = _is_gate(a) or _is_gate(b)
    if _varies(a) and _varies(b):
        if _gating(b) > _gating(a):
            return func(a, mode.fix(b), **kwargs)
        if func in _IN_PLACE:
            raise NotDifferentiableError(
                "an in-place product of two tensors that both depend on the input has no detached "
                "linearisation. Write a * b, or use the Jacobian."
            )
        return func(mode.fix(a), b, **kwargs)
    # A gate written out by hand is a product with a fixed factor: x * sigmoid(x).
    product = func(a, b, **kwargs)
    return _mark(product) if marks else product


def _contraction(mode: DetachedMode, func: Any, *args: Any, **kwargs: Any) -> Any:
    # Scores end in a softmax that is fixed anyway; elsewhere (linear attention, state spaces) the
    # first operand is what the second, that carries the values, is mixed by.
    varying = [i for i, a in enumerate(args) if _varies(a)]
    fixed = sorted(varying, key=lambda i: not hasattr(args[i], "_lch_squashed"))[:-1]
    return func(*(mode.fix(a) if i in fixed else a for i, a in enumerate(args)), **kwargs)


def _quotient(mode: DetachedMode, func: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    return func(a, mode.fix(b) if _varies(b) else b, **kwargs)


def _sum(_mode: DetachedMode, func: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    # 1 + tanh(...) is as much of a gate as tanh(...), and so is 1 - tanh(...).
    value = func(a, b, **kwargs)
    shifted = (_is_gate(a) and not _varies(b)) or (_is_gate(b) and not _varies(a))
    return _mark(value) if shifted else value


def _power(mode: DetachedMode, func: Any, x: Any, exponent: Any = 2, **kwargs: Any) -> Any:
    value = func(x, **kwargs) if func in _SQUARES else func(x, exponent, **kwargs)
    if not _varies(x) or not isinstance(exponent, int | float):
        return value
    if exponent <= 0:
        return _mark(mode.fix(value))
    with torch.no_grad():
        rest = x ** (exponent - 1)
    return mode.with_gradient_of(value, x * mode.fix(rest))


def _layer_norm(
    mode: DetachedMode,
    func: Any,
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    value = func(x, normalized_shape, weight, bias, eps)
    dims = tuple(range(-len(normalized_shape), 0))
    wide = x.to(at_least_float32(x))
    centred = wide - wide.mean(dims, keepdim=True)
    with torch.no_grad():
        scale = torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    linear = centred * mode.fix(scale)
    linear = linear if weight is None else linear * weight
    linear = linear if bias is None else linear + bias
    return mode.with_gradient_of(value, linear)


def _rms_norm(
    mode: DetachedMode,
    func: Any,
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    value = func(x, normalized_shape, weight, eps)
    dims = tuple(range(-len(normalized_shape), 0))
    wide = x.to(at_least_float32(x))
    with torch.no_grad():
        floor = torch.finfo(x.dtype).eps if eps is None else eps
        scale = torch.rsqrt(wide.square().mean(dims, keepdim=True) + floor)
    linear = wide * mode.fix(scale)
    return mode.with_gradient_of(value, linear if weight is None else linear * weight)


def _normalize(
    mode: DetachedMode,
    func: Any,
    x: Tensor,
    p: float = 2.0,
    dim: int = 1,
    eps: float = 1e-12,
    **_out: None,
) -> Tensor:
    value = func(x, p, dim, eps)
    with torch.no_grad():
        norm = x.norm(p, dim, keepdim=True).clamp_min(eps)
    return mode.with_gradient_of(value, x / mode.fix(norm))


def _attention(
    mode: DetachedMode, func: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any
) -> Any:
    return func(mode.fix(q), mode.fix(k), *args, **kwargs)


def _topk(
    mode: DetachedMode, func: Any, x: Tensor, k: int, dim: int = -1, *rest: Any, **kw: Any
) -> Any:
    indices = mode.fix(func(x, k, dim, *rest, **kw).indices)
    return torch.return_types.topk((x.gather(dim, indices), indices))


def _clamp(mode: DetachedMode, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    value = func(x, *args, **kwargs)
    inside, bound = mode.fix(value == x), mode.fix(value)
    return torch.where(inside, x, bound)


def _glu(mode: DetachedMode, func: Any, x: Tensor, dim: int = -1) -> Tensor:
    value = func(x, dim)
    a, b = x.chunk(2, dim)
    return mode.with_gradient_of(value, a * mode.fix(torch.sigmoid(b)))


_T = torch.Tensor
_SQUARES = {torch.square, _T.square}
_IN_PLACE = {_T.mul_, _T.__imul__}
_SOFTMAX = (F.softmax, torch.softmax, _T.softmax)
_AS = (_T.type_as, _T.to, _T.view_as, _T.expand_as)  # Of their second tensor only the form counts.
_TANH = (F.tanh, torch.tanh, _T.tanh)
_OF_PATTERNS = (_contraction, _attention)
_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(
        (
            *(F.gelu, F.silu, F.mish, F.elu, F.selu, F.celu, F.hardswish),
            *(F.softsign, F.relu, torch.relu, _T.relu, F.relu6, F.leaky_relu),
            *_TANH,
        ),
        _activation,
    ),
    **dict.fromkeys(
        (
            *(*_SOFTMAX, F.softplus, F.logsigmoid),
            *(F.sigmoid, torch.sigmoid, _T.sigmoid),
            *(torch.erf, _T.erf, torch.exp, _T.exp, torch.sqrt, _T.sqrt, torch.rsqrt, _T.rsqrt),
            *(torch.norm, _T.norm, torch.linalg.norm, torch.linalg.vector_norm),
            *(torch.reciprocal, _T.reciprocal),
        ),
        _factor,
    ),
    **dict.fromkeys(
        (torch.mul, torch.multiply, _T.mul, _T.__mul__, _T.__rmul__, _T.mul_, _T.__imul__),
        _product,
    ),
    **dict.fromkeys(
        (torch.div, torch.true_divide, _T.div, _T.__truediv__, _T.__itruediv__, _T.div_),
        _quotient,
    ),
    **dict.fromkeys(
        (
            *(torch.matmul, _T.matmul, _T.__matmul__, torch.mm, _T.mm, torch.bmm, _T.bmm),
            *(torch.einsum, F.linear, torch.outer),
        ),
        _contraction,
    ),
    **dict.fromkeys(
        (
            *(torch.add, _T.add, _T.__add__, _T.__radd__),
            *(torch.sub, _T.sub, _T.__sub__, _T.__rsub__, torch.rsub),
        ),
        _sum,
    ),
    **dict.fromkeys((torch.pow, _T.pow, _T.__pow__, *_SQUARES), _power),
    F.layer_norm: _layer_norm,
    torch.layer_norm: lambda mode, func, x, shape, w=None, b=None, eps=1e-5, _=True: _layer_norm(
        mode, F.layer_norm, x, shape, w, b, eps
    ),
    F.rms_norm: _rms_norm,
    F.normalize: _normalize,
    **dict.fromkeys((torch.topk, _T.topk), _topk),
    **dict.fromkeys((torch.clamp, _T.clamp), _clamp),
    F.scaled_dot_product_attention: _attention,
    F.glu: _glu,
}

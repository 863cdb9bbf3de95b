"""The components of a model, each cut off from those before it: one affine expert apiece.

A component (the attention or the MLP of a block) reads the residual stream, which is the sum of
the embeddings and of what the components before it wrote. In the pass made here each component is
given a copy of what it reads that is the end of its graph. Its gradients are then those of its own
expert, and what it reads is known, so that the wiring can be checked: every read has to be the sum
of the writes before it, or there is a `SiteError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lch_plugin.adapters.states import evaluating
from lch_plugin.adapters.transformer_lens import LensModel, NodePoint, run_edited
from lch_plugin.adapters.transformer_lens.gates import Act, Gate
from lch_plugin.adapters.transformer_lens.residual import (
    Component,
    components,
    final_read,
    position_embedding_name,
)
from lch_plugin.circuits.kinds import KINDS, ComponentKind
from lch_plugin.circuits.prompt_batches import Prompts
from lch_plugin.circuits.scores.attribution import embedding_name
from lch_plugin.errors import SiteError
from lch_plugin.linearization import DetachedMode
from lch_plugin.mlp import at_least_float32
from lch_plugin.sites import Linearization

# Numbers in the cotangents of one batch of vector-Jacobian products.
_BATCH_SIZE = 2**22


@dataclass(frozen=True, eq=False)
class Values:
    """What a component reads, what its nodes are parts of, and what it writes, on one prompt."""

    read: Float[Tensor, "pos d_model"]
    held: Float[Tensor, "pos width"]
    write: Float[Tensor, "pos d_model"]

    def __sub__(self, other: Values) -> Values:
        return Values(self.read - other.read, self.held - other.held, self.write - other.write)


class FrozenComponent:
    """One component as an affine map, in two steps: what it reads, what it holds, what it writes.

    Attributes:
        kind, layer: of the component.
        clean: on the prompt.
        values: the same, less what they are on the corrupt prompt if there is one.
    """

    def __init__(
        self,
        component: Component,
        graph: tuple[Tensor, Tensor, Tensor],
        reference: Values | None,
    ) -> None:
        self.kind: ComponentKind = component.kind
        self.layer = component.layer
        self._read, self._held, self._write = graph
        n_pos = self._read.numel() // self._read.shape[-1]
        self.clean = Values(*(_rows(x, n_pos) for x in graph))
        self.values = self.clean if reference is None else self.clean - reference

    def to_held(self, cotangent: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos width"]:
        """What a cotangent at the write is at the values it holds."""
        return _pull(self._write, self._held, cotangent[None])[0]

    def to_read(
        self, cotangents: Float[Tensor, "n width"], positions: Int[Tensor, " n"]
    ) -> Float[Tensor, "n pos d_model"]:
        """Centroids, in what it reads, of the values it holds at some positions."""
        batches = self._batches(cotangents, positions)
        return torch.cat([_pull(self._held, self._read, batch) for batch in batches])

    def written(
        self, held: Float[Tensor, "n width"], positions: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d_model"]:
        """What parts of the values held at some positions write there, biases left out.

        Writing mixes no positions: only what attention holds is mixed from several.
        """
        pulled, dual = self._dual
        batches = self._batches(held, positions)
        spread = torch.cat([_pull(pulled, dual, batch) for batch in batches])
        return spread[torch.arange(len(held), device=held.device), positions]

    def _batches(self, rows: Tensor, positions: Tensor) -> Iterator[Float[Tensor, "n pos width"]]:
        """Rows put at their positions, zero elsewhere; few enough at a time for memory."""
        n_pos = len(self.values.held)
        size = max(1, _BATCH_SIZE // (n_pos * rows.shape[-1]))
        for some, at in zip(rows.split(size), positions.split(size), strict=True):
            spread = some.new_zeros(len(some), n_pos, some.shape[-1])
            spread[torch.arange(len(some), device=some.device), at] = some
            yield spread

    @cached_property
    def _dual(self) -> tuple[Tensor, Tensor]:
        # A vector-Jacobian product is linear in its vector, and its transpose is the Jacobian.
        dual = torch.zeros_like(self._write, requires_grad=True)
        if not self._write.requires_grad:
            return self._write.new_zeros(self._held.shape), dual
        (pulled,) = torch.autograd.grad(
            self._write, self._held, dual, create_graph=True, materialize_grads=True
        )
        return pulled, dual


@dataclass(frozen=True, eq=False)
class FrozenModel:
    """A model on one prompt as experts side by side, joined by the residual stream alone.

    Attributes:
        embeddings: what enters the residual stream for each token, less that of the corrupt prompt
            if there is one; so is ``final``.
        positions: what enters for the position; None if it cannot be told apart, or cancels.
        stages: the experts in the order they are computed; those of a stage read the same.
        final: the residual stream that the final norm reads.
        cotangent: gradient of the metric there.
        metric: on the prompt.
        reference: the metric on the corrupt prompt, 0 if there is none.
        is_embedded_as_is: whether embeddings enter the residual stream neither scaled nor
            normalised.
        tolerance: relative difference up to which two values are the same but for rounding.
    """

    embeddings: Float[Tensor, "pos d_model"]
    positions: Float[Tensor, "pos d_model"] | None
    stages: tuple[tuple[FrozenComponent, ...], ...]
    final: Float[Tensor, "pos d_model"]
    cotangent: Float[Tensor, "pos d_model"]
    metric: float
    reference: float
    is_embedded_as_is: bool
    tolerance: float

    @property
    def experts(self) -> tuple[FrozenComponent, ...]:
        """All of them, in order."""
        return tuple(expert for stage in self.stages for expert in stage)

    @property
    def n_layers(self) -> int:
        """Blocks of the model."""
        return 1 + max(expert.layer for expert in self.experts)


def freeze_components(
    model: LensModel,
    prompt: Prompts,
    points: Sequence[NodePoint],
    *,
    inputs: frozenset[int] = frozenset(),
    linearization: Linearization = "detached",
    through_patterns: bool = False,
) -> FrozenModel:
    """The experts of a model on one prompt.

    Args:
        model: TransformerBridge or HookedTransformer.
        prompt: one; with a corrupt twin, values are taken relative to those on the twin.
        points: what the components hold: heads, or activations of neurons.
        inputs: layers whose MLP holds its input instead.
        linearization: of everything: ``"detached"`` or ``"jacobian"``.
        through_patterns: let attention patterns change with what attention reads, to first order;
            the Jacobian does.

    Raises:
        SiteError: as `components`; or the residual stream that a component reads is not the sum of
            what was written before, so that there are no paths to tell apart.
    """
    wiring = _Wiring(model, points, inputs)
    detached = linearization == "detached"
    mode = DetachedMode(through_patterns=through_patterns) if detached else None
    with evaluating(model):
        with torch.enable_grad():
            clean = wiring.run(prompt, prompt.clean, mode)
            (cotangent,) = torch.autograd.grad(clean.metric.sum(), clean.final)
        with torch.no_grad():
            twin = None if prompt.corrupt is None else wiring.run(prompt, prompt.corrupt, None)
    n_pos = prompt.clean.shape[-1]
    experts = []
    for i, (component, graph) in enumerate(zip(wiring.components, clean.graphs, strict=True)):
        other = None if twin is None else Values(*(_rows(x, n_pos) for x in twin.graphs[i]))
        experts.append(FrozenComponent(component, graph, other))
    final = _rows(clean.final, n_pos)
    tolerance = _tolerance(clean.final.dtype)
    stages = _stages(experts, final, tolerance)
    embeddings, positions, as_is = _entering(clean, experts[0].clean.read, tolerance)
    if twin is not None:  # The same positions are embedded in both prompts.
        embeddings, positions = experts[0].values.read, None
        final = final - _rows(twin.final, n_pos)
    return FrozenModel(
        embeddings=embeddings,
        positions=positions,
        stages=stages,
        final=final,
        cotangent=_rows(cotangent, n_pos),
        metric=float(clean.metric.detach()),
        reference=0.0 if twin is None else float(twin.metric),
        is_embedded_as_is=as_is,
        tolerance=tolerance,
    )


@dataclass(frozen=True, eq=False)
class _Pass:
    """What was seen of one forward pass: read, held and written by each component."""

    metric: Tensor
    final: Tensor
    embedding: Tensor
    positions: Tensor | None
    graphs: list[tuple[Tensor, Tensor, Tensor]]


class _Wiring:
    """Where the tensors of a model pass that its experts are made of."""

    def __init__(
        self, model: LensModel, points: Sequence[NodePoint], inputs: frozenset[int]
    ) -> None:
        self._model = model
        self.components = components(model)
        self._names = {(KINDS[p.kind].component, p.layer): p.name for p in points}
        self._inputs = inputs
        self._final = final_read(model)

    def run(
        self, prompt: Prompts, tokens: Int[Tensor, "1 pos"], mode: DetachedMode | None
    ) -> _Pass:
        """One pass, every component and the final norm cut off from what came before."""
        cuts = _Cuts(mode)
        seen: dict[object, Tensor] = {}

        def see(key: object, value: Tensor) -> Tensor:
            seen[key] = value
            return value

        gates: list[tuple[Gate, Act]] = []
        reads = {gate.key: gate for gate in [self._final, *(c.read for c in self.components)]}
        gates += [(gate, partial(cuts.cut, key)) for key, gate in reads.items()]
        for i, component in enumerate(self.components):
            gates.append((component.write, partial(see, ("write", i))))
            if component.layer in self._inputs and component.entry is not None:
                gates.append((component.entry, partial(see, ("held", i))))
        start = embedding_name(self._model)
        position = position_embedding_name(self._model)
        names = [start, *([] if position is None else [position]), *self._names.values()]
        edits = {name: partial(see, name) for name in names}
        try:
            for gate, act in gates:
                gate.install(lambda: True, act)
            with nullcontext() if mode is None else mode:
                logits = run_edited(self._model, tokens, edits)
        finally:
            for gate, _ in gates:
                gate.remove()
        return _Pass(
            # Outside the mode: the metric is differentiated as it is.
            metric=prompt.measure(logits),
            final=cuts.after(self._final.key, "the final norm"),
            embedding=seen[start],
            positions=None if position is None else seen[position],
            graphs=[self._graph(i, cuts, seen) for i in range(len(self.components))],
        )

    def _graph(
        self, i: int, cuts: _Cuts, seen: dict[object, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a component read, held and wrote."""
        component = self.components[i]
        label = f"the {component.kind} of layer {component.layer}"
        if ("write", i) not in seen:
            raise _unseen(label)
        written = seen["write", i]
        name = self._names.get((component.kind, component.layer))
        held = seen.get(("held", i), written if name is None else seen[name])
        return cuts.after(component.read.key, label), held, written


class _Cuts:
    """Places where what is read is replaced by a copy at which gradients end."""

    def __init__(self, mode: DetachedMode | None) -> None:
        self._mode = mode
        self._made: dict[object, tuple[Tensor, Tensor]] = {}

    def cut(self, key: object, value: Tensor) -> Tensor:
        """The copy of what passes a place."""
        if key not in self._made:
            leaf = value.detach()
            if torch.is_grad_enabled():
                leaf = leaf.requires_grad_()
                leaf = leaf if self._mode is None else self._mode.follow(leaf)
            self._made[key] = value, leaf
        passed, leaf = self._made[key]
        # HookedTransformer normalises once for queries, once for keys, once for values.
        if passed is not value:
            raise SiteError(
                "a norm reads several things in one pass, so there is no one residual stream to "
                "draw paths in. Turn off use_split_qkv_input and use_attn_in."
            )
        return leaf

    def after(self, key: object, reader: str) -> Tensor:
        """The copy that was made at a place.

        Raises:
            SiteError: nothing passed there.
        """
        if key not in self._made:
            raise _unseen(reader)
        return self._made[key][1]


def _unseen(label: str) -> SiteError:
    return SiteError(
        f"what {label} reads or writes did not pass its hook points, so its paths cannot be told. "
        "If an SAE stands there, call reset_saes() first."
    )


def _entering(
    passed: _Pass, first: Float[Tensor, "pos d_model"], tolerance: float
) -> tuple[Float[Tensor, "pos d_model"], Float[Tensor, "pos d_model"] | None, bool]:
    """What enters for tokens and for positions, and whether that is just their embeddings.

    If it is not (they are scaled or normalised first), all of it counts for the tokens.
    """
    embeddings = _rows(passed.embedding, len(first))
    positions = None if passed.positions is None else _rows(passed.positions, len(first))
    total = embeddings if positions is None else embeddings + positions
    if not _equal(first, total, tolerance):
        return first, None, False
    return embeddings, positions, True


def _stages(
    experts: Sequence[FrozenComponent], final: Float[Tensor, "pos d_model"], tolerance: float
) -> tuple[tuple[FrozenComponent, ...], ...]:
    """Experts that read the same residual stream, together.

    Raises:
        SiteError: one reads something other than the sum of the writes before it.
    """
    total = experts[0].clean.read
    stages: list[list[FrozenComponent]] = []
    pending = torch.zeros_like(total)
    for expert in experts:
        read = expert.clean.read
        if stages and torch.equal(read, stages[-1][0].clean.read):
            stages[-1].append(expert)  # Side by side, as in GPT-NeoX and GPT-J.
            pending = pending + expert.clean.write
            continue
        total = total + pending
        _check_sum(read, total, f"the {expert.kind} of layer {expert.layer}", tolerance)
        stages.append([expert])
        pending = expert.clean.write
    _check_sum(final, total + pending, "the final norm", tolerance)
    return tuple(map(tuple, stages))


def _check_sum(read: Tensor, total: Tensor, reader: str, tolerance: float) -> None:
    if not _equal(read, total, tolerance):
        error = float((read - total).norm() / total.norm())
        raise SiteError(
            f"what {reader} reads is not the sum of what embeddings, attention and MLPs wrote "
            f"before it (relative difference {error:.1e}), so a graph of paths would be wrong. The "
            "blocks scale, normalise or mix the residual stream, or a hook edits it. Score nodes "
            "without a graph: lch_plugin.circuits.node_attribution."
        )


def _equal(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return float((a - b).norm()) <= tolerance * float(b.norm())


def _tolerance(dtype: torch.dtype) -> float:
    """Half of the digits that a model computes with; RMS norms compute in float32 at most."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) ** 0.5


def _rows(value: Tensor, n_pos: int) -> Float[Tensor, "pos width"]:
    """One row a position, at least in float32. OPT joins batch and position."""
    return value.detach().to(at_least_float32(value)).reshape(n_pos, -1)


def _pull(y: Tensor, x: Tensor, cotangents: Float[Tensor, "n pos a"]) -> Float[Tensor, "n pos b"]:
    """Vector-Jacobian products with each cotangent."""
    n, n_pos, _ = cotangents.shape
    if y is x:
        return cotangents
    if not y.requires_grad:  # A hook has put a constant in its place.
        return cotangents.new_zeros(n, n_pos, x.numel() // n_pos)
    (gradient,) = torch.autograd.grad(
        *(y, x, cotangents.to(y.dtype).reshape(n, *y.shape)),
        retain_graph=True,
        is_grads_batched=True,
        materialize_grads=True,
    )
    return gradient.to(at_least_float32(gradient)).reshape(n, n_pos, -1)

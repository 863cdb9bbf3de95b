"""What a model says with some of its nodes replaced: by zero, by their mean, by a corrupt prompt's.

A circuit is run with every node outside it replaced. Token embeddings, biases and norms stay as the
prompt has them, in the empty circuit too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lch_plugin.adapters.states import evaluating, without_autocast
from lch_plugin.adapters.transformer_lens import (
    LensModel,
    NodePoint,
    as_tokens,
    check_token_ids,
    locate_mlps,
)
from lch_plugin.circuits.nodes import Circuit, Node
from lch_plugin.circuits.prompt_batches import Prompts, batches_of
from lch_plugin.circuits.scores.attribution import activations
from lch_plugin.cotangents import Metric
from lch_plugin.errors import InputError
from lch_plugin.metrics import logit_difference
from lch_plugin.sites import integers
from lch_plugin.statistics import ROUNDING

Reference: TypeAlias = Literal["zero", "mean", "resample"]
_REFERENCES: tuple[Reference, ...] = get_args(Reference)


class Ablation:
    """Prompts, and what the nodes outside a circuit are replaced by on each of them.

    The activations they are replaced by are computed once, for any number of circuits.

    Attributes:
        batches: of prompts.
        values: for each batch, by hook name, what is put there; nothing where that is zero.
        points, reference: as given.

    Args:
        model: TransformerBridge or HookedTransformer.
        prompts: in batches of one length.
        points: where the nodes are.
        reference: ``"zero"``; ``"mean"``, the mean activation of the node over all positions of
            all corrupt prompts (of the clean ones, in batches without), the first included; or
            ``"resample"``, its activation at the same position of the corrupt twin.

    Raises:
        InputError: no prompts, an unknown reference, or ``"resample"`` without corrupt twins.
        SiteError: a hook point did not fire.
    """

    def __init__(
        self,
        model: LensModel,
        prompts: Prompts | Iterable[Prompts],
        points: tuple[NodePoint, ...],
        reference: Reference = "resample",
    ) -> None:
        self._model = model
        self.batches = batches_of(prompts)
        if not sum(map(len, self.batches)):
            raise InputError("there are no prompts to run a circuit on.")
        if reference not in _REFERENCES:
            raise InputError(f"reference={reference!r} must be one of {_REFERENCES}.")
        if reference == "resample" and any(b.corrupt is None for b in self.batches):
            raise InputError(
                "reference='resample' replaces activations by those on corrupt prompts, and there "
                "are none. Give corrupt twins, or take 'mean' or 'zero'."
            )
        self.points = points
        self.reference = reference
        self.values = self._of_reference()

    def metric(self, circuit: Circuit) -> Float[Tensor, " prompt"]:
        """The metric of each prompt, every node outside the circuit replaced; on the CPU.

        Raises:
            InputError: the circuit is one of other nodes; or as `Prompts.measure`.
            SiteError: a hook point did not fire.
        """
        if circuit.points != self.points:
            raise InputError("the circuit is made of other nodes than those that are ablated.")
        # Where all nodes are kept there is nothing to do.
        masks = {name: keep for name, keep in circuit.masks().items() if not bool(keep.all())}
        found = []
        with evaluating(self._model), torch.no_grad():
            for batch, values in zip(self.batches, self.values, strict=True):
                edits = {
                    point.name: partial(_replace, point, masks[point.name], values.get(point.name))
                    for point in self.points
                    if point.name in masks
                }
                logits = batch.run(self._model, edits)
                found.append(batch.measure(logits).double().cpu())
        return torch.cat(found)

    def everything(self) -> Circuit:
        """The circuit of all nodes: the model as it is."""
        return Circuit(self.points, torch.ones(sum(p.n_nodes for p in self.points)).bool())

    def _of_reference(self) -> list[dict[str, Float[Tensor, "#batch #pos *rest"]]]:
        """For each batch, what is put at each hook point; nothing where that is zero."""
        names = [point.name for point in self.points]
        if self.reference == "zero":
            return [{} for _ in self.batches]
        twins = [b.clean if b.corrupt is None else b.corrupt for b in self.batches]
        if self.reference == "resample":
            return [activations(self._model, twin, names) for twin in twins]
        total: dict[str, Tensor] = {}
        for twin in twins:
            for name, value in activations(self._model, twin, names).items():
                total[name] = total.get(name, 0) + value.sum((0, 1), keepdim=True)
        n_positions = sum(twin.numel() for twin in twins)
        mean = {name: value / n_positions for name, value in total.items()}
        return [mean for _ in self.batches]


@without_autocast()
def run_circuit(
    model: LensModel,
    prompts: Prompts | Iterable[Prompts],
    circuit: Circuit,
    reference: Reference = "resample",
) -> Float[Tensor, " prompt"]:
    """The metric of each prompt with every node outside a circuit replaced.

    Args:
        model, prompts, reference: as `Ablation`.
        circuit: the nodes that stay.

    Raises:
        InputError, SiteError: as `Ablation`.
    """
    return Ablation(model, prompts, circuit.points, reference).metric(circuit)


def _replace(
    point: NodePoint, keep: Bool[Tensor, " node"], other: Tensor | None, value: Tensor
) -> Tensor:
    """The value of a hook point, with the nodes that are not kept taken from another."""
    own = point.split(value)
    new = own.new_zeros(()) if other is None else point.split(other).to(own)
    return torch.where(keep.to(own.device)[:, None], own, new).reshape(value.shape)


@dataclass(frozen=True)
class AblationCheck:
    """Mean logit difference, answer minus foil, with neurons removed (set to zero).

    Attributes:
        neurons: those removed, by layer.
        clean: with nothing removed.
        ablated: without ``neurons``.
        random: without as many random others of the same layers, one value a random set.
    """

    neurons: dict[int, tuple[int, ...]]
    clean: float
    ablated: float
    random: tuple[float, ...]

    @property
    def effect(self) -> float:
        """``clean - ablated``, in logits: positive means removing them lowers the metric."""
        return self.clean - self.ablated

    @property
    def random_effects(self) -> Float[Tensor, " n_random"]:
        """``clean - random``, in logits."""
        return self.clean - torch.tensor(self.random, dtype=torch.float64)

    @property
    def p_value(self) -> float:
        """Two-sided permutation p-value: how often a random set's effect is at least as large.

        Two-sided because a neuron score is a magnitude: top neurons may push either way. What is
        smaller by rounding alone is as large.
        """
        rounding = ROUNDING * torch.finfo(torch.float64).eps * abs(self.clean)
        as_large = int((self.random_effects.abs() >= abs(self.effect) - rounding).sum())
        return (1 + as_large) / (1 + len(self.random))


@without_autocast()
def ablation_check(
    model: LensModel,
    tokens: str | Int[Tensor, "*batch pos"],
    answer: int | Sequence[int],
    foil: int | Sequence[int],
    neurons: Mapping[int, Sequence[int]],
    *,
    n_random: int = 20,
    generator: torch.Generator | None = None,
) -> AblationCheck:
    """Remove neurons, and random sets of others, and compare the logit difference.

    Removing sets a neuron's activation to zero at every position, as its removal from the
    centroid does. The metric is ``logit(answer) - logit(foil)`` at the last position, averaged
    over prompts. A random set has as many neurons in each layer as ``neurons``, and none of
    ``neurons``.

    Args:
        model: TransformerBridge or HookedTransformer.
        tokens: a prompt, ``(pos,)`` or ``(batch, pos)`` token ids.
        answer: token id, or one a prompt.
        foil: token id, or one a prompt.
        neurons: indices of the neurons to remove, by layer; negative layers count from the end.
        n_random: random sets to compare with.
        generator: source of the randomness, on the CPU.

    Raises:
        InputError: tokens, answer, foil, neurons or n_random cannot be used.
        SiteError: as `lch_plugin.attach`, or an SAE stands where the neurons are.
    """
    tokens = as_tokens(model, tokens)
    answers, foils = (_one_each(model, len(tokens), ids) for ids in (answer, foil))
    if n_random < 1:
        raise InputError(f"n_random={n_random} must be at least 1.")
    points, removed = _neurons(model, neurons)
    difference = logit_difference([[a] for a in answers], [[f] for f in foils])
    # Subtracted in double precision, at the one position that counts.
    exact = Metric(lambda logits: difference.fn(logits.double()), difference.name, position=-1)
    ablation = Ablation(model, Prompts(tokens, exact), points, "zero")
    everything = ablation.everything()

    def mean(chosen: Mapping[int, Sequence[int]]) -> float:
        gone = [Node("neuron", layer, i) for layer, indices in chosen.items() for i in indices]
        return float(ablation.metric(everything.without(*gone)).mean())

    def draw() -> dict[int, list[int]]:
        drawn = {}
        for point in points:
            gone = set(removed[point.layer])
            rest = [i for i in range(point.n_nodes) if i not in gone]
            order = torch.randperm(len(rest), generator=generator)[: len(gone)]
            drawn[point.layer] = [rest[i] for i in order]
        return drawn

    return AblationCheck(
        neurons=removed,
        clean=mean({}),
        ablated=mean(removed),
        random=tuple(mean(draw()) for _ in range(n_random)),
    )


def _neurons(
    model: LensModel, neurons: Mapping[int, Sequence[int]]
) -> tuple[tuple[NodePoint, ...], dict[int, tuple[int, ...]]]:
    """Where the neurons of these layers are, and their indices by layer counted from the start."""
    if not neurons:
        raise InputError("neurons is empty: there is nothing to remove.")
    points: list[NodePoint] = []
    removed: dict[int, tuple[int, ...]] = {}
    for layer, indices in neurons.items():
        (parts,) = locate_mlps(model, layer)
        d_mlp = parts.weights.W_out.shape[0]
        listed = integers(indices)
        if (
            not listed
            or not all(0 <= i < d_mlp for i in listed)
            or not len(set(listed)) == len(listed) <= d_mlp // 2
        ):
            raise InputError(
                f"neurons {indices} of layer {layer}: distinct indices from 0 to {d_mlp - 1} are "
                "needed, at least one and at most half of them, to draw as many others."
            )
        if parts.layer in removed:
            raise InputError(
                f"neurons of layer {parts.layer} are given twice, the second time as layer {layer}."
            )
        points.append(NodePoint("neuron", parts.layer, parts.post_activation_name, d_mlp, 1))
        removed[parts.layer] = tuple(listed)
    return tuple(points), removed


def _one_each(model: LensModel, n_prompts: int, ids: int | Sequence[int]) -> list[int]:
    listed = integers(ids) or []
    listed = listed * n_prompts if len(listed) == 1 else listed
    if len(listed) != n_prompts:
        raise InputError(f"token ids {ids!r} for {n_prompts} prompts: give one, or one each.")
    check_token_ids(model.cfg.d_vocab, min(listed), max(listed))
    return listed

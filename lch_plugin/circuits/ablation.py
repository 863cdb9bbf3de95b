"""Does removing the top-ranked neurons change what the model says, more than random ones would?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lch_plugin.adapters.transformer_lens import (
    LensModel,
    as_tokens,
    check_token_ids,
    locate_mlps,
)
from lch_plugin.errors import InputError, SiteError
from lch_plugin.sites import integers


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
        return self.clean - torch.tensor(self.random)

    @property
    def p_value(self) -> float:
        """Two-sided permutation p-value: how often a random set's effect is at least as large.

        Two-sided because a neuron score is a magnitude: top neurons may push either way.
        """
        as_large = int((self.random_effects.abs() >= abs(self.effect)).sum())
        return (1 + as_large) / (1 + len(self.random))


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
    if not neurons:
        raise InputError("neurons is empty: there is nothing to remove.")
    names, removed, others = {}, {}, {}
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
        names[parts.layer] = parts.post_activation_name
        removed[parts.layer] = torch.tensor(listed)
        others[parts.layer] = torch.tensor(sorted(set(range(d_mlp)) - set(listed)))

    def metric(chosen: Mapping[int, Tensor]) -> float:
        fired: set[int] = set()

        def remove(layer: int, value: Tensor, hook: object) -> Tensor:  # noqa: ARG001
            fired.add(layer)
            value = value.clone()
            value[..., chosen[layer]] = 0
            return value

        hooks = [(names[layer], partial(remove, layer)) for layer in chosen]
        with torch.no_grad():
            logits = model.run_with_hooks(tokens, fwd_hooks=hooks)[:, -1].double()
        if fired != chosen.keys():
            missed = [names[layer] for layer in chosen.keys() - fired]
            raise SiteError(
                f"{missed} did not fire, so nothing was removed there. If an SAE stands there, "
                "call reset_saes() first."
            )
        rows = torch.arange(len(tokens))
        return float((logits[rows, answers] - logits[rows, foils]).mean())

    def draw() -> dict[int, Tensor]:
        return {
            layer: rest[torch.randperm(len(rest), generator=generator)[: len(removed[layer])]]
            for layer, rest in others.items()
        }

    return AblationCheck(
        neurons={layer: tuple(indices.tolist()) for layer, indices in removed.items()},
        clean=metric({}),
        ablated=metric(removed),
        random=tuple(metric(draw()) for _ in range(n_random)),
    )


def _one_each(model: LensModel, n_prompts: int, ids: int | Sequence[int]) -> list[int]:
    listed = integers(ids) or []
    listed = listed * n_prompts if len(listed) == 1 else listed
    if len(listed) != n_prompts:
        raise InputError(f"token ids {ids!r} for {n_prompts} prompts: give one, or one each.")
    check_token_ids(model.cfg.d_vocab, min(listed), max(listed))
    return listed

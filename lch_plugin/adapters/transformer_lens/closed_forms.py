"""Readers in closed form: MLPs, neurons and attention heads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lch_plugin.adapters.checks import check_reads
from lch_plugin.adapters.transformer_lens.architecture import (
    attention_input,
    check_members,
    head_outputs,
    head_weights,
    heads_output,
    heads_values,
)
from lch_plugin.adapters.transformer_lens.gates import Gate, PointGate
from lch_plugin.adapters.transformer_lens.mlps import UNPROCESSED, MLPParts, mlp_gates
from lch_plugin.adapters.transformer_lens.model_end import postpone
from lch_plugin.adapters.transformer_lens.readers import Reader
from lch_plugin.adapters.values import expert_values, local_values
from lch_plugin.cotangents import Ones, Vector, is_fixed
from lch_plugin.errors import SiteError
from lch_plugin.mlp import MLP, at_least_float32, centroid_of_neurons, read_direction


class ClosedFormReader(Reader):
    """A component whose centroid follows from values that the model computes within it."""

    method = "closed form"
    #: What is said where the model did not compute these values.
    missing = ""

    def __init__(self, *args: Any, gates: tuple[Gate, tuple[Gate, ...], Gate], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._entry, self._within, self._exit = gates

    @property
    def gates(self) -> Sequence[Gate]:
        reads_x = self.site.expert or self.site.is_local
        return [*([self._entry] if reads_x else []), *self._within, self._exit]

    def at(self, gate: Gate, tensor: Tensor) -> Tensor | None:
        if gate.key == self._entry.key:
            self._run.see(self).x = self._kept(tensor)
            return None
        if gate.key != self._exit.key:
            self._run.see(self).values[gate.key] = self._kept(tensor)
            return None
        seen = self._run.take(self)
        if len(seen.values) < len(self._within):
            raise SiteError(f"{self.name}: {self.missing}")
        values = tuple(seen.values[gate.key] for gate in self._within)
        finish = partial(self._finish, values, seen.x, self._kept(tensor))
        if self.site.is_late:
            return postpone(self, tensor, finish)
        with self._run.scope.outside():
            finish(None)
        return None

    def _finish(
        self, values: tuple[Tensor, ...], x: Tensor | None, y: Tensor, v: Tensor | None
    ) -> None:
        """Show the centroid; ``v`` is given if it came late."""
        raise NotImplementedError


class MLPReader(ClosedFormReader):
    """An MLP in closed form (`lch_plugin.mlp`), from the pre-activations the model computes."""

    missing = (
        "the MLP ran without passing the hook points of its pre-activations, so its centroid is "
        "unknown."
    )

    def __init__(self, *args: Any, parts: MLPParts, **kwargs: Any) -> None:
        gates = parts.input_gate, parts.pre_activation_gates, mlp_gates(parts.component)[1]
        super().__init__(*args, gates=gates, **kwargs)
        self.parts = parts
        self._checked: tuple[int, int] | None = None

    @property
    def mlp(self) -> MLP:
        """The MLP, or the part of it that the site is about."""
        return self.parts.weights

    @property
    def can_be_differentiated(self) -> bool:
        """Whether the model's own module says the same, should the closed form be wrong."""
        return True

    def check(self) -> None:
        """Raise for a fixed cotangent that does not fit, or reads nothing of what is written."""
        v = self._fixed()
        if v is not None:
            self.parts.check_cotangent(None if isinstance(self.site.v, Ones) else v)

    def _finish(
        self, pre: tuple[Tensor, ...], x: Tensor | None, y: Tensor, v: Tensor | None
    ) -> None:
        mlp, dtype = self.mlp, self.site.compute_dtype or at_least_float32(y)
        s = self._reading(mlp, y, v, dtype)
        options: Any = {"dtype": dtype, "create_graph": self.site.create_graph}
        if self.site.is_local:
            assert x is not None

            def mu_at(samples: Tensor) -> Tensor:
                return centroid_of_neurons(mlp, mlp.pre_activations(samples), s, **options)

            self._show(local_values(self.site, x.to(dtype), mu_at))
        elif not self.site.expert:
            self._show({"": lambda: centroid_of_neurons(mlp, pre, s, **options)})
        else:
            assert x is not None
            mu = centroid_of_neurons(mlp, pre, s, **options)
            v = self._at(y) if v is None else v
            values = expert_values(mu, x, y, v, mixes_positions=False)
            self._show({**values, "_region": lambda: pre[0] > 0})

    def _reading(self, mlp: MLP, y: Tensor, v: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Weight of each neuron in ``v . f(x)``."""
        options: Any = {"dtype": dtype, "create_graph": self.site.create_graph}
        if v is not None or not is_fixed(self.site.v):
            return read_direction(mlp, self._at(y) if v is None else v, **options)
        identity = mlp.W_out.data_ptr(), mlp.W_out._version
        if self._checked != identity:
            self.check()  # Weights may have been processed, trained or moved since.
            self._checked = identity
        ones = isinstance(self.site.v, Ones)
        return read_direction(mlp, None if ones else self._fixed(), **options)

    def _fixed(self) -> Tensor | None:
        """The cotangent, if it is the same in every pass."""
        W_out = self.parts.weights.W_out
        like = W_out.new_empty(1, W_out.shape[-1], dtype=at_least_float32(W_out))
        return self._at(like) if is_fixed(self.site.v) else None


class NeuronReader(MLPReader):
    """Neurons of an MLP: the gradient of their weighted activations in what the MLP reads.

    Their activations are the output; a cotangent that comes late reads what they write.
    """

    @property
    def can_be_differentiated(self) -> bool:
        return False

    @property
    def mlp(self) -> MLP:
        return self.parts.weights.neurons(list(self.site.members))

    def check(self) -> None:
        d_mlp = self.parts.weights.W_out.shape[0]
        unknown = [j for j in self.site.members if j >= d_mlp]
        if unknown:
            raise SiteError(f"{self.path} has neurons 0 to {d_mlp - 1}, not {unknown}.")
        if isinstance(self.site.v, Vector):
            self._at(self.site.v.v.new_empty(1, len(self.site.members)))

    def _finish(
        self, pre: tuple[Tensor, ...], x: Tensor | None, y: Tensor, v: Tensor | None
    ) -> None:
        pre = tuple(z[..., list(self.site.members)] for z in pre)
        if v is None:
            y = self.mlp.activations(tuple(z.to(at_least_float32(z)) for z in pre))
        super()._finish(pre, x, y, v)

    def _reading(self, mlp: MLP, y: Tensor, v: Tensor | None, dtype: torch.dtype) -> Tensor:
        return self._at(y) if v is None else read_direction(mlp, v, dtype=dtype)


class HeadReader(ClosedFormReader):
    """Attention heads with the pattern held fixed, in closed form: their detached linearisation.

    A head then writes ``y_t = sum_s A_ts x_s W_V W_O``, which is linear in what attention reads:
    ``mu_s = sum_t A_ts (v_t W_O^T) W_V^T``.
    """

    missing = (
        "attention ran without passing its pattern through a hook point. Load the model with "
        'attn_implementation="eager".'
    )

    def __init__(self, *args: Any, attn: Any, **kwargs: Any) -> None:
        pattern = PointGate(attn, "hook_pattern", last=True)
        within = (pattern, heads_values(attn, last=True))
        gates = attention_input(attn), within, heads_output(attn)
        super().__init__(*args, gates=gates, **kwargs)
        self.attn = attn

    def check(self) -> None:
        """Raise for heads that do not exist, and for a cotangent that reads nothing of theirs."""
        check_members(self.attn, self.path, self.site.members)
        if is_fixed(self.site.v):
            W_O = head_weights(self.attn, self.site.members)[1].flatten(0, 1)
            v = self._at(W_O.to(at_least_float32(W_O)))
            check_reads(self.name, "these heads", W_O, v, cure=UNPROCESSED)

    def centroid(self, pattern: Tensor, v: Tensor) -> Tensor:
        """``mu``, ``(batch, pos, d_model)``, for ``v`` of the same shape."""
        W_V, W_O = (W.to(v.dtype) for W in head_weights(self.attn, self.site.members))
        A = pattern[:, list(self.site.members)].to(v.dtype)
        u = torch.einsum("btd,hed->bhte", v, W_O)
        return torch.einsum("bhts,bhte,hde->bsd", A, u, W_V)

    def _finish(
        self, values: tuple[Tensor, ...], x: Tensor | None, _y: Tensor, v: Tensor | None
    ) -> None:
        pattern, z = values
        dtype = self.site.compute_dtype or at_least_float32(z)
        y = head_outputs(self.attn, self.site.members, z.to(dtype))
        if v is None:
            v = self.weigh(self._at(y), y)
        mu = self.centroid(pattern, v.to(dtype))
        if x is None:
            self._show({"": lambda: mu})
            return
        if x.shape != mu.shape:
            raise SiteError(
                f"{self.name}: with a key-value cache the head reads earlier tokens as well, which "
                "are not at hand for its offset. Run the whole sequence at once."
            )
        self._show(expert_values(mu, x, y, v.to(dtype), mixes_positions=True))

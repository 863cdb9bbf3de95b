"""What can have a centroid, said without a model: `Site`.

| kind | hook point | from | to |
| --- | --- | --- | --- |
| `mlp` | `blocks.L.mlp.hook_centroid` | what the MLP reads | what it writes |
| `neuron` | `blocks.L.mlp.hook_centroid_neuron_J` | what the MLP reads | activation of neuron J |
| `attn` | `blocks.L.attn.hook_centroid` | what attention reads | what it writes |
| `head` | `blocks.L.attn.hook_centroid_head_H` | what attention reads | what head H writes |
| `block` | `blocks.L.hook_centroid` | residual stream before block L | after it |
| `span` | `blocks.J.hook_centroid_from_I` | residual stream before block I | after block J |
| `model` | `hook_centroid` | token embeddings | logits |

Every centroid has the shape of its input, ``(batch, pos, d_model)``.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lch_plugin.centroids import Neighbourhood, check_neighbourhood
from lch_plugin.cotangents import AnyCotangent, Logit, Metric, as_cotangent
from lch_plugin.errors import InputError, SiteError

Kind = Literal["mlp", "neuron", "attn", "head", "block", "span", "model"]
Linearization = Literal["jacobian", "detached"]

_INDEXED = ("neuron", "head")
_MIXES_POSITIONS = ("attn", "head", "block", "span", "model")
# Beyond this many members a group of neurons or heads goes by its label.
_MAX_SPELLED = 4
# TransformerLens gates hook points with these endings, SAELens flattens those with these parts.
_RESERVED = re.compile(r"(mlp_in|attn_in|_input|_result)$|hook_[qkvz]")


@dataclass(frozen=True, eq=False)
class Site:
    """A component of a transformer, and how its centroid is to be taken.

    Attributes:
        kind: which component; the table is in `lch_plugin.sites`.
        layers: blocks, negative counting from the end; all if None. Of a span its first and its
            last block; of a model None.
        index: the neuron or head, or several that count as one group.
        cotangent: ``v`` of the centroid ``J^T v``, a tensor of shape ``(d_out,)`` or anything from
            `lch_plugin.cotangents`; all ones if None.
        output_positions: of a component that mixes positions, those outputs that count, among each
            prompt's own tokens: 0 is its first, -1 its last, wherever padding lies. All if None.
        linearization: ``"jacobian"``, or ``"detached"`` for the exact affine map of
            `lch_plugin.linearization`. Of a head the Jacobian goes through its values and through
            where it looks; detached, its pattern is held, and the centroid has a closed form.
        expert: also give the affine expert: hook points ``..._offset``, ``..._radius`` and
            ``..._alignment`` (`lch_plugin.AffineExpert`), and of an MLP ``..._region``, which of
            its neurons are on (pre-activation above zero).
        radius: take the local centroid, the mean over a neighbourhood of this radius; with hook
            points ``..._variance`` and ``..._standard_error`` beside it.
        sigma: in place of a radius, the standard deviation of Gaussian noise in each coordinate.
        n_samples, neighbourhood, centre, generator: as `lch_plugin.sample_neighbourhood`. Without a
            generator every forward pass draws the same points, and the global random state is not
            used.
        compute_dtype: of closed forms (`mlp`, `neuron`, a detached `head`); at least float32 if
            None.
        stack: of an encoder-decoder, ``"encoder_blocks"`` or ``"decoder_blocks"``; both if None.
            Hook names begin with it.
        label: ends the hook names. Two sites that differ in nothing but the cotangent need it.

    Raises:
        InputError: settings that mean nothing, or nothing together.
        SiteError: no such kind.
    """

    kind: Kind = "mlp"
    layers: int | Sequence[int] | None = None
    index: int | Sequence[int] | None = None
    cotangent: Float[Tensor, " d_out"] | AnyCotangent | None = None
    output_positions: int | Sequence[int] | None = None
    linearization: Linearization = "jacobian"
    expert: bool = False
    radius: float | None = None
    sigma: float | None = None
    n_samples: int = 256
    neighbourhood: Neighbourhood = "ball"
    centre: bool = False
    generator: torch.Generator | None = None
    compute_dtype: torch.dtype | None = None
    stack: str | None = None
    label: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise SiteError(f"site {self.kind!r} is not known; use one of {get_args(Kind)}.")
        object.__setattr__(self, "cotangent", as_cotangent(self.cotangent))
        self._check_types()
        self._check_indices()
        self._check_options()

    @property
    def v(self) -> AnyCotangent:
        """The cotangent, whatever it was given as."""
        return as_cotangent(self.cotangent)

    @property
    def is_late(self) -> bool:
        """Whether the cotangent is known only once the logits are."""
        return isinstance(self.v, Logit | Metric) and not (
            self.kind == "model" and isinstance(self.v, Metric)
        )

    @property
    def is_local(self) -> bool:
        """Whether it is the mean over a neighbourhood."""
        return self.radius is not None or self.sigma is not None

    @property
    def mixes_positions(self) -> bool:
        """Whether outputs at one position depend on inputs at others."""
        return self.kind in _MIXES_POSITIONS

    @property
    def members(self) -> tuple[int, ...]:
        """The neurons or heads of the group."""
        return tuple(integers(self.index) or ())

    @property
    def suffix(self) -> str:
        """What follows ``hook_centroid`` in the name, but for a span's first block."""
        parts = [self.kind, *map(str, self.members)] if self.kind in _INDEXED else []
        if len(self.members) > _MAX_SPELLED:
            parts = [f"{self.kind}s"]
        return "".join(f"_{part}" for part in (*parts, self.label) if part)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Endings of the site's hook points; that of the centroid itself is empty."""
        if self.is_local:
            return ("", "_variance", "_standard_error")
        if not self.expert:
            return ("",)
        region = ("_region",) if self.kind == "mlp" else ()
        return ("", "_offset", "_radius", "_alignment", *region)

    def _check_indices(self) -> None:
        if self.layers is not None and not integers(self.layers):
            raise SiteError(f"layers={self.layers!r} names no layer; pass integers, or None.")
        if self.kind == "span" and len(integers(self.layers) or ()) != 2:
            raise SiteError(
                f"layers={self.layers!r}: a span needs two, its first and its last block."
            )
        if self.kind == "model" and self.layers is not None:
            raise SiteError(f"layers={self.layers!r}: the whole model has no layers to choose.")
        if (self.kind in _INDEXED) != (self.index is not None):
            raise InputError(
                f"index={self.index!r}: sites of kind {_INDEXED} need one, others have none."
            )
        if self.index is not None and (not self.members or min(self.members) < 0):
            raise InputError(f"index={self.index!r} must be integers, zero or more.")
        if len(set(self.members)) < len(self.members):
            raise InputError(f"index={self.index!r} names one of its {self.kind}s twice.")
        if len(self.members) > _MAX_SPELLED and not self.label:
            raise InputError(
                f"a group of {len(self.members)} {self.kind}s needs a label to name its hook point."
            )
        if self.output_positions is not None and not self.mixes_positions:
            raise InputError(
                f"output_positions={self.output_positions!r}: a {self.kind} does not mix positions,"
                " so each has but its own output. Slice the centroids instead."
            )
        if self.output_positions is not None and not integers(self.output_positions):
            raise InputError(f"output_positions={self.output_positions!r} must be integers.")

    def _check_types(self) -> None:
        for name, value, kinds in (
            ("radius", self.radius, (int, float, type(None))),
            ("sigma", self.sigma, (int, float, type(None))),
            ("n_samples", self.n_samples, (int,)),
            ("centre", self.centre, (bool,)),
            ("generator", self.generator, (torch.Generator, type(None))),
            ("compute_dtype", self.compute_dtype, (torch.dtype, type(None))),
            ("label", self.label, (str,)),
            ("stack", self.stack, (str, type(None))),
        ):
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                wanted = " or ".join(k.__name__ for k in kinds)
                raise InputError(f"{name}={value!r} must be {wanted}.")

    def _check_options(self) -> None:
        if self.linearization not in get_args(Linearization):
            raise InputError(
                f"linearization={self.linearization!r} is not known; use one of "
                f"{get_args(Linearization)}."
            )
        # Of a head the detached linearisation has a closed form, which leaves the pass alone.
        is_detached = self.linearization == "detached"
        if is_detached and self.kind != "head" and self.is_late and isinstance(self.v, Metric):
            raise InputError(
                f"cotangent {self.v.name!r} is a gradient through everything downstream, in the "
                "same pass, which 'detached' would change as well: use the Jacobian, or a Logit."
            )
        if is_detached and self.kind == "neuron":
            raise InputError("a neuron has one linearisation: leave it at 'jacobian'.")
        if not re.fullmatch(r"\w*", self.label, re.ASCII) or _RESERVED.search(self.label):
            raise InputError(
                f"label={self.label!r} must be letters, digits and underscores, without parts "
                "that TransformerLens or SAELens treat on their own (hook_q, mlp_in, _input, ...)."
            )
        if self.compute_dtype is not None and not self.compute_dtype.is_floating_point:
            raise InputError(f"compute_dtype={self.compute_dtype} must be floating point.")
        in_closed_form = self.kind in ("mlp", "neuron") or (self.kind == "head" and is_detached)
        if self.compute_dtype is not None and not in_closed_form:
            raise InputError(
                f"compute_dtype={self.compute_dtype}: a {self.kind} is differentiated as the model "
                "runs it, in the model's dtype. Load the model in the dtype you want."
            )
        if not self.is_local:
            return
        check_neighbourhood(self.radius, self.sigma, self.neighbourhood)
        if self.n_samples < 2:
            raise InputError(f"n_samples={self.n_samples} must be at least 2.")
        size = f"radius={self.radius}" if self.sigma is None else f"sigma={self.sigma}"
        if self.kind in ("head", "span", "model") or is_detached:
            raise InputError(
                f"{size}: a local centroid is offered for mlp, neuron, attn and block with the "
                "Jacobian. For others use lch_plugin.local_centroid on a callable."
            )
        if self.expert or self.is_late:
            raise InputError(
                f"{size} goes with neither expert=True nor a cotangent that is known only from the "
                "logits."
            )


def integers(values: Any) -> list[int] | None:
    """One integer or several, of any kind (numpy's and tensors too); None for anything else."""
    values = values.tolist() if hasattr(values, "tolist") else values
    listed = list(values) if isinstance(values, Iterable) else [values]
    if any(isinstance(v, bool) or not hasattr(v, "__index__") for v in listed):
        return None
    return [operator.index(v) for v in listed]

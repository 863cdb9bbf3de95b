"""What can have a centroid, and how it is to be taken, said without a model: `Site`.

| kind | hook point | from | to |
| --- | --- | --- | --- |
| `mlp` | `blocks.L.mlp.hook_centroid` | what the MLP reads | what it writes |
| `neuron` | `blocks.L.mlp.hook_centroid_neuron_J` | what the MLP reads | activation of neuron J |
| `attn` | `blocks.L.attn.hook_centroid` | what attention reads | what it writes |
| `head` | `blocks.L.attn.hook_centroid_head_H` | what attention reads | what head H writes |
| `block` | `blocks.L.hook_centroid` | residual stream before block L | after it |
| `span` | `blocks.J.hook_centroid_from_I` | residual stream before block I | after block J |
| `model` | `hook_centroid` | token embeddings | logits |

Every centroid has the shape of its input, ``(batch, pos, d_model)``. The table is `KINDS`, which is
all that is known of a kind but how its reader is built, which each adapter knows.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lch_plugin.centroids import Neighbourhood, check_neighbourhood
from lch_plugin.cotangents import AnyCotangent, Logit, Metric, Vector, as_cotangent
from lch_plugin.errors import InputError, SiteError
from lch_plugin.names import check_known, did_you_mean

Kind = Literal["mlp", "neuron", "attn", "head", "block", "span", "model"]
Linearization = Literal["jacobian", "detached"]


@dataclass(frozen=True)
class SiteKind:
    """What is known of one kind of site.

    Attributes:
        hook: the name of its hook point, for the documentation.
        reads: its input, in words.
        writes: its output, in words.
        part: the part of a block that it is, or belongs to; None of what is more than a part.
        residual: ``"is"`` if its output is the residual stream, ``"adds"`` if its output is added
            to it, None if neither: then it has no `Logit`.
        layers: what ``layers`` of a site are: a list of blocks, the two ends of a span, or none.
        is_indexed: whether it is one of several in a block, told apart by ``index``.
        mixes_positions: whether outputs at one position depend on inputs at others.
        linearizations: those it has.
        closed_forms: those of them that take no backward pass, where the component's weights show
            that it has such a form.
        has_local: whether its mean over a neighbourhood is offered.
    """

    hook: str
    reads: str
    writes: str
    part: Literal["mlp", "attn"] | None = None
    residual: Literal["is", "adds"] | None = None
    layers: Literal["list", "ends", "none"] = "list"
    is_indexed: bool = False
    mixes_positions: bool = True
    linearizations: tuple[Linearization, ...] = ("jacobian", "detached")
    closed_forms: tuple[Linearization, ...] = ()
    has_local: bool = False


KINDS: Mapping[Kind, SiteKind] = {
    "mlp": SiteKind(
        "blocks.L.mlp.hook_centroid",
        "what the MLP reads",
        "what it writes",
        part="mlp",
        residual="adds",
        mixes_positions=False,
        closed_forms=("jacobian",),
        has_local=True,
    ),
    "neuron": SiteKind(
        "blocks.L.mlp.hook_centroid_neuron_J",
        "what the MLP reads",
        "activation of neuron J",
        part="mlp",
        residual="adds",
        is_indexed=True,
        mixes_positions=False,
        linearizations=("jacobian",),
        closed_forms=("jacobian",),
        has_local=True,
    ),
    "attn": SiteKind(
        "blocks.L.attn.hook_centroid",
        "what attention reads",
        "what it writes",
        part="attn",
        residual="adds",
        has_local=True,
    ),
    "head": SiteKind(
        "blocks.L.attn.hook_centroid_head_H",
        "what attention reads",
        "what head H writes",
        part="attn",
        residual="adds",
        is_indexed=True,
        closed_forms=("detached",),
    ),
    "block": SiteKind(
        "blocks.L.hook_centroid",
        "residual stream before block L",
        "after it",
        residual="is",
        has_local=True,
    ),
    "span": SiteKind(
        "blocks.J.hook_centroid_from_I",
        "residual stream before block I",
        "after block J",
        residual="is",
        layers="ends",
        has_local=True,
    ),
    "model": SiteKind("hook_centroid", "token embeddings", "logits", layers="none", has_local=True),
}
"""What is known of each kind, by name."""

# Beyond this many members a group of neurons or heads goes by its label.
_MAX_SPELLED = 4
# TransformerLens gates hook points with these endings, SAELens flattens those with these parts.
_RESERVED = re.compile(r"(mlp_in|attn_in|_input|_result)$|hook_[qkvz]")


@dataclass(frozen=True, eq=False, kw_only=True)
class Settings:
    """How a centroid is to be taken, whatever it is the centroid of.

    Attributes:
        cotangent: ``v`` of the centroid ``J^T v``, a tensor of shape ``(d_out,)`` or anything from
            `lch_plugin.cotangents`; all ones if None.
        output_positions: of a component that mixes positions, those outputs that count, among each
            prompt's own tokens: 0 is its first, -1 its last, wherever padding lies. All if None.
        linearization: ``"jacobian"``, or ``"detached"`` for the exact affine map of
            `lch_plugin.linearization`. Of a head the Jacobian goes through its values and through
            where it looks; detached, its pattern is held, and the centroid has a closed form.
        expert: also give the affine expert: ``..._offset``, ``..._radius`` and ``..._alignment``
            (`lch_plugin.AffineExpert`), and of an MLP as a `Site` ``..._region``, which of its
            neurons are on (pre-activation above zero).
        radius: take the local centroid, the mean over a neighbourhood of this radius; with
            ``..._variance`` and ``..._standard_error`` beside it.
        sigma: in place of a radius, the standard deviation of Gaussian noise in each coordinate.
        n_samples, neighbourhood, centre, generator: as `lch_plugin.sample_neighbourhood`. Without a
            generator every forward pass draws the same points, and the global random state is not
            used.
        create_graph: keep the graph of every value, so that it can be differentiated again, in the
            input and in the weights. Gradients have to be on in the pass.

    Raises:
        InputError: settings that mean nothing, or nothing together.
    """

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
    create_graph: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "cotangent", as_cotangent(self.cotangent))
        self._check_types(
            ("radius", (int, float, type(None))),
            ("sigma", (int, float, type(None))),
            ("n_samples", (int,)),
            ("centre", (bool,)),
            ("generator", (torch.Generator, type(None))),
            ("create_graph", (bool,)),
        )
        if self.output_positions is not None and not integers(self.output_positions):
            raise InputError(f"output_positions={self.output_positions!r} must be integers.")
        check_known("linearization", self.linearization, get_args(Linearization))
        if self.is_late and isinstance(self.v, Metric) and self._changes_the_pass:
            raise InputError(
                f"cotangent {self.v.name!r} is a gradient through everything downstream, in the "
                "same pass, which 'detached' would change as well: use the Jacobian, or a Logit."
            )
        if self.create_graph and (self.is_late or self.linearization == "detached"):
            raise InputError(
                "create_graph=True goes with neither a cotangent that is known only from the "
                "logits nor the detached linearisation, which changes the gradients of a pass."
            )
        if self.is_local:
            self._check_neighbourhood()

    @property
    def v(self) -> AnyCotangent:
        """The cotangent, whatever it was given as."""
        return as_cotangent(self.cotangent)

    @property
    def is_late(self) -> bool:
        """Whether the cotangent is known only once the logits are."""
        return isinstance(self.v, Logit | Metric)

    @property
    def is_local(self) -> bool:
        """Whether it is the mean over a neighbourhood."""
        return self.radius is not None or self.sigma is not None

    @property
    def positions(self) -> list[int] | None:
        """Output positions that count; all if None."""
        return None if self.output_positions is None else integers(self.output_positions)

    @property
    def endings(self) -> tuple[str, ...]:
        """Endings of the names of what is computed; that of the centroid itself is empty."""
        if self.is_local:
            return ("", "_variance", "_standard_error")
        return ("", "_offset", "_radius", "_alignment") if self.expert else ("",)

    def record(self) -> dict[str, Any]:
        """What the centroid is, in terms of JSON."""
        v = self.v
        record: dict[str, Any] = {
            "cotangent": v.v.tolist() if isinstance(v, Vector) else v.name,
            "linearization": self.linearization,
        }
        if isinstance(v, Logit) and v.position is not None:
            record["cotangent_position"] = v.position
        if self.positions is not None:
            record["output_positions"] = self.positions
        if self.is_local:
            of_radius = self.sigma is None
            record |= {
                **({"radius": self.radius} if of_radius else {"sigma": self.sigma}),
                "n_samples": self.n_samples,
                "neighbourhood": self.neighbourhood,
                **({"centre": True} if self.centre else {}),
            }
        return record

    @property
    def _changes_the_pass(self) -> bool:
        """Whether what is downstream would have other gradients while this is computed."""
        return self.linearization == "detached"

    def _check_types(self, *kinds: tuple[str, tuple[type, ...]]) -> None:
        for name, allowed in kinds:
            value = getattr(self, name)
            if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                wanted = " or ".join(k.__name__ for k in allowed)
                raise InputError(f"{name}={value!r} must be {wanted}.")

    def _check_neighbourhood(self) -> None:
        check_neighbourhood(self.radius, self.sigma, self.neighbourhood)
        if self.n_samples < 2:
            raise InputError(f"n_samples={self.n_samples} must be at least 2.")
        size = f"radius={self.radius}" if self.sigma is None else f"sigma={self.sigma}"
        if not self._has_local or self.linearization == "detached":
            offered = [kind for kind, found in KINDS.items() if found.has_local]
            raise InputError(
                f"{size}: a local centroid is offered for {', '.join(offered[:-1])} and "
                f"{offered[-1]} with the Jacobian. For others use lch_plugin.local_centroid on a "
                "callable."
            )
        if self.expert:
            raise InputError(
                f"{size}: a mean over a neighbourhood is no affine expert. Leave out expert=True."
            )

    @property
    def _has_local(self) -> bool:
        return True


class Options(TypedDict, total=False):
    """`Settings` but for the cotangent, as keyword arguments."""

    output_positions: int | Sequence[int] | None
    linearization: Linearization
    expert: bool
    radius: float | None
    sigma: float | None
    n_samples: int
    neighbourhood: Neighbourhood
    centre: bool
    generator: torch.Generator | None
    create_graph: bool


@dataclass(frozen=True, eq=False)
class Site(Settings):
    """A component of a transformer, and how its centroid is to be taken.

    Attributes:
        kind: which component; the table is in `lch_plugin.sites`.
        layers: blocks, negative counting from the end; all if None. Of a span its first and its
            last block; of a model None.
        index: the neuron or head, or several that count as one group.
        compute_dtype: of closed forms (`mlp`, `neuron`, a detached `head`); at least float32 if
            None.
        stack: of an encoder-decoder, ``"encoder_blocks"`` or ``"decoder_blocks"``; both if None.
            Hook names begin with it.
        label: ends the hook names. Two sites that differ in nothing but the cotangent need it.

    The other attributes are those of `Settings`, and each value is a hook point of its own.

    Raises:
        InputError: settings that mean nothing, or nothing together.
        SiteError: no such kind.

    Example:
        >>> import lch_plugin as lch
        >>> site = lch.Site("head", layers=2, index=[1, 3], expert=True)
        >>> with lch.attach(lch.load_demo_model(), site=site) as handle:
        ...     print(handle.centroid_names)
        ['blocks.2.attn.hook_centroid_head_1_3']
    """

    kind: Kind = "mlp"
    layers: int | Sequence[int] | None = None
    index: int | Sequence[int] | None = None
    compute_dtype: torch.dtype | None = field(default=None, kw_only=True)
    stack: str | None = field(default=None, kw_only=True)
    label: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise SiteError(f"site {self.kind!r} is not known. {did_you_mean(self.kind, KINDS)}")
        super().__post_init__()
        self._check_types(
            ("compute_dtype", (torch.dtype, type(None))),
            ("label", (str,)),
            ("stack", (str, type(None))),
        )
        self._check_indices()
        self._check_options()

    @property
    def of_kind(self) -> SiteKind:
        """What is known of its kind."""
        return KINDS[self.kind]

    @property
    def is_late(self) -> bool:
        # A model's output is the logits.
        return super().is_late and not (self.kind == "model" and isinstance(self.v, Metric))

    @property
    def mixes_positions(self) -> bool:
        """Whether outputs at one position depend on inputs at others."""
        return self.of_kind.mixes_positions

    @property
    def members(self) -> tuple[int, ...]:
        """The neurons or heads of the group."""
        return tuple(integers(self.index) or ())

    @property
    def suffix(self) -> str:
        """What follows ``hook_centroid`` in the name, but for a span's first block."""
        parts = [self.kind, *map(str, self.members)] if self.of_kind.is_indexed else []
        if len(self.members) > _MAX_SPELLED:
            parts = [f"{self.kind}s"]
        return "".join(f"_{part}" for part in (*parts, self.label) if part)

    @property
    def endings(self) -> tuple[str, ...]:
        has_region = self.expert and not self.is_local and self.kind == "mlp"
        return (*super().endings, *(["_region"] if has_region else []))

    def record(self) -> dict[str, Any]:
        return {
            "site": self.kind,
            **super().record(),
            "label": self.label,
            **({"compute_dtype": str(self.compute_dtype)} if self.compute_dtype else {}),
            **({"index": list(self.members)} if self.members else {}),
        }

    @property
    def _changes_the_pass(self) -> bool:
        # A closed form leaves the pass alone.
        return super()._changes_the_pass and self.linearization not in self.of_kind.closed_forms

    @property
    def _has_local(self) -> bool:
        return self.of_kind.has_local

    def _check_indices(self) -> None:
        kind = self.of_kind
        if self.layers is not None and not integers(self.layers):
            raise SiteError(f"layers={self.layers!r} names no layer; pass integers, or None.")
        if kind.layers == "ends" and len(integers(self.layers) or ()) != 2:
            raise SiteError(
                f"layers={self.layers!r}: a {self.kind} needs two, its first and its last block."
            )
        if kind.layers == "none" and self.layers is not None:
            raise SiteError(f"layers={self.layers!r}: the whole model has no layers to choose.")
        if kind.is_indexed != (self.index is not None):
            indexed = tuple(name for name, found in KINDS.items() if found.is_indexed)
            raise InputError(
                f"index={self.index!r}: sites of kind {indexed} need one, others have none."
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

    def _check_options(self) -> None:
        if self.linearization not in self.of_kind.linearizations:
            raise InputError(
                f"a {self.kind} has one linearisation: leave it at "
                f"{self.of_kind.linearizations[0]!r}."
            )
        if not re.fullmatch(r"\w*", self.label, re.ASCII) or _RESERVED.search(self.label):
            raise InputError(
                f"label={self.label!r} must be letters, digits and underscores, without parts "
                "that TransformerLens or SAELens treat on their own (hook_q, mlp_in, _input, ...)."
            )
        if self.compute_dtype is not None and not self.compute_dtype.is_floating_point:
            raise InputError(f"compute_dtype={self.compute_dtype} must be floating point.")
        if self.compute_dtype is not None and self.linearization not in self.of_kind.closed_forms:
            raise InputError(
                f"compute_dtype={self.compute_dtype}: a {self.kind} is differentiated as the model "
                "runs it, in the model's dtype. Load the model in the dtype you want."
            )


def integers(values: Any) -> list[int] | None:
    """One integer or several, of any kind (numpy's and tensors too); None for anything else."""
    values = values.tolist() if hasattr(values, "tolist") else values
    listed = list(values) if isinstance(values, Iterable) else [values]
    if any(isinstance(v, bool) or not hasattr(v, "__index__") for v in listed):
        return None
    return [operator.index(v) for v in listed]

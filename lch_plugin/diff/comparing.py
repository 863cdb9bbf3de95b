"""Compare the components of two checkpoints on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lch_plugin.adapters.transformer_lens import (
    LensModel,
    weight_processing,
)
from lch_plugin.cotangents import AnyCotangent, Random, Vector, as_cotangent
from lch_plugin.diff.asked import check_cotangent, check_models, check_prompts, check_sites
from lch_plugin.diff.components import Components, watched
from lch_plugin.diff.differences import ComponentDifference, Differences
from lch_plugin.errors import InputError
from lch_plugin.files import portable
from lch_plugin.lens.asked import text
from lch_plugin.progress import track
from lch_plugin.sites import Kind, Site

_FEWEST = 2


def compare(
    before: LensModel,
    after: LensModel,
    prompts: str | Sequence[str] | Int[Tensor, "batch pos"],
    *,
    sites: Kind | Site | Sequence[Kind | Site] = ("attn", "mlp"),
    cotangent: Float[Tensor, " d_out"] | AnyCotangent | None = None,
    n_random: int = 8,
    seed: int = 0,
    batch_size: int = 16,
) -> Differences:
    """Where two checkpoints of one model differ in what they compute, and on which inputs.

    Each component of both models reads what it reads in ``before``. Prompts run in batches of one
    length, without padding. Three passes a batch and site, with ``1 + n_random`` centroids of each
    component in two of them.

    Args:
        before: TransformerBridge or HookedTransformer.
        after: of the same class and architecture, with other weights.
        prompts: texts, or token ids without padding.
        sites: kinds of components, or `lch_plugin.Site` for some layers, heads or neurons alone. A
            block is compared as a whole, with its norms, on the residual stream that it reads.
        cotangent: of ``centroids``, one direction; all ones if None.
        n_random: random cotangents for ``jacobian``, at least two.
        seed: of these.
        batch_size: prompts in a batch.

    Raises:
        InputError: models that are the same object, or of different classes, shapes, types,
            devices, tokenizers or weight processing; no prompts, or prompts that cannot be read; a
            cotangent that depends on what is computed; sites or numbers that mean nothing here.
        SiteError, VanishingCentroidError, NotDifferentiableError: as `lch_plugin.attach`.

    Example:
        >>> before, after = lch.load_demo_model(), lch.load_demo_model()
        >>> with torch.no_grad():
        ...     _ = after.blocks[2].mlp.W_out[5].mul_(2)  # What neuron 5 writes.
        >>> found = lch.diff.compare(before, after, ["Tom saw an apple.", "A pear"])
        >>> found.ranked()
        ['blocks.2.mlp']
    """
    chosen = check_sites(sites)
    v = check_cotangent(as_cotangent(cotangent))
    for name, value, least in (("n_random", n_random, _FEWEST), ("batch_size", batch_size, 1)):
        if value < least:
            raise InputError(f"{name}={value} must be at least {least}.")
    randoms = [Random(seed * n_random + k) for k in range(n_random)]
    check_models(before, after)
    ids = check_prompts(before, after, prompts)
    changed: list[Tensor] = []
    size: list[Tensor] = []
    parts: list[_Part] = []
    for site in chosen:
        with ExitStack() as stack:
            old, new = (
                stack.enter_context(watched(model, site, [v, *randoms]))
                for model in (before, after)
            )
            twice = {part.name for part in parts} & set(old.names)
            if twice:
                raise InputError(f"sites={sites!r} name {sorted(twice)} twice: name each once.")
            found = _squares(old, new, ids, batch_size)
        changed.append(found[0])
        size.append(found[1])
        parts += map(_Part, old.names, old.layers, old.modules, new.modules)
    order = sorted(range(len(parts)), key=lambda i: parts[i].layer)
    components, by_input = _differences(
        torch.cat(changed)[order], torch.cat(size)[order], [parts[i] for i in order]
    )
    return Differences(
        components=components,
        tokens=[[text(before, i) for i in row.tolist()] for row in ids],
        by_input=by_input,
        elsewhere=_elsewhere(
            before, after, [part.before for part in parts if part.before is not None]
        ),
        run={
            "before": portable(before.cfg.model_name),
            "after": portable(after.cfg.model_name),
            **weight_processing(before, 0),
            "dtype": str(next(before.parameters()).dtype).removeprefix("torch."),
            "sites": [_site_record(site) for site in chosen],
            "cotangent": v.v.tolist() if isinstance(v, Vector) else v.name,
            "random_cotangents": [one.name for one in randoms],
            "seed": seed,
            "n_prompts": len(ids),
            "versions": {
                name: version(name)
                for name in ("lch-plugin", "torch", "transformers", "transformer-lens")
            },
        },
    )


@dataclass(frozen=True)
class _Part:
    """A component in both models, with the modules that hold its parameters."""

    name: str
    layer: int
    before: nn.Module | None
    after: nn.Module | None

    @property
    def weights(self) -> float | None:
        """Relative difference of all its parameters."""
        if self.before is None or self.after is None:
            return None
        other = dict(self.after.named_parameters())
        pairs = [(p, other[name]) for name, p in self.before.named_parameters()]
        return ratio(*map(sum, zip(*(_changed_and_size(*pair) for pair in pairs), strict=True)))


def _changed_and_size(before: Tensor, after: Tensor) -> tuple[float, float]:
    a, b = before.detach().double(), after.detach().double()
    return float((a - b).square().sum()), float(a.square().sum())


def _squares(
    old: Components, new: Components, ids: Sequence[Int[Tensor, " _"]], batch_size: int
) -> tuple[Float[Tensor, "component what token"], Float[Tensor, "component what token"]]:
    """Squared norms at each token: of differences, and of what was there before.

    What: centroids through each cotangent, outputs on the same inputs, outputs on own inputs.
    """
    starts = torch.tensor([0, *map(len, ids)]).cumsum(0).tolist()
    changed: list[list[Tensor]] = []
    size: list[list[Tensor]] = []
    places: list[int] = []
    for rows in track(_batches(ids, batch_size), "comparing"):
        tokens = torch.stack([ids[row] for row in rows])
        was = old.run(tokens)
        same, own = new.run(tokens, was.inputs), new.run(tokens, centroids=False)
        places += [starts[row] + i for row in rows for i in range(tokens.shape[1])]

        def norms(x: Tensor, n: int = tokens.numel()) -> Tensor:
            return x.double().reshape(n, -1).square().sum(-1).cpu()

        for_change, for_size = [], []
        for i in range(len(old.names)):
            y = old.output(was, i)
            before = [*old.centroids(was, i), y, y]
            after = [*new.centroids(same, i), new.output(same, i), new.output(own, i)]
            pairs = zip(before, after, strict=True)
            for_change.append(torch.stack([norms(a.double() - b.double()) for a, b in pairs]))
            for_size.append(torch.stack([norms(a) for a in before]))
        changed.append(for_change)
        size.append(for_size)
    order = torch.tensor(places).argsort()
    return tuple(  # type: ignore[return-value]
        torch.stack([torch.cat(parts, -1) for parts in zip(*found, strict=True)])[..., order]
        for found in (changed, size)
    )


def _differences(
    changed: Float[Tensor, "component what token"],
    size: Float[Tensor, "component what token"],
    of: Sequence[_Part],
) -> tuple[list[ComponentDifference], dict[Any, Float[Tensor, "component token"]]]:
    """From squared norms to relative differences."""
    parts = {
        "jacobian": slice(1, -2),
        "centroids": slice(0, 1),
        "outputs": slice(-2, -1),
        "activations": slice(-1, None),
    }
    by_input = {
        name: (changed[:, part].sum(1) / size[:, part].sum(1).mean(-1, keepdim=True)).sqrt()
        for name, part in parts.items()
    }
    components = []
    for i, component in enumerate(of):
        totals = {
            measure: (changed[i, part].sum(-1).tolist(), size[i, part].sum(-1).tolist())
            for measure, part in parts.items()
        }
        components.append(
            ComponentDifference(
                name=component.name,
                layer=component.layer,
                **{m: ratio(sum(n), sum(d)) for m, (n, d) in totals.items()},
                jacobian_error=_jackknife(*totals["jacobian"]),
                weights=component.weights,
            )
        )
    return components, by_input


def ratio(changed: float, size: float) -> float:
    """Root of the ratio of two sums of squares: 0 of no change, infinite of what was zero."""
    if changed == 0:
        return 0.0
    return math.sqrt(changed / size) if size > 0 else math.inf


def _jackknife(changed: Sequence[float], size: Sequence[float]) -> float:
    """Standard error of `ratio` of the sums, over what is summed."""
    n = len(changed)
    without = [ratio(sum(changed) - c, sum(size) - s) for c, s in zip(changed, size, strict=True)]
    mean = sum(without) / n
    return math.sqrt((n - 1) / n * sum((one - mean) ** 2 for one in without))


def _batches(ids: Sequence[Int[Tensor, " _"]], batch_size: int) -> list[list[int]]:
    """Prompts of one length together."""
    by_length: dict[int, list[int]] = {}
    for row, one in enumerate(ids):
        by_length.setdefault(len(one), []).append(row)
    return [
        rows[i : i + batch_size]
        for rows in by_length.values()
        for i in range(0, len(rows), batch_size)
    ]


def _elsewhere(
    before: LensModel, after: LensModel, compared: Sequence[nn.Module]
) -> dict[str, float]:
    """By module, how much parameters differ that belong to none of the compared ones."""
    known = {id(p) for module in compared for p in module.parameters()}
    other = dict(after.named_parameters())
    sums: dict[str, list[float]] = {}
    for name, p in before.named_parameters():
        if id(p) not in known:
            total = sums.setdefault(_module_name(name), [0.0, 0.0])
            for i, square in enumerate(_changed_and_size(p, other[name])):
                total[i] += square
    return {name: ratio(*total) for name, total in sums.items() if total[0] > 0}


def _module_name(parameter: str) -> str:
    return parameter.replace("_original_component.", "").rpartition(".")[0]


def _site_record(site: Site) -> dict[str, Any]:
    left_out = ("cotangent", "label")
    layers = None if site.layers is None else torch.as_tensor(site.layers).flatten().tolist()
    return {k: v for k, v in site.record().items() if k not in left_out} | {"layers": layers}

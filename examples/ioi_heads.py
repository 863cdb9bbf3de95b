"""Which head does what in indirect object identification, and a causal test of each kind.

    python examples/ioi_heads.py --model DIR

In "When Mary and John went to the store, John gave a bottle to" the answer is the name that is
said once. Wang et al. (arXiv 2211.00593) found in GPT-2 small how. At the second "John" some heads
notice that it was there before: duplicate-token heads look at the first, induction heads at the
token after it, which previous-token heads have marked. S-inhibition heads carry that to the end,
and move the attention of the name movers there from "John" to "Mary".

Here heads are told apart by where they look, those of the last two kinds by their score as well.
The test puts in place of all heads of a kind what they hold on the twin, in which Mary gives: by
how much does the metric fall, beside random heads of the same layers, and where do the next heads
look?
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import lch_plugin as lch
from lch_plugin import circuits
from lch_plugin.adapters.transformer_lens import (
    LensModel,
    NodePoint,
    node_points,
    pattern_names,
    run_edited,
)
from lch_plugin.circuits.scores.attribution import activations

N_RANDOM = 10


@dataclass(frozen=True)
class Kind:
    """Heads that look from one place to another.

    Attributes:
        name: as the paper calls them.
        looks: from where, to where; ``io`` is the answer's name, ``s1`` and ``s2`` the other's.
        attention: mean attention from which a head belongs.
        score: least size of its score, in logits.
        moves: the kind whose attention it is to move.
        on_twin: whether the twin, whose last name alone is another, changes what they hold. Those
            that act before it take their mean over positions instead.
    """

    name: str
    looks: tuple[str, str]
    attention: float
    score: float
    moves: str | None = None
    on_twin: bool = True


KINDS = (
    Kind("previous token", ("after s1", "s1"), 0.5, 0.0, "induction", on_twin=False),
    Kind("duplicate token", ("s2", "s1"), 0.4, 0.0, "S-inhibition"),
    Kind("induction", ("s2", "after s1"), 0.4, 0.0, "S-inhibition"),
    Kind("S-inhibition", ("end", "s2"), 0.25, 0.5, "name mover"),
    Kind("name mover", ("end", "io"), 0.25, 0.1),
)


def places(pair: circuits.Prompts) -> list[dict[str, int] | None]:
    """Where the names stand in each prompt; None where one is other tokens at the beginning."""
    found: list[dict[str, int] | None] = []
    for ids, (answer,), (foil,) in zip(
        pair.clean.tolist(), pair.metric.answers, pair.metric.foils, strict=True
    ):
        if answer not in ids or ids.count(foil) != 2:
            found.append(None)
            continue
        s1 = ids.index(foil)
        at = {"io": ids.index(answer), "s1": s1, "after s1": s1 + 1, "s2": ids.index(foil, s1 + 1)}
        found.append({**at, "end": len(ids) - 1})
    return found


def attention(patterns: Tensor, where: Sequence[dict[str, int]], looks: tuple[str, str]) -> Tensor:
    """Sum over prompts of the attention of all heads from one place to another, (layer, head)."""
    rows = range(len(where))
    dest, src = ([at[name] for at in where] for name in looks)
    return patterns[rows, :, :, dest, src].sum(0)


class Passes:
    """The model on some pairs, with heads replaced by what they hold on the twins."""

    def __init__(self, model: LensModel, pairs: Sequence[circuits.Prompts]) -> None:
        self.model = model
        self.points = node_points(model, ("head",))
        self.pairs = [(pair, [at for at in places(pair) if at is not None]) for pair in pairs]
        self.n = sum(len(pair) for pair, _ in self.pairs)
        names = [point.name for point in self.points]
        self.twins = [activations(model, pair.corrupt, names) for pair, _ in self.pairs]

    def __call__(
        self, replaced: Sequence[circuits.Node], on_twin: bool = True
    ) -> tuple[float, dict[str, Tensor]]:
        """The mean metric, and by kind the mean attention of every head, (layer, head)."""
        total, looked = 0.0, dict.fromkeys((kind.name for kind in KINDS), torch.zeros(()))
        for (pair, where), twin in zip(self.pairs, self.twins, strict=True):
            seen: dict[str, Tensor] = {}
            edits = {name: partial(seen.__setitem__, name) for name in pattern_names(self.model)}
            for point in self.points:
                heads = [node.index for node in replaced if node.layer == point.layer]
                if heads:
                    other = twin[point.name] if on_twin else None
                    edits[point.name] = partial(put, point, heads, other)
            with torch.no_grad():
                total += float(pair.measure(run_edited(self.model, pair.clean, edits)).sum())
            patterns = torch.stack(list(seen.values()), 1)
            for kind in KINDS:
                looked[kind.name] = looked[kind.name] + attention(patterns, where, kind.looks)
        return total / self.n, {name: value / self.n for name, value in looked.items()}


def put(point: NodePoint, heads: list[int], other: Tensor | None, value: Tensor) -> Tensor:
    """Heads of a layer with what they hold elsewhere, or with their mean over positions."""
    value = value.clone()
    other = value.mean(1, keepdim=True).expand_as(value) if other is None else other.to(value)
    point.split(value)[:, :, heads] = point.split(other)[:, :, heads]
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="directory, hub name or .gguf; the embedded model if none")
    parser.add_argument("--pairs", type=int, default=40)
    options = parser.parse_args()
    model = lch.load(options.model).bridge() if options.model else lch.load_demo_model()
    pairs = circuits.solved(model, circuits.task(model, "ioi", options.pairs))
    usable = [
        pair[rows]
        for pair in pairs
        if (rows := [row for row, at in enumerate(places(pair)) if at is not None])
    ]
    if not usable:
        raise SystemExit("no prompt whose names are single tokens in every place")
    scores = circuits.node_attribution(model, pairs, ("head",))
    passes = Passes(model, usable)
    metric, looks = passes([])
    found = {kind.name: members(kind, looks[kind.name], scores) for kind in KINDS}
    table = Table(
        "kind", "heads: attention, score in logits", "metric falls by", "random heads", "moved"
    )
    generator = torch.Generator().manual_seed(0)
    for kind in KINDS:
        heads = found[kind.name]
        if not heads:
            table.add_row(kind.name, "none", "", "", "")
            continue
        without, looks_without = passes(heads, kind.on_twin)
        circuit = circuits.Circuit.of(scores.points, heads)
        random = [
            metric - passes(circuit.random(generator).nodes, kind.on_twin)[0]
            for _ in range(N_RANDOM)
        ]
        named = ", ".join(
            f"{head} {looks[kind.name][head.layer, head.index]:.2f}, {scores.node(head).score:+.2f}"
            for head in heads
        )
        table.add_row(
            kind.name,
            named,
            f"{metric - without:+.2f} of {metric:.2f}",
            f"{sum(random) / N_RANDOM:+.2f} ({min(random):+.2f} to {max(random):+.2f})",
            moved(kind, found, looks, looks_without),
        )
    console = Console(width=130)
    console.print(f"{passes.n} prompts; metric {metric:+.2f} logits")
    console.print(table)


def members(kind: Kind, looks: Tensor, scores: circuits.NodeScores) -> list[circuits.Node]:
    """The heads of a kind, those that look most first."""
    inside = [
        circuits.Node("head", layer, index)
        for layer, index in (looks >= kind.attention).nonzero().tolist()
    ]
    kept = [node for node in inside if abs(scores.node(node).score) >= kind.score]
    return sorted(kept, key=lambda node: -float(looks[node.layer, node.index]))


def moved(
    kind: Kind,
    found: dict[str, list[circuits.Node]],
    looks: dict[str, Tensor],
    without: dict[str, Tensor],
) -> str:
    """How the attention of the heads that a kind is to move changes without it."""
    first = min(head.layer for head in found[kind.name])
    heads = [head for head in found.get(kind.moves or "", []) if head.layer > first]
    if not heads:
        return ""
    before, after = (
        sum(float(of[kind.moves or ""][h.layer, h.index]) for h in heads) / len(heads)
        for of in (looks, without)
    )
    dest, src = next(k.looks for k in KINDS if k.name == kind.moves)
    return f"{kind.moves}, {dest} to {src}: {before:.2f} to {after:.2f}"


if __name__ == "__main__":
    main()

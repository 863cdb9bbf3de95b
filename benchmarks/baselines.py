"""What others score the nodes of a circuit by, and the truth that all of them approximate.

Each takes a model, batches of pairs and the hook points of the nodes, and gives a score a node, as
`lch.circuits.node_attribution` does: in units of the metric, averaged over prompts, positive if
removing the node lowers it. ``a`` is a node's activation on the clean prompt, ``a'`` on the corrupt
one.

- `exact_patching`: a forward pass for each node, with ``a'`` in its place.
- `gradient_x_activation`: ``a . dm/da``.
- `attribution_patching`: ``(a - a') . dm/da`` with the gradient on the corrupt prompt, as
  TransformerLens has it (`transformer_lens.tools.analysis.attribution_patch`, held to it by
  `check_attribution_patching`; its nodes are heads and whole MLPs). Nanda 2023; Syed et al., arXiv
  2310.10348. With the gradient on the clean prompt it is `node_attribution` by ``"jacobian"``.
- `integrated_gradients`: ``(a - a') . g``, with ``g`` the mean gradient along the straight line
  between the embeddings of the two prompts. At nodes, this is EAP-IG (Hanna et al., arXiv
  2403.17806; "inputs" in the MIB benchmark, arXiv 2504.13151). No package on PyPI holds it.
- `integrated_gradients_of_activations`: along the straight line between ``a'`` and ``a``, one layer
  at a time (Sundararajan et al., arXiv 1703.01365; "activations" in MIB).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis import attribution_patch

from lch_plugin.adapters.transformer_lens import NodePoint, run_edited
from lch_plugin.circuits import NodeScores, Prompts
from lch_plugin.circuits.evaluation.ablation import Ablation
from lch_plugin.circuits.nodes import all_nodes
from lch_plugin.circuits.scores.attribution import activations, embedding_name, metric_gradients

Points = tuple[NodePoint, ...]
Values = dict[str, Tensor]


def exact_patching(model: TransformerBridge, batches: list[Prompts], points: Points) -> NodeScores:
    ablation = Ablation(model, batches, points, "resample")
    everything = ablation.everything()
    full = ablation.metric(everything).mean()
    without = [ablation.metric(everything.without(node)).mean() for node in all_nodes(points)]
    return NodeScores(points, (full - torch.stack(without)).float())


def gradient_x_activation(
    model: TransformerBridge, batches: list[Prompts], points: Points
) -> NodeScores:
    def score(batch: Prompts) -> Values:
        found = metric_gradients(model, batch, _names(points))
        return {n: found.activations[n] * found.gradients[n] for n in found.gradients}

    return _mean(batches, points, score)


def attribution_patching(
    model: TransformerBridge, batches: list[Prompts], points: Points
) -> NodeScores:
    def score(batch: Prompts) -> Values:
        names = _names(points)
        clean = activations(model, batch.clean, names)
        at_corrupt = metric_gradients(model, Prompts(_corrupt(batch), batch.metric), names)
        corrupt, gradients = at_corrupt.activations, at_corrupt.gradients
        return {n: (clean[n] - corrupt[n]) * gradients[n] for n in names}

    return _mean(batches, points, score)


def transformer_lens_patching(model: TransformerBridge, batches: list[Prompts]) -> Tensor:
    """TransformerLens' own scores, heads and MLP of layer after layer, summed over positions."""
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    total = torch.zeros(n_layers, n_heads + 1, dtype=torch.float64)
    for batch in batches:
        pairs = zip(batch.clean[:, None], _corrupt(batch)[:, None], strict=True)
        for i, (clean, corrupt) in enumerate(pairs):

            def metric(logits: Tensor, batch: Prompts = batch, i: int = i) -> Tensor:
                return batch.metric.of(logits.expand(len(batch), -1, -1))[i]

            for node, value in attribution_patch(model, clean, corrupt, metric).node_scores.items():
                if node.layer is not None:
                    total[node.layer, n_heads if node.head is None else node.head] += value
    return (total / sum(map(len, batches))).flatten()


def check_attribution_patching(
    model: TransformerBridge, batches: list[Prompts], points: Points
) -> None:
    """At heads and whole MLPs `attribution_patching` is TransformerLens'."""
    ours = attribution_patching(model, batches, points).values.double()
    torch.testing.assert_close(
        ours, transformer_lens_patching(model, batches), rtol=1e-3, atol=1e-4
    )


def integrated_gradients(
    model: TransformerBridge, batches: list[Prompts], points: Points, *, steps: int
) -> NodeScores:
    embed = embedding_name(model)

    def score(batch: Prompts) -> Values:
        names = _names(points)
        ends = [activations(model, side, [embed, *names]) for side in _sides(batch)]
        gradients = _along_the_line(
            model, batch, names, steps, {embed: (ends[1][embed], ends[0][embed])}
        )
        return {n: (ends[0][n] - ends[1][n]) * gradients[n] for n in names}

    return _mean(batches, points, score)


def integrated_gradients_of_activations(
    model: TransformerBridge, batches: list[Prompts], points: Points, *, steps: int
) -> NodeScores:
    def score(batch: Prompts) -> Values:
        names = _names(points)
        clean, corrupt = (activations(model, side, names) for side in _sides(batch))
        found = {}
        for name in names:
            line = {name: (corrupt[name], clean[name])}
            gradients = _along_the_line(model, batch, [name], steps, line)
            found[name] = (clean[name] - corrupt[name]) * gradients[name]
        return found

    return _mean(batches, points, score)


def random_scores(points: Points, seed: int) -> NodeScores:
    nodes = list(range(sum(point.n_nodes for point in points)))
    random.Random(seed).shuffle(nodes)
    return NodeScores(points, torch.tensor(nodes, dtype=torch.float32))


def _along_the_line(
    model: TransformerBridge,
    batch: Prompts,
    names: Sequence[str],
    steps: int,
    line: dict[str, tuple[Tensor, Tensor]],
) -> Values:
    """Mean gradients of the metric in what passes some hook points, at ``k / steps``, k from 1.

    What passes the points of the line is put on it, the clean prompt running otherwise.
    """
    total: Values = {}
    for k in range(1, steps + 1):
        seen: Values = {}

        def step(name: str, value: Tensor, seen: Values = seen, share: float = k / steps) -> Tensor:
            if name in line:
                start, end = line[name]
                value = (start + share * (end - start)).detach().requires_grad_()
            if name in names:
                seen[name] = value
            return value

        with torch.enable_grad():
            edits = {name: partial(step, name) for name in {*names, *line}}
            metric = batch.measure(run_edited(model, batch.clean, edits)).sum()
            gradients = torch.autograd.grad(metric, [seen[name] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            total[name] = total.get(name, 0) + gradient / steps
    return total


def _mean(batches: list[Prompts], points: Points, score: Callable[[Prompts], Values]) -> NodeScores:
    total = torch.zeros(sum(point.n_nodes for point in points), dtype=torch.float64)
    for batch in batches:
        values = score(batch)
        total += torch.cat([p.split(values[p.name]).double().sum((0, 1, 3)) for p in points])
    return NodeScores(points, (total / sum(map(len, batches))).float())


def _names(points: Points) -> list[str]:
    return [point.name for point in points]


def _sides(batch: Prompts) -> tuple[Tensor, Tensor]:
    return batch.clean, _corrupt(batch)


def _corrupt(batch: Prompts) -> Tensor:
    assert batch.corrupt is not None, "the baselines compare with corrupt twins"
    return batch.corrupt

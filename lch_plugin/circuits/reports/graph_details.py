"""What to say of the nodes of an attribution graph beside their numbers: tokens and attention.

Tokens are those that a node's write raises and lowers by direct logit attribution (`direct`), with
the final norm's scale as it is on the prompt.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import networkx as nx
import torch
from jaxtyping import Float
from torch import Tensor

from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.adapters.transformer_lens.nodes import pattern_names
from lch_plugin.circuits.graphs.writes import node_writes
from lch_plugin.circuits.nodes import Node, NodeScores
from lch_plugin.circuits.prompt_batches import Prompts
from lch_plugin.circuits.reports.direct import direct_logits
from lch_plugin.circuits.reports.graph_page import NodeDetail
from lch_plugin.circuits.scores.attribution import activations


def node_details(
    model: LensModel,
    prompts: Prompts,
    graph: nx.DiGraph,
    scores: NodeScores | None = None,
    *,
    n_tokens: int = 5,
) -> dict[str, NodeDetail]:
    """Tokens that heads, neurons, MLPs and embeddings write towards, and where heads look.

    All of it is on the clean prompt. Logits are those of the node's own position, less their mean
    over the vocabulary.

    Args:
        model: that the graph is of.
        prompts: the prompt that the graph is of.
        graph: of `lch_plugin.circuits.graphs`.
        scores: on a task; each node's goes with it.
        n_tokens: tokens to name on either side.

    Raises:
        InputError, SiteError: as `attribution_graph`.
    """
    found = node_writes(model, prompts, graph)
    tokens = _tokens(model, found.final, graph, found.writes, n_tokens)
    patterns = _patterns(model, prompts, graph)

    def detail(key: str, data: dict[str, Any]) -> NodeDetail:
        promoted, suppressed = tokens.get(key, ((), ()))
        kind, layer, index, at = (data[k] for k in ("kind", "layer", "index", "position"))
        known = scores is not None and (kind, layer) in {(p.kind, p.layer) for p in scores.points}
        return NodeDetail(
            promoted=promoted,
            suppressed=suppressed,
            attention=patterns[layer][index, at, : at + 1].tolist() if kind == "head" else (),
            scored=scores.node(Node(kind, layer, index)) if scores and known else None,
        )

    return {key: detail(key, data) for key, data in graph.nodes(data=True)}


def _patterns(
    model: LensModel, prompts: Prompts, graph: nx.DiGraph
) -> dict[int, Float[Tensor, "head dest src"]]:
    """Attention patterns of the layers that have a head in the graph."""
    layers = sorted({d["layer"] for _, d in graph.nodes(data=True) if d["kind"] == "head"})
    if not layers:
        return {}
    names = pattern_names(model)
    found = activations(model, prompts.clean, [names[layer] for layer in layers])
    return {layer: found[names[layer]][0] for layer in layers}


def _tokens(
    model: LensModel,
    residual: Float[Tensor, "pos d_model"],
    graph: nx.DiGraph,
    writes: dict[str, Float[Tensor, " d_model"]],
    n: int,
) -> dict[str, tuple[list[tuple[str, float]], list[tuple[str, float]]]]:
    """Of each node with a write, the tokens it raises most and those it lowers most."""
    at = [graph.nodes[key]["position"] for key in writes]
    logits = direct_logits(model, residual[at], torch.stack(list(writes.values())))
    logits = logits - logits.mean(-1, keepdim=True)

    @cache
    def text(token: int) -> str:
        return model.to_string([token])

    def pairs(row: Tensor, largest: bool) -> list[tuple[str, float]]:
        found = row.topk(min(n, len(row)), largest=largest)
        return list(zip(map(text, found.indices.tolist()), found.values.tolist(), strict=True))

    return {
        key: (pairs(row, True), pairs(row, False)) for key, row in zip(writes, logits, strict=True)
    }

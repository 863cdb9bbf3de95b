"""Node scores in the form that the evaluator of the MIB benchmark reads.

The circuit track of MIB (Mueller et al., arXiv 2504.13151) loads a JSON file with
``load_graph_from_json`` of MIB-circuit-track, which is ``Graph.from_json`` of EAP-IG (Hanna et al.,
arXiv 2403.17806): ``cfg``, the shape of the model; ``nodes``, by name (``input``, ``a0.h0``,
``m0``, ``logits``), each with ``in_graph`` and ``score``; and ``edges``. Evaluated with
``--level node``, it ranks nodes by these scores, and keeps those without a score, here ``input``,
in every circuit. Scores of nodes come without edges: the evaluator turns on all edges out of a node
that it keeps. Scores of edges come with all of them, by name (``a0.h0->a1.h2<q>``, ``m0->logits``),
for ``--level edge``.

What MIB calls neurons are the ``d_model`` coordinates of what a head or an MLP writes, not the
neurons of an MLP; scores of those have no place in the file.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, TypeAlias

from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.circuits.edges.wiring import EdgeScores
from lch_plugin.circuits.nodes import NodeScores, all_nodes
from lch_plugin.errors import InputError
from lch_plugin.files import write_file

# What a head reads for, at the end of a reader's name.
_READ_FOR = re.compile(r"\.([qkv])$")


def save_mib(
    model: LensModel, scores: NodeScores | EdgeScores, path: str | os.PathLike[str]
) -> None:
    """Write the scores of all heads and MLPs, or of all edges, as MIB's evaluator reads them.

    Args:
        model: that the scores are of.
        scores: of kinds ``("head", "mlp")``, every layer; or of edges.
        path: of the file, which MIB wants to end in ``.json``.

    Raises:
        InputError: the scores are of other nodes, or a score is not finite.
        OutputError: the file cannot be written.
    """
    write_file(Path(path), json.dumps(_graph(model, scores), allow_nan=False))


def _graph(model: LensModel, scores: NodeScores | EdgeScores) -> dict[str, Any]:
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    nodes, edges = (
        _of_nodes(n_layers, n_heads, scores)
        if isinstance(scores, NodeScores)
        else _of_edges(n_layers, n_heads, scores)
    )
    if not bool(scores.values.isfinite().all()):
        raise InputError("scores are not all finite: MIB would keep what has none for free.")
    return {
        "cfg": {
            "n_layers": n_layers,
            "n_heads": n_heads,
            "parallel_attn_mlp": bool(model.cfg.parallel_attn_mlp),
            "d_model": model.cfg.d_model,
        },
        "nodes": {"input": {"in_graph": True}, **nodes, "logits": {"in_graph": True}},
        "edges": edges,
    }


_Entries: TypeAlias = dict[str, dict[str, Any]]


def _of_nodes(n_layers: int, n_heads: int, scores: NodeScores) -> tuple[_Entries, _Entries]:
    expected = {("head", layer): n_heads for layer in range(n_layers)}
    expected |= {("mlp", layer): 1 for layer in range(n_layers)}
    if {(p.kind, p.layer): p.n_nodes for p in scores.points} != expected:
        kinds = tuple(dict.fromkeys(p.kind for p in scores.points))
        raise InputError(
            f"scores of {len(scores.values)} nodes of kinds {kinds}: MIB takes those of all heads "
            'and MLPs of the model. Score kinds=("head", "mlp").'
        )
    scored = zip(all_nodes(scores.points), scores.values.tolist(), strict=True)
    return {str(node): {"in_graph": True, "score": score} for node, score in scored}, {}


def _of_edges(n_layers: int, n_heads: int, scores: EdgeScores) -> tuple[_Entries, _Entries]:
    wiring = scores.wiring
    if (wiring.n_layers, wiring.n_heads) != (n_layers, n_heads):
        raise InputError(
            f"the scores are of {wiring}, and the model has {n_layers} layers of {n_heads} heads."
        )
    scored = zip(wiring.edges, scores.values.tolist(), strict=True)
    nodes = {name: {"in_graph": True} for name in wiring.writers[1:]}
    edges = {}
    for edge, score in scored:
        reader = _READ_FOR.sub(r"<\1>", edge.reader)
        edges[f"{edge.writer}->{reader}"] = {"in_graph": True, "score": score}
    return nodes, edges

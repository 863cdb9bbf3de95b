"""Scores for MIB's evaluator: every field that its reader looks at, in the order it indexes by."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens import node_points
from lch_plugin.circuits import Node, NodeScores
from lch_plugin.circuits.evaluation.mib import save_mib
from tests import models


def scores_of(model, kinds: tuple = ("head", "mlp")) -> NodeScores:
    points = node_points(model, kinds)
    values = torch.randn(sum(p.n_nodes for p in points), generator=torch.Generator().manual_seed(0))
    return NodeScores(points, values)


def read(path: Path) -> tuple[dict, torch.Tensor]:
    """What EAP-IG's ``Graph.from_json`` takes from a file: its configuration, and node scores.

    It builds the nodes from ``cfg``, each at an index of its own, NaN where it has no score; then
    looks up every name of the file, but ``logits``, among them.
    """
    content = json.loads(path.read_text())
    assert {"cfg", "nodes", "edges"} <= content.keys()
    cfg = content["cfg"]
    stride = cfg["n_heads"] + 1
    index = {"input": 0}
    for layer in range(cfg["n_layers"]):
        for head in range(cfg["n_heads"]):
            index[f"a{layer}.h{head}"] = 1 + layer * stride + head
        index[f"m{layer}"] = 1 + layer * stride + cfg["n_heads"]
    scores = torch.full((1 + cfg["n_layers"] * stride,), torch.nan)
    for name, node in content["nodes"].items():
        assert type(node["in_graph"]) is bool
        if name != "logits" and "score" in node:
            scores[index[name]] = node["score"]
    for edge in content["edges"].values():
        assert {"score", "in_graph"} <= edge.keys()
    assert content["nodes"].keys() == {*index, "logits"}
    return cfg, scores


@pytest.mark.parametrize("family", ["hooked", "gpt2", "gpt_neox", "llama"])
def test_the_reader_of_mib_finds_each_score_where_it_belongs(family: str, tmp_path: Path) -> None:
    model = models.hooked() if family == "hooked" else models.bridge(family)
    scores = scores_of(model)
    save_mib(model, scores, tmp_path / "importances.json")
    cfg, found = read(tmp_path / "importances.json")
    assert cfg == {
        "n_layers": 3,
        "n_heads": 4,
        "parallel_attn_mlp": family == "gpt_neox",
        "d_model": models.D_MODEL,
    }
    # The input has no score, which MIB takes to mean that it belongs to every circuit.
    assert found.isnan().nonzero().tolist() == [[0]]
    # In the order of computation, heads before the MLP of their layer: the order of our nodes.
    assert torch.equal(found[1:], scores.values)
    assert float(found[1 + 2 * 5 + 3]) == scores.node(Node("head", 2, 3)).score
    assert float(found[1 + 1 * 5 + 4]) == scores.node(Node("mlp", 1)).score


@pytest.mark.usefixtures("as_users_run")
def test_scores_that_mib_cannot_read_are_refused(tmp_path: Path) -> None:
    model, path = models.bridge("gpt2"), tmp_path / "importances.json"
    for kinds in (("head", "neuron"), ("mlp",)):
        with pytest.raises(lch.InputError, match=r'kinds=\("head", "mlp"\)'):
            save_mib(model, scores_of(model, kinds), path)
    scores = scores_of(model)
    scores.values[3] = torch.nan
    with pytest.raises(lch.InputError, match="not all finite"):
        save_mib(model, scores, path)
    part = replace(scores, points=scores.points[:-1], values=scores.values[:-1])
    with pytest.raises(lch.InputError, match="all heads and MLPs"):
        save_mib(model, part, path)
    assert not path.exists()

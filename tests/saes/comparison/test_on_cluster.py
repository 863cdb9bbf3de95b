"""`lch.saes.compare` on a cluster: what one process finds, to the last digit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lch_plugin as lch
from lch_plugin.cluster import Cluster
from lch_plugin.demo import DEMO_MODEL_DIR
from lch_plugin.saes.comparison.embedded import labelled_stories

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("ray"),
    pytest.mark.usefixtures("ray_here"),
]

SMALL = lch.saes.ComparisonSettings(
    k=(2,),
    n_seeds=2,
    d_sae=16,
    n_rows=2048,
    n_test_rows=500,
    n_items=40,
    n_neighbours=3,
    batch_size=128,
)


def test_saes_and_scores_are_those_of_one_process(tmp_path: Path) -> None:
    loaded = lch.load(DEMO_MODEL_DIR)
    train, test = labelled_stories(100, seed=1), labelled_stories(40, split="test", seed=2)
    for out, cluster in (("one", None), ("two", Cluster(workers=1))):
        lch.saes.compare(
            loaded, "transformer.h.1.mlp", train, test, tmp_path / out, SMALL, cluster=cluster
        )
    one, two = (
        {p.relative_to(tmp_path / out): p for p in (tmp_path / out).rglob("*") if p.is_file()}
        for out in ("one", "two")
    )
    assert one.keys() == two.keys()
    numbers = [p for p in one if p.suffix in (".json", ".csv", ".safetensors")]
    assert len(numbers) > 20
    for path in numbers:
        if path.name == "cfg.json":  # SAELens' order of keys is that of a set, of each process.
            assert json.loads(one[path].read_text()) == json.loads(two[path].read_text())
        elif path.name != "files.json":  # Hashes of the others.
            assert one[path].read_bytes() == two[path].read_bytes(), path

"""The comparison of lenses runs offline on the embedded model, and again from what it kept.

`make test-slow`: outside `testpaths`, since it takes minutes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.scripts import ROOT, run_small


def compare(out: Path) -> dict[str, Any]:
    script = ROOT / "examples/lens/comparison.py"
    said = run_small(script, out)
    found: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return found["results"] | {"said": said}


def test_lenses_are_compared_and_kept(tmp_path: Path) -> None:
    found = compare(tmp_path)
    assert (tmp_path / "figure.png").is_file()
    assert (tmp_path / "tables.md").is_file()
    assert set(found["corpora"]) == {"detached", "jacobian"}
    assert {row["lens"] for row in found["cells"]} >= {"exact", "logit lens"}
    last_layer = max(row["layer"] for row in found["cells"])
    for row in found["cells"]:
        assert -1 <= row["spearman"] <= 1 >= row["r2"]
        # Close to the logits, and where it stands, the exact lens tells what a change will do.
        if (row["lens"], row["place"], row["layer"]) == ("exact", "last", last_layer):
            assert row["spearman"] > abs(row["shuffled"])
            assert row["spearman"] > 0.5
    assert all(one["read"] <= one["of"] for one in found["reads"]["lenses"].values())
    again = compare(tmp_path)
    assert "fitting" not in again["said"]
    assert again["cells"] == found["cells"]

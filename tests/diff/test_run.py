"""What ``lch diff`` writes."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

import pytest
import torch

import lch_plugin as lch
from lch_plugin.demo import DEMO_MODEL_DIR
from lch_plugin.diff.run import read_prompts, run


def test_the_page_names_what_changed_and_where(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Tom saw an apple and\n\nThe <keys> were\n")
    before, after = lch.load(DEMO_MODEL_DIR), lch.load(DEMO_MODEL_DIR)
    with torch.no_grad():
        after.model.transformer.h[1].mlp.c_proj.weight[5] *= 3
    prompts = read_prompts(tmp_path / "prompts.txt")
    run(before, after, prompts, tmp_path / "out", n_random=2, seed=3, k=2)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["run"]["before"] == results["run"]["after"] == "lch_plugin/demo/model"
    assert results["run"]["random_cotangents"] == ["random6", "random7"]
    (top,) = results["top"]
    assert top["component"] == "blocks.1.mlp"
    assert len(top["inputs"]) == 2
    page = (tmp_path / "out" / "report.html").read_text()
    assert "1 of 8 components" in page
    assert f"<mark>{escape(top['inputs'][0]['token'])}</mark>" in page
    assert (tmp_path / "out" / "components.png").exists()


@pytest.mark.parametrize(
    ("content", "said"), [(b"\n \n", "has no prompt"), (b"\xff\xfe", "cannot be read")]
)
def test_a_file_without_prompts_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(lch.InputError, match=said):
        read_prompts(tmp_path / "prompts.txt")

"""``lch centroids``: prompts in, a directory of centroids out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import lch_plugin as lch
from lch_plugin.cli import app
from lch_plugin.demo import DEMO_MODEL_DIR
from lch_plugin.extract import CENTROIDS, RECORD, extract
from tests import families

PROMPTS = ["I climbed up the pear tree", "I picked"]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["centroids", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_what_is_written_is_what_the_adapter_gives(tmp_path: Path) -> None:
    output = run(*PROMPTS, "--out", str(tmp_path / "out"), "--dtype", "float64")
    assert "closed form" in output
    assert f"They are in {tmp_path / 'out' / CENTROIDS}, under these names" in output
    found = load_file(tmp_path / "out" / CENTROIDS)
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    loaded = lch.load(DEMO_MODEL_DIR, dtype="float64")
    inputs = {key: found[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad(), lch.huggingface.attach(loaded.model) as handle:
        loaded.model(**inputs)
    for name, mu in handle.cache.items():
        assert torch.equal(found[name], mu)
    assert [c["site"] for c in record["components"]] == handle.centroid_names
    assert record["prompts"] == PROMPTS
    assert record["versions"]["lch-plugin"] == lch.__version__


def test_components_and_cotangent_can_be_chosen(tmp_path: Path) -> None:
    modules = ["--modules", "transformer.h.*", "--modules", "transformer.h.1.attn"]
    run(PROMPTS[0], *modules, "--random-cotangent", "3", "--out", str(tmp_path / "out"))
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert len(record["components"]) == 5
    assert {c["cotangent"] for c in record["components"]} == {"random3"}
    assert set(record["methods"].values()) == {"VJP"}


def test_prompts_have_the_centroids_they_have_alone(tmp_path: Path) -> None:
    loaded = lch.load(DEMO_MODEL_DIR, dtype="float64")
    loaded.processor.padding_side = "left"
    extract(loaded, PROMPTS, tmp_path / "both")
    extract(loaded, PROMPTS[1], tmp_path / "alone")
    both, alone = (load_file(tmp_path / name / CENTROIDS) for name in ("both", "alone"))
    n = alone["input_ids"].shape[1]
    for name in ("transformer.h.0.mlp", "transformer.h.3.mlp"):
        torch.testing.assert_close(both[name][1:, :n], alone[name])


def test_each_call_of_a_shared_module_is_written(tmp_path: Path) -> None:
    loaded = lch.load(DEMO_MODEL_DIR)
    loaded.model.transformer.h[2].mlp = loaded.model.transformer.h[1].mlp
    extract(loaded, PROMPTS, tmp_path / "out", modules=["transformer.h.*.mlp"])
    found = load_file(tmp_path / "out" / CENTROIDS)
    assert {"transformer.h.1.mlp[0]", "transformer.h.1.mlp[1]", "transformer.h.0.mlp"} <= set(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "--out", "x"], "an empty one"),
        (["pear " * 200, "--out", "x"], "more than the model's context of 128"),
        (["pear", "--modules", "h.*.mlp", "--out", "x"], "fits no module"),
        (["pear", "--modules", "transformer.h", "--out", "x"], "is never called"),
        (["pear", "--modules", "transformer.h.3:transformer.h.1", "--out", "x"], "was not called"),
        (["pear", "--model", "./nowhere", "--out", "x"], "does not exist"),
        (["pear", "--out", "."], "exists with other content"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_left(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lch.LCHError, match=message):
        run(*arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    families.huggingface("vit", torch.float32).save_pretrained(tmp_path / "vit")
    with pytest.raises(lch.InputError, match=r"lch\.saes\.Rows"):
        extract(lch.load(tmp_path / "vit"), ["pear"], tmp_path / "out")

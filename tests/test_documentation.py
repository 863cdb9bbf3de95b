"""What the README and the examples show runs, as it stands."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from tests import families

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize(
    ("page", "n_blocks"),
    [
        ("README.md", 6),
        ("docs/adapters.md", 5),
        ("docs/saes.md", 5),
        ("docs/circuits.md", 5),
        ("docs/conventions.md", 2),
    ],
)
def test_the_pages_python_runs(
    page: str, n_blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(blocks) >= n_blocks
    # From a file: nnsight reads the source of what it traces.
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script))


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run(
    example: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = {"train_centroid_sae.py": ["sae"], "vision_sae.py": ["--rows", "4096"]}
    monkeypatch.chdir(tmp_path)
    run_example(example, arguments.get(example, []), monkeypatch)
    assert capsys.readouterr().out.strip()


def test_the_vision_example_takes_other_models_and_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    families.huggingface("vit_base", torch.float32).save_pretrained(tmp_path / "model")
    size = {"height": 16, "width": 16}
    ViTImageProcessor(size=size).save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    for i in range(40):
        directory = tmp_path / "images" / ("train" if i < 24 else "test") / "ab"[i % 2]
        directory.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 127 + 128 * (i % 2), (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    arguments = "--model model --images images --module layers.1.mlp --rows 2048"
    run_example("vision_sae.py", arguments.split(), monkeypatch)
    assert (tmp_path / "vision_sae.png").is_file()
    assert "centroid, BatchTopK" in capsys.readouterr().out


def run_example(example: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [example, *arguments])
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")

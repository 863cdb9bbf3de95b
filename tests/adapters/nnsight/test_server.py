"""On a server that has nothing of ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lch_plugin.cotangents import Random
from tests import models, nnsight_server
from tests.adapters.nnsight.common import IDS, site, steps, tokenizer, truth
from tests.models import relative_error

# How a loop over the steps of a generation ends.
pytestmark = pytest.mark.filterwarnings("ignore:.*was never reached", "ignore:Module '")


def test_a_server_needs_nothing_of_ours(tmp_path: Path) -> None:
    """Requests run where this package and what it imports are missing, to the same values."""
    models.huggingface("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    torch.save(IDS, tmp_path / "ids.pt")
    command = [sys.executable, "-W", "ignore", nnsight_server.__file__, str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)
    found = {
        name: torch.load(tmp_path / f"{name}.pt") for name in ("trace", "generation", "envoys")
    }

    hf, r = models.huggingface("llama"), Random(3).at(torch.ones(models.D_MODEL))
    for kind, v in (("block", None), ("attn", r), ("mlp", None)):
        expected = truth(hf, site("llama", kind), IDS, v=v)
        assert relative_error(found["trace"][kind], expected) < 1e-5
    expected = truth(hf, site("llama", "mlp", 2), IDS, v=r)
    assert relative_error(found["trace"]["other"], expected) < 1e-5
    for kind in ("block", "mlp"):
        expected = truth(hf, site("llama", kind), IDS)
        assert relative_error(found["envoys"][kind], expected) < 1e-5
        of_steps = found["generation"][kind]
        assert len(of_steps) == 3
        for mu, step in zip(of_steps, steps(hf, site("llama", kind), IDS), strict=False):
            assert relative_error(mu, step) < 1e-5

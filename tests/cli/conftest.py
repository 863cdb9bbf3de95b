"""A directory to work in, and models that would be loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from sae_lens import TopKSAE, TopKSAEConfig

import lch_plugin as lch
import lch_plugin.circuits.reports.task_run
import lch_plugin.demonstration.run
import lch_plugin.loading
import lch_plugin.saes.comparison.embedded

LOADED = "a model is being loaded"
LOADERS = (
    "lch_plugin.loading.load",
    "lch_plugin.demonstration.run.load_demo_model",
    "lch_plugin.saes.comparison.embedded.embedded_task",
)


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Things that arguments may name."""
    directory = tmp_path_factory.mktemp("cli") / "in" / "here"
    directory.mkdir(parents=True)
    TopKSAE(TopKSAEConfig(d_in=32, d_sae=16, k=4)).save_model(directory / "dictionary")
    (directory / "file.txt").write_text("I climbed up the pear tree.\n")
    (directory / "empty.json").touch()
    rows = [f"Statement {i}.,{i % 2}" for i in range(20)]
    (directory / "statements.csv").write_text("\n".join(["statement,label", *rows]) + "\n")
    os.mkfifo(directory / "pipe")
    return directory


@pytest.fixture
def place(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, where no model can be loaded."""

    def load(*_args: Any, **_kwargs: Any) -> Any:
        raise lch.LCHError(LOADED)

    monkeypatch.chdir(directory)
    for name in LOADERS:
        monkeypatch.setattr(name, load)
    return directory

"""Layers, files of options, and dry runs of ``lch sae train`` and ``cache``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

import lch_plugin as lch
from lch_plugin.cli import config_files
from tests.cli import run

pytestmark = pytest.mark.usefixtures("as_users_run")

PATTERN, TWO = (
    "blocks.*.mlp.hook_centroid",
    ("blocks.0.mlp.hook_centroid", "blocks.2.mlp.hook_centroid"),
)
SMALL = ["--setting", "k=4", "--d-sae", "32", "--batch-size", "512", "--tokens", "2048"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    from lch_plugin.demo.corpus import stories

    file = tmp_path_factory.mktemp("text") / "stories.txt"
    file.write_text("\n".join(stories(300)))
    return str(file)


@pytest.fixture(scope="module")
def model() -> str:
    from lch_plugin.demo import DEMO_MODEL_DIR

    return str(DEMO_MODEL_DIR)


def succeed(*arguments: str) -> str:
    code, said = run(*arguments)
    assert code == 0, said
    return said


def test_layers_train_in_one_pass_into_a_directory_each(
    model: str, text: str, tmp_path: Path
) -> None:
    out = tmp_path / "saes"
    arguments = ["--model", model, "--text", text, *SMALL, "--out", str(out)]
    said = succeed("sae", "train", PATTERN, "--layers", "0,2", *arguments)
    assert "You just passed in" not in said
    assert "Training" not in said
    for hook in TWO:
        sae = SAE.load_from_disk(out / hook)
        assert sae.cfg.metadata.hook_name == hook
        assert sae.cfg.metadata.lch_centroid["layer"] == int(hook.split(".")[1])
    assert not (tmp_path / "saes-checkpoints").exists()


def test_layers_are_cached_in_one_pass_and_trained_from_there(
    model: str, text: str, tmp_path: Path
) -> None:
    cached, out = tmp_path / "cache", tmp_path / "saes"
    source = ["--model", model, "--text", text, "--n-tokens", "4096", "--context-size", "64"]
    succeed("sae", "cache", PATTERN, "--layers", "2,0", *source, "--out", str(cached))
    assert set(lch.saes.Cache(cached).hook_names) == set(TWO)
    settings = ["--cache", str(cached), *SMALL, "--out", str(out)]
    succeed("sae", "train", PATTERN, "--layers", "all", *settings)
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == sorted(TWO)
    code, said = run("sae", "train", PATTERN, "--layers", "1", "--cache", str(cached))
    assert code == 1
    assert "[0, 2]" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([PATTERN], "say which by --layers"),
        ([TWO[0], "--layers", "1"], "need one *"),
        ([PATTERN, "--layers", "1,x"], "no list of layers"),
        ([PATTERN, "--layers", "-1"], "no list of layers"),
        ([PATTERN, "--layers", "7"], "layers 0 to 3"),
    ],
)
@pytest.mark.parametrize("command", ["train", "cache"])
def test_layers_that_are_none_are_refused(
    command: str, arguments: list[str], message: str, tmp_path: Path
) -> None:
    code, said = run("sae", command, *arguments, "--out", str(tmp_path / "out"))
    assert code == 1
    assert message in " ".join(said.split())
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    model: str, text: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from lch_plugin.cli import app

    monkeypatch.chdir(tmp_path)
    source = ["--model", model, "--text", text, "--dry-run"]
    caching = ["cache", TWO[0], "--n-tokens", "10000", "--context-size", "100"]
    for arguments, words in (
        (caching, "tokens  10,000\ndisk    5.2 MB\n"),
        (["train", PATTERN, "--layers", "0,1", *SMALL], "tokens  2,048\n"),
    ):
        found = CliRunner().invoke(app, ["sae", *arguments, *source], catch_exceptions=False)
        assert found.exit_code == 0, found.output
        assert words in found.output
        assert "memory  about" in found.output
        assert "by a trial" in found.output
    assert not list(tmp_path.iterdir())


def test_options_come_from_a_file_and_those_given_win(
    model: str, text: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"hook: '{TWO[1]}'\nmodel: {model}\ntext: {text}\ntokens: 2048\nbatch-size: 512\n"
        "d_sae: 16\nsetting: {k: 4}\nlr: 2e-3\n"
    )
    out = tmp_path / "sae"
    succeed("sae", "train", "--config", str(file), "--d-sae", "24", "--out", str(out))
    sae = SAE.load_from_disk(out)
    assert (sae.cfg.d_sae, sae.cfg.k) == (24, 4)
    assert sae.cfg.metadata.hook_name == TWO[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tokns: 5", "Did you mean tokens?"),
        ("zzz: 5", "is no option of this command. There are"),
        ("- 5", "holds no options"),
        ("a: [", "is no YAML file"),
        ("tokens: many", "Invalid value"),
    ],
)
def test_a_file_of_options_that_is_none_is_refused(
    content: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    code, said = run("sae", "train", TWO[0], "--config", str(file))
    assert code in (1, 2)
    assert message in " ".join(said.split())
    code, said = run("sae", "train", TWO[0], "--config", str(tmp_path / "none.yaml"))
    assert code == 1
    assert "is no YAML file" in said


def test_values_of_a_file_are_as_the_command_line_has_them() -> None:
    given = config_files._as_given
    assert given({"k": 4, "rescale": True}, takes_many=True) == ["k=4", "rescale=true"]
    assert given([5, 10], takes_many=False) == "5,10"
    assert given([5, 10], takes_many=True) == ["5", "10"]
    assert given("a", takes_many=True) == ["a"]
    assert given(True, takes_many=False) is True


@pytest.mark.slow
def test_logging_is_saelens_own(model: str, text: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Without an account it can be kept on the disk."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    arguments = ["--model", model, "--text", text, *SMALL, "--out", str(tmp_path / "sae")]
    succeed("sae", "train", TWO[0], *arguments, "--wandb", "--setting", "run_name=mine")
    assert list(tmp_path.glob("wandb/offline-run-*"))
    for given, message in (
        (["--setting", "run_name=mine"], "--wandb turns on"),
        (["--wandb", "--setting", "wandb_log_frequency=no"], "SAELens takes int"),
    ):
        code, said = run("sae", "train", TWO[0], *arguments[:-1], str(tmp_path / "b"), *given)
        assert code == 1
        assert message in " ".join(said.split())


@pytest.mark.slow
def test_checkpoints_by_the_minute_are_kept_one_at_a_time(tmp_path: Path) -> None:
    from sae_lens import TopKTrainingSAEConfig

    from lch_plugin.demo.corpus import stories

    demo = lch.load_demo_model()
    texts = list(stories(200))
    cache = lch.saes.cache(
        demo, texts, tmp_path / "cache", hook_names=TWO[0], n_tokens=4096, context_size=64
    )

    def config(**more: Any) -> Any:
        sae = TopKTrainingSAEConfig(
            d_in=128, d_sae=32, k=4, normalize_activations="expected_average_only_in"
        )
        return lch.saes.runner_config(
            sae,
            TWO[0],
            training_tokens=4096,
            train_batch_size_tokens=512,
            context_size=64,
            use_cached_activations=True,
            cached_activations_path=str(cache.path),
            **more,
        )

    whole = lch.saes.train(None, None, config())
    checkpoints = tmp_path / "checkpoints"
    lch.saes.train(None, None, config(checkpoint_path=str(checkpoints)), checkpoint_minutes=0.0)
    (last,) = [path for path in checkpoints.glob("*/*") if path.name.isdigit()]
    assert last.name == str(4096 - 512)
    resumed = lch.saes.train(None, None, config(resume_from_checkpoint=str(last)))
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    with pytest.raises(lch.InputError, match="zero or more"):
        lch.saes.train(None, None, config(), checkpoint_minutes=-1.0)

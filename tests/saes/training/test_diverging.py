"""Training that goes wrong stops, with the step and what there is to go back to."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import JumpReLUTrainingSAEConfig, StandardTrainingSAEConfig, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

import lch_plugin as lch
from lch_plugin.saes.training.checkpoints import newest_good
from tests import models

HOOK = "blocks.1.mlp.hook_centroid"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "cache"
    data = [{"tokens": row} for row in models.tokens(64, models.N_CTX).tolist()]
    lch.saes.cache(models.bridge("gpt2"), Dataset.from_list(data), path, hook_names=HOOK)
    return path


def train(rows: Path, out: Path, **changes: Any) -> Any:
    config = lch.saes.runner_config(
        changes.pop("sae", TopKTrainingSAEConfig(d_in=models.D_MODEL, d_sae=32, k=4)),
        HOOK,
        **{
            "training_tokens": 2048,
            "train_batch_size_tokens": 128,
            "context_size": models.N_CTX,
            "lr": 1e-3,
            "use_cached_activations": True,
            "cached_activations_path": str(rows),
            "checkpoint_path": str(out.parent / "checkpoints"),
            "output_path": str(out),
            **changes,
        },
    )
    return lch.saes.train(None, None, config)


def test_a_loss_that_is_no_number_ends_training(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(lch.NonFiniteError, match=r"diverged at step \d+ \(\d+ tokens\).*Lower lr"):
        train(rows, tmp_path / "sae", lr=1e30)
    assert not (tmp_path / "sae").exists()


def test_the_last_good_checkpoint_is_named(rows: Path, tmp_path: Path) -> None:
    train(rows, tmp_path / "sae", n_checkpoints=3)
    (run,) = (tmp_path / "checkpoints").iterdir()
    last = newest_good(run)
    assert last is not None
    diverging: dict[str, Any] = {"training_tokens": 8192, "lr": 1e30, "n_checkpoints": 0}
    with pytest.raises(lch.NonFiniteError, match="There is no checkpoint to go back to"):
        train(rows, tmp_path / "other", checkpoint_path=None, **diverging)
    # A run of its own diverges after a checkpoint: the weights are broken in the midst of it.
    steps = 0

    def broken(self: Any, batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 12:
            self.sae.W_dec.data[0, 0] = float("nan")
        return original(self, batch)

    original = SAETrainer.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SAETrainer, "step", broken)
        with pytest.raises(lch.NonFiniteError, match=r"The last good checkpoint is .*/\d+\."):
            train(rows, tmp_path / "third", n_checkpoints=3)
    for checkpoint in (tmp_path / "checkpoints").glob("*/*/"):
        assert newest_good(checkpoint.parent) is not None


def test_a_dictionary_of_which_nothing_fires_ends_training(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(self: Any, batch: Any) -> Any:
        self.sae.b_enc.data.fill_(-1e6)
        return original(self, batch)

    original = SAETrainer.step
    monkeypatch.setattr(SAETrainer, "step", dying)
    sae = StandardTrainingSAEConfig(d_in=models.D_MODEL, d_sae=16)
    dead = "all 16 features are dead: none fired in"
    with pytest.raises(lch.InputError, match=rf"at step 100 .*{dead} 100 steps"):
        train(rows, tmp_path / "sae", sae=sae, training_tokens=128 * 150)
    with pytest.raises(lch.InputError, match=rf"at step 8 .*{dead} 8 steps"):
        train(rows, tmp_path / "sae", sae=sae, training_tokens=1024)


TRAINER = {
    "n_checkpoints": 0,
    "checkpoint_path": None,
    "save_final_checkpoint": False,
    "total_training_samples": 512,
    "device": "cpu",
    "autocast": False,
    "lr": 1e-3,
    "lr_end": None,
    "lr_scheduler_name": "constant",
    "lr_warm_up_steps": 0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "lr_decay_steps": 0,
    "n_restart_cycles": 1,
    "train_batch_size_samples": 64,
    "dead_feature_window": 1000,
    "feature_sampling_window": 2000,
    "logger": LoggingConfig(log_to_wandb=False),
}


@pytest.mark.parametrize(
    ("value", "message", "error"),
    [
        (float("nan"), "row 70 has NaN or infinite", lch.NonFiniteError),
        (float("inf"), "row 70 has NaN or infinite", lch.NonFiniteError),
        (0.0, "row 70 is zero", lch.InputError),
    ],
)
def test_rows_that_teach_nothing_are_refused_by_number(
    value: float, message: str, error: type[Exception]
) -> None:
    data = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    data[70] = value
    sae = TopKTrainingSAEConfig(d_in=8, d_sae=16, k=2)
    with pytest.raises(error, match=message):
        lch.saes.train_on(list(data.split(64)), sae, SAETrainerConfig(**TRAINER), buffer_size=128)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(64, "fewer than a batch of 128"), (128, r"fewer than 4 for each feature")],
)
def test_a_run_of_too_few_tokens_warns(
    rows: Path, tmp_path: Path, tokens: int, message: str
) -> None:
    sae = TopKTrainingSAEConfig(d_in=models.D_MODEL, d_sae=64, k=4)
    with pytest.warns(UserWarning, match=message):
        train(rows, tmp_path / "sae", training_tokens=tokens, sae=sae)


# --- checkpoints ---------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: cut(c / "trainer_state.pt"), "bytes where"),
        (lambda c: (c / "trainer_state.pt").unlink(), "no directory with a file trainer_state.pt"),
        (lambda c: (c / "cfg.json").unlink(), "cfg.json cannot be read"),
        (lambda c: (c / "files.json").unlink(), "has lost its files.json"),
        (lambda c: (c / "files.json").write_text("{}"), "files: Field required"),
    ],
)
def test_a_torn_checkpoint_names_the_newest_good_one(
    rows: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    train(rows, tmp_path / "sae", n_checkpoints=3)
    (run,) = (tmp_path / "checkpoints").iterdir()
    by_age = sorted(run.iterdir(), key=lambda path: int(path.name))
    damage(by_age[0])
    with pytest.raises(lch.InputError, match=message) as caught:
        train(rows, tmp_path / "again", resume_from_checkpoint=str(by_age[0]))
    assert str(caught.value).endswith(f"The newest good one of its run is {by_age[-1]}.")


def test_a_pickle_in_the_place_of_a_trainers_state_is_not_run(rows: Path, tmp_path: Path) -> None:
    train(rows, tmp_path / "sae", n_checkpoints=1)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*/*/")
    for name in ("files.json", "lch_resume.safetensors"):
        (checkpoint / name).unlink()

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"optimizer": Evil()}, checkpoint / "trainer_state.pt")
    with pytest.raises(lch.InputError, match="is damaged, or holds more than tensors"):
        train(rows, tmp_path / "again", resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "evil").exists()


# --- manifests and SAEs --------------------------------------------------------------------------


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        change(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            edited(lambda m: m["hooks"][HOOK]["centroid"].update(cotangent="random")),
            "other content",
        ),
        (edited(lambda m: m["hooks"][HOOK]["centroid"].update(site="attn")), "other content"),
        (edited(lambda m: m["shards"].append(m["shards"][0])), "there twice"),
        (edited(lambda m: m["shards"][0].update(file="../x.arrow")), "shards.0.file"),
        (edited(lambda m: m["shards"][0].update(file="/etc/passwd")), "shards.0.file"),
        (edited(lambda m: m["shards"][0].update(n_sequences=-1)), "shards.0.n_sequences"),
        (edited(lambda m: m["shards"][0].update(n_bytes=10**30)), "shards.0.n_bytes"),
        (edited(lambda m: m["shards"][0].update(n_bytes="many")), "shards.0.n_bytes"),
        (edited(lambda m: m.pop("hooks")), "hooks: Field required"),
        (edited(lambda m: m.update(more=1)), "more"),
        (edited(lambda m: m.pop("xxh3")), "xxh3: Field required"),
        (lambda path: (path / "manifest.json").unlink(), "has lost its manifest"),
        (lambda path: (path / "manifest.json").write_text("[" * 10**5), "damaged"),
        (lambda path: pipe(path / "manifest.json"), "no plain file"),
        (lambda path: pipe(path / "state.json"), "no plain file"),
        (lambda path: pipe(path / "data-00000.arrow"), "no plain file"),
        (lambda path: link(path / "data-00000.arrow"), "no plain file"),
        (lambda path: rename_column(path), "something else than"),
    ],
)
def test_a_manifest_is_not_believed(
    rows: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    path = tmp_path / "cache"
    shutil.copytree(rows, path)
    assert lch.saes.Cache(path).n_sequences == 64
    damage(path)
    with pytest.raises(lch.InputError, match=message) as caught:
        lch.saes.Cache(path)
    assert "\n" not in str(caught.value)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def rename_column(path: Path) -> None:
    info = path / "dataset_info.json"
    info.write_text(info.read_text().replace("mlp.hook_centroid", "mlp.hook_in"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lch_centroid", {"site": 3}, "lch_centroid of"),
        ("lch_centroid", {"cotangent": "ones"}, "site: Field required"),
    ],
)
def test_what_an_sae_says_of_itself_is_checked(
    rows: Path, tmp_path: Path, name: str, value: Any, message: str
) -> None:
    train(rows, tmp_path / "sae")
    assert lch.saes.load_sae(tmp_path / "sae").cfg.d_sae == 32
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    cfg["metadata"][name] = value
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(lch.InputError, match=r"cfg\.json has"):
        lch.saes.load_sae(tmp_path / "sae")
    (tmp_path / "sae" / "files.json").unlink()  # As if others had written it.
    with pytest.raises(lch.InputError, match=message):
        lch.saes.load_sae(tmp_path / "sae")


def test_an_sae_of_nan_is_refused(rows: Path, tmp_path: Path) -> None:
    sae = train(rows, tmp_path / "sae", sae=JumpReLUTrainingSAEConfig(models.D_MODEL, 32))
    sae.W_enc.data[0, 0] = float("nan")
    sae.save_inference_model(tmp_path / "nan")
    with pytest.raises(lch.InputError, match="W_enc has NaN or infinite values"):
        lch.saes.load_sae(tmp_path / "nan")

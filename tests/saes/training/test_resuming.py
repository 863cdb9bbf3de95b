"""Training from a cache: without a model, and resumed bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, ActivationsStore, TrainingSAE
from sae_lens.saes.sae import TrainingSAE as AnyTrainingSAE
from safetensors.torch import load_file
from typer.testing import CliRunner

import lch_plugin as lch
from lch_plugin.cli import app
from lch_plugin.saes.caching.cache import Cache
from tests import models
from tests.saes.training.test_train import ARCHITECTURES, DATA, HOOK, config

INPUT = "blocks.1.mlp.hook_in"


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("caches") / "cache"
    return lch.saes.cache(models.bridge("gpt2"), DATA, path, hook_names=[HOOK, INPUT], batch_size=8)


def settings(cached: Cache, **kw: Any) -> dict[str, Any]:
    return {
        "use_cached_activations": True,
        "cached_activations_path": str(cached.path),
        "training_tokens": 3072,
        "train_batch_size_tokens": 96,  # Neither sequences nor epochs are made of whole batches.
        **kw,
    }


def assert_same(sae: TrainingSAE[Any], other: TrainingSAE[Any]) -> None:
    state, expected = sae.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name in state:
        assert torch.equal(state[name], expected[name]), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    architecture: str, cached: Cache, tmp_path: Path
) -> None:
    kw = settings(cached, architecture=architecture, n_checkpoints=2)
    whole = lch.saes.train(None, None, config(**kw, checkpoint_path=str(tmp_path)))
    checkpoints = sorted(tmp_path.glob("*/*"))
    assert len(checkpoints) == 2
    for checkpoint in checkpoints:
        assert 0 < int(checkpoint.name) < 3072
        resumed = lch.saes.train(None, None, config(**kw, resume_from_checkpoint=str(checkpoint)))
        assert_same(resumed, whole)
        assert resumed.cfg.to_dict() == whole.cfg.to_dict()


@pytest.mark.parametrize(
    ("prefetch", "normalize", "step"),
    [
        (False, "none", 7),
        (3, "none", 7),
        (False, "covariance_whitening", 7),
        (3, "covariance_whitening", 7),
        (3, "expected_average_only_in", 32),  # The last one.
    ],
)
def test_an_interrupt_waits_for_the_step_and_loses_nothing(
    normalize: str,
    prefetch: bool | int,
    step: int,
    cached: Cache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kw = settings(cached, normalize=normalize, prefetch_llm_batches=prefetch)
    whole = lch.saes.train(None, None, config(**kw))
    steps: list[int] = []
    forward = AnyTrainingSAE.training_forward_pass

    def interrupted(self: Any, step_input: Any) -> Any:
        steps.append(1)
        if len(steps) == step:
            signal.raise_signal(signal.SIGINT)  # In the midst of a step.
        return forward(self, step_input)

    with monkeypatch.context() as patch:
        patch.setattr(AnyTrainingSAE, "training_forward_pass", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lch.saes.train(None, None, config(**kw, checkpoint_path=str(tmp_path)))
    (checkpoint,) = tmp_path.glob("*/*")
    assert int(checkpoint.name) == step * 96
    resumed = lch.saes.train(None, None, config(**kw, resume_from_checkpoint=str(checkpoint)))
    assert_same(resumed, whole)


def test_a_cache_needs_no_model_and_says_what_it_is_of(cached: Cache, tmp_path: Path) -> None:
    out = str(tmp_path / "sae")
    lch.saes.train(None, None, config(**settings(cached, output_path=out)))
    record = SAE.load_from_disk(out).cfg.metadata.lch_centroid
    assert (record["site"], record["layer"], record["cotangent"]) == ("mlp", 1, "ones")
    assert record["scale"] > 0
    given = lch.saes.train(models.bridge("gpt2"), None, config(**settings(cached)))
    assert_same(given, lch.saes.train(None, None, config(**settings(cached))))
    activations = lch.saes.train(None, None, config(hook_name=INPUT, **settings(cached)))
    assert "lch_centroid" not in activations.cfg.metadata


def test_logging_evaluates_rows_of_the_cache(
    cached: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: dict[str, Any] = {}
    monkeypatch.setattr("wandb.init", lambda **kw: None)
    monkeypatch.setattr("wandb.finish", lambda: None)
    monkeypatch.setattr("wandb.log", lambda data, **kw: logged.update(data))
    monkeypatch.setattr("wandb.log_artifact", lambda *args, **kw: None)
    logging = lch.saes.train(None, None, config(**settings(cached, wandb=True)))
    assert logged["evaluation/l0"] == 4
    assert 0 < logged["evaluation/explained_variance"] < 1
    # Evaluation takes no batches from training.
    assert_same(logging, lch.saes.train(None, None, config(**settings(cached))))


def test_the_sae_says_how_the_cache_made_sequences(cached: Cache, tmp_path: Path) -> None:
    assert lch.saes.train(None, None, config(**settings(cached))).cfg.metadata.prepend_bos
    other = lch.saes.cache(
        models.bridge("gpt2"),
        DATA,
        tmp_path / "other",
        hook_names=HOOK,
        prepend_bos=False,
        sequence_separator_token=None,
        disable_concat_sequences=True,
    )
    metadata = lch.saes.train(None, None, config(**settings(other))).cfg.metadata
    assert metadata.prepend_bos is False
    assert metadata.sequence_separator_token is None
    assert metadata.disable_concat_sequences is True


def test_nobody_is_told_that_a_cache_has_too_few_samples(
    cached: Cache, recwarn: pytest.WarningsRecorder
) -> None:
    lch.saes.train(None, None, config(**settings(cached)))
    assert not [w for w in recwarn if "fewer samples" in str(w.message)]


def test_the_command_trains_on_a_cache(cached: Cache, tmp_path: Path) -> None:
    def run(hook: str, *more: str) -> Any:
        arguments = ["sae", "train", hook, "--cache", str(cached.path), *more]
        return CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "sae")])

    result = run(HOOK, "--tokens", "3072", "--setting", "k=4", "--setting", "d_sae=48")
    assert result.exit_code == 0, result.output
    sae = SAE.load_from_disk(tmp_path / "sae")
    assert (sae.cfg.d_sae, sae.cfg.k, sae.cfg.metadata.context_size) == (48, 4, 16)
    (tmp_path / "sae").rename(tmp_path / "first")
    for hook, more, message in [
        ("blocks.0.mlp.hook_centroid", (), "which has"),
        (HOOK, ("--model", "gpt2"), "Leave them out"),
        (HOOK, ("--text", "texts.txt"), "Leave them out"),
    ]:
        error = run(hook, *more).exception
        assert isinstance(error, lch.InputError)
        assert message in str(error)


def test_the_seed_decides_the_order(cached: Cache) -> None:
    saes = [
        lch.saes.train(None, None, config(**settings(cached, seed=seed))).W_dec
        for seed in (0, 0, 1)
    ]
    assert torch.equal(saes[0], saes[1])
    assert not torch.equal(saes[0], saes[2])


def test_special_tokens_are_left_out_by_id(cached: Cache) -> None:
    first = int(cached.token_ids([0])[0, 0])
    kept = lch.saes.train(None, None, config(**settings(cached, exclude_special_tokens=[first])))
    everything = lch.saes.train(None, None, config(**settings(cached)))
    assert not torch.equal(kept.W_dec, everything.W_dec)


@pytest.mark.usefixtures("as_users_run")
def test_what_does_not_fit_the_cache_is_refused(cached: Cache, tmp_path: Path) -> None:
    final = tmp_path / "final_3072"
    final.mkdir()
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        ("which has", None, {"hook_name": "blocks.0.mlp.hook_centroid"}),
        ("Set d_in=32", None, {"d_in": 33}),
        ("Set context_size=16", None, {"context_size": 8}),
        ("leave seqpos_slice out", None, {"seqpos_slice": (1, None)}),
        ("give their ids", None, {"exclude_special_tokens": True}),
        ("heads side by side", None, {"hook_head_index": 0}),
        ("no checkpoint", None, {"resume_from_checkpoint": str(final)}),
        ("not of this model", models.bridge("gpt2", seed=1), {}),
        ("no finished cache", None, {"cached_activations_path": str(tmp_path)}),
        ("hook points", "gpt2", {}),
    ]
    for match, model, kw in cases:
        with pytest.raises(lch.InputError, match=match):
            lch.saes.train(model, None, config(**{**settings(cached), **kw}))
    with pytest.raises(lch.InputError, match="is a NoneType"):
        lch.saes.train(None, DATA, config())


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_live_run_resumes_in_the_text_where_it_was(
    prefetch: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.bridge("gpt2")
    kw: dict[str, Any] = {
        "training_tokens": 3072,
        "n_checkpoints": 2,
        "prefetch_llm_batches": prefetch,
    }
    lch.saes.train(model, DATA, config(**kw, checkpoint_path=str(tmp_path)))
    first, second = sorted(tmp_path.glob("*/*"), key=lambda path: int(path.name))
    read = watch_text(monkeypatch)
    sae = lch.saes.train(
        model,
        DATA,
        config(**kw, checkpoint_path=str(tmp_path / "again"), resume_from_checkpoint=str(first)),
    )
    assert torch.equal(read[0], following(first))
    # No checkpoint is written twice.
    assert [p.name for p in tmp_path.glob("again/*/*")] == [second.name]
    state = torch.load(next(tmp_path.glob("again/*/*")) / "trainer_state.pt")
    assert state["n_training_samples"] == int(second.name)
    scale = json.loads((first / "activation_scaler.json").read_text())["scaling_factor"]
    assert sae.cfg.metadata.lch_centroid["scale"] == scale


def test_training_goes_on_from_a_finished_sae_of_the_same_kind(
    cached: Cache, tmp_path: Path
) -> None:
    for architecture in ("topk", "batchtopk"):
        out = str(tmp_path / architecture)
        kw = settings(
            cached, architecture=architecture, compile_llm=True
        )  # Of which there is none.
        lch.saes.train(None, None, config(**kw, output_path=out))
    kw = settings(cached, from_pretrained_path=str(tmp_path / "topk"))
    before = SAE.load_from_disk(tmp_path / "topk")
    after = lch.saes.train(None, None, config(**{**kw, "training_tokens": 96, "lr": 1e-6}))
    torch.testing.assert_close(after.W_dec, before.W_dec, rtol=0, atol=1e-5)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("saves a finished BatchTopK", {"architecture": "batchtopk"}),
        ("none that SAELens wrote", {"from_pretrained_path": str(tmp_path)}),
        ("architecture='standard'", {"architecture": "standard"}),
    ]
    batchtopk = {"architecture": "batchtopk", "from_pretrained_path": str(tmp_path / "batchtopk")}
    for match, changes in [*cases, ("has 'jumprelu'", batchtopk)]:
        with pytest.raises(lch.InputError, match=match):
            lch.saes.train(None, None, config(**{**kw, **changes}))


def watch_text(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The batches of tokens that SAELens reads from now on."""
    read: list[torch.Tensor] = []
    get_batch_tokens = ActivationsStore.get_batch_tokens

    def watched(self: Any, *args: Any, **kw: Any) -> torch.Tensor:
        read.append(get_batch_tokens(self, *args, **kw))
        return read[-1]

    monkeypatch.setattr(ActivationsStore, "get_batch_tokens", watched)
    return read


def following(checkpoint: Path) -> torch.Tensor:
    """The batch of tokens after the last that a checkpoint's run has read."""
    state = load_file(checkpoint / "activations_store_state.safetensors")
    # SAELens counts a row when it asks for the next.
    row = int(state["n_dataset_processed"]) + 1
    assert 0 < row < len(DATA) - 8
    return torch.tensor(DATA["tokens"][row : row + 8])


def test_what_is_no_checkpoint_on_the_way_is_refused(cached: Cache, tmp_path: Path) -> None:
    model = models.bridge("gpt2")
    kw: dict[str, Any] = {"n_checkpoints": 1, "checkpoint_path": str(tmp_path)}
    lch.saes.train(model, DATA, config(**kw, save_final_checkpoint=True))
    lch.saes.train(
        None,
        None,
        config(**settings(cached, n_checkpoints=1), checkpoint_path=str(tmp_path / "cached")),
    )
    (final,) = tmp_path.glob("*/final_*")
    (of_cache,) = tmp_path.glob("cached/*/*")
    on_the_way = next(p for p in final.parent.iterdir() if p != final)
    cases: list[tuple[str, Path, dict[str, Any]]] = [
        ("folded", final, {}),
        ("trainer_state.pt", final.parent, {}),
        ("activations_store_state", of_cache, {}),
        ("architecture='standard', but .* has 'topk'", on_the_way, {"architecture": "standard"}),
    ]
    for match, path, changes in cases:
        with pytest.raises(lch.InputError, match=match):
            lch.saes.train(
                model,
                DATA,
                config(resume_from_checkpoint=str(path), training_tokens=4096, **changes),
            )
    for changes in ({"train_batch_size_tokens": 128}, {"seed": 7}, {"n_batches_in_buffer": 20}):
        kw_there = settings(cached, resume_from_checkpoint=str(of_cache), **changes)
        with pytest.raises(lch.InputError, match=next(iter(changes))):
            lch.saes.train(None, None, config(**kw_there))
    # Nothing is folded in where nothing is scaled.
    lch.saes.train(model, DATA, config(**kw, normalize="none", save_final_checkpoint=True))
    (plain,) = set(tmp_path.glob("*/final_*")) - {final}
    lch.saes.train(
        model,
        DATA,
        config(normalize="none", resume_from_checkpoint=str(plain), training_tokens=4096),
    )

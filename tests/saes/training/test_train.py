"""`lch.saes.train`: SAELens' runner on a centroid hook, end to end."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    AbsTopKTrainingSAEConfig,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LoggingConfig,
    MatchingPursuitTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.prefetch import PrefetchingIterator

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens import attached_readers
from lch_plugin.cotangents import Logit, logit_difference
from tests import models
from tests.slow import all_but

HOOK = "blocks.1.mlp.hook_centroid"
DATA = Dataset.from_dict({"tokens": models.tokens(256, 16).tolist()})
ARCHITECTURES = {
    "topk": lambda **kw: TopKTrainingSAEConfig(k=4, **kw),
    "batchtopk": lambda **kw: BatchTopKTrainingSAEConfig(k=4, **kw),
    "standard": lambda **kw: StandardTrainingSAEConfig(l1_coefficient=1.0, **kw),
    "gated": lambda **kw: GatedTrainingSAEConfig(l1_coefficient=1.0, **kw),
    "jumprelu": lambda **kw: JumpReLUTrainingSAEConfig(l0_coefficient=0.1, **kw),
    "abstopk": lambda **kw: AbsTopKTrainingSAEConfig(k=4, **kw),
    "matryoshka_batchtopk": lambda **kw: MatryoshkaBatchTopKTrainingSAEConfig(
        k=4, matryoshka_widths=[16, 64], **kw
    ),
    "matching_pursuit": lambda **kw: MatchingPursuitTrainingSAEConfig(max_iterations=4, **kw),
}
# Whose saved form has a threshold in the place of its batch's k.
BATCH_TOP_K = ("batchtopk", "matryoshka_batchtopk")


def test_every_architecture_that_saelens_trains_is_tested() -> None:
    assert set(ARCHITECTURES) == set(SAE_TRAINING_CLASS_REGISTRY)


def config(
    *,
    architecture: str = "topk",
    d_in: int = models.D_MODEL,
    normalize: str = "expected_average_only_in",
    wandb: bool = False,
    **kw: Any,
) -> LanguageModelSAERunnerConfig[Any]:
    logger = LoggingConfig(log_to_wandb=wandb, wandb_log_frequency=1, eval_every_n_wandb_logs=2)
    defaults = {
        "hook_name": HOOK,
        "dataset_path": "tiny",
        "model_name": "tiny",
        "streaming": False,
        "context_size": 16,
        "training_tokens": 2048,
        "train_batch_size_tokens": 128,
        "n_batches_in_buffer": 16,
        "store_batch_size_prompts": 8,
        "n_batches_for_norm_estimate": 4,
        "n_eval_batches": 1,
        "lr": 1e-2,
        "checkpoint_path": None,
        "output_path": None,
        "verbose": False,
        "logger": logger,
    }
    sae = ARCHITECTURES[architecture](d_in=d_in, d_sae=64, normalize_activations=normalize)
    return LanguageModelSAERunnerConfig(sae=sae, **{**defaults, **kw})


@pytest.mark.parametrize("architecture", all_but(["topk", "jumprelu"], ARCHITECTURES))
def test_a_trained_sae_saves_loads_and_reconstructs(architecture: str, tmp_path: Path) -> None:
    model, out = models.bridge("gpt2"), tmp_path / "sae"
    sae = lch.saes.train(
        model,
        DATA,
        config(architecture=architecture, output_path=str(out), training_tokens=40_000),
    )
    assert not attached_readers(model)
    loaded = SAE.load_from_disk(out)
    with lch.attach(model, layers=1):
        mu = model.run_with_cache(models.tokens(16, 16), names_filter=HOOK)[1][HOOK][:, 1:]
    mu = mu.flatten(0, 1)
    with torch.no_grad():
        decoded = loaded.decode(loaded.encode(mu))
        if architecture not in BATCH_TOP_K:
            torch.testing.assert_close(decoded, sae.decode(sae.encode(mu)))
    unexplained = (mu - decoded).square().sum() / (mu - mu.mean(0)).square().sum()
    assert unexplained < 0.6


def test_metadata_say_what_the_sae_was_trained_on(tmp_path: Path) -> None:
    model, out = models.bridge("gpt2"), tmp_path / "sae"
    v = torch.linspace(-1, 1, models.D_MODEL)
    with lch.attach(model, layers=1, cotangent=v):
        lch.saes.train(model, DATA, config(output_path=str(out)))
        assert attached_readers(model)  # The caller's own attachment stays.
    metadata = SAE.load_from_disk(out).cfg.metadata
    assert metadata.hook_name == HOOK
    record = metadata.lch_centroid
    assert record["site"] == "mlp"
    assert record["layer"] == 1
    assert record["cotangent"] == v.tolist()
    assert record["weight_processing"] == {
        "processed": False,
        "writing_weights_centered": False,
    }
    assert record["lch_plugin_version"] == lch.__version__
    # SAELens' scale makes the mean norm sqrt(d_in).
    with lch.attach(model, layers=1, cotangent=v):
        mu = model.run_with_cache(models.tokens(256, 16), names_filter=HOOK)[1][HOOK]
    norm = float(mu.norm(dim=-1).mean())
    assert record["scale"] == pytest.approx(models.D_MODEL**0.5 / norm, rel=0.1)
    lch.saes.train(model, DATA, config(output_path=str(tmp_path / "b"), normalize="none"))
    record = json.loads((tmp_path / "b" / "cfg.json").read_text())["metadata"]["lch_centroid"]
    assert record["scale"] is None
    assert record["cotangent"] == "ones"


def test_processed_weights_are_recorded() -> None:
    model = models.bridge("gpt2")
    model.enable_compatibility_mode(disable_warnings=True, center_writing_weights=False)
    sae = lch.saes.train(model, DATA, config())
    assert sae.cfg.metadata.lch_centroid["weight_processing"] == {
        "processed": True,
        "writing_weights_centered": False,
    }


def test_an_ordinary_hook_trains_by_the_same_call(tmp_path: Path) -> None:
    out = tmp_path / "sae"
    lch.saes.train(
        models.bridge("gpt2"), DATA, config(hook_name="blocks.1.mlp.hook_in", output_path=str(out))
    )
    assert "lch_centroid" not in SAE.load_from_disk(out).cfg.metadata


def test_the_seed_decides_and_the_global_random_state_is_left_alone() -> None:
    model, weights = models.bridge("gpt2"), []
    for n, seed in enumerate((0, 0, 1)):
        torch.manual_seed(10 + n)
        before = torch.get_rng_state()
        weights.append(lch.saes.train(model, DATA, config(seed=seed)).W_dec)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_model_is_in_evaluation_mode_and_left_as_it_was() -> None:
    model, modes = models.bridge("gpt2").train(), set()
    point = model.hook_dict["hook_embed"]
    with point.register_forward_hook(lambda *_: modes.add(model.training)):
        lch.saes.train(model, DATA, config())
    assert modes == {False}
    assert model.training


def test_a_compiled_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def compile_(f: Any, **_: Any) -> Any:  # As torch.compile, which takes a while.
        return lambda *args, **kw: compiled.append(f.__name__) or f(*args, **kw)

    monkeypatch.setattr("torch.compile", compile_)
    model = models.bridge("gpt2")
    lch.saes.train(model, DATA, config(compile_llm=True))
    assert set(compiled) == {"run_with_cache"}
    assert "run_with_cache" not in vars(model)


def test_training_in_another_thread_is_the_same() -> None:
    found: list[Any] = []

    def train() -> None:
        found.append(lch.saes.train(models.bridge("gpt2"), DATA, config()).W_dec)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    train()
    assert torch.equal(*found)


def test_a_signal_that_is_ignored_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = TrainingSAE.training_forward_pass

    def signalled(self: Any, step_input: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return forward(self, step_input)

    monkeypatch.setattr(TrainingSAE, "training_forward_pass", signalled)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        lch.saes.train(models.bridge("gpt2"), DATA, config())
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)


def test_rows_of_a_fixed_number_of_tokens_are_read() -> None:
    fixed = DATA.cast_column("tokens", datasets.Sequence(datasets.Value("int32"), length=16))
    sae = lch.saes.train(models.bridge("gpt2"), fixed, config())
    assert torch.equal(sae.W_dec, lch.saes.train(models.bridge("gpt2"), DATA, config()).W_dec)


@pytest.mark.parametrize("prefetch", [False, True])
def test_logging_evaluates_the_reconstruction_and_not_the_loss(
    prefetch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With SAELens' own evaluator this dies: an ablation loss of zero is divided by."""
    logged: dict[str, Any] = {}
    monkeypatch.setattr("wandb.init", lambda **kw: None)
    monkeypatch.setattr("wandb.finish", lambda: None)
    monkeypatch.setattr("wandb.log", lambda data, **kw: logged.update(data))
    monkeypatch.setattr("wandb.log_artifact", lambda *args, **kw: None)
    pauses: list[int] = []
    pause = PrefetchingIterator.paused
    monkeypatch.setattr(PrefetchingIterator, "paused", lambda self: pauses.append(1) or pause(self))
    lch.saes.train(models.bridge("gpt2"), DATA, config(wandb=True, prefetch_llm_batches=prefetch))
    assert bool(pauses) == prefetch  # Evaluation and prefetching share one store.
    names = " ".join(logged)
    assert "explained_variance" in names
    assert "ce_loss" not in names
    assert "kl_div" not in names


def test_the_dataset_and_the_signal_handlers_are_left_as_they_were() -> None:
    data = Dataset.from_dict({"tokens": models.tokens(256, 16).tolist()})
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    lch.saes.train(models.bridge("gpt2"), data, config())
    assert data.format["type"] is None
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_an_interrupted_run_leaves_finished_files_valid_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.bridge("gpt2")
    lch.saes.train(model, DATA, config(output_path=str(tmp_path / "first")))
    settings = {
        "output_path": str(tmp_path / "second"),
        "checkpoint_path": str(tmp_path / "checkpoints"),
        "training_tokens": 20_000,
    }
    forward, calls = model.forward, []

    def interrupted(*args: Any, **kw: Any) -> Any:
        calls.append(1)
        if len(calls) == 60:
            signal.raise_signal(signal.SIGINT)
        return forward(*args, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lch.saes.train(model, DATA, config(**settings))
    assert {p.name for p in tmp_path.iterdir()} == {"first", "checkpoints"}
    assert not attached_readers(model)
    SAE.load_from_disk(tmp_path / "first")
    (checkpoint,) = tmp_path.glob("checkpoints/*/*")
    done = int(checkpoint.name)
    assert 0 < done < 20_000
    lch.saes.train(model, DATA, config(**settings, resume_from_checkpoint=str(checkpoint)))
    assert SAE.load_from_disk(tmp_path / "second").cfg.metadata.lch_centroid["layer"] == 1


@pytest.mark.usefixtures("as_users_run")
def test_bad_configurations_are_refused_before_work_starts(tmp_path: Path) -> None:
    model = models.bridge("gpt2")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("keep me")
    (tmp_path / "file").write_text("keep me")
    outside = Dataset.from_dict({"tokens": [[0] * 15 + [models.D_VOCAB]]})
    short = Dataset.from_dict({"input_ids": [[0] * 16, [0] * 9]})
    cases: list[tuple[type[lch.LCHError], str, Any, dict[str, Any]]] = [
        (lch.InputError, "d_in=33.*Set d_in=32", DATA, {"d_in": 33}),
        (lch.InputError, "Set d_in=48", DATA, {"hook_name": "blocks.1.mlp.hook_post"}),
        (lch.InputError, "no heads", DATA, {"hook_head_index": 0}),
        (lch.InputError, "no directory", DATA, {"resume_from_checkpoint": "nowhere"}),
        (lch.InputError, "list of integers", Dataset.from_dict({"tokens": [["a"] * 16]}), {}),
        (lch.InputError, "list of integers", Dataset.from_dict({"tokens": [[0.5] * 16]}), {}),
        (lch.InputError, "list of integers", Dataset.from_dict({"tokens": [1, 2]}), {}),
        (lch.InputError, "1 missing", Dataset.from_dict({"tokens": [[1] * 16, None]}), {}),
        (lch.InputError, "is a list", [{"text": "a"}], {}),
        (lch.SiteError, r"layers \[7\]", DATA, {"hook_name": "blocks.7.mlp.hook_centroid"}),
        (lch.SiteError, "no hook point", DATA, {"hook_name": "blocks.1.mlp.hook_centriod"}),
        (lch.InputError, "context of 16", DATA, {"context_size": 17}),
        (lch.InputError, "n_batches_in_buffer to 8", DATA, {"n_batches_in_buffer": 7}),
        (
            lch.InputError,
            "n_batches_in_buffer to 16",
            DATA,
            {"seqpos_slice": (8, None), "n_batches_in_buffer": 15},
        ),
        (lch.InputError, "vocabulary", outside, {}),
        (lch.InputError, "9 tokens", short, {}),
        (lch.InputError, "0 rows", Dataset.from_dict({"tokens": []}), {}),
        (lch.InputError, "columns", Dataset.from_dict({"words": ["a"]}), {}),
        (lch.InputError, "columns", Dataset.from_dict({"words": ["a"]}).to_iterable_dataset(), {}),
        (lch.InputError, "0 rows", DATA.to_iterable_dataset().take(0), {}),
        (lch.InputError, "9 tokens", short.select([1]).to_iterable_dataset(), {}),
        (lch.InputError, "vocabulary", outside.to_iterable_dataset(), {}),
        (lch.InputError, "need use_chat_formatting", Dataset.from_dict({"messages": [[]]}), {}),
        (lch.OutputError, "other content", DATA, {"output_path": str(tmp_path / "taken")}),
        (lch.OutputError, "written", DATA, {"output_path": str(tmp_path / "file" / "out")}),
    ]
    for error, match, data, kw in cases:
        with pytest.raises(error, match=match):
            lch.saes.train(model, data, config(**kw))
        assert not attached_readers(model)
    assert (tmp_path / "taken" / "file").read_text() == "keep me"


@pytest.mark.parametrize("hook", ["blocks.1.attn.hook_centroid", "blocks.2.hook_centroid"])
def test_attention_and_blocks_are_attached_for_as_long_as_training_takes(hook: str) -> None:
    model = models.bridge("gpt2")
    sae = lch.saes.train(model, DATA, config(hook_name=hook))
    assert sae.cfg.metadata.lch_centroid["site"] == ("attn" if "attn" in hook else "block")
    assert not attached_readers(model)


@pytest.mark.parametrize(
    ("hook", "site", "record"),
    [
        ("blocks.2.hook_centroid_from_1", lch.Site("span", (1, 2)), {"first_layer": 1, "layer": 2}),
        (
            "hook_centroid_mlp_1",
            lch.Site("mlp", 1, cotangent=logit_difference(3, 4, position=9)),
            {"cotangent": "3_minus_4"},
        ),
        (
            "hook_centroid_block_1_at",
            lch.Site("block", 1, cotangent=Logit(3, position=9), output_positions=9, label="at"),
            {"cotangent_position": 9, "output_positions": [9], "label": "at"},
        ),
        (
            "blocks.1.hook_centroid",
            lch.Site("block", 1, linearization="detached"),
            {"linearization": "detached"},
        ),
        (
            "blocks.1.attn.hook_centroid_head_2",
            lch.Site("head", 1, 2),
            {"index": [2], "site": "head"},
        ),
    ],
)
def test_saes_train_on_every_kind_of_site(
    hook: str, site: lch.Site, record: dict[str, Any]
) -> None:
    model = models.bridge("gpt2")
    with lch.attach(model, site=site) as handle:
        assert handle.hook_names == [hook]
        sae = lch.saes.train(model, DATA, config(hook_name=hook))
    assert record.items() <= sae.cfg.metadata.lch_centroid.items()


def test_hooks_without_positions_or_not_there_are_refused_with_the_cure() -> None:
    model = models.bridge("gpt2")
    with lch.attach(model, site=lch.Site("block", 1, expert=True)):
        with pytest.raises(lch.InputError, match="not \\(batch, pos, d_in\\)"):
            lch.saes.train(model, DATA, config(hook_name="blocks.1.hook_centroid_offset"))
    with pytest.raises(lch.SiteError, match=r"lch\.attach first"):
        lch.saes.train(model, DATA, config(hook_name="blocks.2.hook_centroid_from_1"))


def test_the_configuration_for_a_model_that_is_passed_in_writes_and_logs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sae = ARCHITECTURES["topk"](d_in=models.D_MODEL, d_sae=64)
    short = lch.saes.runner_config(sae, HOOK, training_tokens=8192, context_size=16)
    assert not short.logger.log_to_wandb
    trained = lch.saes.train(models.bridge("gpt2"), DATA, short)
    assert trained.cfg.metadata.hook_name == HOOK
    assert not list(tmp_path.iterdir())
    own = lch.saes.runner_config(
        sae, HOOK, training_tokens=8192, n_batches_in_buffer=7, lr=1.0, output_path="here"
    )
    assert (own.n_batches_in_buffer, own.lr, own.output_path) == (7, 1.0, "here")
    sliced = lch.saes.runner_config(
        sae, HOOK, training_tokens=8192, context_size=16, seqpos_slice=(8, None)
    )
    assert sliced.n_batches_in_buffer == 4 * 4096 // 8


def test_training_under_autocast_learns_as_well() -> None:
    """bfloat16 has three digits, and a centroid is computed in float32 all the same."""
    model = models.bridge("gpt2")
    found = {}
    for autocast in (False, True):
        torch.manual_seed(0)
        kw = {"autocast": autocast, "autocast_lm": autocast, "training_tokens": 8192}
        sae = lch.saes.train(model, DATA, config(**kw))
        with lch.attach(model, layers=1):
            mu = model.run_with_cache(models.tokens(16, 16), names_filter=HOOK)[1][HOOK]
        found[autocast] = lch.saes.evaluate(sae, [mu.flatten(0, 1)]).explained_variance
    assert found[True] > 0.5
    assert abs(found[True] - found[False]) < 0.05

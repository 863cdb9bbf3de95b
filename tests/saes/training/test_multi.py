"""Several SAEs from one forward pass, by SAELens' multi-SAE runner."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    JumpReLUTrainingSAEConfig,
    LoggingConfig,
    MultiSAETrainingRunnerConfig,
    TopKTrainingSAEConfig,
)

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens import attached_readers
from tests import models
from tests.saes.training.test_resuming import following, watch_text
from tests.saes.training.test_train import DATA

HOOKS = {
    "first": "blocks.0.mlp.hook_centroid",
    "attention": "blocks.1.attn.hook_centroid",
    "block": "blocks.1.hook_centroid",
    "input": "blocks.1.mlp.hook_in",
    "jump": "blocks.0.mlp.hook_centroid",
}


def config(*, wandb: bool = False, normalize: str = "expected_average_only_in", **kw: Any) -> Any:
    settings: dict[str, Any] = {
        "d_in": models.D_MODEL,
        "d_sae": 64,
        "normalize_activations": normalize,
    }
    saes: dict[str, Any] = {name: TopKTrainingSAEConfig(k=4, **settings) for name in HOOKS}
    saes["jump"] = JumpReLUTrainingSAEConfig(l0_coefficient=0.1, **settings)
    defaults: dict[str, Any] = {
        "saes": saes,
        "hook_names": HOOKS,
        "dataset_path": "tiny",
        "streaming": False,
        "context_size": 16,
        "training_tokens": 4096,
        "train_batch_size_tokens": 128,
        "n_batches_in_buffer": 16,
        "store_batch_size_prompts": 8,
        "n_batches_for_norm_estimate": 4,
        "n_eval_batches": 1,
        "lr": 1e-2,
        "checkpoint_path": None,
        "output_path": None,
        "logger": LoggingConfig(
            log_to_wandb=wandb, wandb_log_frequency=1, eval_every_n_wandb_logs=8
        ),
    }
    return MultiSAETrainingRunnerConfig(**{**defaults, **kw})


def test_layers_and_sites_train_from_one_forward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = models.bridge("gpt2"), tmp_path / "saes"
    passes: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **kw: passes.append(1) or forward(*a, **kw))
    saes = lch.saes.train(model, DATA, config(output_path=str(out)))
    assert not attached_readers(model)
    # Batches of 8 x 16 tokens, a buffer of 2 of them, estimates and checks among them.
    assert len(passes) < 4096 / 128 + 4 + 2 + 2 * len(HOOKS) + 4
    for name, hook in HOOKS.items():
        loaded = SAE.load_from_disk(out / name)
        x = torch.randn(8, models.D_MODEL, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(loaded(x), saes[name](x))
        assert loaded.cfg.metadata.hook_name == hook
        record = loaded.cfg.metadata.lch_centroid
        if name == "input":
            assert record is None
        else:
            assert (record["site"], record["layer"]) == {
                "first": ("mlp", 0),
                "jump": ("mlp", 0),
                "attention": ("attn", 1),
                "block": ("block", 1),
            }[name]
            assert record["scale"] > 0
    assert (out / "runner_cfg.json").exists()
    assert not [p for p in tmp_path.iterdir() if p != out]


def test_logging_splices_in_activations_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[str, Any] = {}
    monkeypatch.setattr("wandb.init", lambda **kw: None)
    monkeypatch.setattr("wandb.finish", lambda: None)
    monkeypatch.setattr("wandb.log", lambda data, **kw: logged.update(data))
    seen: list[tuple[int, ...]] = []

    def evaluator(sae: Any, batches: Any, scaler: Any) -> dict[str, float]:
        seen.append(tuple(next(batches).shape))
        return {"own": 1.0}

    lch.saes.train(
        models.bridge("gpt2"),
        DATA,
        config(wandb=True, training_tokens=1024, evaluator=evaluator, prefetch_llm_batches=True),
    )
    assert [key for key in logged if "ce_loss_score" in key] == [
        "input/model_performance_preservation/ce_loss_score"
    ]
    for name in HOOKS:
        assert logged[f"{name}/own"] == 1
        assert f"{name}/reconstruction_quality/explained_variance" in logged
    assert seen == [(128, models.D_MODEL)] * len(HOOKS)


@pytest.mark.parametrize("prefetch", [False, True])
def test_an_interrupted_run_goes_on(
    prefetch: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.bridge("gpt2")
    forward, calls = model.forward, []

    def interrupted(*args: Any, **kw: Any) -> Any:
        calls.append(1)
        if len(calls) == 30:
            signal.raise_signal(signal.SIGINT)
        return forward(*args, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lch.saes.train(model, DATA, config(checkpoint_path=str(tmp_path)))
    (checkpoint,) = tmp_path.glob("*/*")
    done = int(checkpoint.name)
    assert 0 < done < 4096
    read = watch_text(monkeypatch)
    resumed = config(
        resume_from_checkpoint=str(checkpoint),
        training_tokens=done + 128,
        prefetch_llm_batches=prefetch,
    )
    saes = lch.saes.train(model, DATA, resumed)
    assert torch.equal(read[0], following(checkpoint))
    before = SAE.load_from_disk(checkpoint / "first")
    scale = saes["first"].cfg.metadata.lch_centroid["scale"]
    # One step further, with the scale folded in.
    moved = (saes["first"].W_dec * scale - before.W_dec).norm() / before.W_dec.norm()
    assert 0 < moved < 0.2


@pytest.mark.slow
def test_one_learning_rate_serves_layers_whose_centroids_differ_by_orders_of_magnitude() -> None:
    """Scaled, SAEs learn equally well everywhere; unscaled, only where the scale happens to fit."""
    explained: dict[str, list[float]] = {}
    for normalize in ("expected_average_only_in", "none"):
        model = models.bridge("gpt2")
        with torch.no_grad():
            for layer, factor in enumerate((1e-3, 1.0, 1e3)):
                model.original_model.transformer.h[layer].mlp.c_proj.weight *= factor
        names = [f"blocks.{layer}.mlp.hook_centroid" for layer in range(3)]
        one = TopKTrainingSAEConfig(
            d_in=models.D_MODEL, d_sae=64, k=8, normalize_activations=normalize
        )
        saes = lch.saes.train(
            model,
            DATA,
            config(
                saes=dict.fromkeys(names, one),
                hook_names={name: name for name in names},
                training_tokens=10_000,
            ),
        )
        with lch.attach(model, layers=[0, 1, 2]):
            cache = model.run_with_cache(models.tokens(64, 16), names_filter=names)[1]
        norms = [float(cache[name].norm(dim=-1).mean()) for name in names]
        assert max(norms) > 1e4 * min(norms)
        explained[normalize] = [
            lch.saes.evaluate(saes[name], [cache[name].flatten(0, 1)]).explained_variance
            for name in names
        ]
    assert min(explained["expected_average_only_in"]) > 0.8
    assert min(explained["none"]) < 0.5


@pytest.mark.usefixtures("as_users_run")
def test_what_does_not_fit_is_refused_before_work_starts(tmp_path: Path) -> None:
    model = models.bridge("gpt2")
    wide = TopKTrainingSAEConfig(d_in=33, d_sae=64, k=4)
    (tmp_path / "taken").write_text("keep me")
    cases: list[tuple[type[lch.LCHError], str, dict[str, Any]]] = [
        (lch.InputError, "Set d_in=32", {"saes": {"a": wide}, "hook_names": HOOKS["first"]}),
        (lch.InputError, "leaves no position", {"seqpos_slice": (16, None)}),
        (lch.InputError, "first/trainer_state.pt", {"resume_from_checkpoint": str(tmp_path)}),
        (lch.InputError, "context of 16", {"context_size": 17}),
        (lch.InputError, "n_batches_in_buffer to 8", {"n_batches_in_buffer": 7}),
        (lch.InputError, "no heads", {"hook_head_indices": {"first": 0, "jump": 0}}),
        (lch.InputError, "plain name", {"saes": {"../a": wide}, "hook_names": HOOKS["first"]}),
        (lch.OutputError, "other content", {"output_path": str(tmp_path / "taken")}),
        (
            lch.SiteError,
            "no hook point",
            {"hook_names": dict.fromkeys(HOOKS, "blocks.1.mlp.hook_centriod")},
        ),
    ]
    for error, match, kw in cases:
        with pytest.raises(error, match=match):
            lch.saes.train(model, DATA, config(**kw))
        assert not attached_readers(model)

"""SAELens' runner on HuggingFace models that TransformerLens need not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKTrainingSAEConfig,
)

import lch_plugin as lch
from lch_plugin.saes import HookedModel
from tests import models

LAYER = "model.layers.{}.mlp"
HOOK = "model.layers.1.mlp.hook_centroid"


def hooked(**kwargs: Any) -> HookedModel:
    return HookedModel(models.huggingface("llama"), models.tokenizer(), **kwargs)


def dataset(n_tokens: int = 16) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, models.D_VOCAB, (200, n_tokens), generator=generator)
    return Dataset.from_dict({"tokens": ids.tolist()})


def config(**changes: Any) -> LanguageModelSAERunnerConfig[Any]:
    settings: dict[str, Any] = {
        "sae": TopKTrainingSAEConfig(
            d_in=models.D_MODEL, d_sae=64, k=4, normalize_activations="expected_average_only_in"
        ),
        "hook_name": HOOK,
        "dataset_path": "made here",
        "is_dataset_tokenized": True,
        "streaming": False,
        "context_size": 16,
        "training_tokens": 1024,
        "train_batch_size_tokens": 64,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 8,
        "n_batches_for_norm_estimate": 2,
        "checkpoint_path": None,
        "output_path": None,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    return LanguageModelSAERunnerConfig(**(settings | changes))


def test_hook_points_give_the_adapters_centroids() -> None:
    hf = models.huggingface("llama")
    with torch.no_grad(), lch.huggingface.attach(hf) as handle:
        logits = hf(models.tokens()).logits
    model = HookedModel(hf, models.tokenizer(), activations=["model.layers.0"])
    with torch.no_grad():
        out, cache = model.run_with_cache(models.tokens())
    assert torch.equal(out, logits)
    assert cache["model.layers.0"].shape == cache[HOOK].shape
    for i in range(models.N_LAYERS):
        name = LAYER.format(i)
        assert torch.equal(cache[f"{name}.hook_centroid"], handle.cache[name])


def test_a_centroid_is_computed_only_if_something_listens() -> None:
    model = hooked()
    seen: list[str] = []
    for name, reader in model.readers.items():
        publish = reader.publish
        reader.publish = lambda mu, name=name, publish=publish: (seen.append(name), publish(mu))
    with torch.no_grad():
        model(models.tokens())
        assert seen == []
        model.run_with_hooks(models.tokens(), fwd_hooks=[(HOOK, lambda value, hook: value)])
    assert seen == [HOOK]


def test_detaching_leaves_the_model_as_it_was() -> None:
    span = "model.layers.0:model.layers.2"
    with hooked(modules=["model.layers.*.mlp", span], activations=["model.layers.*"]) as model:
        assert f"{span}.hook_centroid" in model.hook_dict
        assert "model.layers.2" in model.hook_dict
    left = [m for m in model.model.modules() if "forward" in vars(m) or m._forward_hooks]
    assert not left
    assert not model.hook_dict
    with pytest.raises(lch.SiteError, match="no hook point"):
        lch.saes.train(model, dataset(), config())


def test_a_misspelt_activation_is_refused_and_nothing_is_left() -> None:
    hf = models.huggingface("llama")
    with pytest.raises(lch.SiteError, match="fits no module"):
        HookedModel(hf, models.tokenizer(), activations=["model.layers.0", "model.layer.1"])
    assert not [m for m in hf.modules() if "forward" in vars(m) or m._forward_hooks]


def test_the_sae_says_what_it_was_trained_on(tmp_path: Path) -> None:
    model = hooked(modules=LAYER.format("*"), cotangent=lch.cotangents.Random(3))
    later_layers: list[int] = []
    model.model.model.layers[2].register_forward_hook(lambda *_: later_layers.append(1))
    lch.saes.train(model, dataset(), config(output_path=str(tmp_path / "sae")))
    assert len(later_layers) <= 1  # The check's; training stops after the hook.
    record = SAE.load_from_disk(str(tmp_path / "sae")).cfg.metadata.lch_centroid
    assert record["site"] == LAYER.format(1)
    assert record["cotangent"] == "random3"
    assert record["scale"] > 0


def test_saelens_own_runner_takes_it() -> None:
    runner: Any = LanguageModelSAETrainingRunner(
        config(), override_dataset=dataset(), override_model=hooked()
    )
    sae = runner.run()
    assert sae.cfg.d_in == models.D_MODEL


def test_an_activation_hook_trains_too() -> None:
    model = hooked(activations=["model.layers.1.mlp"])
    sae = lch.saes.train(model, dataset(), config(hook_name="model.layers.1.mlp"))
    assert sae.cfg.metadata.lch_centroid is None


@pytest.mark.parametrize(
    ("changes", "tokens", "message"),
    [
        ({"hook_name": "model.layers.9.mlp.hook_centroid"}, 16, "no hook point"),
        ({"context_size": 17, "training_tokens": 1088}, 17, "longer than the model's context"),
        ({"context_size": 16}, 9, "has 9 tokens"),
    ],
)
def test_bad_configurations_are_refused(
    changes: dict[str, Any], tokens: int, message: str, as_users_run: None
) -> None:
    with pytest.raises(lch.LCHError, match=message):
        lch.saes.train(hooked(), dataset(tokens), config(**changes))


def test_token_ids_out_of_vocabulary_are_refused() -> None:
    ids = Dataset.from_dict({"tokens": [[0] * 15 + [models.D_VOCAB]] * 10})
    with pytest.raises(lch.InputError, match="leave the model's vocabulary"):
        lch.saes.train(hooked(), ids, config())


def test_a_plain_model_is_refused_with_the_cure(as_users_run: None) -> None:
    with pytest.raises(lch.InputError, match=r"lch\.saes\.HookedModel\(model, tokenizer\)"):
        lch.saes.train(models.huggingface("llama"), dataset(), config())


def test_a_tokenizer_is_needed(as_users_run: None) -> None:
    with pytest.raises(lch.InputError, match=r"lch\.saes\.Rows"):
        HookedModel(models.huggingface("llama"), None)  # type: ignore[arg-type]

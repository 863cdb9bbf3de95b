"""Transcoders between centroids and activations, trained by SAELens' trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    JumpReLUTrainingSAEConfig,
    JumpReLUTranscoder,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    Transcoder,
)
from sae_lens.config import LoggingConfig, SAETrainerConfig
from torch import Tensor

import lch_plugin as lch
from tests import models

CENTROID, OUTPUT = "blocks.1.mlp.hook_centroid", "blocks.1.mlp.hook_post"


def trainer(**kw: Any) -> SAETrainerConfig:
    defaults = {
        "total_training_samples": 60_000,
        "train_batch_size_samples": 256,
        "lr": 3e-3,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    return SAETrainerConfig(**{**defaults, **kw})


@pytest.fixture(scope="module")
def pairs() -> list[tuple[Tensor, Tensor]]:
    model = models.bridge("gpt2")
    with lch.attach(model, layers=1):
        cache = model.run_with_cache(models.tokens(400, 16), names_filter=[CENTROID, OUTPUT])[1]
    x, y = (cache[name][:, 1:].flatten(0, 1) for name in (CENTROID, OUTPUT))
    # Scales as different as those of layers.
    return list(zip((1000 * x).split(512), (y / 50).split(512), strict=True))


@pytest.mark.parametrize(
    ("sae", "kind"),
    [
        (StandardTrainingSAEConfig(d_in=32, d_sae=128, l1_coefficient=0.02), Transcoder),
        (JumpReLUTrainingSAEConfig(d_in=32, d_sae=128, l0_coefficient=0.02), JumpReLUTranscoder),
    ],
)
def test_centroids_tell_what_the_mlp_computes(
    sae: Any, kind: type[Transcoder], pairs: list[tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    transcoder = lch.saes.train_transcoder(pairs, sae, trainer())
    assert type(transcoder) is kind
    x, y = (torch.cat(side) for side in zip(*pairs, strict=True))
    with torch.no_grad():
        unexplained = (y - transcoder(x)).square().sum() / (y - y.mean(0)).square().sum()
        l0 = (transcoder.encode(x) != 0).sum(-1).float().mean()
    assert unexplained < 0.3
    assert 0 < l0 < 128
    transcoder.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is kind
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), transcoder(x), rtol=0, atol=0)


def test_scales_are_folded_in_and_the_seed_decides(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Scaling either side by a power of two, which floats do exactly, scales the weights."""
    sae = StandardTrainingSAEConfig(d_in=32, d_sae=64, l1_coefficient=0.1)
    settings = trainer(total_training_samples=2048)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    plain = lch.saes.train_transcoder(pairs, sae, settings)
    assert torch.equal(before, torch.get_rng_state())
    scaled = lch.saes.train_transcoder([(8 * x, y / 4) for x, y in pairs], sae, settings)
    assert torch.equal(plain.W_enc / 8, scaled.W_enc)
    assert torch.equal(plain.W_dec / 4, scaled.W_dec)
    assert torch.equal(plain.b_dec / 4, scaled.b_dec)
    other = lch.saes.train_transcoder(pairs, sae, settings, seed=1)
    assert not torch.equal(plain.W_enc, other.W_enc)


@pytest.mark.usefixtures("as_users_run")
def test_what_makes_no_transcoder_is_refused(pairs: list[tuple[Tensor, Tensor]]) -> None:
    sae = StandardTrainingSAEConfig(d_in=32, d_sae=64)
    x, y = pairs[0]
    cases: list[tuple[str, Any, Any]] = [
        ("no transcoder of that kind", pairs, TopKTrainingSAEConfig(d_in=32, d_sae=64, k=4)),
        ("Set d_in=32", pairs, StandardTrainingSAEConfig(d_in=33, d_sae=64)),
        ("do not make pairs", [(x, y[1:])], sae),
        (
            "Leave it at 'none'",
            pairs,
            StandardTrainingSAEConfig(d_in=32, d_sae=64, normalize_activations="layer_norm"),
        ),
        ("there were none", [], sae),
    ]
    for match, given, config in cases:
        with pytest.raises(lch.InputError, match=match):
            lch.saes.train_transcoder(given, config, trainer())
    with pytest.raises(lch.InputError, match="holds no training batch"):
        lch.saes.train_transcoder(pairs, sae, trainer(), buffer_size=255)

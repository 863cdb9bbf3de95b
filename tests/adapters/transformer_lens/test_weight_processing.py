"""Weights that were folded or centered."""

from __future__ import annotations

import pytest
import torch

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens import weight_processing
from tests import models
from tests.adapters.transformer_lens.common import NAMES, cached, snapshot


def test_centered_weights_are_refused_with_the_cure() -> None:
    bridge = models.bridge("gpt2")
    bridge.enable_compatibility_mode(disable_warnings=True)
    hooked = models.hooked()
    hooked.process_weights_(fold_ln=False, center_unembed=False)
    for model in (bridge, hooked):
        before = snapshot(model)
        with pytest.raises(lch.VanishingCentroidError, match="from_pretrained_no_processing"):
            lch.attach(model)
        assert snapshot(model) == before
        v = torch.arange(models.D_MODEL).float()
        with lch.attach(model, cotangent=v):
            cached(model)


def test_weights_centered_after_attaching_are_refused_too() -> None:
    model = models.bridge("gpt2")
    with lch.attach(model):
        model.enable_compatibility_mode(disable_warnings=True)
        with pytest.raises(lch.VanishingCentroidError):
            cached(model)


def test_weights_centered_in_place_after_attaching_are_refused_too() -> None:
    model = models.hooked()
    with lch.attach(model):
        model.process_weights_(fold_ln=False, center_unembed=False)
        with pytest.raises(lch.VanishingCentroidError):
            cached(model)


def test_what_is_known_of_weight_processing_is_recorded() -> None:
    for build in (models.hooked, lambda: models.bridge("gpt2")):
        model = build()
        assert weight_processing(model, 1) == {
            "processed": False,
            "writing_weights_centered": False,
        }
    model = models.hooked()
    model.load_and_process_state_dict(model.state_dict(), fold_ln=True)
    assert weight_processing(model, 1) == {"processed": True, "writing_weights_centered": True}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_compatibility_mode_without_centering_keeps_working(family: str) -> None:
    before, after = models.bridge(family), models.bridge(family)
    options = {"disable_warnings": True, "center_writing_weights": False}
    before.enable_compatibility_mode(**options)
    with lch.attach(before), lch.attach(after):
        after.enable_compatibility_mode(**options)
        first, second = cached(before), cached(after)
        for name in NAMES:
            torch.testing.assert_close(first[name], second[name])
    assert not [n for n in after.hook_dict if "centroid" in n]

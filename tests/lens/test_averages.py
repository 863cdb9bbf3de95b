"""Averages are TransformerLens' own, and the frozen one is the mean of exact maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens.tools.analysis import JacobianLens

import lch_plugin as lch
from lch_plugin.lens.passes import ResidualPass
from tests import families, models

TEXTS = ["w3 w7 w1 w9 w4 w8", "w5 w6 w2 w2 w9 w11 w30", "w4"]
SETTINGS: dict[str, Any] = {"skip_first": 1, "batch_size": 5}


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return models.bridge("gpt2")


@pytest.fixture(scope="module")
def frozen(gpt2: Any) -> JacobianLens:
    return lch.lens.average(gpt2, TEXTS, **SETTINGS)


def test_with_the_jacobian_it_is_the_fit_of_transformerlens(gpt2: Any) -> None:
    ours = lch.lens.average(gpt2, TEXTS, "jacobian", corpus="words", **SETTINGS)
    theirs = JacobianLens.fit(
        *(gpt2, TEXTS[:2]),
        corpus="words",
        dim_batch=8,
        skip_first_positions=1,
        show_progress=False,
    )
    assert ours.source_layers == theirs.source_layers == [0, 1]
    assert ours.n_prompts == 2
    for layer in ours.source_layers:
        torch.testing.assert_close(
            ours.jacobians[layer], theirs.jacobians[layer], rtol=1e-5, atol=1e-6
        )
    assert "linearization" not in ours.metadata


def test_detached_it_is_the_mean_of_the_frozen_maps(gpt2: Any, frozen: JacobianLens) -> None:
    expected = torch.zeros(2, 32, 32)
    for text in TEXTS[:2]:
        ids = gpt2.to_tokens(text)
        run = ResidualPass(gpt2, ids, "detached")
        valid = range(1, ids.shape[1] - 1)
        last = run.streams[-1]
        for layer in (0, 1):
            for i in range(32):
                v = torch.zeros_like(last)
                v[0, list(valid), i] = 1
                (g,) = torch.autograd.grad(last, run.streams[layer + 1], v, retain_graph=True)
                expected[layer, i] += g[0, list(valid)].mean(0) / 2
    for layer in (0, 1):
        torch.testing.assert_close(frozen.jacobians[layer], expected[layer], rtol=1e-4, atol=1e-5)
    assert frozen.metadata["linearization"] == "detached"


def test_the_two_differ_and_are_not_merged(gpt2: Any, frozen: JacobianLens) -> None:
    other = lch.lens.average(gpt2, TEXTS, "jacobian", **SETTINGS)
    assert not torch.allclose(other.jacobians[0], frozen.jacobians[0], atol=1e-2)
    with pytest.raises(ValueError, match="provenance"):
        JacobianLens.merge([frozen, other])


def test_averaging_leaves_the_model_as_it_was(gpt2: Any) -> None:
    with models.no_hooks_added(gpt2):
        assert lch.lens.average(gpt2, TEXTS, **SETTINGS).n_prompts == 2
    assert all(p.requires_grad for p in gpt2.parameters())


def test_a_saved_average_loads_and_reads(gpt2: Any, frozen: JacobianLens, tmp_path: Path) -> None:
    path = tmp_path / "lens.pt"
    frozen.save(str(path), dtype=torch.float32)
    loaded = lch.lens.load(path, gpt2)
    assert torch.equal(loaded.jacobians[1], frozen.jacobians[1])
    assert loaded.readout(gpt2, TEXTS[0], top_k=3).lens_topk_indices[1].shape[-1] == 3


def test_a_lens_of_another_model_or_basis_is_refused(
    gpt2: Any, frozen: JacobianLens, tmp_path: Path
) -> None:
    path = tmp_path / "lens.pt"
    frozen.save(str(path))
    processed = models.bridge("gpt2")
    processed.enable_compatibility_mode()
    for model in (processed, families.bridge("gpt2", torch.float32)):
        with pytest.raises(lch.InputError, match="another model or basis"):
            lch.lens.load(path, model)
    with pytest.raises(lch.InputError, match="TransformerLens fits no lens here"):
        lch.lens.average(processed, TEXTS, "jacobian", **SETTINGS)
    path.write_text("no lens")
    with pytest.raises(lch.InputError, match="holds no lens"):
        lch.lens.load(path, gpt2)


def test_too_few_texts_are_refused(gpt2: Any) -> None:
    with pytest.raises(lch.InputError, match="1 of 2 texts have more than 2 tokens"):
        lch.lens.average(gpt2, TEXTS[1:], **SETTINGS)
    with pytest.raises(lch.InputError, match="list of strings"):
        lch.lens.average(gpt2, TEXTS[0], **SETTINGS)


@pytest.mark.filterwarnings("ignore")
def test_no_average_of_maps_that_are_not_exact() -> None:
    with pytest.raises(lch.SiteError, match="of their size"):
        lch.lens.average(families.bridge("bloom", torch.float32), TEXTS, **SETTINGS)

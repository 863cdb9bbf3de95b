"""Averages from after attention, and up to an earlier block: held to Jacobians written out."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.tools.analysis import JacobianLens

import lch_plugin as lch
from lch_plugin.linearization import DetachedMode
from tests import models

TEXTS = ["w3 w7 w1 w9 w4", "w5 w6 w2 w2 w9 w11"]
SETTINGS: dict[str, Any] = {"skip_first": 1}
# The other stands in the first test.
BOTH = [pytest.param("jacobian", marks=pytest.mark.slow), "detached"]


@pytest.fixture(scope="module")
def llama() -> Any:
    return models.bridge("llama", torch.float64)


@pytest.fixture(scope="module")
def gemma3() -> Any:
    return models.bridge("gemma3_text", torch.float64)


@pytest.fixture(scope="module")
def after_attention(llama: Any) -> JacobianLens:
    return lch.lens.average(llama, TEXTS, layers=[1, 2], site="resid_mid", **SETTINGS)


def written_out(model: Any, point: str, end: int, linearization: str) -> Tensor:
    """The mean of the Jacobian in something added at a hook point, all of it computed."""
    total = torch.zeros(())
    for text in TEXTS:
        ids = model.to_tokens(text)
        _, cache = model.run_with_cache(ids)

        def of_added(added: Tensor, ids: Tensor = ids) -> Tensor:
            seen = []
            hooks = [
                (point, lambda x, hook: x + added),
                (f"blocks.{end}.hook_out", lambda x, hook: seen.append(x)),
            ]
            mode = DetachedMode() if linearization == "detached" else nullcontext()
            if linearization == "detached":
                mode.follow(added)
            with mode:
                model.run_with_hooks(ids, fwd_hooks=hooks)
            return seen[0][0]

        zero = torch.zeros_like(cache[point])
        jacobian = torch.autograd.functional.jacobian(of_added, zero)  # (target, i, 1, source, j)
        counted = slice(1, ids.shape[1] - 1)
        total = total + jacobian[counted, :, 0, counted].sum(0).mean(1) / len(TEXTS)
    return total.float()


@pytest.mark.parametrize("linearization", ["jacobian", "detached"])
def test_after_attention_it_is_the_mean_jacobian_in_what_attention_writes(
    llama: Any, linearization: Any
) -> None:
    lens = lch.lens.average(llama, TEXTS, linearization, [0, 1], site="resid_mid", **SETTINGS)
    for layer in (0, 1):
        expected = written_out(llama, f"blocks.{layer}.attn.hook_out", 2, linearization)
        torch.testing.assert_close(lens.jacobians[layer], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("linearization", BOTH)
def test_with_a_norm_behind_attention_it_is_in_what_the_norm_writes(
    gemma3: Any, linearization: Any
) -> None:
    lens = lch.lens.average(gemma3, TEXTS, linearization, [1], site="resid_mid", **SETTINGS)
    expected = written_out(gemma3, "blocks.1.ln1_post.hook_out", 2, linearization)
    torch.testing.assert_close(lens.jacobians[1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("linearization", BOTH)
def test_it_ends_at_an_earlier_block(llama: Any, linearization: Any) -> None:
    lens = lch.lens.average(llama, TEXTS, linearization, [0], end=1, **SETTINGS)
    expected = written_out(llama, "blocks.0.hook_out", 1, linearization)
    torch.testing.assert_close(lens.jacobians[0], expected, rtol=1e-4, atol=1e-5)
    own = lch.lens.average(llama, TEXTS, linearization, site="resid_mid", end=0, **SETTINGS)
    expected = written_out(llama, "blocks.0.attn.hook_out", 0, linearization)
    torch.testing.assert_close(own.jacobians[0], expected, rtol=1e-4, atol=1e-5)


def test_what_a_head_or_an_mlp_writes_is_transported(llama: Any) -> None:
    mid = lch.lens.average(llama, TEXTS, "jacobian", [1], site="resid_mid", **SETTINGS)
    post = lch.lens.average(llama, TEXTS, "jacobian", [1], **SETTINGS)
    in_mlp = written_out(llama, "blocks.1.mlp.hook_out", 2, "jacobian")
    torch.testing.assert_close(post.jacobians[1], in_mlp, rtol=1e-4, atol=1e-5)
    in_z = written_out(llama, "blocks.1.attn.o.hook_in", 2, "jacobian")
    W_O = llama.blocks[1].attn.W_O.detach().float()  # (head, d_head, d_model)
    for head, of_head in enumerate(in_z.reshape(-1, *W_O.shape[:2]).unbind(1)):
        found = mid.transport(W_O[head], 1)  # Of what each of its dimensions writes.
        torch.testing.assert_close(found, of_head.T, rtol=1e-4, atol=1e-5)


def test_up_to_the_last_block_this_mean_is_that_of_the_fit(llama: Any) -> None:
    from lch_plugin.lens.spans import Span, mean_jacobians

    fitted = lch.lens.average(llama, TEXTS, "detached", [0, 1], **SETTINGS)
    ids = [llama.to_tokens(text) for text in TEXTS]
    span = Span((0, 1), "resid_post", 2, "detached")
    for layer, found in mean_jacobians(llama, ids, span, skip_first=1, batch_size=7).items():
        torch.testing.assert_close(fitted.jacobians[layer], found.float(), rtol=1e-4, atol=1e-5)


def test_it_is_saved_loaded_and_merged_with_its_own_kind_alone(
    llama: Any, after_attention: JacobianLens, tmp_path: Path
) -> None:
    path = tmp_path / "lens.pt"
    after_attention.save(str(path), dtype=torch.float32)
    loaded = lch.lens.load(path, llama)
    assert loaded.metadata == after_attention.metadata
    assert loaded.metadata["site"] == "resid_mid"
    merged = JacobianLens.merge([loaded, after_attention])
    assert merged.n_prompts == 4
    torch.testing.assert_close(merged.jacobians[2], after_attention.jacobians[2])
    others = [
        lch.lens.average(llama, TEXTS, layers=[1, 2], site="resid_mid", end=2, skip_first=2),
        lch.lens.average(llama, TEXTS, "jacobian", [1, 2], site="resid_mid", **SETTINGS),
    ]
    for other in others:
        with pytest.raises(ValueError, match="provenance"):
            JacobianLens.merge([after_attention, other])


def test_it_is_not_read_out_as_a_lens_of_block_outputs(
    llama: Any, after_attention: JacobianLens
) -> None:
    early = lch.lens.average(llama, TEXTS, layers=[0], end=1, **SETTINGS)
    for lens, layer in ((after_attention, 1), (early, 0)):
        for read in (
            lambda lens, layer: lens.readout(llama, TEXTS[0]),
            lambda lens, layer: lens.lens_vectors(llama, [3], layer),
            lambda lens, layer: lens.steering_hooks(llama, 3, [layer]),
            lambda lens, layer: lens.validate_model(llama),
        ):
            with pytest.raises(
                ValueError, match=r"targets layer 1|block 2, from|outside the model"
            ):
                read(lens, layer)


def test_a_lens_of_another_model_is_refused(after_attention: JacobianLens, tmp_path: Path) -> None:
    path = tmp_path / "lens.pt"
    after_attention.save(str(path))
    other = models.bridge("llama")
    other.cfg.model_name = "other"
    with pytest.raises(lch.InputError, match=r"another model or basis.*'other'"):
        lch.lens.load(path, other)


def test_sites_and_ends_that_are_not_there_are_refused(llama: Any) -> None:
    with pytest.raises(lch.InputError, match="not before the output of block 1"):
        lch.lens.average(llama, TEXTS, layers=[1], end=1, **SETTINGS)
    with pytest.raises(lch.SiteError, match="layers \\[7\\] do not exist"):
        lch.lens.average(llama, TEXTS, end=7, **SETTINGS)
    parallel = models.bridge("gpt_neox")
    with pytest.raises(lch.SiteError, match="no residual stream that is its input"):
        lch.lens.average(parallel, TEXTS, layers=[1], site="resid_mid", **SETTINGS)


def test_the_model_is_left_as_it_was(llama: Any) -> None:
    with models.no_hooks_added(llama):
        lch.lens.average(llama, TEXTS, layers=[1], site="resid_mid", **SETTINGS)
    assert all(p.requires_grad for p in llama.parameters())

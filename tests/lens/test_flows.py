"""What each layer writes of each prompt token adds up to the logits, and is what torch says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lch_plugin as lch
from tests import families, models

TOKENS = [3, 4, 5]
IDS = models.tokens(1, 6)


def error(flow: lch.lens.Flow) -> float:
    """How far the parts are from the logits."""
    total = flow.logits.sum((0, 1)) + flow.biases.sum(0)
    return float((total - flow.model_logits).abs().max())


@pytest.fixture(scope="module")
def gpt2() -> Any:
    model = models.huggingface("gpt2", torch.float64)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)  # Those of norms are zero as they come.
    return models.boot(model, torch.float64)


@pytest.fixture(scope="module")
def flow(gpt2: Any) -> lch.lens.Flow:
    return lch.lens.flow(gpt2, IDS, tokens=TOKENS)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_tokens_layers_and_biases_add_up_to_the_logits(family: str) -> None:
    model = models.bridge(family, torch.float64)
    flow = lch.lens.flow(model, IDS, target=-2, tokens=TOKENS)
    assert flow.layers == ("embed", "0", "1", "2", "unembed")
    assert flow.logits.shape == (5, 6, 3)
    assert torch.equal(model(IDS)[0, -2, TOKENS], flow.model_logits)
    assert error(flow) < (1e-6 if family in families.FLOAT32_INSIDE else 1e-10)
    # Layer 0 of a reading is the same without the layers.
    reading = lch.lens.read(model, IDS, layers=[0], target=-2, tokens=TOKENS)
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(flow.logits.sum(0), reading.logits[0], **tolerance)
    torch.testing.assert_close(flow.biases.sum(0), reading.offset[0], **tolerance)


# Values shared between layers, scaled streams, experts, a state space, no causal mask.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["gemma4_text", "granite", "mixtral", "mamba", "bert"])
def test_other_architectures_add_up(family: str) -> None:
    model, inputs = families.bridge(family), families.inputs(family)
    assert error(lch.lens.flow(model, inputs["input"], tokens=TOKENS)) < 1e-5


def test_the_embedding_is_the_targets_own_and_unembedding_writes_biases_alone(
    flow: lch.lens.Flow,
) -> None:
    assert not flow.logits[0, :-1].any()
    assert flow.logits[0, -1].all()
    assert not flow.logits[-1].any()
    assert not flow.biases[0].any()
    assert flow.biases[1:].all()


def test_without_biases_all_comes_from_tokens() -> None:
    flow = lch.lens.flow(models.bridge("llama", torch.float64), IDS, tokens=TOKENS)
    assert not flow.biases.any()


def test_each_part_is_what_the_frozen_model_writes_of_one_embedding(
    gpt2: Any, flow: lch.lens.Flow
) -> None:
    """Block by block in plain torch, with the model's own patterns, gates and scales."""
    _, cache = gpt2.run_with_cache(IDS)
    ln_f, W_U = gpt2.ln_final.original_component, gpt2.W_U

    def norm(x: Tensor, at: Tensor, layer: Any, *, biased: bool) -> Tensor:
        scale = (at.var(-1, unbiased=False, keepdim=True) + layer.eps).rsqrt()
        y = (x - x.mean(-1, keepdim=True)) * scale * layer.weight
        return y + layer.bias if biased else y

    def block(m: int, x: Tensor, *, biased: bool) -> Tensor:
        hf = gpt2.blocks[m].original_component
        pattern = cache[f"blocks.{m}.attn.hook_pattern"][0]
        at = cache[f"blocks.{m}.hook_in"][0]
        on = float(biased)
        v = norm(x, at, hf.ln_1, biased=biased) @ gpt2.blocks[m].attn.W_V.transpose(0, 1).flatten(1)
        v = v + on * gpt2.blocks[m].attn.b_V.flatten()
        mixed = torch.einsum("hqk,khd->qhd", pattern, v.reshape(len(x), pattern.shape[0], -1))
        W_O = gpt2.blocks[m].attn.W_O.flatten(0, 1)
        middle = x + mixed.flatten(1) @ W_O + on * gpt2.blocks[m].attn.b_O
        attended = at + cache[f"blocks.{m}.attn.hook_out"][0]
        z = norm(middle, attended, hf.ln_2, biased=biased) @ gpt2.blocks[m].mlp.W_in
        z = z + on * gpt2.blocks[m].mlp.b_in
        pre = norm(attended, attended, hf.ln_2, biased=True) @ gpt2.blocks[m].mlp.W_in
        pre = pre + gpt2.blocks[m].mlp.b_in
        gate = torch.nn.functional.gelu(pre, approximate="tanh") / pre
        return middle + (z * gate) @ gpt2.blocks[m].mlp.W_out + on * gpt2.blocks[m].mlp.b_out

    def written(x: Tensor, *, biased: bool) -> Tensor:
        """What each block writes in the logits at the last position."""
        found, end = [], cache["blocks.2.hook_out"][0, -1]
        for m in range(3):
            y = block(m, x, biased=biased)
            found.append(norm((y - x)[-1], end, ln_f, biased=False) @ W_U[:, TOKENS])
            x = y
        return torch.stack(found)

    embeddings = cache["blocks.0.hook_in"][0]
    with torch.no_grad():
        for pos in range(6):
            alone = torch.zeros_like(embeddings)
            alone[pos] = embeddings[pos]
            torch.testing.assert_close(flow.logits[1:-1, pos], written(alone, biased=False))
        of_zero = written(torch.zeros_like(embeddings), biased=True)
        torch.testing.assert_close(flow.biases[1:-1], of_zero)
        torch.testing.assert_close(flow.biases[-1], ln_f.bias @ W_U[:, TOKENS])


def test_the_jacobian_adds_up_to_first_order(gpt2: Any) -> None:
    flow = lch.lens.flow(gpt2, IDS, tokens=TOKENS, linearization="jacobian")
    reading = lch.lens.read(gpt2, IDS, layers=[0], tokens=TOKENS, linearization="jacobian")
    assert error(flow) < 1e-12
    torch.testing.assert_close(flow.logits.sum(0), reading.logits[0])


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_is_not_affine_is_refused() -> None:
    model, inputs = families.bridge("bloom"), families.inputs("bloom")
    with pytest.raises(lch.SiteError, match=r"of their size|no detached linearisation"):
        lch.lens.flow(model, inputs["input"])


def test_a_notebook_shows_where_the_first_token_comes_from() -> None:
    flow = lch.lens.flow(lch.load_demo_model(), "A <b> tree", tokens=[" apple", " pear"])
    page = flow._repr_html_()
    assert "<b>" not in page
    assert page.count("<tr>") == 1 + len(flow.prompt) + 2
    assert f"{float(flow.model_logits[0]):.2f}</td></tr></tbody>" in page
    assert error(flow) < 1e-3

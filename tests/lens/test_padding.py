"""A prompt that is filled up reads as it does without its padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lch_plugin as lch
from lch_plugin.padding import known_tokens, mark_tokens
from tests import models

TOKENS = [3, 4, 5]
IDS = models.tokens(1, 5)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return models.bridge(request.param, torch.float64)


def padded(side: str) -> tuple[Tensor, Tensor, slice]:
    """Ids and their mask, and where the tokens are."""
    fill, own = torch.full((1, 3), 7), torch.ones_like(IDS)
    if side == "left":
        return torch.cat([fill, IDS], 1), torch.cat([0 * fill, own], 1), slice(3, 8)
    return torch.cat([IDS, fill], 1), torch.cat([own, 0 * fill], 1), slice(0, 5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_everything_is_as_without_padding(model: Any, side: str) -> None:
    ids, mask, own = padded(side)
    alone = lch.lens.read(model, IDS, tokens=TOKENS)
    found = lch.lens.read(model, ids, tokens=TOKENS, target=own.stop - 1, attention_mask=mask)
    torch.testing.assert_close(found.logits[:, own], alone.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.offset, alone.offset, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.model_logits, alone.model_logits, rtol=0, atol=1e-12)
    assert found.logits.shape[1] == 8
    assert not found.logits[:, mask[0] == 0].any()
    assert found.prompt[own] == alone.prompt
    assert found.prompt.count("[padding]") == 3
    # A cell's list, a choice of positions and the flow know where the tokens are.
    cell, same_cell = alone.top(1, 2, 3), found.top(1, own.start + 2, 3)
    assert [token for token, _ in same_cell] == [token for token, _ in cell]
    assert [x for _, x in same_cell] == pytest.approx([x for _, x in cell])
    padding = 0 if side == "left" else -1
    assert [value for _, value in found.top(1, padding, 3)] == [0, 0, 0]
    chosen = lch.lens.read(
        model,
        *(ids[0], None, [padding, own.start + 2]),
        **{"tokens": TOKENS, "target": own.stop - 1, "attention_mask": mask[0].bool()},
    )
    assert not chosen.logits[:, 0].any()
    torch.testing.assert_close(chosen.logits[:, 1], alone.logits[:, 2], rtol=0, atol=1e-12)
    flow = lch.lens.flow(model, IDS, -2, TOKENS)
    same = lch.lens.flow(model, ids, own.stop - 2, TOKENS, attention_mask=mask)
    torch.testing.assert_close(same.logits[:, own], flow.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(same.biases, flow.biases, rtol=0, atol=1e-12)
    assert not same.logits[:, mask[0] == 0].any()


def test_the_mask_is_what_the_model_itself_does_with_padding() -> None:
    """HuggingFace's own logits of the padded prompt, with rotary positions."""
    model = models.bridge("llama", torch.float64)
    ids, mask, _ = padded("left")
    original = models.huggingface("llama", torch.float64)
    original.set_attn_implementation("sdpa")  # Eager attention has no numbers at padding.
    expected = original(ids, attention_mask=mask).logits
    found = lch.lens.read(model, ids, tokens=TOKENS, attention_mask=mask)
    # Rotations are computed in float32.
    torch.testing.assert_close(
        found.model_logits, expected[0, -1, TOKENS].detach(), rtol=1e-4, atol=1e-5
    )


def test_ids_that_are_known_to_be_filled_up_need_no_mask(model: Any) -> None:
    with lch.attach(model):
        both = model.to_tokens(["w1 w2 w3 w4", "w1 w2"])
    known = known_tokens(both)
    assert known is not None
    row, n = mark_tokens(both[1:], known[1:]), int(known[1].sum())
    assert n < row.numel()
    found = lch.lens.read(model, row, tokens=TOKENS, target=n - 1)
    alone = lch.lens.read(model, mark_tokens(row[:, :n]), tokens=TOKENS)
    torch.testing.assert_close(found.logits[:, :n], alone.logits)
    assert found.logits.shape[1] == row.numel()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target": -1}, r"target=-1 is padding, .* tokens are at 0 to 4"),
        ({"target": 8}, r"target=8: \[8\] do not exist"),
        ({"attention_mask": torch.ones(1, 7)}, r"attention_mask has shape \(1, 7\)"),
        ({"attention_mask": torch.zeros(1, 8)}, r"tokens would be at \[\]"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1]])}, "on its left or right"),
        ({"prompt": "w1 w2"}, "goes with the ids"),
    ],
)
def test_what_cannot_be_read_of_a_padded_prompt_is_said(
    model: Any, settings: dict[str, Any], said: str
) -> None:
    ids, mask, _ = padded("right")
    with pytest.raises(lch.InputError, match=said) as caught:
        lch.lens.read(model, **{"prompt": ids, "attention_mask": mask, **settings})
    assert "\n" not in str(caught.value)


def test_several_prompts_are_read_one_by_one(model: Any) -> None:
    with lch.attach(model):
        rows = model.to_tokens(["w1 w2 w3 w4", "w1"])
    with pytest.raises(lch.InputError, match="one at a time"):
        lch.lens.read(model, rows)

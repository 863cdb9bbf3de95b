"""Readings add up to the logits, and each is what torch's own gradient of the frozen model says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lch_plugin as lch
from lch_plugin.lens.passes import ResidualPass
from tests import families, models
from tests.models import D_VOCAB

TOKENS = [3, 4, 5]
IDS = models.tokens(1, 6)
PROMPT = "Tom saw an apple and picked an"


def error(reading: lch.lens.Reading) -> float:
    """How far the parts are from the logits."""
    return float((reading.logits.sum(1) + reading.offset - reading.model_logits).abs().max())


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return models.bridge("gpt2", torch.float64)


@pytest.fixture(scope="module")
def reading(gpt2: Any) -> lch.lens.Reading:
    return lch.lens.read(gpt2, IDS, tokens=TOKENS)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_readings_and_offset_add_up_to_the_logits_at_every_layer(family: str) -> None:
    model = models.bridge(family, torch.float64)
    reading = lch.lens.read(model, IDS, tokens=TOKENS, target=-2)
    assert torch.equal(model(IDS)[0, -2, TOKENS], reading.model_logits)
    assert reading.logits.shape == (model.cfg.n_layers + 1, 6, 3)
    assert error(reading) < (1e-6 if family in families.FLOAT32_INSIDE else 1e-10)
    assert not reading.logits[:, -1].any()  # What follows the target is not read.


# Values shared between layers, scaled streams, experts, a state space, no causal mask.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["gemma4_text", "granite", "mixtral", "mamba", "bert"])
def test_other_architectures_add_up(family: str) -> None:
    model, inputs = families.bridge(family), families.inputs(family)
    assert error(lch.lens.read(model, inputs["input"], tokens=TOKENS)) < 1e-5


def test_a_hooked_transformer_reads_as_the_bridge(reading: lch.lens.Reading) -> None:
    hooked = lch.lens.read(models.hooked(torch.float64), IDS, tokens=TOKENS)
    torch.testing.assert_close(hooked.logits, reading.logits)
    torch.testing.assert_close(hooked.offset, reading.offset)


def test_a_soft_cap_is_held_as_one_more_factor() -> None:
    model = models.bridge("gemma2", torch.float64)
    assert model.original_model.config.final_logit_softcapping
    reading = lch.lens.read(model, IDS, tokens=TOKENS)
    normed = model.ln_final(reading._run.streams[-1].detach())
    cap, direct = model.original_model.config.final_logit_softcapping, model.unembed(normed)
    capped = cap * torch.tanh(direct / cap)
    torch.testing.assert_close(reading.logits[-1, -1], capped[0, -1, TOKENS], rtol=1e-6, atol=1e-6)


def test_without_biases_nothing_is_left_over() -> None:
    reading = lch.lens.read(models.bridge("llama", torch.float64), IDS, tokens=TOKENS)
    assert not reading.offset.any()


def test_an_offset_is_the_frozen_span_of_zero(gpt2: Any, reading: lch.lens.Reading) -> None:
    run = ResidualPass(gpt2, IDS, "detached")
    for layer in range(len(reading.layers)):
        expected = run.constant(layer)[-1, TOKENS]
        torch.testing.assert_close(reading.offset[layer], expected, rtol=1e-9, atol=1e-12)
    assert reading.offset.abs().min(1).values[0] > 1e-3


def test_the_last_layer_is_the_direct_path_of_the_target_alone(
    gpt2: Any, reading: lch.lens.Reading
) -> None:
    x = reading._run.streams[-1].detach()[0, -1]
    norm, W_U = gpt2.ln_final.original_component, gpt2.W_U
    scale = (x.var(unbiased=False) + norm.eps).rsqrt()
    direct = ((x - x.mean()) * scale * norm.weight) @ W_U[:, TOKENS]
    torch.testing.assert_close(reading.logits[-1, -1], direct.detach())
    assert not reading.logits[-1, :-1].any()


def test_a_cells_list_is_its_reading_of_the_whole_vocabulary(gpt2: Any) -> None:
    everything = lch.lens.read(gpt2, IDS, tokens=list(range(D_VOCAB)))
    for layer in range(4):
        for pos in (0, 3, 5):
            cell = everything.logits[layer, pos]
            expected = (cell - cell.mean()).topk(4)
            found = everything.top_cells([layer], [pos], 4)
            if layer < 3 or pos == 5:  # Elsewhere all are zero, in any order.
                assert found.ids[0, 0].tolist() == expected.indices.tolist()
            torch.testing.assert_close(found.values[0, 0], expected.values)
            names = [f"w{i}" for i in found.ids[0, 0].tolist()]
            assert [token for token, _ in everything.top(layer, pos, 4)] == names


def test_the_default_tokens_are_the_likeliest() -> None:
    model = lch.load_demo_model()
    reading = lch.lens.read(model, PROMPT)
    logits = model(PROMPT)[0, -1]
    assert list(reading.token_ids) == logits.topk(10).indices.tolist()
    assert reading.tokens[0] == model.tokenizer.decode([int(logits.argmax())])
    assert error(reading) < 1e-4 * float(reading.model_logits.abs().max())
    assert lch.lens.read(model, PROMPT, tokens=" apple").tokens == (" apple",)


def test_layers_and_positions_choose_from_the_whole(gpt2: Any, reading: lch.lens.Reading) -> None:
    part = lch.lens.read(gpt2, IDS, layers=[-1, 1], positions=[-1, 0], tokens=TOKENS)
    assert (part.layers, part.positions) == ((3, 1), (5, 0))
    torch.testing.assert_close(part.logits, reading.logits[[3, 1]][:, [5, 0]])
    torch.testing.assert_close(part.offset, reading.offset[[3, 1]])


def test_the_jacobian_is_that_of_the_model(gpt2: Any) -> None:
    reading = lch.lens.read(gpt2, IDS, tokens=TOKENS, linearization="jacobian")
    seen: dict[str, Tensor] = {}

    def start(value: Tensor, hook: Any) -> Tensor:
        seen["x"] = value.detach().requires_grad_()
        return seen["x"]

    logits = gpt2.run_with_hooks(IDS, fwd_hooks=[("blocks.1.hook_in", start)])
    (mu,) = torch.autograd.grad(logits[0, -1, 4], seen["x"])
    torch.testing.assert_close(reading.logits[1, :, 1], (mu * seen["x"]).sum(-1)[0].detach())
    assert error(reading) < 1e-12  # By definition of the offset.


def test_reading_leaves_the_model_as_it_was() -> None:
    model = models.bridge("gpt2", torch.float64).train()
    with models.no_hooks_added(model), torch.inference_mode():
        lch.lens.read(model, IDS, tokens=TOKENS).top(1, 1)
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["bloom", "phimoe"])
def test_a_model_that_is_not_affine_is_named_with_how_far_off_it_is(family: str) -> None:
    model, inputs = families.bridge(family), families.inputs(family)
    with pytest.raises(lch.SiteError, match=r"of their size, at layers|no detached linearisation"):
        lch.lens.read(model, inputs["input"])
    jacobian = lch.lens.read(model, inputs["input"], linearization="jacobian")
    assert error(jacobian) < 1e-6


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": torch.ones(2, 3, dtype=torch.long)}, "2 prompts"),
        ({"prompt": torch.tensor([[3, D_VOCAB]])}, "vocabulary"),
        ({"target": 6}, r"target=6: \[6\] do not exist; there are 0 to 5"),
        ({"layers": [4]}, "layers"),
        ({"positions": []}, "positions"),
        ({"tokens": [D_VOCAB]}, "vocabulary, 0 to 49"),
        ({"tokens": []}, "names no token"),
        ({"tokens": ["w1 w2"]}, "is not one token but 2"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(
    gpt2: Any, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(lch.InputError, match=said) as caught:
        lch.lens.read(gpt2, **{"prompt": IDS, **settings})
    assert "\n" not in str(caught.value)


def test_cells_that_are_not_there_are_refused(reading: lch.lens.Reading) -> None:
    with pytest.raises(lch.InputError, match="layers"):
        reading.top(4, 0)
    with pytest.raises(lch.InputError, match="k=51"):
        reading.top(0, 0, 51)


def test_a_model_of_images_is_refused() -> None:
    with pytest.raises(lch.InputError, match="reads no text"):
        lch.lens.read(families.bridge("vit"), IDS)

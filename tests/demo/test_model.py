"""The shipped model: size, loaders and what it can do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from lch_plugin.demo import DEMO_MODEL_DIR, load_demo_model
from lch_plugin.demo.evaluate import Score, evaluate, next_token_logits, token_ids
from lch_plugin.demo.tasks import BEHAVIOURS, margin, pear_apple
from lch_plugin.demo.train import Recipe, pack, save, train
from lch_plugin.errors import OutputError
from tests.toolkits import HAS_HOOKED, needs_hooked

if HAS_HOOKED:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

REQUIRED_ACCURACY = {
    "a_an": 0.95,
    "ioi": 0.90,
    "agreement": 0.95,
    "greater_than": 0.90,
    "induction": 0.80,
    "pronoun": 0.95,
}
TINY = Recipe(
    d_model=32,
    n_lists=4,
    n_stories=60,
    n_vocabulary_stories=60,
    batch_size=4,
    warmup_steps=2,
    n_threads=1,
)


def hugging_face_model(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    return AutoModelForCausalLM.from_pretrained(
        DEMO_MODEL_DIR, attn_implementation="eager", dtype=dtype
    ).eval()


@pytest.fixture(scope="module")
def scores() -> dict[str, Score]:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL_DIR)
    return evaluate(hugging_face_model(), tokenizer, n=200)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL_DIR)
    return torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(pear_apple().prompt)]])


@pytest.fixture(scope="module")
def expected(tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return hugging_face_model(torch.float64)(tokens).logits


def test_loads_in_single_precision() -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL_DIR)
    assert isinstance(model, GPT2LMHeadModel)
    assert model.dtype == torch.float32


def test_transformer_bridge_gives_the_same_logits(tokens: Tensor, expected: Tensor) -> None:
    bridge = load_demo_model(dtype=torch.float64)
    with torch.no_grad():
        logits = bridge(tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(bridge.to_tokens(pear_apple().prompt), tokens)


@needs_hooked
def test_hooked_transformer_gives_the_same_logits(tokens: Tensor, expected: Tensor) -> None:
    model = hugging_face_model(torch.float64)
    config = HookedTransformerConfig(
        n_layers=model.config.n_layer,
        d_model=model.config.n_embd,
        n_heads=model.config.n_head,
        d_head=model.config.n_embd // model.config.n_head,
        d_mlp=4 * model.config.n_embd,
        n_ctx=model.config.n_ctx,
        d_vocab=model.config.vocab_size,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=model.config.layer_norm_epsilon,
        device="cpu",
        dtype=torch.float64,
        model_name="demo",
    )
    hooked = HookedTransformer(config, AutoTokenizer.from_pretrained(DEMO_MODEL_DIR))
    hooked.load_state_dict(convert_gpt2_weights(model, config), strict=False)
    with torch.no_grad():
        logits = hooked(tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_nnsight_gives_the_same_logits(tokens: Tensor, expected: Tensor) -> None:
    import nnsight  # beartype cannot be imported after it, so it must not come first

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL_DIR)
    model = nnsight.TransformersModel(hugging_face_model(torch.float64), tokenizer=tokenizer)
    with torch.no_grad(), model.trace(tokens):
        logits = model.lm_head.output.save()
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_held_out_accuracy(behaviour: str, scores: dict[str, Score]) -> None:
    score = scores[behaviour]
    assert score.accuracy >= REQUIRED_ACCURACY[behaviour]
    # From the year 01 the model expects an end within 30 years, which suits an early start as well.
    assert score.flipped > (0.4 if behaviour == "greater_than" else 0.9)
    assert score.bigram < 0.7


def test_pear_and_apple_is_right() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL_DIR)
    example = pear_apple()
    logits = next_token_logits(hugging_face_model(), tokenizer, [example.prompt, example.corrupt])
    answers, foils = token_ids(tokenizer, example.answers), token_ids(tokenizer, example.foils)
    clean, corrupt = margin(logits, answers, foils)
    assert clean > 0 > corrupt
    assert int(logits[0].argmax()) in answers


def test_padding_does_not_change_the_logits() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL_DIR)
    model = hugging_face_model()
    long, short = pear_apple().prompt, "Mary was tired because"
    together = next_token_logits(model, tokenizer, [long, short])
    alone = next_token_logits(model, tokenizer, [short])
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)


def test_size_on_disk() -> None:
    assert sum(file.stat().st_size for file in DEMO_MODEL_DIR.iterdir()) <= 8 * 10**6


def test_every_mlp_has_an_all_ones_centroid() -> None:
    """The sums over d_model of W_out, which are what the all-ones cotangent sees, are not small."""
    for block in hugging_face_model().transformer.h:
        w_out = block.mlp.c_proj.weight  # (d_mlp, d_model)
        assert w_out.sum(-1).norm() / w_out.norm() > 0.3


def test_training_is_reproducible() -> None:
    first, second = (train(TINY, seed=1)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_saved_model_loads(tmp_path: Path) -> None:
    model, tokenizer, log = train(TINY, seed=0)
    save(model, tokenizer, log, tmp_path / "new" / "model")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "model")
    assert loaded.dtype == torch.float32
    assert loaded.config.n_ctx == 128
    with pytest.raises(OutputError):
        save(model, tokenizer, log, tmp_path / "new" / "model")


def test_rows_begin_with_and_without_a_new_document() -> None:
    documents = [[0, 1, 2], [0, 3, 4], [0, 5, 6], [0, 7, 8]]
    continued, fresh = [[0, 1, 2, 0], [3, 4, 0, 5]], [[0, 7, 8, 0]]
    assert list(pack([*documents, [0, 9]], 4)) == continued + fresh

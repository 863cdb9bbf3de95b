"""Padding, and caches of keys and values."""

from __future__ import annotations

import copy

import pytest
import torch

from lch_plugin.adapters.huggingface import attach
from tests import families, models
from tests.adapters.huggingface.common import (
    F64,
    IDS,
    assert_close,
    built,
    noise,
    other,
    read,
    truth,
)
from tests.models import D_MODEL


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_padded_prompts_have_the_centroids_they_have_alone(
    family: str, side: str, attention: str
) -> None:
    if family == "bert":
        model, layers = families.huggingface("bert"), "bert.encoder.layer"
        names = [f"{layers}.0.attention", f"{layers}.0", f"{layers}.0:{layers}.1"]
        names += [f"{layers}.0.intermediate:{layers}.0.output.dense", f"{layers}.1:"]
    else:
        model, layers = models.huggingface(family, F64), models.FAMILIES[family].layers
        attn = "attn" if family == "gpt2" else "self_attn"
        norm = "transformer.ln_f" if family == "gpt2" else "model.norm"
        names = [f"{layers}.0.{attn}", f"{layers}.1.mlp", f"{layers}.0:{layers}.1"]
        names += [f"{layers}.0:{norm}", f"{layers}.1:", f"{layers}.2"]
    # Llama's softmax is in float32, where float64's lowest number for a mask is infinite.
    dtype, tolerance = F64, 1e-9
    if (family, side, attention) == ("llama", "left", "eager"):
        model, dtype, tolerance = copy.deepcopy(model).float(), torch.float32, 1e-5
    model.set_attn_implementation(attention)
    n, n_pad = 4, 3
    short = IDS[:1, :n]
    padded = torch.cat([short, short.new_zeros(1, n_pad)], dim=1)
    mask = torch.tensor([[1] * n + [0] * n_pad])
    if side == "left":
        padded, mask = padded.roll(n_pad, 1), mask.roll(n_pad, 1)
    ids = torch.cat([padded, models.tokens(1, n + n_pad, seed=8)])
    mask = torch.cat([mask, torch.ones_like(mask)])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    n_vocab = model.config.vocab_size
    v = {n: noise(n_vocab if n[-1] == ":" else D_MODEL, dtype=dtype) for n in names}
    for name in names:
        alone = read(model, name, short, cotangent=v[name])[name]
        together = read(
            model, name, ids, attention_mask=mask, position_ids=positions, cotangent=v[name]
        )[name]
        real = slice(n_pad, None) if side == "left" else slice(n)
        assert_close(together[:1, real], alone, tolerance)
        full = read(model, name, ids[1:], cotangent=v[name])[name]
        assert_close(together[1:], full, tolerance)


def test_padding_of_an_encoder_is_none_of_its_decoders() -> None:
    model = families.huggingface("t5gemma")
    ids, decoder_ids = IDS[:, :6], IDS[:, 1:5]
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder_ids}
    names = ["model.decoder.layers.0", "model.decoder.layers.0.cross_attn"]
    for name in names:
        assert_close(read(model, name, **inputs)[name], truth(model, name, **inputs))
    embeddings = model.get_input_embeddings()(ids).detach()
    inputs = {**inputs, "inputs_embeds": embeddings, "input_ids": None}
    v = noise(model.config.decoder.vocab_size)
    mus = read(
        model, ["", "model.encoder.layers.0:model.decoder.layers.1"], **inputs, cotangent=None
    )
    for name, value in mus.items():
        assert_close(value, truth(model, name, **inputs))
    assert v is not None


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_padding_of_encoders_with_positional_masks(model_type: str) -> None:
    config = families._T5 if model_type == "t5" else families._SEQ2SEQ
    model = other(model_type, **config)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    inputs = {"input_ids": IDS, "attention_mask": mask, "decoder_input_ids": IDS[:, 1:5]}
    block = "decoder.block.0" if model_type == "t5" else "decoder.layers.0"
    v = noise(D_MODEL)
    mu = read(model, block, **inputs, cotangent=v)[block]
    assert_close(mu, truth(model, block, **inputs, v=v))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generated_tokens_stay_and_caches_hold_no_graph(family: str) -> None:
    model, layers = built(family), models.FAMILIES[family].layers
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    options |= {"pad_token_id": 0, "eos_token_id": -1}
    expected = model.generate(IDS, **options)
    names = [f"{layers}.1.mlp", f"{layers}.1", f"{layers}.0:{layers}.2", f"{layers}.1:"]
    with attach(model, names) as handle:
        result = model.generate(IDS, **options)
    assert torch.equal(result.sequences, expected.sequences)
    for entry in result.past_key_values.layers:
        assert not entry.keys.requires_grad
        assert not entry.values.requires_grad
    for name in names:  # Of the last token, whose pass reads the others from the cache.
        assert handle.cache[name].shape == (2, 1, D_MODEL)
        last = read(model, name, result.sequences[:, :-1])[name][:, -1:]
        assert_close(handle.cache[name], last, 1e-10 if family == "gpt2" else 1e-6)

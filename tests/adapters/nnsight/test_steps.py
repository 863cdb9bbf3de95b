"""Several prompts, and the steps of a generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nnsight.modeling.transformers import TransformersModel
from transformers import (
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from tests import models
from tests.adapters.nnsight.common import (
    F64,
    IDS,
    NAMES,
    centroid,
    plain,
    site,
    steps,
    text,
    tokenizer,
    traced,
    truth,
)
from tests.models import relative_error

# How a loop over the steps of a generation ends.
pytestmark = pytest.mark.filterwarnings("ignore:.*was never reached", "ignore:Module '")


@pytest.mark.parametrize("kind", ["mlp", "attn", "block"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"), [("eager", torch.float32, 1e-5), ("sdpa", F64, 1e-6)]
)
def test_invokes_of_different_lengths(
    family: str, kind: str, attention: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Tokens have the centroids that they have alone; nnsight pads on the left."""
    hf = models.huggingface(family, dtype)
    hf.set_attn_implementation(attention)
    model, name = TransformersModel(hf, tokenizer=tokenizer()), site(family, kind)
    short, long = IDS[0, :3], IDS[1]
    with model.trace() as tracer:
        with tracer.invoke(text(short)):
            of_short = centroid(model.get(name)).save()
        with tracer.invoke(text(long)):
            of_long = centroid(model.get(name)).save()
        with tracer.invoke():
            of_both = centroid(model.get(name)).save()
    assert of_both.shape == (2, len(long), models.D_MODEL)
    assert relative_error(of_short, of_both[:1]) < tolerance
    assert relative_error(of_long, of_both[1:]) < tolerance
    for mu, ids in ((of_short[:, -len(short) :], short), (of_long, long)):
        assert relative_error(mu, truth(plain(family), name, ids[None])) < tolerance


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("kind", ["mlp", "attn", "block"])
@pytest.mark.parametrize("family", NAMES)
def test_as_many_invokes_as_tokens(family: str, kind: str, n: int) -> None:
    """Nothing without rows is cut to rows."""
    model, name, ids = traced(family), site(family, kind), models.tokens(2, n, seed=5)
    with model.trace() as tracer:
        with tracer.invoke(ids[:1]):
            first = centroid(model.get(name)).save()
        with tracer.invoke(ids[1:]):
            second = centroid(model.get(name)).save()
    expected = truth(plain(family), name, ids)
    assert relative_error(torch.cat([first, second]), expected) < 1e-10


N_NEW = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.mark.parametrize("kind", ["mlp", "attn", "block"])
@pytest.mark.parametrize("family", NAMES)
def test_generation(family: str, kind: str) -> None:
    """Every step has its own, through its own keys and values; the tokens do not change."""
    model, name = traced(family), site(family, kind)
    with model.generate(IDS, **N_NEW):
        alone = model.generator.output.save()
    with model.generate(**N_NEW) as tracer:
        found = [].save()
        with tracer.invoke(IDS):
            for _ in tracer.iter[:]:
                found.append(centroid(model.get(name)))
        with tracer.invoke():
            tokens = model.generator.output.save()
    assert torch.equal(tokens, alone)
    expected = steps(plain(family), name, IDS)
    assert len(found) == 4
    for mu, step in zip(found, expected, strict=True):
        assert relative_error(mu, step) < 1e-9


@pytest.mark.parametrize("kind", ["mlp", "block"])
def test_chosen_steps_of_a_generation(kind: str) -> None:
    model, name = traced("gemma3_text"), site("gemma3_text", kind)
    with model.generate(IDS, **N_NEW) as tracer:
        found = [].save()
        for _ in tracer.iter[1:3]:
            found.append(centroid(model.get(name)))
    for mu, step in zip(found, steps(plain("gemma3_text"), name, IDS)[1:3], strict=True):
        assert relative_error(mu, step) < 1e-9


@pytest.mark.parametrize("family", NAMES)
def test_the_steps_of_an_mlp_are_the_positions_of_its_sequence(family: str) -> None:
    model, name = traced(family), site(family, "mlp")
    with model.generate(IDS, **N_NEW) as tracer:
        found = [].save()
        for _ in tracer.iter[:4]:
            found.append(centroid(model.get(name)))
        tokens = tracer.result.save()
    expected = truth(plain(family), name, tokens[:, :-1])
    assert relative_error(torch.cat(list(found), 1), expected) < 1e-6


@pytest.mark.parametrize("kind", ["mlp", "attn", "block"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_generation_of_several_prompts(family: str, kind: str) -> None:
    """Each through its own rows of the cache."""
    model, name = traced(family), site(family, kind)
    with model.generate(**N_NEW) as tracer:
        first, second = [].save(), [].save()
        with tracer.invoke(IDS[:1]):
            for _ in tracer.iter[:]:
                first.append(centroid(model.get(name)))
        with tracer.invoke(IDS[1:]):
            for _ in tracer.iter[:]:
                second.append(centroid(model.get(name)))
        with tracer.invoke():
            tokens = tracer.result.save()
    with model.generate(IDS, **N_NEW):
        alone = model.generator.output.save()
    assert torch.equal(tokens, alone)
    expected = steps(plain(family), name, IDS)
    for *pair, step in zip(first, second, expected, strict=True):
        assert relative_error(torch.cat(pair), step) < 1e-9


@pytest.mark.parametrize("n_prompts", [1, 2])
def test_generation_with_a_static_cache(n_prompts: int) -> None:
    model, name = traced("gemma3_text"), site("gemma3_text", "block")
    options = {**N_NEW, "cache_implementation": "static", "disable_compile": True}
    with model.generate(**options) as tracer:
        found = [[] for _ in range(n_prompts)].save()
        for i, mine in enumerate(found):
            with tracer.invoke(IDS[i : i + 1]):
                for _ in tracer.iter[:]:
                    mine.append(centroid(model.get(name)))
        with tracer.invoke():
            tokens = tracer.result.save()
    with model.generate(IDS[:n_prompts], **options):
        alone = model.generator.output.save()
    assert torch.equal(tokens, alone)
    expected = steps(plain("gemma3_text"), name, IDS[:n_prompts])
    for *pair, step in zip(*found, expected, strict=True):
        assert relative_error(torch.cat(pair), step) < 1e-6


def hybrid() -> Any:
    """Linear attention beside full attention, with states that it writes to in place."""
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=models.D_VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        mlp_only_layers=[0, 1],
    )
    return Qwen3NextForCausalLM(config).eval()


def test_generation_with_linear_attention() -> None:
    model, hf = TransformersModel(hybrid(), tokenizer=tokenizer()), hybrid()
    with model.generate(IDS, **N_NEW):
        alone = model.generator.output.save()
    with model.generate(**N_NEW) as tracer:
        found = [].save()
        with tracer.invoke(IDS):
            for _ in tracer.iter[:]:
                found.append(centroid(model.model.layers[0]))
        with tracer.invoke():
            tokens = tracer.result.save()
    assert torch.equal(tokens, alone)
    for mu, step in zip(found, steps(hf, "model.layers.0", IDS), strict=True):
        assert relative_error(mu, step) < 1e-4

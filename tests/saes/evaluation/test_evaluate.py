"""What an SAE is said to reconstruct, held to sums in float64 over all rows at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

import lch_plugin as lch
from lch_plugin.saes.evaluation.evaluate import DENSE, decoder_cosines, evaluate
from tests import models

D_IN, D_SAE, K = 16, 40, 4


def topk(dtype: str = "float32", **changes: Any) -> Any:
    torch.manual_seed(0)
    settings = {"d_in": D_IN, "d_sae": D_SAE, "k": K, "dtype": dtype} | changes
    return TrainingSAE.from_dict(TopKTrainingSAEConfig(**settings).to_dict())


def identity() -> Any:
    """With as many features as dimensions, k all of them and identity weights, nothing is lost."""
    sae = topk(d_sae=D_IN, k=D_IN)
    with torch.no_grad():
        for weight in (sae.W_enc, sae.W_dec):
            weight.copy_(torch.eye(D_IN))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def rows(n: int = 100, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 60),
    batch_size=st.integers(1, 60),
    log_scale=st.integers(-8, 4),
    log_offset=st.integers(-3, 3),
)
def test_equals_the_definition_over_all_rows_at_once(
    n: int, batch_size: int, log_scale: int, log_offset: int
) -> None:
    """However the rows are batched, scaled, and however far their mean is from zero."""
    sae = topk("float64")
    x = rows(n, seed=n, dtype=torch.float64) + 10.0**log_offset
    x = x * 10.0**log_scale
    result = evaluate(sae, x.split(batch_size))
    with torch.no_grad():
        features = sae.encode(x)
        residual = (x - sae.decode(features)).square().sum()
    variance = (x - x.mean(0)).square().sum()
    assert result.explained_variance == pytest.approx(float(1 - residual / variance), rel=1e-8)
    assert result.l0 == pytest.approx(float((features != 0).sum() / n))
    torch.testing.assert_close(result.density, (features != 0).float().mean(0))
    assert result.n_rows == n


def test_tiny_rows_are_no_perfect_reconstruction() -> None:
    """Nor is any variance below some constant taken for none."""
    sae = identity()
    x = rows().abs() * 1e-9
    assert evaluate(sae, [x]).explained_variance == pytest.approx(1, abs=1e-6)
    with torch.no_grad():
        sae.b_enc.fill_(-1)  # Nothing fires.
    expected = 1 - x.double().square().sum() / (x - x.mean(0)).double().square().sum()
    assert evaluate(sae, [x]).explained_variance == pytest.approx(float(expected), rel=1e-6)


def test_counts_of_features() -> None:
    """Feature 0 fires on every row, 1 on one in ten, 2 on one in a hundred, and others never."""
    sae = identity()
    x = torch.zeros(100, D_IN)
    x[:, 0], x[::10, 1], x[0, 2] = 1, 2, 3
    result = evaluate(sae, [x[:0], x[:30], x[30:]])
    assert result.density[:4].tolist() == pytest.approx([1, 0.1, 0.01, 0])
    assert (result.n_fired, result.n_dead, result.n_dense) == (3, D_IN - 3, 1)
    assert DENSE == 0.1
    counts, edges = result.density_histogram
    found = [(round(float(edges[i]), 6), int(counts[i])) for i in counts.nonzero().flatten()]
    assert found == [(-2, 1), (-1, 1), (-0.25, 1)]
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["n_dead"] == D_IN - 3


@settings(max_examples=50, deadline=None)
@given(n_rows=st.integers(2, 10_000), share=st.floats(0, 1))
def test_every_feature_that_fires_is_in_the_histogram(n_rows: int, share: float) -> None:
    densities = torch.tensor([1 / n_rows, max(1, int(share * n_rows)) / n_rows, 1.0, 0.0])
    result = lch.saes.Evaluation(0.5, 1.0, n_rows, densities, torch.zeros(4))
    assert int(result.density_histogram[0].sum()) == 3


def test_decoder_cosines() -> None:
    W_dec = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    torch.testing.assert_close(decoder_cosines(W_dec), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert decoder_cosines(W_dec[:1]).tolist() == [-1]


def test_decoder_cosines_of_more_rows_than_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    W_dec = rows(30)
    whole = decoder_cosines(W_dec)
    monkeypatch.setattr(sys.modules[decoder_cosines.__module__], "_MAX_COSINES", 7 * 30)
    torch.testing.assert_close(decoder_cosines(W_dec), whole)


def test_batchtopk_fresh_from_training_chooses_within_the_batch() -> None:
    config = BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K)
    assert evaluate(TrainingSAE.from_dict(config.to_dict()), rows().split(25)).l0 == K


def test_rows_of_half_precision_and_sparse_features() -> None:
    dense, sparse = topk(), topk(use_sparse_activations=True)
    x = rows().bfloat16()
    a, b = evaluate(sparse, [x]), evaluate(dense, [x])
    assert a.explained_variance == pytest.approx(b.explained_variance, rel=1e-5)
    assert torch.equal(a.density, b.density)


def test_an_sae_that_joins_heads_reads_them_joined() -> None:
    """Rows have heads joined; afterwards it takes them apart again."""
    joined = TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K))
    apart = TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, reshape_activations="hook_z"))
    apart.load_state_dict(joined.state_dict())
    heads = rows().view(100, 2, D_IN // 2)
    before = apart(heads)
    assert evaluate(apart, [rows()]).to_dict() == evaluate(joined, [rows()]).to_dict()
    assert torch.equal(apart(heads), before)


def transcoder() -> Any:
    settings: Any = {"d_in": D_IN, "d_out": D_IN, "d_sae": D_SAE, "apply_b_dec_to_input": False}
    return JumpReLUTranscoder(JumpReLUTranscoderConfig(**settings))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: evaluate(topk(), []), "no rows"),
        (lambda: evaluate(topk(), [rows(0)]), "no rows"),
        (lambda: evaluate(topk(), [rows()[:, 1:]]), r"\(n, 16\)"),
        (lambda: evaluate(topk(), [rows()[None]]), r"\(n, 16\)"),
        (lambda: evaluate(topk(), [torch.ones(4, D_IN, dtype=torch.long)]), "floating-point"),
        (lambda: evaluate(topk(), [torch.ones(4, D_IN)]), "no variance"),
        (lambda: evaluate(topk(), [1 + 1e-7 * rows()]), "the same but for rounding"),
        (lambda: evaluate(topk(), [rows(), rows() / 0]), "rows 100 to 199"),
        (lambda: evaluate(transcoder(), [rows()]), "Pass an SAE"),
    ],
)
def test_bad_input_is_refused(make: Callable[[], Any], message: str, as_users_run: None) -> None:
    with pytest.raises(lch.LCHError, match=message):
        make()


# ---------------------------------------------------------------- a model and texts


def on_model(hook: str) -> SAE[Any]:
    config = StandardSAEConfig(
        d_in=models.D_MODEL, d_sae=D_SAE, metadata=SAEMetadata(hook_name=hook)
    )
    sae = StandardSAE(config)
    for weight in (sae.W_enc, sae.W_dec):
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    return sae


TEXTS = ["w2 w3 w4 w5 w6", "w7", "w8 w9 w10", "w11 w0 w12"]


@pytest.mark.parametrize("hook", ["blocks.1.mlp.hook_centroid", "blocks.1.attn.hook_centroid"])
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("as_tokens", [False, True])
def test_a_model_and_texts(hook: str, special: bool, as_tokens: bool) -> None:
    """Every token of every text once, whatever it is batched with; no padding."""
    model, sae = models.bridge("gpt2"), on_model(hook)
    rows = []
    with lch.attach(model, site=["mlp", "attn"]):
        texts = model.to_tokens(TEXTS) if as_tokens else TEXTS
        for text in TEXTS:
            ids = model.to_tokens(text)
            value = model.run_with_cache(ids, names_filter=hook)[1][hook]
            rows.append(value[torch.ones_like(ids).bool() if special else ids != 0])
    found = evaluate(sae, model, texts, special_tokens=special, batch_size=2)
    expected = evaluate(sae, [torch.cat(rows)])
    assert found.n_rows == expected.n_rows == (4 + 12 if special else 12 - 1)
    assert found.explained_variance == pytest.approx(expected.explained_variance, rel=1e-5)
    torch.testing.assert_close(found.density, expected.density)
    assert not any("hook_centroid" in name for name in model.hook_dict)


def test_a_wrapped_huggingface_model_and_texts() -> None:
    name = "transformer.h.1.mlp"
    with lch.saes.HookedModel(models.huggingface("gpt2"), models.tokenizer(), name) as model:
        sae = on_model(f"{name}.hook_centroid")
        assert evaluate(sae, model, TEXTS).n_rows == 11


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, s: evaluate(s, m), "TransformerBridge without texts: pass"),
        (lambda m, s: evaluate(s, [rows()], TEXTS), "list with texts: pass"),
        (lambda m, s: evaluate(s, m, []), "no text"),
        (lambda m, s: evaluate(s, m, [3]), r"texts hold \['int'\]"),
        (lambda m, s: evaluate(s, m, torch.zeros(2, 3)), "integers of shape"),
        (lambda m, s: evaluate(s, m, TEXTS, batch_size=0), "batch_size=0"),
        (lambda m, s: evaluate(s, m, ["w0"]), "no rows"),
        (lambda m, s: evaluate(topk(), m, TEXTS), "say nothing of the hook"),
    ],
)
@pytest.mark.usefixtures("as_users_run")
def test_a_model_and_texts_that_do_not_fit(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(lch.InputError, match=message):
        call(models.bridge("gpt2"), on_model("blocks.1.mlp.hook_centroid"))

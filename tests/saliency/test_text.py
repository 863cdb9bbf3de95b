"""Token scores are gradients of an answer's log-probability, and judged as they should be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM
from typer.testing import CliRunner

import lch_plugin as lch
from lch_plugin.cli import app
from lch_plugin.demo import DEMO_MODEL_DIR
from lch_plugin.saliency import AnswerMetric, by_method, completeness, curves, randomisation, text
from lch_plugin.saliency.drawing import curve_figure
from tests import models

PROMPT, ANSWER, FOIL = [5, 6, 7, 8], [9, 10], [11]
FAMILIES = ("gpt2", "llama")
F64 = torch.float64


def metric(family: str = "gpt2", **kw: Any) -> AnswerMetric:
    return AnswerMetric(models.huggingface(family, F64), PROMPT, ANSWER, **kw)


@pytest.fixture(scope="module")
def loaded() -> Any:
    return lch.load(DEMO_MODEL_DIR, dtype=F64)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("foil", [None, FOIL])
def test_without_noise_scores_are_those_of_the_gradient(family: str, foil: Any) -> None:
    model = models.huggingface(family, F64)
    x = model.get_input_embeddings()(torch.tensor(PROMPT)).detach().requires_grad_()

    def log_probability(answer: list[int]) -> torch.Tensor:
        rest = model.get_input_embeddings()(torch.tensor(answer))
        logits = model(inputs_embeds=torch.cat([x, rest])[None]).logits[0]
        places = range(len(PROMPT) - 1, len(PROMPT) + len(answer) - 1)
        found = [logits[p].log_softmax(-1)[t] for p, t in zip(places, answer, strict=True)]
        return torch.stack(found).sum()

    value = log_probability(ANSWER) - (0 if foil is None else log_probability(foil))
    (truth,) = torch.autograd.grad(value, x)
    of = AnswerMetric(model, PROMPT, ANSWER, foil)
    assert torch.allclose(of(of.embeddings[None])[0], value)
    found = text(of, sigma=0.0, n_samples=2)
    assert torch.allclose(found.centroid, truth)
    assert torch.allclose(found.norm, truth.norm(dim=-1))
    assert torch.allclose(found.input_times_centroid, (truth * x).sum(-1))


def test_noise_counts_and_is_of_its_seed() -> None:
    of = metric()
    quiet, noisy, again, other = (
        text(of, sigma=sigma, seed=seed).norm
        for sigma, seed in [(0.0, 0), (0.5, 0), (0.5, 0), (0.5, 1)]
    )
    assert torch.equal(noisy, again)
    assert not torch.allclose(noisy, quiet)
    assert not torch.allclose(noisy, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bridge_and_its_huggingface_model_agree(family: str) -> None:
    of = metric(family)
    truth = text(of)
    bridge = models.bridge(family, F64)
    found = text(AnswerMetric(bridge, PROMPT, ANSWER))
    assert torch.allclose(found.centroid, truth.centroid)
    assert torch.allclose(AnswerMetric(bridge, PROMPT, ANSWER).baseline, of.baseline)


def test_prompts_run_together_as_one_by_one() -> None:
    of = metric()
    x = torch.stack([of.embeddings, of.embeddings.flip(0), 2 * of.embeddings])
    together = lch.centroid(of, x)
    assert torch.allclose(together, torch.cat([lch.centroid(of, one[None]) for one in x]))


@pytest.mark.parametrize("family", FAMILIES)
def test_input_times_detached_centroid_adds_up_to_the_logit(family: str) -> None:
    of = metric(family, quantity="logit")
    found = completeness(of, of.embeddings)
    assert found.error < (1e-6 if family == "llama" else 1e-10)  # Its norm is in float32.
    assert math.isclose(found.value, float(of(of.embeddings[None]).detach()))
    assert abs(float(found.scores.sum())) > 1e-3 * abs(found.value)
    with pytest.raises(lch.InputError, match="not affine"):
        completeness(metric(family), of.embeddings)


def test_captum_is_the_oracle(loaded: Any) -> None:
    of = AnswerMetric(loaded, "Tom saw an apple and picked an", " apple")
    found = by_method(of, sigma=0.0)
    x = of.embeddings[None].clone().requires_grad_()
    truth: Any = captum.attr.InputXGradient(of).attribute(x)
    assert torch.allclose(found["local centroid x input"], truth[0].sum(-1))
    assert torch.allclose(found["SmoothGrad"], found["Saliency"])
    total = found["IntegratedGradients"].sum()
    ends = of(of.embeddings[None]) - of(of.baseline.expand_as(of.embeddings)[None])
    assert torch.allclose(total, ends[0], rtol=0.02)


def test_curves_of_a_linear_model_are_best_in_the_order_of_its_terms() -> None:
    x, weights = torch.eye(3, dtype=F64), torch.tensor([1.0, 5.0, 2.0], dtype=F64)
    zero = torch.zeros(3, dtype=F64)

    def linear(x: torch.Tensor) -> torch.Tensor:
        return x.sum(1) @ weights

    best = curves(linear, x, weights, zero)
    assert best.deletion.tolist() == [8, 3, 1, 0]
    assert best.insertion.tolist() == [0, 5, 7, 8]
    assert math.isclose(best.deletion_area, (4 + 3 + 1) / 3)
    orders = [torch.tensor(o, dtype=F64) for o in ([3, 2, 1], [1, 2, 3], [2, 1, 3], [3, 1, 2])]
    others = [curves(linear, x, order, zero) for order in orders]
    assert all(best.deletion_area < other.deletion_area for other in others)
    assert all(best.insertion_area > other.insertion_area for other in others)


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_curves_in_steps_and_chunks_are_points_of_the_whole_curve(steps: int) -> None:
    draw = torch.Generator().manual_seed(0)
    x, scores = (torch.rand(7, n, dtype=F64, generator=draw) for n in (2, 1))

    def metric(x: torch.Tensor) -> torch.Tensor:
        return x.prod(1).sum(1)

    args = (metric, x, scores[:, 0], torch.ones(2, dtype=F64))
    whole, some = curves(*args), curves(*args, steps=steps, chunk=2)
    assert len(some.counts) == min(steps, 7) + 1
    assert torch.equal(some.deletion, whole.deletion[some.counts])
    assert torch.equal(some.insertion, whole.insertion[some.counts])
    truth = np.trapezoid(some.deletion.numpy(), some.counts.numpy()) / 7
    assert math.isclose(some.deletion_area, truth)


def test_some_methods_alone_score_as_all_do(loaded: Any) -> None:
    of = AnswerMetric(loaded, "Tom saw an apple and picked an", " apple")
    some = ("SmoothGrad", "local centroid, norm")
    found, every = by_method(of, methods=some, n_samples=3), by_method(of, n_samples=3)
    assert tuple(found) == some
    assert all(torch.equal(found[name], every[name]) for name in some)
    with pytest.raises(lch.InputError, match="LIME"):
        by_method(of, methods=["LIME"])


def test_half_precision_is_rounded_once_and_not_in_the_logarithm() -> None:
    of = AnswerMetric(models.huggingface("gpt2", torch.bfloat16), PROMPT, ANSWER)
    found = of(of.embeddings[None])
    assert found.dtype == torch.float32
    rest = of._embed(torch.tensor(ANSWER))
    logits = of._model(inputs_embeds=torch.cat([of.embeddings, rest])[None]).logits[0].float()
    rows = logits[len(PROMPT) - 1 : len(PROMPT) + 1].log_softmax(-1)
    assert torch.allclose(found[0], rows[range(2), ANSWER].sum(), rtol=0.01)
    assert all(scores.isfinite().all() for scores in by_method(of, n_samples=3).values())


def test_a_model_that_predicts_no_next_token_is_refused() -> None:
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    for model in (BertForMaskedLM(config).eval(), lch.load_demo_vision_model()):
        with pytest.raises(lch.InputError, match="predicts no next token"):
            AnswerMetric(model, PROMPT, ANSWER)


def test_a_model_in_training_mode_is_refused() -> None:
    model = models.huggingface("gpt2", F64).train()
    with pytest.raises(lch.InputError, match="training mode"):
        AnswerMetric(model, PROMPT, ANSWER)
    AnswerMetric(model.eval(), PROMPT, ANSWER)


def test_curves_that_coincide_are_one_line_and_the_best_is_first() -> None:
    rows = {"a": [3.0, 1.0], "b": [3.0, 0.0], "c": [3.0, 1.0]}
    judged = {
        name: {
            **{"counts": [0, 1], "deletion": row, "insertion": row[::-1]},
            **{f"{kind}_area": sum(row) / 2 for kind in ("deletion", "insertion")},
        }
        for name, row in rows.items()
    }
    deletion, insertion = curve_figure(judged, "nats", "tokens").axes
    assert [len(axis.lines) for axis in (deletion, insertion)] == [2, 2]
    told = [[t.get_text() for t in axis.get_legend().get_texts()] for axis in (deletion, insertion)]
    assert told == [["1.5  b", "2  a = c"], ["2  a = c", "1.5  b"]]


def test_randomised_weights_change_scores_and_come_back() -> None:
    of = metric()
    model = of._model
    before = {name: w.detach().clone() for name, w in model.named_parameters()}
    found = randomisation(model, lambda: text(of, n_samples=1).centroid)
    assert all(torch.equal(w, before[name]) for name, w in model.named_parameters())
    assert list(found)[1:4] == [f"transformer.h.{i}" for i in (2, 1, 0)]
    assert abs(list(found.values())[-1]) < 0.6
    again = randomisation(model, lambda: text(of, n_samples=1).centroid, seed=1)
    assert again != found


@pytest.mark.parametrize(
    ("prompt", "answer", "foil", "said"),
    [
        (" ", " apple", None, "prompt is empty"),
        ("Tom saw an", "", None, "has no token"),
        ("Tom saw an", " apple", " apple", "both"),
        ("Tom saw an " * 200, " apple", None, "context"),
    ],
)
def test_bad_input_is_one_line(
    loaded: Any, prompt: str, answer: str, foil: str | None, said: str
) -> None:
    with pytest.raises(lch.InputError, match=said) as error:
        AnswerMetric(loaded, prompt, answer, foil)
    assert "\n" not in str(error.value)


def test_ids_of_another_tokenizer_are_refused() -> None:
    for prompt, answer in (([5, models.D_VOCAB], [1]), ([5], [models.D_VOCAB]), ([5], [-1])):
        with pytest.raises(lch.InputError, match="not in the vocabulary"):
            AnswerMetric(models.huggingface("gpt2"), prompt, answer)


def test_scores_and_curves_that_are_not_finite_are_refused() -> None:
    model = models.huggingface("gpt2")
    model.lm_head.weight.data[9] = math.inf
    of = AnswerMetric(model, PROMPT, ANSWER)
    with pytest.raises(lch.NonFiniteError, match="local centroid"):
        text(of, n_samples=1)
    with pytest.raises(lch.NonFiniteError, match="curve"):
        curves(of, of.embeddings, torch.arange(4.0), of.baseline)


def test_an_answer_that_merges_with_the_prompt_is_refused(loaded: Any) -> None:
    with pytest.raises(lch.InputError, match="merges"):
        AnswerMetric(loaded, "Tom saw an app", "le")


@pytest.mark.parametrize("sigma", [-0.1, math.nan, math.inf])
def test_a_sigma_that_is_none_is_refused(sigma: float) -> None:
    with pytest.raises(lch.InputError, match="sigma"):
        text(metric(), sigma=sigma)


def test_tokens_are_text_and_no_markup() -> None:
    scores = lch.saliency.TokenScores(["<b>"], torch.ones(1, 2), torch.ones(1), torch.ones(1))
    assert "&lt;b&gt;" in scores._repr_html_()


def test_the_command_writes_a_report(tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = ["saliency", "Tom saw an apple and picked an", "--answer", " apple", "--foil", " pear"]
    found = CliRunner().invoke(app, [*line, "--samples", "4", "--out", str(out)])
    assert found.exit_code == 0, found.output
    assert {"report.html", "results.json", "tokens.png"} <= {p.name for p in out.iterdir()}
    page = (out / "report.html").read_text()
    assert all(name in page for name in lch.saliency.METHODS)

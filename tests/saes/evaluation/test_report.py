"""The page of an SAE: what it shows is in the results, and they are what the functions give."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import TopKTrainingSAEConfig, TrainingSAE
from scipy.stats import false_discovery_control
from typer.testing import CliRunner

import lch_plugin as lch
from lch_plugin import cli
from lch_plugin.demo.corpus import stories
from lch_plugin.padding import mark_tokens
from lch_plugin.saes.evaluation import plots
from lch_plugin.saes.evaluation.feature_acts import load_sae
from lch_plugin.saes.evaluation.report import evaluation_report
from lch_plugin.steering import SteeringEffects
from tests import models

TEXTS = list(stories(30, split="test"))
CENTROID = "blocks.2.mlp.hook_centroid"


def saved(path: Path, hook_name: str, d_in: int = 128) -> Path:
    torch.manual_seed(0)
    config = TopKTrainingSAEConfig(d_in=d_in, d_sae=64, k=4)
    sae: Any = TrainingSAE.from_dict(config.to_dict())
    sae.cfg.metadata.hook_name, sae.cfg.metadata.context_size = hook_name, 64
    with torch.no_grad():  # So that enough of them fire.
        sae.W_enc += 0.3 * torch.randn(sae.W_enc.shape)
    sae.save_inference_model(str(path))
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("evaluate")
    text = directory / "stories.txt"
    text.write_text("\n".join(TEXTS))
    sae, out = saved(directory / "sae", CENTROID), directory / "out"
    options = f"--text {text} --out {out} --n-features 3 --n-tokens 128 --seed 1"
    result = CliRunner().invoke(cli.app, ["sae", "evaluate", str(sae), *options.split()])
    assert result.exit_code == 0, result.output
    return out


def test_the_page_is_self_contained_and_shows_the_results(report: Path) -> None:
    names = {"report.html", "results.json", "density.png", "responses.png", "steering.png"}
    names |= {"files.json"}
    assert {p.name for p in report.iterdir()} == names
    page = (report / "report.html").read_text()
    for source in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert source.startswith("data:image/png;base64,")
    results = json.loads((report / "results.json").read_text())
    assert f"{results['evaluation']['explained_variance']:.3f}" in page
    assert f"{results['responses'][-1]['r_squared']['SAE']:.3f}" in page
    for feature in results["steering"]["features"]:
        assert f"<td>{feature['index']}</td>" in page
    assert len(results["steering"]["features"]) == 3
    assert results["run"]["hooks"][CENTROID]["centroid"]["cotangent"] == "ones"


def test_p_values_are_corrected_for_features_and_strengths(report: Path) -> None:
    steered = json.loads((report / "results.json").read_text())["steering"]
    raw, corrected = (
        np.array([f[name] for f in steered["features"]]) for name in ("p_value", "p_corrected")
    )
    assert steered["n_tests"] == raw.size == 3 * 3
    expected = false_discovery_control(raw.ravel())
    assert corrected.ravel() == pytest.approx(expected)
    assert expected != pytest.approx(raw.ravel())
    page = (report / "report.html").read_text()
    assert "corrected for the\n9 tests made here" in page
    for value in corrected[:, -1]:
        assert f"<td>{value:.3f}</td>" in page


def test_the_results_are_those_of_the_functions(tmp_path: Path) -> None:
    sae, model = load_sae(saved(tmp_path / "sae", CENTROID)), lch.load_demo_model()
    ids = model.tokenizer("".join(f"<|endoftext|>{t}" for t in TEXTS))["input_ids"][: 4 * 64]
    tokens, positions = torch.tensor(ids).view(4, 64), slice(1, None)
    mark_tokens(tokens)  # Text from end to end.
    results = evaluation_report(
        model, sae, tokens, tmp_path / "out", n_features=2, n_random=2, seed=1
    )
    with lch.attach(model, layers=2) as handle, torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=handle.hook_names)
    evaluation = lch.saes.evaluate(sae, [cache[CENTROID][:, positions].flatten(0, 1)])
    shown = results["evaluation"]
    assert shown["explained_variance"] == pytest.approx(evaluation.explained_variance, rel=1e-4)
    assert shown["n_rows"] == 4 * 63

    component = lch.saes.CapturedComponent(model, [tokens], "blocks.2.mlp", positions=positions)
    fits = lch.saes.predicted_responses(
        component,
        component.x,
        {"SAE": lch.saes.reconstructed_centroids(sae, component)},
        generator=torch.Generator().manual_seed(1),
    )
    for fit, response in zip(fits, results["responses"], strict=True):
        assert response["r_squared"]["SAE"] == pytest.approx(fit.r_squared["SAE"], abs=1e-3)
        assert response["n"] == 8 * 4 * 63

    steered = results["steering"]
    features = [f["index"] for f in steered["features"]]
    energy = sae.encode(cache[CENTROID][:, positions].flatten(0, 1)).square().sum(0)
    energy = energy * (evaluation.density <= 0.1)
    assert sorted(features) == sorted(energy.topk(2).indices.tolist())
    effects = lch.saes.steering_effects(
        model, [tokens], CENTROID, sae.W_dec[features], positions=positions, n_random=1
    )
    for i, feature in enumerate(steered["features"]):
        assert feature["kl"] == pytest.approx(effects.kl[i].mean(-1).tolist(), rel=1e-3)
        promoted = [model.tokenizer.decode([t]) for t in effects.promoted(i, k=6)]
        assert feature["promoted"] == promoted


@pytest.mark.parametrize(
    ("hook", "has_responses"),
    [
        ("blocks.1.attn.hook_centroid", True),
        ("blocks.1.mlp.hook_in", True),
        ("blocks.1.attn.hook_z", False),
        ("blocks.1.hook_resid_post", False),
    ],
)
def test_saes_on_other_hook_points(hook: str, has_responses: bool, tmp_path: Path) -> None:
    sae = load_sae(saved(tmp_path / "sae", hook))
    model = lch.load_demo_model()
    results = evaluation_report(
        model, sae, TEXTS, tmp_path / "out", n_tokens=128, n_features=2, n_random=2
    )
    assert (results["responses"] is not None) == has_responses
    assert (tmp_path / "out" / "responses.png").exists() == has_responses
    assert min(results["steering"]["features"][0]["kl"]) > 0


def test_tokens_that_the_sae_was_trained_without_do_not_count(tmp_path: Path) -> None:
    sae, model = load_sae(saved(tmp_path / "sae", CENTROID)), lch.load_demo_model()
    bos = model.tokenizer.bos_token_id
    ids = model.tokenizer("".join(f"<|endoftext|>{t}" for t in TEXTS))["input_ids"][: 4 * 64]
    tokens = torch.tensor(ids).view(4, 64)
    assert int((tokens[:, 3:40] == bos).sum())
    sae.cfg.metadata.exclude_special_tokens = True
    sae.cfg.metadata.seqpos_slice = (1, 40)
    out = tmp_path / "out"
    results = evaluation_report(model, sae, tokens, out, skip=3, n_features=2, n_random=2)
    with lch.attach(model, layers=2) as handle, torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=handle.hook_names)
    chosen = cache[CENTROID][:, 3:40][tokens[:, 3:40] != bos]
    evaluation = lch.saes.evaluate(sae, [chosen])
    assert results["evaluation"]["n_rows"] == len(chosen)
    assert results["evaluation"]["l0"] == pytest.approx(evaluation.l0)
    explained = results["evaluation"]["explained_variance"]
    assert explained == pytest.approx(evaluation.explained_variance, rel=1e-4)
    assert results["responses"][0]["n"] == 8 * 4 * 37
    energy = sae.encode(chosen).square().sum(0) * (evaluation.density <= 0.1)
    found = [feature["index"] for feature in results["steering"]["features"]]
    assert sorted(found) == sorted(energy.topk(2).indices.tolist())
    assert "what the SAE was trained without" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("site", "name"),
    [
        (lch.Site("mlp", 2, radius=0.1, n_samples=2), CENTROID),
        (lch.Site("attn", 2, output_positions=[-1]), "blocks.2.attn.hook_centroid"),
        (lch.Site("block", 2, linearization="detached"), "blocks.2.hook_centroid"),
        (lch.Site("mlp", 2, cotangent=lch.cotangents.Logit(3)), None),
    ],
)
def test_centroids_other_than_the_modules_own_have_no_responses(
    site: lch.Site, name: str | None, tmp_path: Path
) -> None:
    """The SAE was not trained on what `reconstructed_centroids` would give it."""
    model = lch.load_demo_model()
    with lch.attach(model, site=site) as handle:
        (hook, *_) = handle.hook_names
        assert name is None or hook == name
        sae = load_sae(saved(tmp_path / "sae", hook))
        results = evaluation_report(
            model, sae, TEXTS, tmp_path / "out", n_tokens=128, n_features=1, n_random=2
        )
    assert results["responses"] is None
    assert results["steering"]["features"][0]["kl"][-1] > 0


def test_strength_zero_has_no_ratio(tmp_path: Path) -> None:
    sae, model = load_sae(saved(tmp_path / "sae", CENTROID)), lch.load_demo_model()
    results = evaluation_report(
        model,
        sae,
        TEXTS,
        tmp_path / "out",
        n_tokens=128,
        n_features=2,
        n_random=2,
        strengths=(1.0, 0.0),
    )
    assert results["steering"]["features"][0]["ratio"][1] is None
    assert results["steering"]["median_ratio"][1] is None
    assert results["steering"]["median_ratio"][0] > 0
    assert "<td>–</td>" in (tmp_path / "out" / "report.html").read_text()


def test_in_half_precision_the_page_says_so(tmp_path: Path) -> None:
    sae = load_sae(saved(tmp_path / "sae", CENTROID))
    model = lch.load_demo_model().to(torch.bfloat16)
    out = tmp_path / "out"
    results = evaluation_report(model, sae, TEXTS, out, n_tokens=128, n_features=2, n_random=2)
    assert results["run"]["dtype"] == "bfloat16"
    assert "responses to small perturbations are" in (out / "report.html").read_text()


def test_without_steering_the_rest_is_there(tmp_path: Path) -> None:
    sae = load_sae(saved(tmp_path / "sae", CENTROID))
    out, model = tmp_path / "out", lch.load_demo_model()
    results = evaluation_report(model, sae, TEXTS, out, n_tokens=128, n_features=0)
    assert results["steering"] is None
    assert results["responses"]
    page = (out / "report.html").read_text()
    assert "Steering along features" not in page
    assert not (out / "steering.png").exists()


def test_models_that_transformerlens_does_not_know(tmp_path: Path) -> None:
    hook = "transformer.h.1.mlp.hook_centroid"
    sae = load_sae(saved(tmp_path / "sae", hook, d_in=models.D_MODEL))
    ids = models.tokens(batch=8, pos=16)
    hooked = lch.saes.HookedModel(models.huggingface("gpt2"), models.tokenizer(), hook[:19])
    results = evaluation_report(
        hooked, sae, ids, tmp_path / "out", n_features=2, n_random=2, strengths=[0.5]
    )
    assert results["evaluation"]["n_rows"] == 8 * 15
    assert results["responses"][0]["r_squared"]["exact centroid"] == pytest.approx(1)


def test_a_page_of_nothing_is_refused(tmp_path: Path) -> None:
    sae = load_sae(saved(tmp_path / "sae", CENTROID))
    model = lch.load_demo_model()
    with pytest.raises(lch.InputError, match="no row of 64 tokens"):
        evaluation_report(model, sae, ["Too short."], tmp_path / "out")
    runs: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: runs.append(1))
    for setting, message in (
        ({"skip": -1}, "at least 1"),
        ({"skip": 64}, "skip=64 leaves none"),
        ({"n_features": -1}, "zero or more"),
        ({"n_sequences": 0}, "at least 1"),
        ({"n_tokens": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"n_random": 0}, "at least 1"),
        ({"strengths": []}, "strengths"),
    ):
        with pytest.raises(lch.InputError, match=message):
            evaluation_report(model, sae, TEXTS, tmp_path / "out", **setting)
    hook.remove()
    assert not runs  # Before any work is done.
    lost = lch.load_demo_model()
    lost.tokenizer = None
    with pytest.raises(lch.InputError, match="no tokenizer"):
        evaluation_report(lost, sae, TEXTS, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(lch.OutputError):
        evaluation_report(model, sae, TEXTS, tmp_path / "full")
    assert not (tmp_path / "out").exists()


def test_figures_show_what_they_are_given() -> None:
    density = torch.tensor([0.5, 0.02, 0.02, 0.0])
    evaluation = lch.saes.Evaluation(0.5, 1.0, 100, density, torch.zeros(4))
    (axis,) = plots.density_histogram(evaluation).axes
    assert axis.patches[0].get_data().values.sum() == 3
    assert "3 of 4" in axis.get_title()

    fits = [
        lch.saes.ResponseFit(kind, size, {"SAE": 0.4, "mean centroid": -5.0}, {}, 8)  # type: ignore[arg-type]
        for kind in ("isotropic", "data")
        for size in (None, 0.1)
    ]
    for axis in plots.response_fits(fits).axes:
        first, second, *_ = axis.lines
        assert list(first.get_ydata()) == [0.4, 0.4]
        assert list(second.get_ydata()) == [-0.1, -0.1]

    kl, random = torch.rand(2, 2, 3) + 1, torch.rand(4, 2, 3)
    others = (kl.mean(-1), random.mean(-1), torch.zeros(2, 2, 5))
    effects = SteeringEffects((1.0, 0.1), 1.0, kl, random, *others)
    (axis,) = plots.steering(effects).axes
    median, *lines = axis.lines
    assert list(lines[1].get_xdata()) == [0.1, 1.0]
    torch.testing.assert_close(torch.tensor(lines[1].get_ydata()), kl[1].mean(-1).flip(0))
    expected = random.mean(-1).quantile(0.5, dim=0).flip(0)
    torch.testing.assert_close(torch.tensor(median.get_ydata()), expected)

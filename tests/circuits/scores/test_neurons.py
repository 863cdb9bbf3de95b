"""Neuron scores of whole models, held to removing one neuron at a time."""

from __future__ import annotations

import pytest
import torch

import lch_plugin as lch
from lch_plugin.circuits import neuron_attribution
from lch_plugin.circuits.reports import plots
from lch_plugin.circuits.scores import neurons
from lch_plugin.cotangents import Metric
from lch_plugin.linearization import detached
from lch_plugin.mlp import centroid_of_neurons
from tests import models

IDS = models.tokens(batch=1)
METRIC = lch.circuits.logit_difference([[3, 4]], [[7]])


def huggingface_mlp(family: str, layer: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """HuggingFace's own MLP, and its writing weight with a neuron a row."""
    model = models.huggingface(family, torch.float64)
    mlp = model.get_submodule(models.FAMILIES[family].layers)[layer].mlp
    return mlp, mlp.c_proj.weight if family == "gpt2" else mlp.down_proj.weight.T


def scores_by_ablation(
    family: str, x: torch.Tensor, layer: int, cotangent: torch.Tensor | None
) -> torch.Tensor:
    """The paper's recipe: remove each neuron of HuggingFace's own MLP and recompute by autograd."""
    mlp, out = huggingface_mlp(family, layer)
    full = lch.centroid(mlp, x, cotangent)
    scores = []
    for j in range(models.D_MLP):
        with torch.no_grad():
            row, out[j] = out[j].clone(), 0.0
        scores.append((lch.centroid(mlp, x, cotangent) - full).square().mean() / full.norm())
        with torch.no_grad():
            out[j] = row
    return torch.stack(scores)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("own_cotangent", [False, True])
def test_scores_equal_removing_neurons_one_at_a_time(family: str, own_cotangent: bool) -> None:
    model = models.bridge(family, torch.float64)
    v = torch.linspace(-1, 2, models.D_MODEL, dtype=torch.float64) if own_cotangent else None
    result = lch.circuits.neuron_attribution(
        model,
        IDS,
        position=-2,
        n_samples=16,
        cotangent=v,
        generator=torch.Generator().manual_seed(3),
    )
    generator = torch.Generator().manual_seed(3)
    inputs = [
        model.run_with_cache(IDS)[1][f"blocks.{layer}.mlp.hook_in"]
        for layer in range(models.N_LAYERS)
    ]
    for layer, x in enumerate(inputs):
        samples = lch.sample_neighbourhood(
            x[0, -2][None], radius=0.25, n_samples=16, generator=generator
        )[:, 0]
        truth = scores_by_ablation(family, samples, layer, v)
        torch.testing.assert_close(result.scores[layer], truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("metric", [None, METRIC])
def test_the_centre_may_be_one_of_the_samples(metric: Metric | None) -> None:
    """Of two samples, the one drawn and the point itself: the mean of both, on their own."""
    model, common = models.bridge("gpt2", torch.float64), {"layers": 1, "metric": metric}
    draw = torch.Generator()
    both, drawn = (
        neuron_attribution(
            model, IDS, n_samples=n, centre=n == 2, generator=draw.manual_seed(0), **common
        ).scores[1]
        for n in (2, 1)
    )
    point = neuron_attribution(model, IDS, radius=0.0, **common).scores[1]
    if metric is not None:
        torch.testing.assert_close(both, (drawn + point) / 2)
        return
    # Squared moves are averaged, and so are squared norms: the score is over their root.
    (x,) = [x[0, -1] for x in models.mlp_inputs("gpt2", IDS)[1:2]]
    sample = lch.sample_neighbourhood(
        x[None], radius=0.25, n_samples=1, generator=draw.manual_seed(0)
    )[0]
    mlp, _ = huggingface_mlp("gpt2", 1)
    norms = [lch.centroid(mlp, at).norm() for at in (sample, x[None])]
    total = torch.stack(norms).norm()
    torch.testing.assert_close(both, (drawn * norms[0] + point * norms[1]) / 2 / total)


def target_by_autograd(family: str, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What HuggingFace's own MLP reads, and the metric's gradient in what it writes."""
    model, seen = models.huggingface(family, torch.float64), {}

    def keep(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        seen["x"], seen["y"] = args[0].detach(), output

    model.get_submodule(models.FAMILIES[family].layers)[layer].mlp.register_forward_hook(keep)
    metric = METRIC.fn(model(IDS).logits)
    return seen["x"], torch.autograd.grad(metric.sum(), seen["y"])[0]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("radius", [0.0, 0.25])
def test_targeted_scores_are_what_removal_takes_from_the_linearised_metric(
    family: str, radius: float
) -> None:
    result = lch.circuits.neuron_attribution(
        models.bridge(family, torch.float64),
        IDS,
        layers=1,
        position=[-1, 2],
        radius=radius,
        n_samples=8,
        metric=METRIC,
        linearization="jacobian",
        generator=torch.Generator().manual_seed(3),
    )
    assert result.positions == (2, IDS.shape[-1] - 1)
    x, g = (value[:, result.positions] for value in target_by_autograd(family, 1))
    points = lch.sample_neighbourhood(
        x.flatten(0, 1),
        radius=radius,
        n_samples=8,
        generator=torch.Generator().manual_seed(3),
    )
    mlp, out = huggingface_mlp(family, 1)
    with torch.no_grad():
        whole = mlp(points)
        for j in range(models.D_MLP):
            row, out[j] = out[j].clone(), 0.0
            lost = ((whole - mlp(points)).mean(0) * g[0]).sum()
            out[j] = row
            torch.testing.assert_close(result.scores[1][j], lost, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("linearization", ["jacobian", "detached"])
def test_a_targeted_score_is_the_term_that_removal_takes_from_the_expert(
    family: str, linearization: str
) -> None:
    """From the centroid ``J^T g``, and from the offset: of the detached expert, by its bias."""
    model = models.bridge(family, torch.float64)
    scores = lch.circuits.neuron_attribution(
        model, IDS, 1, radius=0.0, metric=METRIC, linearization="jacobian"
    ).scores[1]
    x, g = (value[0, -1] for value in target_by_autograd(family, 1))
    mlp, out = huggingface_mlp(family, 1)
    fn = mlp if linearization == "jacobian" else detached(mlp)
    parts = lch.adapters.transformer_lens.locate_mlps(model, 1)[0].weights
    (z, *_) = pre = parts.pre_activations(x)
    s = parts.W_out @ g
    ratio = parts.act(z) / z
    for j in range(0, models.D_MLP, 5):
        one = torch.zeros_like(s).index_fill(0, torch.tensor(j), 1) * s
        whole = lch.affine_expert(fn, x[None], g)
        with torch.no_grad():
            row, out[j] = out[j].clone(), 0.0
        rest = lch.affine_expert(fn, x[None], g)
        with torch.no_grad():
            out[j] = row
        term, offset = (whole.centroid - rest.centroid)[0], (whole.offset - rest.offset)[0]
        torch.testing.assert_close(term @ x + offset, scores[j], rtol=1e-6, atol=1e-9)
        if linearization == "jacobian":
            torch.testing.assert_close(
                term, centroid_of_neurons(parts, pre, one), rtol=1e-6, atol=1e-9
            )
        else:
            bias = parts.b_in[j] if family == "gpt2" else torch.zeros(()).double()
            torch.testing.assert_close(offset, s[j] * ratio[j] * bias, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "hooked gpt2", "opt", "llama", "gemma2"])
@pytest.mark.parametrize("linearization", ["jacobian", "detached"])
def test_at_the_point_itself_targeted_scores_are_those_of_node_attribution(
    family: str, linearization: str
) -> None:
    dtype = torch.float64
    model = models.hooked(dtype) if family == "hooked gpt2" else models.bridge(family, dtype)
    ids = models.tokens(batch=2)
    metric = lch.circuits.logit_difference([[1], [2]], [[3], [4]])
    truth = lch.circuits.node_attribution(
        model, lch.circuits.Prompts(ids, metric), ["neuron"], method=linearization
    )
    for radius in (0.0, 1e-9):  # By the model's own activations, and in closed form.
        scores = lch.circuits.neuron_attribution(
            model,
            ids,
            position=None,
            radius=radius,
            n_samples=3,
            metric=metric,
            linearization=linearization,
        ).scores
        for layer in range(models.N_LAYERS):
            wanted = truth.of("neuron", layer).double()
            torch.testing.assert_close(scores[layer], wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("metric", [None, METRIC])
def test_untargeted_scores_are_averaged_over_positions_and_targeted_ones_add_up(
    metric: lch.cotangents.Metric | None,
) -> None:
    model = models.bridge("gpt2", torch.float64)

    def scores(position: int | list[int] | None) -> torch.Tensor:
        return lch.circuits.neuron_attribution(
            model, IDS, 1, position, radius=0.0, metric=metric
        ).scores[1]

    apart = torch.stack([scores(i) for i in range(IDS.shape[-1])])
    combined = apart.mean(0) if metric is None else apart.sum(0)
    torch.testing.assert_close(scores(None), combined)
    several = apart[[1, 6]].mean(0) if metric is None else apart[[1, 6]].sum(0)
    torch.testing.assert_close(scores([-1, 1]), several)


@pytest.mark.parametrize("targeted", [False, True])
def test_rows_are_scored_alike_whether_they_fit_in_memory_together_or_not(
    monkeypatch: pytest.MonkeyPatch, targeted: bool
) -> None:
    model, ids = models.bridge("llama", torch.float64), models.tokens(batch=2)
    metric = lch.circuits.logit_difference([[1], [2]], [[3], [4]]) if targeted else None
    options = {"position": [1, 2, 3], "radius": 1e-9, "n_samples": 4, "metric": metric}
    together = lch.circuits.neuron_attribution(model, ids, **options).scores[1]
    monkeypatch.setattr(neurons, "_MOST_POINTS", 8)
    apart = lch.circuits.neuron_attribution(model, ids, **options).scores[1]
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-9)


def test_at_radius_zero_one_point_is_as_good_as_many() -> None:
    model = models.bridge("gpt2")
    one, many = (
        lch.circuits.neuron_attribution(model, IDS, 0, radius=0.0, n_samples=n) for n in (1, 64)
    )
    assert many.n_samples == 1
    assert torch.equal(one.scores[0], many.scores[0])


def test_a_batch_averages_over_prompts_and_attachment_makes_no_difference() -> None:
    model, ids = models.bridge("gpt2", torch.float64), models.tokens(batch=3)
    options = {"radius": 0.0, "n_samples": 1}
    together = lch.circuits.neuron_attribution(model, ids, **options).scores[1]
    with lch.attach(model):
        apart = [
            lch.circuits.neuron_attribution(model, row, layers=1, **options).scores[1]
            for row in ids
        ]
    torch.testing.assert_close(together, torch.stack(apart).mean(0))


@pytest.mark.parametrize("metric", [None, METRIC])
def test_there_is_no_dropout(metric: Metric | None) -> None:
    model, ids = models.bridge("gpt2"), models.tokens(1)
    options = {"position": None, "radius": 0.0, "metric": metric}
    expected = neuron_attribution(model, ids, **options).scores
    model.train()
    found = neuron_attribution(model, ids, **options).scores
    assert all(torch.equal(found[layer], expected[layer]) for layer in expected)


def test_ranks_and_percentiles() -> None:
    scores = {0: torch.tensor([1.0, 5.0, 3.0, 3.0]), 2: torch.tensor([9.0, 0.0, 2.0, 4.0])}
    result = lch.circuits.NeuronAttribution(scores, positions=(0,), radius=0.25, n_samples=1)
    assert [(n.layer, n.index) for n in result.top(3)] == [(2, 0), (0, 1), (2, 3)]
    assert [n.index for n in result.top(9, layer=0)][:1] == [1]
    signed = {0: torch.tensor([1.0, -5.0, 3.0])}
    targeted = lch.circuits.NeuronAttribution(signed, (0,), 0.25, n_samples=1, metric="m")
    assert [n.index for n in targeted.top(2)] == [2, 0]
    assert [n.score for n in targeted.top(2, by="magnitude")] == [-5.0, 3.0]
    assert result.neuron(0, 2) == lch.circuits.Neuron(0, 2, 3.0, rank=2, percentile=25.0)
    assert result.neuron(2, 0).percentile == 75.0
    with pytest.raises(lch.SiteError, match="layer 1 was not scored"):
        result.top(1, layer=1)
    with pytest.raises(lch.SiteError, match="neurons 0 to 3"):
        result.neuron(0, 4)


def test_pictures_name_the_top_neurons_or_those_asked_for() -> None:
    scores = {4: torch.tensor([0.1, 2.0, -3.0]), 7: torch.tensor([1.0, 0.2, 0.5])}
    targeted = lch.circuits.NeuronAttribution(scores, (0,), 0.0, 1, metric="logit_difference")
    (axis,) = plots.neuron_scores(targeted, n_named=1).axes
    assert [(text.get_text(), text.xy[1]) for text in axis.texts] == [("2", -3.0), ("0", 1.0)]
    assert (axis.get_yscale(), axis.get_ylabel()) == ("linear", "logit difference")
    assert [label.get_text() for label in axis.get_xticklabels()] == ["4", "7"]
    magnitudes = {layer: values.abs() for layer, values in scores.items()}
    untargeted = lch.circuits.NeuronAttribution(magnitudes, (0,), 0.0, 1)
    (axis,) = plots.neuron_scores(untargeted, named={(7, 1): "1 $x"}).axes
    assert [(text.get_text(), text.xy[1]) for text in axis.texts] == [("1 $x", pytest.approx(0.2))]
    assert axis.get_yscale() == "log"


def test_every_backend_scores_alike() -> None:
    options = {"radius": 0.1, "n_samples": 8}
    one, other = (
        lch.circuits.neuron_attribution(
            model, IDS, generator=torch.Generator().manual_seed(0), **options
        ).scores
        for model in (models.bridge("gpt2", torch.float64), models.hooked(torch.float64))
    )
    for layer in range(models.N_LAYERS):
        torch.testing.assert_close(one[layer], other[layer], rtol=1e-9, atol=0)


def test_interventions_of_the_user_are_part_of_the_pass() -> None:
    model, options = models.bridge("gpt2"), {"radius": 0.0, "n_samples": 1, "layers": 1}
    plain = lch.circuits.neuron_attribution(model, IDS, **options).scores[1]
    with model.hooks(fwd_hooks=[("blocks.1.mlp.hook_in", lambda value, hook: value * 0 + 1)]):
        edited = lch.circuits.neuron_attribution(model, IDS, **options).scores[1]
    truth = scores_by_ablation("gpt2", torch.ones(1, models.D_MODEL).double(), 1, None)
    torch.testing.assert_close(edited.double(), truth, rtol=1e-4, atol=1e-9)
    assert not torch.allclose(edited, plain)


def test_an_mlp_that_computes_something_else_is_refused() -> None:
    model = models.bridge("gpt2")
    inner = model.blocks[1].mlp.original_component
    original = inner.forward
    inner.forward = lambda x: original(torch.tanh(x))
    with pytest.raises(lch.SiteError, match="self-check"):
        lch.circuits.neuron_attribution(model, IDS)


@pytest.mark.usefixtures("as_users_run")
def test_bad_input_is_refused() -> None:
    model = models.bridge("gpt2")
    attribute = lch.circuits.neuron_attribution
    for tokens, match in [
        (torch.tensor([0, models.D_VOCAB]), "vocabulary, 0 to 49"),
        (torch.tensor([-1]), "vocabulary"),
        (torch.zeros(models.N_CTX + 1, dtype=torch.long), "context of 16"),
        (torch.zeros(2, 0, dtype=torch.long), "at least one"),
        (torch.zeros(2, 3), "float32"),
        (torch.ones(3, dtype=torch.bool), "bool"),
        ([1, 2], r"\[1, 2\]"),
        (None, "None"),
    ]:
        with pytest.raises(lch.InputError, match=match):
            attribute(model, tokens)
    bad = ({"position": 7}, {"position": -8}, {"position": []}, {"position": [0, 7]})
    for kw in (*bad, {"position": 1.5}, {"radius": -1.0}, {"n_samples": 0}):
        for metric in (None, METRIC):
            with pytest.raises(lch.InputError, match=next(iter(kw))):
                attribute(model, IDS, metric=metric, **kw)
    with pytest.raises(lch.InputError, match="Leave one out"):
        attribute(model, IDS, metric=METRIC, cotangent=torch.ones(models.D_MODEL))
    with pytest.raises(lch.InputError, match="one number a prompt"):
        attribute(model, IDS, metric=lch.cotangents.Metric(lambda logits: logits[:, -1]))
    with pytest.raises(lch.InputError, match="constant"):
        attribute(model, IDS, metric=lch.cotangents.Metric(lambda logits: logits[:, 0, 0] * 0))
    with pytest.raises(lch.SiteError, match="layers 0 to 2"):
        attribute(model, IDS, layers=3, metric=METRIC)
    with pytest.raises(lch.InputError, match="boot_transformers"):
        attribute(models.huggingface("gpt2"), IDS)
    model.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(lch.VanishingCentroidError):
        attribute(model, IDS)

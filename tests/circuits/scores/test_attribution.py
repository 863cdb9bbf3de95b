"""What nodes do for a metric, against the frozen model itself, finite differences and other tools.

Exactness is asked for in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.tools.analysis import attribution_patch

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens import (
    NodePoint,
    node_points,
    pattern_names,
    run_edited,
)
from lch_plugin.circuits import (
    METHODS,
    Method,
    Node,
    Prompts,
    kl_divergence,
    log_odds,
    log_probability,
    logit_difference,
    node_attribution,
    pattern_attribution,
    run_circuit,
    task,
)
from lch_plugin.circuits.scores.attribution import (
    activations,
    contributions,
    embedding_name,
    metric_gradients,
)
from lch_plugin.cotangents import Metric
from lch_plugin.linearization import DetachedMode
from tests import models
from tests.toolkits import require_hooked

F64 = torch.float64
Edit = Callable[[Tensor], Tensor]
CLEAN, CORRUPT = models.tokens(seed=1), models.tokens(seed=2)
SEVERAL = ([[1, 5], [2]], [[3], [4, 6, 7]])  # Answers and foils.
METRIC = logit_difference(*SEVERAL)
PAIR, ALONE = Prompts(CLEAN, METRIC, CORRUPT), Prompts(CLEAN, METRIC)
# Two kinds of attention (GQA in llama, soft caps in gemma2), of MLP (gated in both) and of block
# (parallel in gpt_neox); biases in gpt2, gpt_neox and qwen2.
FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen2", "gemma2")
WITHOUT_BIASES = ("llama", "gemma2")
BACKENDS = (*FAMILIES, "hooked")


def frozen(
    model,
    batch: Prompts,
    edits: dict[str, Edit],
    held: dict[str, Tensor] | None = None,
    **mode: bool,
) -> Tensor:
    """The metric summed over prompts, of the model frozen at the clean prompts, edited.

    Hook points that are held have a value of their own whatever comes before them.
    """
    embed, held = embedding_name(model), held or {}

    def run(recording: DetachedMode, changes: dict[str, Edit]) -> Tensor:
        def start(name: str, value: Tensor) -> Tensor:
            value = changes.get(name, torch.clone)(held.get(name, value).detach())
            return recording.follow(value.clone().requires_grad_())

        starts = {name: partial(start, name) for name in (embed, *held)}
        with recording:
            logits = run_edited(model, batch.clean, {**changes, **starts})
        return batch.measure(logits).detach().sum()

    at_clean = DetachedMode(**mode)
    run(at_clean, {})
    return run(DetachedMode(replay=at_clean.recorded, **mode), edits)


def replaced(point: NodePoint, index: int, target: Tensor | float) -> Edit:
    """An edit that puts the target in the place of one node."""

    def edit(value: Tensor) -> Tensor:
        node = torch.zeros_like(point.split(value))
        node[:, :, index] = 1
        # A sum with the value that came in, which the frozen model follows.
        return value + node.reshape(value.shape) * (target - value.detach())

    return edit


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("reference", ["zero", "corrupt"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_removing_a_node_from_the_frozen_model_is_worth_its_score(
    backend: str, reference: str
) -> None:
    model = models.float64(backend)
    batch = ALONE if reference == "zero" else PAIR
    points = node_points(model)
    found = contributions(model, batch, points)
    twin = activations(model, CORRUPT, [p.name for p in points])
    for point, index in ((points[0], 1), (points[3], 5)):
        edit = replaced(point, index, twin[point.name] if reference == "corrupt" else 0.0)
        removed = found.metric.sum() - frozen(model, batch, {point.name: edit})
        score = found.nodes[point.name][..., index].sum()
        torch.testing.assert_close(score, removed, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["greater_than", "agreement", "induction"])
def test_with_several_answers_or_foils_scores_are_exact_for_the_logit_difference(name: str) -> None:
    model = lch.load_demo_model(dtype=F64)
    points = node_points(model)
    errors = {}
    for metric in (logit_difference, log_odds):
        (batch, *_) = task(model, name, 2, metric=metric)
        assert batch.metric.name == metric.__name__
        found = contributions(model, batch, points)
        twin = activations(model, batch.corrupt, [p.name for p in points])
        worth = {
            (point, i): found.nodes[point.name][..., i].sum()
            for point in points
            for i in range(point.n_nodes)
        }
        top = sorted(worth, key=lambda node: -abs(worth[node]))[:4]
        removed = [
            found.metric.sum() - frozen(model, batch, {p.name: replaced(p, i, twin[p.name])})
            for p, i in top
        ]
        errors[metric] = max(
            abs(float(worth[node] / value) - 1) for node, value in zip(top, removed, strict=True)
        )
    assert errors[logit_difference] < 1e-9
    if name == "induction":
        assert errors[log_odds] > 0.1


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("make", [log_odds, lambda answers, _: log_probability(answers)])
def test_of_a_metric_that_is_not_linear_a_score_is_the_change_to_first_order(make) -> None:
    model, step = models.float64("llama"), 1e-5
    batch = Prompts(CLEAN, make(*SEVERAL), CORRUPT)
    points = node_points(model)
    found = contributions(model, batch, points)
    twin = activations(model, CORRUPT, [p.name for p in points])
    for point, index in ((points[0], 1), (points[3], 5)):

        def taken(share: float, point=point, index=index) -> Tensor:
            """By a part of the way to the twin, for a whole one."""
            target = twin[point.name]
            edit = replaced(point, index, target)
            moved = {point.name: lambda value: value + share * (edit(value) - value)}
            return (found.metric.sum() - frozen(model, batch, moved)) / share

        score = found.nodes[point.name][..., index].sum()
        torch.testing.assert_close(score, (taken(step) + taken(-step)) / 2, rtol=1e-6, atol=1e-9)
        assert abs(taken(1) / score - 1) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_whole_mlps_are_the_sum_of_their_neurons(backend: str, method: str) -> None:
    model = models.float64(backend)
    neurons = node_attribution(model, PAIR, ("neuron",), method=method)
    mlps = node_attribution(model, PAIR, ("mlp",), method=method)
    for layer in range(models.N_LAYERS):
        torch.testing.assert_close(
            mlps.of("mlp", layer)[0], neurons.of("neuron", layer).sum(), rtol=1e-5, atol=1e-6
        )


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("family", WITHOUT_BIASES)
def test_without_biases_the_embeddings_account_for_the_metric(family: str) -> None:
    model = models.float64(family)
    found = contributions(model, ALONE, ())
    torch.testing.assert_close(found.embeddings.sum(-1), found.metric, rtol=1e-9, atol=1e-9)


def test_embeddings_positions_and_biases_add_up_to_the_metric() -> None:
    """Every source there is, also of the corrupt model: between two prompts biases cancel."""
    model = models.hooked(F64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".b_" in name or name.endswith(".b"):
                parameter.zero_()
    found = metric_gradients(
        model, ALONE, ["hook_embed", "hook_pos_embed"], linearization="detached"
    )
    worth = sum((found.activations[n] * found.gradients[n]).sum((1, 2)) for n in found.gradients)
    torch.testing.assert_close(worth, found.metric, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("in_float64")
def test_the_last_layer_and_the_direct_paths_account_for_the_metric() -> None:
    """What all nodes write reaches the logits of the last layer's own, by no path but the norm."""
    model = models.float64("llama")
    last = f"blocks.{models.N_LAYERS - 1}"
    names = [f"{last}.hook_resid_pre", f"{last}.hook_attn_out", f"{last}.hook_mlp_out"]
    names = [model.hook_dict[name].name for name in names]
    found = metric_gradients(model, ALONE, names, linearization="detached")
    # Gradients in the writes are those of the final norm and unembedding; every write once.
    final = found.gradients[names[2]]
    logit_parts = sum((found.activations[n] * final).sum((1, 2)) for n in names)
    torch.testing.assert_close(logit_parts, found.metric, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_jacobian_is_what_a_small_step_towards_the_reference_costs(backend: str) -> None:
    model, step = models.float64(backend), 1e-5
    points = node_points(model)
    found = contributions(model, PAIR, points, linearization="jacobian")
    twin = activations(model, CORRUPT, [p.name for p in points])
    for point in (points[0], points[3]):
        # All nodes of a layer at once, each in a direction of its own length.
        weights = torch.linspace(-1, 1, point.n_nodes, dtype=F64)

        def moved(sign: int, point=point, weights=weights) -> Tensor:
            def edit(value: Tensor) -> Tensor:
                change = point.split(twin[point.name] - value) * weights[:, None]
                return value + sign * step * change.reshape(value.shape)

            with torch.no_grad():
                return METRIC.fn(run_edited(model, CLEAN, {point.name: edit})).sum()

        slope = (moved(-1) - moved(1)) / (2 * step)
        score = (found.nodes[point.name] * weights).sum()
        torch.testing.assert_close(score, slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_on_the_corrupt_side_the_jacobian_is_attribution_patching(family: str) -> None:
    """TransformerLens takes the gradient on the corrupt prompt and a denoising sign.

    Swap the prompts, and putting back what was removed is minus removing it.
    """
    model = models.bridge(family)
    metric = logit_difference([[1]], [[3]])
    theirs = attribution_patch(model, CLEAN, CORRUPT, lambda logits: metric.fn(logits)[0])
    both = logit_difference([[1]] * 2, [[3]] * 2)
    ours = contributions(
        model,
        Prompts(CORRUPT, both, CLEAN),
        node_points(model, ("head", "mlp")),
        linearization="jacobian",
    )
    points = {(p.kind, p.layer): p.name for p in node_points(model, ("head", "mlp"))}
    kinds = {"attn_head_out": "head", "mlp_out": "mlp"}
    for node, score in theirs.node_scores.items():
        if node.kind == "embed":
            mine = ours.embeddings[:, node.position]
        else:
            name = points[kinds[node.kind], node.layer]
            mine = ours.nodes[name][:, node.position, node.head or 0]
        assert -float(mine.mean()) == pytest.approx(score, rel=1e-4, abs=1e-5)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("backend", BACKENDS)
def test_through_patterns_is_the_slope_of_a_model_with_live_patterns(backend: str) -> None:
    """Gates and norm scales frozen, patterns computed: its finite differences are the scores."""
    model, step = models.float64(backend), 1e-4
    (point, *_) = points = node_points(model)
    through, beside = (
        contributions(model, PAIR, points, through_patterns=t).nodes[point.name]
        for t in (True, False)
    )
    twin = activations(model, CORRUPT, [point.name])[point.name]
    edits = {s: {point.name: lambda v, s=s: v + s * step * (twin - v.detach())} for s in (1, -1)}

    def slope(**mode) -> Tensor:
        low, high = (frozen(model, PAIR, edits[s], **mode) for s in (1, -1))
        return (high - low) / (2 * step)

    torch.testing.assert_close(through.sum(), slope(through_patterns=True), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(beside.sum(), slope(), rtol=1e-6, atol=1e-8)
    assert float((through - beside).norm() / beside.norm()) > 0.01


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pattern_is_worth_what_replacing_it_in_the_frozen_model_costs(backend: str) -> None:
    model, head = models.float64(backend), 2
    names = pattern_names(model)
    patterns = activations(model, CLEAN, names)
    twin = activations(model, CORRUPT, names)[names[1]]

    def look_elsewhere(pattern: Tensor) -> Tensor:
        return torch.cat([pattern[:, :head], twin[:, head:][:, :1], pattern[:, head + 1 :]], 1)

    left = frozen(model, PAIR, {names[1]: look_elsewhere}, held=patterns, through_patterns=True)
    with torch.no_grad():
        cost = METRIC.fn(model(CLEAN)).sum() - left
    score = pattern_attribution(model, PAIR).of("head", 1)[head].double()
    torch.testing.assert_close(score, cost / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("linearization", ["detached", "jacobian"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_twin_a_pattern_scores_as_its_head(backend: str, linearization: str) -> None:
    """Attention is linear in the pattern as it is in the values: both are all of it."""
    model = models.float64(backend)
    patterns = pattern_attribution(model, ALONE, linearization=linearization)
    heads = node_attribution(model, ALONE, ("head",), method=linearization)
    assert patterns.points == heads.points
    torch.testing.assert_close(patterns.values, heads.values, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_the_way_of_the_nodes_scores_are_derivatives_in_what_a_node_keeps(backend: str) -> None:
    """Held to finite differences in the blended model, node by node."""
    model, share, step = models.float64(backend), 0.6, 1e-4
    points = node_points(model, ("head", "mlp"))
    twin = activations(model, CORRUPT, [p.name for p in points])

    def metric(point: NodePoint, index: int, of_node: float) -> Tensor:
        def blend(at: NodePoint, value: Tensor) -> Tensor:
            keep = torch.full((at.n_nodes, 1), share, dtype=F64)
            if at == point:
                keep[index] = of_node
            other, own = at.split(twin[at.name]), at.split(value)
            return (other + keep * (own - other)).reshape(value.shape)

        with torch.no_grad():
            logits = run_edited(model, CLEAN, {p.name: partial(blend, p) for p in points})
        return METRIC.of(logits).mean()

    found = node_attribution(model, PAIR, ("head", "mlp"), method=Method(nodes=(share,)))
    for point, index in ((points[0], 2), (points[3], 0), (points[-2], 1), (points[-1], 0)):
        slope = (metric(point, index, share + step) - metric(point, index, share - step)) / 2 / step
        score = found.of(point.kind, point.layer)[index].double()
        torch.testing.assert_close(score, slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["gpt2", "llama", "hooked"])
def test_along_the_way_of_the_nodes_scores_add_up_to_what_all_of_them_recover(backend: str) -> None:
    model, n = models.float64(backend), 64
    middles = tuple((i + 0.5) / n for i in range(n))
    found = node_attribution(model, PAIR, method=Method(nodes=middles))
    everything = found.circuit(len(found.values))
    kept = run_circuit(model, PAIR, everything) - run_circuit(model, PAIR, ~everything)
    torch.testing.assert_close(found.values.double().sum(), kept.mean(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_the_way_of_the_prompt_embeddings_are_between_the_two(backend: str) -> None:
    """Held to gradients at the hook points of a model whose embeddings are put there by hand."""
    model, shares = models.float64(backend), (0.25, 1.0)
    points, embed = node_points(model, ("head", "mlp")), embedding_name(model)
    names = [p.name for p in points]
    clean, corrupt = (activations(model, ids, [embed, *names]) for ids in (CLEAN, CORRUPT))
    expected = torch.zeros(sum(p.n_nodes for p in points), dtype=F64)
    for share in shares:
        seen: dict[str, Tensor] = {}

        def put(_value: Tensor, share: float = share) -> Tensor:
            mixed = (1 - share) * corrupt[embed] + share * clean[embed]
            return mixed.requires_grad_()

        def see(name: str, value: Tensor, seen: dict[str, Tensor] = seen) -> Tensor:
            return seen.setdefault(name, value)

        edits = {embed: put, **{name: partial(see, name) for name in names}}
        metric = METRIC.of(run_edited(model, CLEAN, edits)).sum()
        slopes = torch.autograd.grad(metric, [seen[name] for name in names])
        for_all = [
            p.split(slope * (clean[p.name] - corrupt[p.name])).sum((0, 1, 3))
            for p, slope in zip(points, slopes, strict=True)
        ]
        expected += torch.cat(for_all) / len(CLEAN) / len(shares)
    found = node_attribution(model, PAIR, ("head", "mlp"), method=Method(prompt=shares))
    torch.testing.assert_close(found.values.double(), expected, rtol=1e-5, atol=1e-7)


def small(**kw: object) -> Any:
    """One of the models that TransformerLens alone knows."""
    require_hooked()
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"n_layers": 2, "d_model": 16, "n_heads": 2, "d_head": 8, "d_mlp": 24, "n_ctx": 8}
    config = HookedTransformerConfig(
        **sizes, d_vocab=models.D_VOCAB, seed=0, device="cpu", dtype=F64, **kw
    )
    return HookedTransformer(config, models.tokenizer()).to(F64)


@pytest.mark.parametrize(
    "options",
    [{"act_fn": "solu"}, {"act_fn": "gelu", "num_experts": 4, "experts_per_token": 2}],
    ids=["SoLU", "mixture of experts"],
)
def test_softmaxes_that_are_no_patterns_stay_fixed(options: dict[str, object]) -> None:
    model = small(**options)
    patterns = pattern_attribution(model, ALONE)
    heads = node_attribution(model, ALONE, ("head",), method="detached")
    torch.testing.assert_close(patterns.values, heads.values)


def test_a_bridge_and_a_hooked_transformer_agree() -> None:
    for method in METHODS:
        scores = [
            node_attribution(models.float64(b), PAIR, method=method).values
            for b in ("gpt2", "hooked")
        ]
        torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        *(pattern_attribution(models.float64(b), PAIR).values for b in ("gpt2", "hooked")),
        rtol=1e-5,
        atol=1e-7,
    )


def test_bfloat16_scores_are_those_of_float64_but_for_rounding() -> None:
    model = models.bridge("gpt2", torch.bfloat16)
    found = node_attribution(model, PAIR, ("head", "mlp"))
    truth = node_attribution(models.float64("gpt2"), PAIR, ("head", "mlp"))
    assert found.values.dtype == torch.float32
    assert models.relative_error(found.values, truth.values) < 0.1


def test_batches_are_weighed_by_their_prompts() -> None:
    model = models.float64("gpt2")
    three = Prompts(models.tokens(3, seed=3), logit_difference([[1]] * 3, [[3]] * 3))
    score = partial(node_attribution, model, method="detached")
    separate = [score(batch).values for batch in (ALONE, three)]
    together = score(iter([ALONE, three])).values
    torch.testing.assert_close(together, (2 * separate[0] + 3 * separate[1]) / 5)


def test_a_metric_is_differentiated_as_it_is() -> None:
    """The detached linearisation is of the model, not of the softmax that a metric may take."""
    model = models.float64("gpt2")

    def scores(fn: Callable[[Tensor], Tensor]) -> Tensor:
        pair = Prompts(CLEAN, Metric(fn), CORRUPT)
        return node_attribution(model, pair, method="detached").values.double()

    def probability(logits: Tensor) -> Tensor:
        return logits[:, -1].softmax(-1)[:, 5]

    with torch.no_grad():
        logits = model(CLEAN)
    logits.requires_grad_()
    (slope,) = torch.autograd.grad(probability(logits).sum(), logits)
    torch.testing.assert_close(scores(probability), scores(lambda y: (y * slope).sum((1, 2))))


@pytest.mark.parametrize("backend", ["gpt2", "hooked"])
def test_the_model_is_left_as_it_was(backend: str) -> None:
    model = models.hooked() if backend == "hooked" else models.bridge(backend)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    hooks = [len(p.fwd_hooks) for p in model.hook_dict.values()]
    node_attribution(model, PAIR)
    pattern_attribution(model, PAIR)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert [m.training for m in model.modules()] == modes
    assert [len(p.fwd_hooks) for p in model.hook_dict.values()] == hooks
    assert all(p.grad is None for p in model.parameters())


def test_hooks_of_the_users_take_part() -> None:
    model = models.bridge("gpt2", F64)
    neurons = node_points(model, ("neuron",))[1].name

    def silence(value: Tensor, hook: object) -> Tensor:
        value = value.clone()
        value[..., 7] = 0
        return value

    untouched = node_attribution(model, PAIR)
    model.add_hook(neurons, silence)
    edited = node_attribution(model, PAIR)
    assert untouched.node(Node("neuron", 1, 7)).score != 0
    assert edited.node(Node("neuron", 1, 7)).score == 0
    expected = model(CLEAN)
    model.reset_hooks()
    assert not torch.allclose(expected, model(CLEAN))
    # The later layers see the edit as well.
    assert not torch.equal(edited.of("head", 2), untouched.of("head", 2))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_modes_make_no_difference(mode: Callable) -> None:
    model = models.float64("gpt2")
    logits = model(CORRUPT).detach()
    makers = {
        "logit difference": lambda: Prompts(CLEAN.clone(), METRIC, CORRUPT.clone()),
        "probability": lambda: Prompts(CLEAN.clone(), log_probability([[1], [2, 3]])),
        "KL": lambda: Prompts(CLEAN.clone(), kl_divergence(logits.clone()), CORRUPT.clone()),
    }
    for make in makers.values():
        score = partial(
            node_attribution, model, method="detached" if make().corrupt is None else "integrated"
        )
        expected = score(make()).values
        with mode():
            found = score(make()).values
            assert not torch.is_grad_enabled()
        assert torch.equal(found, expected)


@pytest.mark.usefixtures("as_users_run")
def test_bad_input_is_refused() -> None:
    model = models.float64("gpt2")
    flat = Metric(lambda logits: logits[:, -1, 0] * 0)
    unlinked = Metric(lambda logits: logits[:, -1, 0].detach())
    scalar = Metric(lambda logits: logits[:, -1].sum())
    number = Metric(lambda logits: float(logits.detach().sum()))
    infinite = Metric(lambda logits: logits[:, -1, 0] / 0)
    root = Metric(lambda logits: (logits[:, -1, 0] - logits[:, -1, 0].detach()).sqrt())
    at_clean = partial(node_attribution, model, method="detached")
    for metric, match in [
        (flat, "constant"),
        (unlinked, "constant"),
        (kl_divergence(model(CLEAN).detach()), "take the logits of another prompt"),
        (scalar, "one number a prompt"),
        (number, "gave float"),
        (infinite, "not finite"),
        (root, "gradient of metric .* is not finite"),
        (logit_difference([[1]], [[2]]), "made for 1 prompts and got 2"),
        (logit_difference([[1]] * 2, [[2]] * 2, position=9), "position 9"),
        (logit_difference([[1]] * 2, [[models.D_VOCAB]] * 2), "vocabulary"),
    ]:
        with pytest.raises(lch.InputError, match=match):
            at_clean(Prompts(CLEAN, metric, CORRUPT))
    for tokens, match in [
        (CLEAN + models.D_VOCAB, "vocabulary, 0 to 49"),
        (models.tokens(pos=models.N_CTX + 1), "longer than the model's context"),
        (CLEAN.double(), "integers"),
    ]:
        with pytest.raises(lch.InputError, match=match):
            at_clean(Prompts(tokens, METRIC))
    with pytest.raises(lch.InputError, match="no prompts"):
        node_attribution(model, [])
    with pytest.raises(lch.InputError, match="linearization='linear'"):
        contributions(model, PAIR, linearization="linear")  # type: ignore[arg-type]
    with pytest.raises(lch.InputError, match=r"method='best' is not known\. There are integrated"):
        node_attribution(model, PAIR, method="best")
    with pytest.raises(lch.InputError, match="Give twins, or method='detached'"):
        node_attribution(model, ALONE)
    for wrong in (
        {},
        {"prompt": (1.5,)},
        {"nodes": (0.0,)},
        {"nodes": (1.0,)},
        {"prompt": (1.0,), "linearization": "linear"},
    ):
        with pytest.raises(lch.InputError):
            Method(**wrong)
    with pytest.raises(lch.InputError, match="TransformerBridge"):
        node_attribution(torch.nn.Linear(2, 2), PAIR)  # type: ignore[arg-type]

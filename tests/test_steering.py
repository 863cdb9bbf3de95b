"""Steering, held to derivatives of the component and to a model left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import lch_plugin as lch
from lch_plugin.steering import SteeringEffects, steering, steering_effects
from tests import families, models
from tests.toolkits import needs_saes

MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: models.bridge("gpt2", torch.float64),
    "opt": lambda: models.bridge("opt", torch.float64),
    "gemma3_text": lambda: models.bridge("gemma3_text", torch.float64),
    "HookedTransformer": lambda: models.hooked(torch.float64),
}
MLP = "blocks.1.mlp"


@pytest.fixture(scope="module")
def bridge() -> Any:
    model = models.bridge("gpt2", torch.float64)
    model(models.tokens())  # A bridge adds hooks of its own in its first pass.
    return model


def direction(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(models.D_MODEL, dtype=torch.float64, generator=generator)


def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        output = model(models.tokens() if ids is None else ids)
    return output if isinstance(output, Tensor) else output.logits


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def written(model: Any, component: str, vector: Tensor) -> Tensor:
    """What a component writes while the model is steered there."""
    found: list[Tensor] = []
    hook = model.get_submodule(component).register_forward_hook(
        lambda _m, _a, y: found.append(y[0] if isinstance(y, tuple) else y)
    )
    with steering(model, component, vector):
        logits(model)
    hook.remove()
    return found[0]


@needs_saes
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("component", [MLP, "blocks.1.attn", "blocks.1"])
def test_the_component_reads_the_sum(name: str, component: str) -> None:
    if (name, component) == ("opt", MLP):
        pytest.skip("OPT's MLP is no module of its own")
    model, d = MODELS[name](), direction()
    alone = lch.saes.CapturedComponent(model, [models.tokens()], component)
    with torch.no_grad():
        torch.testing.assert_close(written(model, component, d), alone(alone.x + d))
    if name in ("gpt2", "HookedTransformer"):  # Others have norms or softmaxes in float32.
        _, slope = torch.autograd.functional.jvp(alone, alone.x, d.expand_as(alone.x))
        rise, fall = (written(model, component, sign * 1e-5 * d) for sign in (1, -1))
        torch.testing.assert_close((rise - fall) / 2e-5, slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_what_it_was(name: str) -> None:
    model, d = MODELS[name](), direction()
    clean = logits(model)
    before = n_hooks(model)
    with steering(model, MLP, d):
        assert not torch.equal(logits(model), clean)
    fails = model.get_submodule("blocks.2").register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), steering(model, MLP, d):
        logits(model)
    fails.remove()
    effects = steering_effects(model, [models.tokens()], MLP, d[None], n_random=2)
    assert n_hooks(model) == before
    assert torch.equal(logits(model), clean)
    assert effects.kl.min() > 0


def test_nothing_added_changes_nothing(bridge: Any) -> None:
    clean = logits(bridge)
    with steering(bridge, MLP, direction() * 0):
        assert torch.equal(logits(bridge), clean)
    effects = steering_effects(
        bridge, [models.tokens()], MLP, direction()[None], strengths=[0.0, 0.5], n_random=2
    )
    for values in (effects.kl, effects.random_kl, effects.logit_change, effects.logit_shift):
        assert not values[:, 0].any()
        assert values[:, 1].any()


def test_contexts_add_up(bridge: Any) -> None:
    a, b = direction(0), direction(1)
    with steering(bridge, MLP, a), steering(bridge, MLP, b):
        nested = logits(bridge)
    with steering(bridge, MLP, a + b):
        torch.testing.assert_close(logits(bridge), nested)


def test_positions(bridge: Any) -> None:
    """Earlier tokens do not see it, later ones do, through attention."""
    clean = logits(bridge)
    with steering(bridge, MLP, direction(), [3]):
        listed = logits(bridge)
    with steering(bridge, MLP, direction(), slice(3, 4)):
        assert torch.equal(logits(bridge), listed)
    changed = (listed != clean).any(-1).any(0)
    assert changed.tolist() == [False] * 3 + [True] * 4


@needs_saes
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("site", ["mlp", "attn", "block"])
def test_centroids_are_those_of_the_steered_input(name: str, site: Any) -> None:
    """Also where the hook points were there first."""
    if (name, site) == ("opt", "mlp"):
        pytest.skip("OPT's MLP is no module of its own")
    model, d, v = MODELS[name](), direction(), lch.cotangents.Random(0)
    component = {"mlp": MLP, "attn": "blocks.1.attn", "block": "blocks.1"}[site]
    with lch.attach(model, layers=1, site=site, cotangent=v) as handle:
        (hook,) = handle.hook_names
        with steering(model, hook, d):
            _, cache = model.run_with_cache(models.tokens(), names_filter=[hook])
    alone = lch.saes.CapturedComponent(model, [models.tokens()], component)
    torch.testing.assert_close(
        cache[hook], lch.centroid(alone, alone.x + d, v), rtol=1e-8, atol=1e-10
    )


@needs_saes
def test_names_of_hook_points_stand_for_what_the_component_reads(bridge: Any) -> None:
    def steered(model: Any, component: str) -> Tensor:
        with steering(model, component, direction()):
            return logits(model)

    assert torch.equal(steered(bridge, f"{MLP}.hook_centroid"), steered(bridge, MLP))
    assert torch.equal(steered(bridge, f"{MLP}.hook_in"), steered(bridge, MLP))
    span = steered(bridge, "blocks.2.hook_centroid_from_1")
    assert torch.equal(span, steered(bridge, "blocks.1"))
    model = models.huggingface("gpt2", torch.float64)
    hooked = lch.saes.HookedModel(model, models.tokenizer(), "transformer.h.1.mlp")
    by_hook = steered(hooked, "transformer.h.1.mlp.hook_centroid")
    assert torch.equal(by_hook, steered(model, "transformer.h.1.mlp"))
    torch.testing.assert_close(by_hook, steered(bridge, MLP))


@pytest.mark.parametrize("name", ["gpt2", "HookedTransformer"])
def test_heads_are_joined_for_a_vector_as_wide_as_all_of_them(name: str) -> None:
    """As SAELens trains on ``hook_z``."""
    model, d, hook = MODELS[name](), direction(), "blocks.1.attn.hook_z"
    seen: list[Tensor] = []

    def add(z: Tensor, **_: Any) -> Tensor:
        seen.append(z)
        z = z.clone()
        z[:, 2:] += d.view(z.shape[2:])
        return z

    with torch.no_grad():
        edited = model.run_with_hooks(models.tokens(), fwd_hooks=[(hook, add)])
    with steering(model, hook, d, slice(2, None)):
        torch.testing.assert_close(logits(model), edited)
    effects = steering_effects(model, [models.tokens()], hook, d[None], n_random=2)
    assert effects.input_norm == pytest.approx(float(seen[0].flatten(2).norm(dim=-1).mean()))
    if name == "HookedTransformer":  # Where heads are apart, one vector goes to every head.
        with steering(model, hook, d[:8]):
            every = logits(model)
        with steering(model, hook, d[:8].repeat(4)):
            torch.testing.assert_close(logits(model), every)


def test_a_centroids_hook_point_is_known_by_what_it_is_of(bridge: Any) -> None:
    """Not by its name, which with a late cotangent is the model's, or ends in a label."""
    sites = [
        lch.Site("mlp", 1, cotangent=lch.cotangents.Logit(3)),
        lch.Site("mlp", 1, label="again"),
        lch.Site("attn", 1, label="attention"),
        lch.Site("span", (1, 2), label="span"),
        lch.Site("model"),
    ]
    stands_for = [MLP, MLP, "blocks.1.attn", "blocks.1", "hook_embed"]
    for site, component in zip(sites, stands_for, strict=True):
        with steering(bridge, component, direction()):
            expected = logits(bridge)
        with lch.attach(bridge, site=site) as handle:
            with steering(bridge, handle.hook_names[0], direction()):
                assert torch.equal(logits(bridge), expected)
            with steering(bridge, handle.hook_names[0], direction()), torch.no_grad():
                assert torch.isfinite(logits(bridge)).all()


@needs_saes
def test_a_components_input_is_not_its_output_of_the_same_name() -> None:
    """Of SAELens' wrapper a module's name is the hook point of what it writes."""
    model, name = models.huggingface("gpt2", torch.float64), "transformer.h.1.mlp"
    with steering(model, name, direction()):
        expected = logits(model)
    hooked = lch.saes.HookedModel(model, models.tokenizer(), name, activations=[name])
    with steering(hooked, f"{name}.hook_centroid", direction()):
        assert torch.equal(logits(model), expected)


def test_inputs_with_nan_in_them_are_steered_too() -> None:
    """A padded position of nothing but NaN says nothing of the others."""
    linear = nn.Linear(4, 4).double()
    x = torch.ones(1, 3, 4, dtype=torch.float64)
    x[0, 0] = torch.nan
    with steering(nn.Sequential(linear), "0", torch.ones(4)):
        found = linear(x)
    torch.testing.assert_close(found[:, 1:], linear(x[:, 1:] + 1))


def test_small_effects_are_no_rounding() -> None:
    """Of second order in the strength, and never negative, in single precision too."""
    model = models.bridge("gpt2")
    strengths = (1e-3, 2e-3)
    ids = models.tokens()
    d = direction()[None].float()
    effects = steering_effects(model, [ids], MLP, d, strengths=strengths, n_random=8)
    for kl in (effects.kl, effects.random_kl):
        assert bool((kl > 0).all())
        torch.testing.assert_close(
            kl[:, 1] / kl[:, 0], torch.full_like(kl[:, 0], 4), rtol=0.1, atol=0
        )
    assert bool(effects.ratios.isfinite().all())


def test_generation_is_steered() -> None:
    loaded = lch.load_demo_model()
    w = 20 * torch.nn.functional.normalize(direction().float(), dim=0).repeat(4)
    settings: Any = {"max_new_tokens": 8, "do_sample": False, "verbose": False}
    before = loaded.generate("Once there was", **settings)
    with steering(loaded, "blocks.2.hook_centroid", w):
        assert loaded.generate("Once there was", **settings) != before
    assert loaded.generate("Once there was", **settings) == before


@pytest.mark.parametrize("name", list(MODELS))
def test_blocks_before_the_component_run_once(name: str) -> None:
    """And again to see that this changes nothing; a hook that edits there is seen to."""
    model = MODELS[name]()
    ids, d = models.tokens(batch=3), direction()[None]
    model(ids)
    calls: list[int] = []
    counting = model.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    quick = steering_effects(model, [ids], MLP, d, n_random=2)
    # A pass for the norm, and the clean one.
    assert len(calls) == 2
    counting.remove()
    noise = torch.Generator().manual_seed(0)

    def edit(_module: Any, _args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        x = x + 1e-9 * torch.rand(x.shape, generator=noise, dtype=x.dtype)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = model.blocks[0].register_forward_hook(edit)
    counting = model.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    slow = steering_effects(model, [ids], MLP, d, n_random=2, generator=None)
    assert len(calls) > 2 + 3 * 3
    counting.remove()
    handle.remove()
    torch.testing.assert_close(quick.kl, slow.kl, rtol=1e-4, atol=1e-12)
    assert "forward" not in vars(model.blocks[0])


def test_effects_are_those_of_the_definition(bridge: Any) -> None:
    ids, ds = models.tokens(batch=3), torch.stack([direction(0), direction(1)])
    effects = steering_effects(
        bridge, ids.split(2), MLP, ds, strengths=[0.2, -0.5], positions=slice(2, None), n_random=3
    )
    seen: list[Tensor] = []
    hook = bridge.get_submodule(MLP).register_forward_pre_hook(lambda _m, x: seen.append(x[0]))
    clean = logits(bridge, ids)
    hook.remove()
    norm = float(seen[0][:, 2:].norm(dim=-1).mean())
    assert effects.input_norm == pytest.approx(norm)
    assert effects.strengths == (0.2, -0.5)
    for i, d in enumerate(ds):
        for j, strength in enumerate(effects.strengths):
            with steering(bridge, MLP, strength * norm * d / d.norm(), slice(2, None)):
                steered = logits(bridge, ids)
            p, q = (t.log_softmax(-1)[:, 2:] for t in (clean, steered))
            kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True)
            torch.testing.assert_close(effects.kl[i, j], kl.sum(-1).mean(1))
            change = (steered - clean)[:, 2:]
            change = change - change.mean(-1, keepdim=True)
            torch.testing.assert_close(effects.logit_shift[i, j], change.mean((0, 1)))
            torch.testing.assert_close(effects.logit_change[i, j], change.abs().mean())
            assert effects.promoted(i, j, 3).tolist() == change.mean((0, 1)).topk(3)[1].tolist()
            assert (
                effects.suppressed(i, j, 3).tolist() == (-change.mean((0, 1))).topk(3)[1].tolist()
            )


def test_controls_have_the_norms_of_the_directions_beside_them(bridge: Any) -> None:
    seen: list[Tensor] = []
    hook = bridge.get_submodule(MLP).register_forward_pre_hook(lambda _m, x: seen.append(x[0]))
    effects = steering_effects(
        bridge,
        [models.tokens()],
        MLP,
        torch.stack([direction(0), direction(1) * 9]),
        strengths=[0.1, 2.0],
        positions=[-1],
        n_random=5,
        generator=torch.Generator().manual_seed(0),
    )
    hook.remove()
    # Three passes are clean: for the norm, for the logits, and to see that blocks can be skipped.
    clean, moved = seen[0], torch.stack(seen[3:])
    assert torch.equal(moved[:, :, :-1], clean[:, :-1].expand_as(moved[:, :, :-1]))
    norms = (moved - clean)[:, :, -1].norm(dim=-1) / effects.input_norm
    expected = torch.tensor([0.1, 2.0] * 7, dtype=torch.float64)[:, None].expand_as(norms)
    torch.testing.assert_close(norms, expected)
    directions = torch.nn.functional.normalize((moved - clean)[4::2, 0, -1], dim=-1)
    assert len(directions) == 5
    assert (directions @ directions.T).triu(1).abs().max() < 0.9


def test_the_same_generator_gives_the_same_controls(bridge: Any) -> None:
    def kl(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        ids = [models.tokens()]
        return steering_effects(
            bridge, ids, MLP, direction()[None], n_random=2, generator=generator
        ).random_kl

    assert torch.equal(kl(0), kl(0))
    assert not torch.equal(kl(0), kl(1))


def test_ratios_and_p_values() -> None:
    kl = torch.tensor([[[2.0, 8.0]], [[0.5, 0.5]]])
    random = torch.tensor([[[1.0, 1.0]], [[2.0, 2.0]], [[1.0, 1.0]]])
    one = torch.ones(2, 1)
    effects = SteeringEffects((1.0,), 1.0, kl, random, one, one[:1].repeat(3, 1), one[..., None])
    torch.testing.assert_close(effects.ratios, torch.tensor([[4.0], [0.5]]))
    torch.testing.assert_close(effects.p_values, torch.tensor([[0.25], [1.0]]))


def effects_of(kl: Tensor, random: Tensor) -> SteeringEffects:
    """With these means over one sequence, ``(n_directions or n_random, n_strengths)``."""
    rest = torch.zeros_like(kl), torch.zeros_like(random), kl[..., None]
    strengths = tuple(float(i) for i in range(kl.shape[1]))
    return SteeringEffects(strengths, 1.0, kl[..., None], random[..., None], *rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_smaller_by_rounding_is_as_large(dtype: torch.dtype) -> None:
    own = torch.tensor([[0.3, 0.3, 0.0]], dtype=dtype)
    below = torch.nextafter(own, torch.zeros_like(own))
    random = torch.cat([below, below, own * 0.99])
    assert effects_of(own, random).p_values[0].tolist() == pytest.approx([0.75, 0.75, 1.0])


def test_what_is_no_number_is_not_larger_than_random() -> None:
    own, random = torch.tensor([[torch.nan, 1.0]]), torch.tensor([[0.5, torch.nan], [0.5, 0.5]])
    assert effects_of(own, random).p_values[0].tolist() == pytest.approx([1, 2 / 3])


def test_p_values_are_corrected_for_directions_and_strengths() -> None:
    """Benjamini and Hochberg's: p times the number of tests, over how many are at most p."""
    random = torch.arange(1.0, 20)[:, None].expand(19, 2)
    kl = torch.tensor([[20.0, 20.0], [19.5, 10.5], [0.5, 18.5]])
    effects = effects_of(kl, random)
    p = [[1 / 20, 1 / 20], [1 / 20, 10 / 20], [1, 2 / 20]]
    torch.testing.assert_close(effects.p_values, torch.tensor(p))
    corrected = [[2 / 20, 2 / 20], [2 / 20, 12 / 20], [1, 3 / 20]]
    torch.testing.assert_close(effects.corrected_p_values, torch.tensor(corrected))


def test_padding_does_not_count() -> None:
    model, ids = models.huggingface("gpt2", torch.float64), models.tokens()
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    options: Any = {"n_random": 2, "strengths": [0.5]}
    component, d = "transformer.h.1.mlp", direction()[None]
    padded = {"input_ids": ids, "attention_mask": mask}

    def effects(batches: list[Any]) -> SteeringEffects:
        generator = torch.Generator().manual_seed(0)
        return steering_effects(model, batches, component, d, generator=generator, **options)

    together, apart = effects([padded]), effects([ids[:1], ids[1:, :4]])
    assert together.input_norm == pytest.approx(apart.input_norm)
    for name in ("kl", "random_kl", "logit_change", "logit_shift"):
        torch.testing.assert_close(getattr(together, name), getattr(apart, name))


def test_classifiers_have_one_prediction() -> None:
    settings: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ViTConfig(**settings, intermediate_size=48, image_size=16, patch_size=8, num_labels=5)
    torch.manual_seed(0)
    vit = ViTForImageClassification(config).eval().double()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    name = next(n for n, _ in vit.named_modules() if n.endswith("1.mlp") or n.endswith("layer.1"))
    effects = steering_effects(
        vit, [images], name, direction()[None], positions=slice(1, None), n_random=2
    )
    assert effects.kl.shape == (1, 3, 3)
    assert effects.logit_shift.shape == (1, 3, 5)


ONE = direction()[None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": []}, "no batches"),
        ({"directions": ONE * 0}, r"rows \[0\] are zero"),
        ({"directions": ONE / 0}, r"rows \[0\] are zero"),
        ({"directions": ONE[0]}, "one direction a row"),
        ({"directions": ONE[:, 1:]}, "cannot be added"),
        ({"strengths": []}, "strengths"),
        ({"strengths": [float("nan")]}, "strengths"),
        ({"n_random": 0}, "at least 1"),
        ({"positions": [7]}, "do not exist in sequences of 7"),
        ({"positions": slice(7, None)}, "without tokens"),
        ({"component": "blocks.7.mlp"}, "is no component"),
        ({"component": "hook_centroid"}, "is no component"),
        ({"component": ""}, "is no component"),
        ({"component": "blocks"}, "did not call"),
    ],
)
def test_bad_input_is_refused(
    bridge: Any, arguments: dict[str, Any], message: str, as_users_run: None
) -> None:
    usual = {"batches": [models.tokens()], "component": MLP, "directions": ONE}
    before = n_hooks(bridge)
    with pytest.raises(lch.LCHError, match=message):
        steering_effects(bridge, **(usual | arguments))
    assert n_hooks(bridge) == before


def test_bad_vectors_and_models_are_refused(bridge: Any, as_users_run: None) -> None:
    for vector in (direction() / 0, ONE):
        with pytest.raises(lch.InputError, match="not finite"), steering(bridge, MLP, vector):
            pass
    for vector, positions in ((direction()[1:], slice(None)), (direction(), [9])):
        with pytest.raises(lch.InputError), steering(bridge, MLP, vector, positions):
            logits(bridge)
    backbone = families.huggingface("vit_base", torch.float64)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with pytest.raises(lch.InputError, match="without logits"):
        steering_effects(backbone, [images], "layers.1.mlp", ONE)

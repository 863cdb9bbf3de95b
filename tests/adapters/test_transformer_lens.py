"""`lch.attach`: the right numbers under an ordinary hook name, and nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

import lch_plugin as lch
from lch_plugin.adapters.transformer_lens import (
    attached_readers,
    closed_forms,
    weight_processing,
)
from lch_plugin.adapters.transformer_lens.toolkit import HookedTransformer
from lch_plugin.mlp import activation_and_derivative
from tests import models
from tests.toolkits import HAS_SAES, needs_saes, require_hooked

if HAS_SAES:
    from sae_lens import StandardSAE, StandardSAEConfig

NAMES = [f"blocks.{layer}.mlp.hook_centroid" for layer in range(models.N_LAYERS)]
BACKENDS: dict[str, Callable[..., Any]] = {
    "TransformerBridge": lambda **kw: models.bridge("gpt2", **kw),
    "SAETransformerBridge": models.sae_bridge,
    "HookedTransformer": models.hooked,
    "HookedSAETransformer": models.hooked_sae_transformer,
}
IDS = models.tokens()


@pytest.fixture(params=BACKENDS)
def model(request: pytest.FixtureRequest) -> Any:
    model = BACKENDS[request.param]()
    with torch.no_grad():
        model.run_with_cache(IDS)  # A bridge finishes setting up its own hooks in its first pass.
    return model


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a centroid is computed."""
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return original(*args, **kwargs)

    original = closed_forms.centroid_of_neurons
    monkeypatch.setattr(closed_forms, "centroid_of_neurons", counted)
    return calls


def cached(model: Any, names: Any = None, ids: Tensor = IDS, **kw: Any) -> Any:
    return model.run_with_cache(ids, names_filter=names or NAMES, **kw)[1]


def pre_activation_name(model: Any) -> str:
    """SAELens' bridge lists canonical names alone, without TransformerLens' aliases."""
    hooked = isinstance(model, HookedTransformer)
    return "blocks.1.mlp.hook_pre" if hooked else "blocks.1.mlp.in.hook_out"


def snapshot(model: Any) -> dict[str, Any]:
    """Everything attaching could disturb, by identity where there is one."""
    return {
        "hook_dict": {k: id(v) for k, v in model.hook_dict.items()},
        "modules": [(name, id(m)) for name, m in model.named_modules()],
        "attributes": {
            name: {k for k in vars(m) if k != "_fired_hook_out"}
            for name, m in model.named_modules()
        },
        "hooks": {
            name: (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks))
            for name, m in model.named_modules()
        },
        "registries": {
            name: set(vars(m)["_hook_registry"])
            for name, m in model.named_modules()
            if "_hook_registry" in vars(m)
        },
        "state": {k: (id(v.untyped_storage()), v._version) for k, v in model.state_dict().items()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
    }


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize("family", models.FAMILIES)
def test_equals_autograd_through_huggingface_in_float64(family: str) -> None:
    model = models.bridge(family, torch.float64)
    # Rotary families differ in the ninth digit before the MLP, so compare at the same input.
    mlp_in = "mlp.in.hook_in" if models.FAMILIES[family].mlp == "fc1" else "mlp.hook_in"
    inputs = [f"blocks.{layer}.{mlp_in}" for layer in range(models.N_LAYERS)]
    v = torch.linspace(-1, 2, models.D_MODEL, dtype=torch.float64)
    for cotangent in (None, v):
        with lch.attach(model, cotangent=cotangent):
            cache = cached(model, inputs + NAMES)
        truth = models.autograd_centroids(family, [cache[i] for i in inputs], cotangent)
        for name, mu in zip(NAMES, truth, strict=True):
            assert cache[name].shape == (*IDS.shape, models.D_MODEL)
            assert models.relative_error(cache[name], mu) < 1e-10


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.08)])
def test_equals_float64_end_to_end(family: str, dtype: torch.dtype, tolerance: float) -> None:
    model = models.bridge(family, dtype)
    truth = models.autograd_centroids(family, models.mlp_inputs(family, IDS))
    with lch.attach(model):
        cache = cached(model)
    for name, mu in zip(NAMES, truth, strict=True):
        assert cache[name].dtype == torch.float32
        assert models.relative_error(cache[name], mu) < tolerance


def test_every_backend_gives_the_same_numbers() -> None:
    truth = models.autograd_centroids("gpt2", models.mlp_inputs("gpt2", IDS))
    for backend, build in BACKENDS.items():
        model = build(dtype=torch.float64)
        with lch.attach(model):
            cache = cached(model)
        for name, mu in zip(NAMES, truth, strict=True):
            assert models.relative_error(cache[name], mu) < 1e-10, backend


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_mode_of_the_caller_is_kept(model: Any, mode: type) -> None:
    with lch.attach(model):
        reference = cached(model)
        with mode():
            before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            cache = cached(model)
            assert before == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        for name in NAMES:
            assert torch.equal(cache[name], reference[name])
            assert not cache[name].requires_grad


# ---------------------------------------------------------------- an ordinary hook point


@pytest.mark.parametrize(
    "names", [NAMES[1], [NAMES[1]], lambda name: name == NAMES[1]], ids=["str", "list", "callable"]
)
def test_run_with_cache_takes_every_kind_of_filter(model: Any, names: Any, computed: list) -> None:
    with lch.attach(model):
        del computed[:]
        cache = cached(model, names)
        assert set(cache) == {NAMES[1]}
        assert len(computed) == 1


def test_stop_at_layer_stops_early(model: Any) -> None:
    ran: list[int] = []
    for layer, block in enumerate(model.blocks):
        block.mlp.register_forward_hook(lambda *call, layer=layer: ran.append(layer))
    with lch.attach(model):
        full = cached(model)
        del ran[:]
        cache = cached(model, [NAMES[1]], stop_at_layer=2)
    assert ran == [0, 1]
    assert torch.equal(cache[NAMES[1]], full[NAMES[1]])


def test_hooks_added_in_every_way_see_the_centroid_once(model: Any) -> None:
    seen: list[tuple[str, Tensor]] = []

    def record(value: Tensor, hook: Any) -> None:
        seen.append((hook.name, value))

    with lch.attach(model):
        expected = cached(model)
        model.run_with_hooks(IDS, fwd_hooks=[(NAMES[0], record)])
        model.run_with_hooks(IDS, fwd_hooks=[(lambda name: name == NAMES[1], record)])
        model.add_hook(NAMES[2], record)
        model(IDS)
        assert [name for name, _ in seen] == NAMES
        assert all(torch.equal(value, expected[name]) for name, value in seen)
        model.reset_hooks()
        model(IDS)
        assert len(seen) == 3
        assert cached(model).keys() == set(NAMES)  # reset_hooks took the user's hook, not ours
        model.add_hook(NAMES[2], record, is_permanent=True)
        model.reset_hooks(including_permanent=True)
        model(IDS)
        assert len(seen) == 3
        assert cached(model).keys() == set(NAMES)
        assert set(NAMES) <= model.hook_dict.keys()
        assert all(model.hook_dict[name].name == name for name in NAMES)


def test_editing_the_centroid_never_changes_the_logits(model: Any) -> None:
    logits = model(IDS)
    with lch.attach(model):
        hooks = [(name, lambda value, hook: value * 0 + 100) for name in NAMES]
        assert torch.equal(model.run_with_hooks(IDS, fwd_hooks=hooks), logits)


def test_nothing_is_computed_when_nobody_listens(model: Any, computed: list) -> None:
    with lch.attach(model):
        del computed[:]
        model(IDS)
        cached(model, lambda name: name.endswith("hook_post"))
        assert not computed
        points = [m for name, m in model.named_modules() if name.endswith(("hook_pre", "out"))]
        assert points
        assert not any(point._forward_hooks for point in points if isinstance(point, HookPoint))


def test_generation_fires_at_every_step() -> None:
    model, shapes = models.bridge("gpt2"), []
    with lch.attach(model, layers=0):
        model.add_hook(NAMES[0], lambda value, hook: shapes.append(tuple(value.shape)))
        model.generate(IDS[:1], max_new_tokens=3, do_sample=False, verbose=False)
    assert shapes[0] == (1, 7, models.D_MODEL)
    assert len(shapes) == 3


# ---------------------------------------------------------------- interventions


def test_interventions_upstream_are_seen(model: Any) -> None:
    model = model.to(torch.float64)

    def shift(value: Tensor, hook: Any) -> Tensor:
        return value + torch.linspace(-1, 1, value.shape[-1], dtype=value.dtype)

    hooked = isinstance(model, HookedTransformer)
    mlp_input = "blocks.1.ln2.hook_normalized" if hooked else "blocks.1.mlp.hook_in"
    pre = pre_activation_name(model)
    mlp = model.blocks[1].mlp
    act = getattr(mlp, "act_fn", None) or mlp.original_component.act
    with lch.attach(model, layers=1):
        plain = cached(model)[NAMES[1]]
        for point in ("blocks.0.hook_resid_pre" if hooked else "blocks.0.hook_in", mlp_input, pre):
            with model.hooks(fwd_hooks=[(point, shift)]):
                cache = cached(model, [pre, NAMES[1]])
            _, derivative = activation_and_derivative(act, cache[pre])
            expected = (derivative * mlp.W_out.sum(-1)) @ mlp.W_in.T
            torch.testing.assert_close(cache[NAMES[1]], expected, rtol=1e-10, atol=1e-12)
            assert models.relative_error(cache[NAMES[1]], plain) > 1e-3


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_users_hooks_inside_the_component_fire_once(family: str) -> None:
    model, fired = models.bridge(family), []
    for name, point in model.blocks[1].mlp.named_modules():
        if isinstance(point, HookPoint):
            point.add_hook(lambda value, hook, name=name: fired.append(name))
        elif isinstance(point, nn.Module):
            point.register_forward_hook(lambda *call, name=name: fired.append("module " + name))
    model(IDS)
    expected = sorted(fired)
    del fired[:]
    handle = lch.attach(model)
    assert not [name for name in fired if not name.startswith("module")]  # silenced
    del fired[:]
    cached(model)
    assert sorted(fired) == expected
    handle.detach()


def test_an_exception_half_way_leaves_nothing_stale(model: Any) -> None:
    def fail(value: Tensor, hook: Any) -> None:
        raise RuntimeError("user error")

    with lch.attach(model):
        expected = cached(model)
        hooks = [(pre_activation_name(model), fail), (NAMES[1], lambda value, hook: None)]
        with pytest.raises(RuntimeError, match="user error"):
            model.run_with_hooks(IDS, fwd_hooks=hooks)
        model.reset_hooks()
        other = models.tokens(seed=5)
        fresh = cached(model, ids=other)
        again = cached(model)
        assert all(torch.equal(again[name], expected[name]) for name in NAMES)
        assert not torch.equal(fresh[NAMES[1]], expected[NAMES[1]])


@pytest.mark.parametrize("point", ["gate.hook_out", "in.hook_out", "hook_in"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_interventions_on_gated_mlps_are_seen(family: str, point: str) -> None:
    model = models.bridge(family, torch.float64)
    name, names = (
        f"blocks.1.mlp.{point}",
        ["blocks.1.mlp.gate.hook_out", "blocks.1.mlp.in.hook_out"],
    )

    def shift(value: Tensor, hook: Any) -> Tensor:
        return value + torch.linspace(-1, 1, value.shape[-1], dtype=value.dtype)

    with lch.attach(model, layers=1) as handle:
        plain = cached(model, NAMES[1])[NAMES[1]]
        with model.hooks(fwd_hooks=[(name, shift)]):
            cache = cached(model, [*names, NAMES[1]])
        mlp = attached_readers(model)[NAMES[1]].parts.weights
        value, derivative = activation_and_derivative(mlp.act, cache[names[0]])
        s = mlp.W_out.sum(-1)
        expected = (derivative * cache[names[1]] * s) @ mlp.W_gate.T + (value * s) @ mlp.W_in.T
    torch.testing.assert_close(cache[NAMES[1]], expected, rtol=1e-10, atol=1e-12)
    assert models.relative_error(plain, expected) > 1e-3
    assert handle.hook_names == [NAMES[1]]


def test_a_forward_pass_within_a_hook_does_not_disturb_the_outer_one(model: Any) -> None:
    inner = models.tokens(seed=9)

    def run_again(value: Tensor, hook: Any) -> None:
        if not running:
            running.append(True)
            model(inner)

    running: list[bool] = []
    with lch.attach(model):
        expected = cached(model)
        with model.hooks(fwd_hooks=[(pre_activation_name(model), run_again)]):
            cache = cached(model)
    assert running
    for name in NAMES[1:]:  # The cache's own hook at layer 0 has seen the inner pass last.
        assert torch.equal(cache[name], expected[name])


def test_dropout_is_no_part_of_a_centroid(model: Any) -> None:
    with lch.attach(model):
        expected = cached(model, NAMES[0])[NAMES[0]]
        model.blocks[0].mlp.train()
        for module in model.blocks[0].mlp.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        torch.testing.assert_close(cached(model, NAMES[0])[NAMES[0]], expected)


def test_under_autocast_the_closed_form_stays_in_float32(model: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), lch.attach(model):
        mu = cached(model, NAMES[0])[NAMES[0]]
    assert mu.dtype == torch.float32
    with lch.attach(model):
        assert models.relative_error(mu, cached(model, NAMES[0])[NAMES[0]]) < 0.05


def test_the_cotangent_is_a_copy(model: Any) -> None:
    v = torch.linspace(-1, 1, models.D_MODEL, requires_grad=True)
    with lch.attach(model, cotangent=v * 2):
        expected = cached(model)
        with torch.no_grad():
            v.mul_(0)
        assert torch.equal(cached(model)[NAMES[1]], expected[NAMES[1]])


def test_neurons_that_are_all_off_have_a_centroid_of_zero() -> None:
    model = models.bridge("opt")
    with torch.no_grad():
        getattr(model.blocks[1].mlp, "in").bias.fill_(-1e4)
    with lch.attach(model):
        assert not cached(model)[NAMES[1]].any()
    scores = lch.circuits.neuron_attribution(model, IDS, n_samples=4).scores
    assert not scores[1].any()
    assert scores[0].any()


# ---------------------------------------------------------------- detaching


def test_detach_leaves_the_model_as_it_was(model: Any) -> None:
    before, logits = snapshot(model), model(IDS)
    handle = lch.attach(model)
    cached(model)
    handle.detach()
    handle.detach()
    assert snapshot(model) == before
    assert torch.equal(model(IDS), logits)


def test_leaving_the_block_by_an_exception_detaches(model: Any) -> None:
    before = snapshot(model)
    with pytest.raises(KeyError, match="no such hook"), lch.attach(model):
        raise KeyError("no such hook")
    assert snapshot(model) == before


def test_attaching_keeps_modes_and_random_state(model: Any) -> None:
    model.train()
    model.blocks[0].mlp.eval()
    for p in list(model.parameters())[::2]:
        p.requires_grad_(False)
    before, state = snapshot(model), torch.get_rng_state()
    with lch.attach(model):
        pass
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_a_deep_copy_is_attached_on_its_own(model: Any) -> None:
    if type(model).__name__ == "HookedSAETransformer":
        pytest.skip("SAELens binds the original's MLP.forward into it: no copy of one has hooks")
    with lch.attach(model):
        with torch.no_grad():  # A bridge cannot be copied after a pass with gradients.
            expected = cached(model)
        other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[0].mlp.W_in.mul_(2)
    changed = cached(other)
    assert not torch.equal(changed[NAMES[0]], expected[NAMES[0]])
    assert not attached_readers(model)
    assert set(attached_readers(other)) == set(NAMES)


def test_detaching_from_within_a_forward_pass(model: Any) -> None:
    logits = model(IDS)
    handle = lch.attach(model)
    hooks = [
        (NAMES[1], lambda value, hook: None),
        (pre_activation_name(model), lambda value, hook: handle.detach()),
    ]
    assert torch.equal(model.run_with_hooks(IDS, fwd_hooks=hooks), logits)
    assert not attached_readers(model)


def test_layers_attach_and_detach_separately(model: Any) -> None:
    first, last = lch.attach(model, layers=0), lch.attach(model, layers=[-1])
    assert first.hook_names == [NAMES[0]]
    assert last.hook_names == [NAMES[2]]
    first.detach()
    assert set(cached(model, lambda name: "centroid" in name)) == {NAMES[2]}
    last.detach()


# ---------------------------------------------------------------- refusals


def test_attaching_twice_says_so_and_leaves_the_first_alone(model: Any) -> None:
    with lch.attach(model, layers=[1]):
        expected = cached(model, [NAMES[1]])
        with pytest.raises(lch.AttachError, match=r"blocks\.1\.mlp\.hook_centroid is already"):
            lch.attach(model)
        assert [n for n in model.hook_dict if "centroid" in n] == [NAMES[1]]
        assert torch.equal(cached(model, [NAMES[1]])[NAMES[1]], expected[NAMES[1]])


@pytest.mark.usefixtures("as_users_run")
def test_bad_arguments_are_refused_before_anything_changes() -> None:
    model = models.bridge("gpt2")
    before = snapshot(model)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (lch.SiteError, r"layers \[3\] do not exist: .* 0 to 2", {"layers": 3}),
        (lch.SiteError, r"\[-4\]", {"layers": [0, -4]}),
        (lch.SiteError, "names no layer", {"layers": []}),
        (lch.SiteError, "names no layer", {"layers": True}),
        (lch.SiteError, "names no layer", {"layers": 1.0}),
        (lch.SiteError, "'mpl'", {"site": "mpl"}),
        (lch.InputError, r"\(32,\)", {"cotangent": torch.ones(31)}),
        (lch.InputError, "zeros", {"cotangent": torch.zeros(32)}),
        (lch.InputError, "floating", {"cotangent": torch.arange(32)}),
        (lch.InputError, "finite", {"cotangent": torch.full((32,), float("nan"))}),
        (TypeError, "radius", {"radius": 1.0}),
    ]
    for error, match, kw in cases:
        with pytest.raises(error, match=match):
            lch.attach(model, **kw)
    assert snapshot(model) == before
    with pytest.raises(lch.InputError, match="boot_transformers"):
        lch.attach(models.huggingface("gpt2"))


def test_centered_weights_are_refused_with_the_cure() -> None:
    bridge = models.bridge("gpt2")
    bridge.enable_compatibility_mode(disable_warnings=True)
    hooked = models.hooked()
    hooked.process_weights_(fold_ln=False, center_unembed=False)
    for model in (bridge, hooked):
        before = snapshot(model)
        with pytest.raises(lch.VanishingCentroidError, match="from_pretrained_no_processing"):
            lch.attach(model)
        assert snapshot(model) == before
        v = torch.arange(models.D_MODEL).float()
        with lch.attach(model, cotangent=v):
            cached(model)


def test_weights_centered_after_attaching_are_refused_too() -> None:
    model = models.bridge("gpt2")
    with lch.attach(model):
        model.enable_compatibility_mode(disable_warnings=True)
        with pytest.raises(lch.VanishingCentroidError):
            cached(model)


def test_weights_centered_in_place_after_attaching_are_refused_too() -> None:
    model = models.hooked()
    with lch.attach(model):
        model.process_weights_(fold_ln=False, center_unembed=False)
        with pytest.raises(lch.VanishingCentroidError):
            cached(model)


def test_what_is_known_of_weight_processing_is_recorded() -> None:
    for build in (models.hooked, lambda: models.bridge("gpt2")):
        model = build()
        assert weight_processing(model, 1) == {
            "processed": False,
            "writing_weights_centered": False,
        }
    model = models.hooked()
    model.load_and_process_state_dict(model.state_dict(), fold_ln=True)
    assert weight_processing(model, 1) == {"processed": True, "writing_weights_centered": True}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_compatibility_mode_without_centering_keeps_working(family: str) -> None:
    before, after = models.bridge(family), models.bridge(family)
    options = {"disable_warnings": True, "center_writing_weights": False}
    before.enable_compatibility_mode(**options)
    with lch.attach(before), lch.attach(after):
        after.enable_compatibility_mode(**options)
        first, second = cached(before), cached(after)
        for name in NAMES:
            torch.testing.assert_close(first[name], second[name])
    assert not [n for n in after.hook_dict if "centroid" in n]


def test_an_mlp_that_computes_something_else_is_differentiated(model: Any) -> None:
    with lch.attach(model):
        plain = cached(model)[NAMES[1]]
    mlp = model.blocks[1].mlp
    inner = mlp if isinstance(model, HookedTransformer) else mlp.original_component
    original = inner.forward
    inner.forward = lambda x: 1.1 * original(x)
    before = snapshot(model)
    with lch.attach(model) as handle:
        assert list(handle.methods.values()) == ["closed form", "VJP", "closed form"]
        torch.testing.assert_close(cached(model)[NAMES[1]], 1.1 * plain)
    assert snapshot(model) == before
    with pytest.raises(lch.SiteError, match=r"self-check of blocks\.1\.mlp"):
        lch.attach(model, site=lch.Site("neuron", 1, 3))
    assert snapshot(model) == before


def test_a_wrong_activation_is_noticed() -> None:
    model = models.bridge("gpt2")
    model.blocks[1].mlp.original_component.act.forward = nn.functional.silu
    model.blocks[1].mlp.original_component.act_fn = nn.functional.gelu
    with lch.attach(model) as handle:
        assert handle.methods[NAMES[1]] == "VJP"


def test_a_layer_without_an_mlp_is_named() -> None:
    model = models.bridge("gpt2")
    del model.blocks[1]._modules["mlp"]
    model.blocks[1].original_component.mlp = None
    with pytest.raises(lch.SiteError, match=r"blocks\.1\.mlp does not exist"):
        lch.attach(model)


def test_weights_that_are_not_loaded_or_quantised_are_refused() -> None:
    model = models.bridge("gpt2").to("meta")
    with pytest.raises(lch.SiteError, match="meta"):
        lch.attach(model)
    model = models.hooked()
    integers = torch.ones_like(model.blocks[1].mlp.W_out, dtype=torch.int8)
    model.blocks[1].mlp.W_out = nn.Parameter(integers, requires_grad=False)
    with pytest.raises(lch.SiteError, match="int8"):
        lch.attach(model)


def lens_model(**kw: Any) -> HookedTransformer:
    require_hooked()
    from transformer_lens import HookedTransformerConfig

    torch.manual_seed(0)
    defaults = {
        "n_layers": 2,
        "d_model": 16,
        "n_heads": 2,
        "d_head": 8,
        "d_mlp": 24,
        "n_ctx": 8,
        "d_vocab": 20,
        "dtype": torch.float64,
        "device": "cpu",
    }
    return HookedTransformer(HookedTransformerConfig(**{**defaults, **kw}))


def test_gated_mlps_of_hooked_transformers_equal_autograd() -> None:
    model = lens_model(act_fn="silu", gated_mlp=True, normalization_type="RMS")
    ids, inputs = torch.arange(6)[None], []
    model.blocks[1].mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with lch.attach(model, layers=1):
        del inputs[:]
        mu = cached(model, NAMES[1], ids)[NAMES[1]]
    truth = lch.centroid(model.blocks[1].mlp, inputs[0])
    assert models.relative_error(mu, truth) < 1e-10


def test_an_mlp_with_a_layer_norm_for_an_activation_is_differentiated() -> None:
    model = lens_model(act_fn="solu_ln", normalization_type="LN")
    inputs: list[Tensor] = []
    model.blocks[0].mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with lch.attach(model) as handle:
        assert set(handle.methods.values()) == {"VJP"}
        inputs.clear()
        cache = cached(model, ids=IDS % model.cfg.d_vocab)
    x = inputs[0].detach().requires_grad_()
    y = model.blocks[0].mlp(x)
    (truth,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(cache[NAMES[0]], truth)


# ---------------------------------------------------------------- SAELens


def random_sae(name: str) -> StandardSAE:
    sae = StandardSAE(StandardSAEConfig(d_in=models.D_MODEL, d_sae=24))
    sae.cfg.metadata.hook_name = name
    nn.init.normal_(sae.W_enc, std=0.3)
    return sae


@needs_saes
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        ("SAETransformerBridge", "blocks.1.mlp.hook_in"),
        ("SAETransformerBridge", "blocks.1.mlp.in.hook_in"),
        ("SAETransformerBridge", "blocks.1.mlp.hook_out"),
        ("HookedSAETransformer", "blocks.1.mlp.hook_pre"),
    ],
)
def test_an_sae_within_the_mlp_is_named_and_not_the_mlp_blamed(backend: str, name: str) -> None:
    model = BACKENDS[backend]()
    model.add_sae(random_sae(name))
    with pytest.raises(lch.SiteError, match=r"SAE stands at .*reset_saes\(\)"):
        lch.attach(model)
    model.reset_saes()
    with lch.attach(model):
        cached(model)


@needs_saes
@pytest.mark.parametrize("backend", ["SAETransformerBridge", "HookedSAETransformer"])
def test_saes_attach_to_centroids_and_come_off_again(backend: str) -> None:
    model = BACKENDS[backend]()
    logits, _ = model.run_with_cache(IDS)
    before = snapshot(model)
    seen: list[Tensor] = []
    with lch.attach(model):
        mu = cached(model)[NAMES[1]]
        sae = random_sae(NAMES[1])
        for _ in range(2):
            out, cache = model.run_with_cache_with_saes(IDS, saes=[sae])
            codes = cache[NAMES[1] + ".hook_sae_acts_post"]
            torch.testing.assert_close(codes, sae.encode(mu))
            assert torch.equal(out, logits)
            # After an SAE came off, the hook point answers to its full name as before.
            model.run_with_hooks(IDS, fwd_hooks=[(NAMES[1], lambda v, hook: seen.append(v))])
        assert len(seen) == 2
        assert torch.equal(seen[1], mu)
        model.add_sae(sae)
    assert not model.acts_to_saes
    assert snapshot(model) == before

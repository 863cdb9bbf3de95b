"""What directions do, held to autograd through HuggingFace's own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lch_plugin as lch
from lch_plugin.cotangents import Logit
from lch_plugin.mlp import MLP, mlp_centroid
from lch_plugin.saes import HookedModel
from lch_plugin.saes.dashboards.effects import closed_form, neuron_terms, push
from tests import models

LAYER = 1
# Each family's block, attention and MLP. Llama's norms compute in float32.
PARTS = {"gpt2": ("transformer.h.{}", "attn"), "llama": ("model.layers.{}", "self_attn")}
TOLERANCE = {"gpt2": 1e-10, "llama": 1e-5}
POSITIONS = torch.tensor([2, 5, 6])
IDS = models.tokens(3, 8)
DIRECTIONS = torch.randn(3, models.D_MODEL, generator=torch.Generator().manual_seed(0)).double()


def derivative(family: str, module: str, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``weights . logits`` along the directions, in what a module reads; and that itself."""
    model, inputs = models.huggingface(family, torch.float64), []

    def note(_module: Any, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        x = x.detach().requires_grad_()
        inputs.append(x)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    model.get_submodule(module).register_forward_pre_hook(note, with_kwargs=True)
    rows = torch.arange(3)
    # One row at a time: what happens in one is no concern of the others.
    logits = model(IDS).logits[rows, POSITIONS]
    (grad,) = torch.autograd.grad((logits * weights).sum(), inputs[0])
    return (grad[rows, POSITIONS] * DIRECTIONS).sum(-1), inputs[0].detach()[rows, POSITIONS]


def lens(family: str, backend: str) -> Any:
    if backend == "HookedTransformer":
        return models.hooked(torch.float64)
    return models.bridge(family, torch.float64)


@pytest.mark.parametrize("kind", ["mlp", "attn", "block"])
@pytest.mark.parametrize(
    ("family", "backend"),
    [
        ("gpt2", "bridge"),
        ("gpt2", "HookedTransformer"),
        ("gpt2", "HookedModel"),
        ("llama", "bridge"),
    ],
)
def test_the_effect_on_the_logits_is_autograds(family: str, backend: str, kind: str) -> None:
    block, attention = PARTS[family]
    path = block.format(LAYER)
    module = {"mlp": f"{path}.mlp", "attn": f"{path}.{attention}", "block": path}[kind]
    weights = torch.randn(3, models.D_VOCAB, dtype=torch.float64)
    truth, points = derivative(family, module, weights)
    if backend == "HookedModel":
        hf = models.huggingface(family, torch.float64)
        model: Any = HookedModel(hf, models.tokenizer(), module)
        x, logits = push(model, f"{module}.hook_centroid", IDS, POSITIONS, DIRECTIONS)
    else:
        model = lens(family, backend)
        with lch.attach(model, LAYER, kind) as handle:
            x, logits = push(model, handle.hook_names[0], IDS, POSITIONS, DIRECTIONS)
    tolerance = TOLERANCE[family]
    assert models.relative_error((logits * weights).sum(-1), truth) < tolerance
    assert models.relative_error(x, points) < tolerance


def test_at_an_ordinary_hook_point_its_value_is_moved() -> None:
    """What a block writes is what the next one reads."""
    weights = torch.randn(3, models.D_VOCAB, dtype=torch.float64)
    truth, points = derivative("gpt2", "transformer.h.1", weights)
    hf = HookedModel(
        models.huggingface("gpt2", torch.float64),
        models.tokenizer(),
        "transformer.h.0.mlp",
        activations=["transformer.h.0"],
    )
    for model, hook in (
        (models.bridge("gpt2", torch.float64), "blocks.0.hook_out"),
        (models.hooked(torch.float64), "blocks.0.hook_resid_post"),
        (hf, "transformer.h.0"),
    ):
        x, logits = push(model, hook, IDS, POSITIONS, DIRECTIONS)
        assert models.relative_error((logits * weights).sum(-1), truth) < 1e-10
        assert torch.allclose(x, points)


def test_spans_late_cotangents_and_models_are_moved_where_they_begin() -> None:
    weights = torch.randn(3, models.D_VOCAB, dtype=torch.float64)
    truth, _ = derivative("gpt2", "transformer.h.1", weights)
    model = models.bridge("gpt2", torch.float64)
    sites = [
        lch.Site("span", (1, 2)),
        lch.Site("block", 1, cotangent=Logit(3)),
        lch.Site("model"),
    ]
    with lch.attach(model, site=sites) as handle:
        span, late, whole = (
            (push(model, name, IDS, POSITIONS, DIRECTIONS)[1] * weights).sum(-1)
            for name in handle.hook_names
        )
    assert models.relative_error(span, truth) < 1e-10
    assert models.relative_error(late, truth) < 1e-10
    # GPT-2 adds token embeddings, which a model's centroid is in, to others before block 0.
    truth, _ = derivative("gpt2", "transformer.h.0", weights)
    assert models.relative_error(whole, truth) < 1e-10


def test_the_model_is_left_as_it_was() -> None:
    model = models.bridge("gpt2")
    with lch.attach(model, LAYER) as handle:
        before = model(IDS)
        push(model, handle.hook_names[0], IDS, POSITIONS, DIRECTIONS.float())
        after = model(IDS)
    assert torch.equal(before, after)
    assert not torch.autograd.forward_ad.unpack_dual(after).tangent


def test_what_does_not_reach_the_logits_is_refused() -> None:
    model = models.bridge("gpt2")
    with lch.attach(model, site=lch.Site("mlp", LAYER, expert=True)):
        offset = f"blocks.{LAYER}.mlp.hook_centroid_offset"
        with pytest.raises(lch.errors.NotDifferentiableError, match="do not depend on"):
            push(model, offset, IDS, POSITIONS, torch.ones(3, 1))


class _NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0]


def test_an_operation_without_forward_mode_is_named() -> None:
    hf = models.huggingface("llama")
    hf.model.norm.register_forward_hook(lambda module, args, output: _NoForwardMode.apply(output))
    model = HookedModel(hf, models.tokenizer(), "model.layers.1.mlp")
    with pytest.raises(lch.errors.NotDifferentiableError, match="eager"):
        push(model, "model.layers.1.mlp.hook_centroid", IDS, POSITIONS, DIRECTIONS.float())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("cotangent", [None, torch.randn(models.D_MODEL).double()])
def test_neuron_terms_add_up_to_the_centroid_along_the_direction(
    family: str, cotangent: Tensor | None
) -> None:
    inputs = models.mlp_inputs(family, IDS)
    truth = models.autograd_centroids(family, inputs, cotangent)[LAYER]
    model = models.bridge(family, torch.float64)
    with lch.attach(model, LAYER, cotangent=cotangent) as handle:
        form = closed_form(model, handle.hook_names[0])
    assert form is not None
    terms = neuron_terms(form[0], inputs[LAYER], DIRECTIONS[0], form[1])
    torch.testing.assert_close(terms.sum(-1), truth @ DIRECTIONS[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_neurons_term_is_what_its_removal_takes_away(family: str) -> None:
    model, x = models.bridge(family, torch.float64), models.mlp_inputs(family, IDS)[LAYER]
    with lch.attach(model, LAYER) as handle:
        form = closed_form(model, handle.hook_names[0])
    assert form is not None
    mlp = form[0]

    def along(part: MLP) -> Tensor:
        return mlp_centroid(part, part.pre_activations(x)) @ DIRECTIONS[1]

    terms = neuron_terms(mlp, x, DIRECTIONS[1])
    for j in (0, 7, models.D_MLP - 1):
        rest = mlp.neurons([i for i in range(models.D_MLP) if i != j])
        torch.testing.assert_close(along(mlp) - along(rest), terms[..., j], rtol=0, atol=1e-12)


def test_closed_forms_are_of_whole_mlps_with_one_cotangent() -> None:
    model = models.bridge("gpt2")
    sites = [
        lch.Site("mlp", LAYER, cotangent=Logit(3), label="late"),
        lch.Site("neuron", LAYER, index=3),
        lch.Site("attn", LAYER),
        lch.Site("mlp", LAYER),
    ]
    with lch.attach(model, site=sites) as handle:
        forms = [closed_form(model, name) for name in handle.hook_names]
        assert closed_form(model, "blocks.1.mlp.hook_in") is None
    assert [form is None for form in forms] == [True, True, True, False]


def test_a_huggingface_model_has_the_same_closed_form() -> None:
    x = models.mlp_inputs("llama", IDS)[LAYER]
    name = f"model.layers.{LAYER}.mlp"
    wrapped = HookedModel(models.huggingface("llama", torch.float64), models.tokenizer(), name)
    model = models.bridge("llama", torch.float64)
    with lch.attach(model, LAYER) as handle:
        forms = (
            closed_form(wrapped, f"{name}.hook_centroid"),
            closed_form(model, handle.hook_names[0]),
        )
    one, other = (neuron_terms(form[0], x, DIRECTIONS[0], form[1]) for form in forms if form)
    torch.testing.assert_close(one, other)

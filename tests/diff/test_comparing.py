"""What changed between two checkpoints: where, by how much, and on which inputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import lch_plugin as lch
from lch_plugin.cotangents import Logit, Ones, Random
from lch_plugin.diff import Differences, compare
from tests.models import D_VOCAB, boot, bridge, hooked, huggingface

PROMPTS = ["w3 w4 w5 w6", "w7 w8", "w9 w10 w11 w12", "w13 w2 w1 w30 w31 w32"]


def edited(edit: Callable[[Any], None], dtype: torch.dtype = torch.float32) -> Any:
    """A bridge of the model that `before` is, but for an edit."""
    model = huggingface("gpt2", dtype)
    with torch.no_grad():
        edit(model.transformer)
    return boot(model, dtype)


@pytest.fixture(scope="module")
def before() -> Any:
    return bridge("gpt2")


@pytest.fixture(scope="module")
def one_neuron(before: Any) -> Differences:
    """Of a model in which what one neuron of the first block writes is another."""

    def edit(model: Any) -> None:
        model.h[0].mlp.c_proj.weight[5] *= 2

    return compare(before, edited(edit), PROMPTS, n_random=3)


class Oracle:
    """One module of a HuggingFace model on a batch, and torch's gradients of it."""

    def __init__(self, model: Any, name: str, ids: Tensor, given: Tensor | None = None) -> None:
        def enter(_module: Any, args: Any, kwargs: Any) -> Any:
            self.x = (args[0] if given is None else given).detach().clone().requires_grad_()
            return (self.x, *args[1:]), kwargs

        def leave(_module: Any, _args: Any, output: Any) -> None:
            self.y = output[0] if isinstance(output, tuple) else output

        module = model.get_submodule(name)
        hooks = [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave),
        ]
        model(ids)
        for hook in hooks:
            hook.remove()

    def centroid(self, v: Tensor) -> Tensor:
        (mu,) = torch.autograd.grad(self.y, self.x, v.expand_as(self.y), retain_graph=True)
        return mu


def squares(x: Tensor) -> Tensor:
    return x.detach().square().sum(-1).flatten()


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_differences_are_those_of_autograd_on_the_same_inputs(part: Any) -> None:
    dtype = torch.float64
    ids = torch.randint(1, D_VOCAB, (3, 5), generator=torch.Generator().manual_seed(0))
    old, new = (huggingface("gpt2", dtype, seed) for seed in (0, 1))
    name = f"transformer.h.1.{part}"
    was = Oracle(old, name, ids)
    same, own = Oracle(new, name, ids, was.x), Oracle(new, name, ids)
    vs = [one.at(was.y) for one in (Ones(), *(Random(2 * 3 + k) for k in range(3)))]
    changed = torch.stack([squares(same.centroid(v) - was.centroid(v)) for v in vs])
    size = torch.stack([squares(was.centroid(v)) for v in vs])
    y = squares(was.y)
    wanted = {
        "centroids": (changed[:1], size[:1]),
        "jacobian": (changed[1:], size[1:]),
        "outputs": (squares(same.y - was.y)[None], y[None]),
        "activations": (squares(own.y - was.y)[None], y[None]),
    }
    site = lch.Site(part, 1)
    found = compare(
        boot(old, dtype), boot(new, dtype), ids, sites=site, n_random=3, seed=2, batch_size=2
    )
    (component,) = found.components
    assert component.name == f"blocks.1.{part}"
    for measure, (d, s) in wanted.items():
        torch.testing.assert_close(getattr(component, measure), float((d.sum() / s.sum()).sqrt()))
        by_token = (d.sum(0) / s.sum(0).mean()).sqrt()
        torch.testing.assert_close(found.by_input[measure][0], by_token)


def test_untouched_components_are_exactly_zero_after_a_changed_one(
    one_neuron: Differences,
) -> None:
    for c in one_neuron.components:
        numbers = (c.centroids, c.jacobian, c.jacobian_error, c.outputs, c.weights)
        if c.name == "blocks.0.mlp":
            assert all(number > 0 for number in numbers if number is not None)
        else:
            assert numbers == (0, 0, 0, 0, 0)
            assert (c.activations > 0) == (c.layer > 0)
    assert one_neuron.ranked() == one_neuron.ranked("weights") == ["blocks.0.mlp"]
    assert len(one_neuron.ranked("activations")) == 5
    assert one_neuron.elsewhere == {}


def test_a_norm_belongs_to_a_block_and_is_elsewhere_for_its_parts(before: Any) -> None:
    def edit(model: Any) -> None:
        model.h[1].ln_2.weight *= 2

    after = edited(edit)
    parts = compare(before, after, PROMPTS[:1], n_random=2)
    assert parts.ranked() == []
    assert list(parts.elsewhere) == ["transformer.h.1.ln_2"]
    whole = compare(before, after, PROMPTS[:1], sites="block", n_random=2)
    assert whole.ranked() == ["blocks.1"]
    assert whole.elsewhere == {}


@pytest.mark.slow
def test_heads_neurons_and_spans_are_components_too(before: Any) -> None:
    def edit(model: Any) -> None:
        model.h[1].attn.c_proj.weight[8:16] *= 2  # Head 1 of 4.
        model.h[2].mlp.c_fc.weight[:, 7] *= 2

    sites = [
        *(lch.Site("head", 1, index=i) for i in range(2)),
        *(lch.Site("neuron", 2, index=i) for i in (6, 7)),
        *(lch.Site("span", ends) for ends in ((0, 0), (0, 1))),
    ]
    found = compare(before, edited(edit), PROMPTS[:1], sites=sites, n_random=2)
    wanted = {"blocks.1.attn.head_1", "blocks.2.mlp.neuron_7", "blocks.1.from_0"}
    assert set(found.ranked()) == set(found.ranked("outputs")) == wanted
    assert all(c.weights is None for c in found.components)


def test_a_planted_neuron_is_named_with_the_tokens_on_which_it_fires() -> None:
    """Its ReLU is open at three tokens alone, and only what it writes is changed."""
    dtype = torch.float64
    model = huggingface("gpt2", dtype)
    ids = [boot(huggingface("gpt2", dtype), dtype).to_tokens(text) for text in PROMPTS]
    x = torch.cat([Oracle(model, "transformer.h.1.mlp", one).x[0] for one in ids]).detach()
    w = x[4] - x.mean(0)
    z, order = (x @ w).sort(descending=True)
    places = [(p, t) for p, one in enumerate(ids) for t in range(one.shape[1])]
    fires = [places[i] for i in order[:3].tolist()]

    def plant(model: Any) -> None:
        mlp = model.h[1].mlp
        mlp.act = nn.ReLU()
        mlp.c_fc.weight[:, 9], mlp.c_fc.bias[9] = w, -(z[2] + z[3]) / 2

    def change(model: Any) -> None:
        plant(model)
        model.h[1].mlp.c_proj.weight[9] *= 3

    found = compare(edited(plant, dtype), edited(change, dtype), PROMPTS, n_random=2)
    assert found.ranked() == ["blocks.1.mlp"]
    for measure in ("jacobian", "centroids", "outputs"):
        top = found.top(10, measure=measure)
        assert sorted((one.prompt, one.position) for one in top) == sorted(fires)
    assert all(one.token in PROMPTS[one.prompt] or one.position == 0 for one in found.top())


@pytest.mark.slow
def test_the_order_and_the_batches_of_prompts_make_no_difference(before: Any) -> None:
    after = bridge("gpt2", seed=1)
    found = compare(before, after, PROMPTS, n_random=2)
    other = compare(before, after, PROMPTS[::-1], n_random=2, batch_size=1)
    lengths = [len(words) for words in found.tokens]
    for measure, values in found.by_input.items():
        backwards = other.by_input[measure].split(lengths[::-1], dim=1)[::-1]
        torch.testing.assert_close(values, torch.cat(backwards, 1), rtol=1e-4, atol=1e-6)


def test_random_cotangents_estimate_the_norm_of_the_jacobian() -> None:
    dtype = torch.float64
    ids = torch.tensor([[3, 14, 15, 9]])
    old, new = (huggingface("gpt2", dtype, seed) for seed in (0, 1))
    x = Oracle(old, "transformer.h.0.mlp", ids).x[0].detach()
    J, K = (
        torch.stack([torch.autograd.functional.jacobian(m.transformer.h[0].mlp, row) for row in x])
        for m in (old, new)
    )
    exact = float((K - J).norm() / J.norm())
    (found,) = compare(
        boot(old, dtype), boot(new, dtype), ids, sites=lch.Site("mlp", 0), n_random=16
    ).components
    assert 0 < found.jacobian_error < 0.1 * exact
    assert abs(found.jacobian - exact) < 3 * found.jacobian_error


def test_a_hooked_transformer_is_compared_likewise() -> None:
    old, new = hooked(), hooked()
    with torch.no_grad():
        new.blocks[1].attn.W_O[2] *= 2
    found = compare(old, new, PROMPTS, n_random=2)
    assert found.ranked() == found.ranked("outputs") == found.ranked("weights") == ["blocks.1.attn"]


def test_the_models_are_left_as_they_were(before: Any) -> None:
    def hooks(model: Any) -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    after = bridge("gpt2", seed=1)
    logits = [model(model.to_tokens(PROMPTS[0])) for model in (before, after)]
    counts = [hooks(model) for model in (before, after)]
    compare(before, after, PROMPTS[:1], n_random=2)
    assert [hooks(model) for model in (before, after)] == counts
    for model, was in zip((before, after), logits, strict=True):
        assert not any("hook_centroid" in name for name in model.hook_dict)
        assert torch.equal(model(model.to_tokens(PROMPTS[0])), was)


def test_results_are_told_and_saved_with_what_they_are_of(
    one_neuron: Differences, tmp_path: Path
) -> None:
    one_neuron.save(tmp_path / "diff.json")
    saved = json.loads((tmp_path / "diff.json").read_text())
    assert saved["run"]["sites"] == [
        {"site": kind, "linearization": "jacobian", "layers": None} for kind in ("attn", "mlp")
    ]
    assert saved["run"]["random_cotangents"] == ["random0", "random1", "random2"]
    assert saved["components"][1]["name"] == "blocks.0.mlp"
    assert saved["components"][1]["jacobian"] == one_neuron.components[1].jacobian
    assert len(saved["by_input"]["outputs"][1]) == sum(map(len, saved["tokens"]))
    assert "1 of 6 components changed, on 4 prompts of 20 tokens" in repr(one_neuron)
    page = one_neuron._repr_html_()
    assert "blocks.0.mlp changed most at" in page
    assert one_neuron.top(1)[0].token in page


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": ["w1", " "]}, "an empty one"),
        ({"n_random": 1}, "n_random=1 must be at least 2"),
        ({"batch_size": 0}, "batch_size=0 must be"),
        ({"sites": []}, "names no component"),
        ({"sites": "model"}, "by its parts"),
        ({"sites": lch.Site("mlp", expert=True)}, "the kind, the layers"),
        ({"sites": [lch.Site("mlp", 1), lch.Site("mlp", [0, 1])]}, "twice: name each once"),
        ({"cotangent": Logit(3)}, "depends on what a model computes"),
    ],
)
def test_what_means_nothing_is_refused(before: Any, settings: Any, said: str) -> None:
    asked = {"prompts": PROMPTS[:1], "n_random": 2} | settings
    with pytest.raises(lch.InputError, match=said):
        compare(before, bridge("gpt2", seed=1), **asked)


def test_models_that_are_no_checkpoints_of_one_are_refused(before: Any) -> None:
    other: dict[str, Any] = {
        "one object": before,
        "is a TransformerBridge of a GPT2LMHeadModel and after": bridge("llama"),
        "float32 cpu before and": bridge("gpt2", torch.float64),
    }
    for said, after in other.items():
        with pytest.raises(lch.InputError, match=said):
            compare(before, after, PROMPTS)


def test_other_tokenizers_are_refused(before: Any, tmp_path: Path) -> None:
    after = bridge("gpt2", seed=1)
    words = {f"w{(i + 1) % D_VOCAB}": i for i in range(D_VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w1", eos_token="w1", pad_token="w1"
    ).save_pretrained(tmp_path)
    after.tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(lch.InputError, match="the tokenizers of the two models read 'w3 w4"):
        compare(before, after, PROMPTS)


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"k": 0}, "k=0 must be"), ({"component": "blocks.9.mlp"}, "was not compared")],
)
def test_inputs_of_what_was_not_compared_are_refused(
    one_neuron: Differences, asked: Any, said: str
) -> None:
    with pytest.raises(lch.InputError, match=said):
        one_neuron.top(**asked)

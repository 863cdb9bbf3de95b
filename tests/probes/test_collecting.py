"""A statement's values are those of the statement alone, at the places that are named."""

from __future__ import annotations

import pytest
import torch

import lch_plugin as lch
from lch_plugin import probes

TEXTS = [
    "Tom saw an apple.",
    "Anna picked a pear in the garden.",
    "Eva saw a pear.",
    "Peter bought an apple and a pear in the park.",
]


@pytest.fixture(scope="module")
def model() -> lch.adapters.transformer_lens.TransformerBridge:
    return lch.load_demo_model(dtype=torch.float64)


@pytest.mark.parametrize("token", ["last", "mean", 2])
@pytest.mark.parametrize("component", ["mlp", "attn", "block"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_values_do_not_depend_on_what_a_statement_runs_with(
    model, token, component, side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.tokenizer, "padding_side", side)
    chosen = {"layers": [1, -1], "component": component, "token": token}
    together, _ = probes.collect(model, TEXTS, **chosen)
    for i, text in enumerate(TEXTS):
        alone, _ = probes.collect(model, [text], **chosen)
        assert len(alone) == 6
        for name, values in alone.items():
            torch.testing.assert_close(together[name][i], values[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layers", [[1], [3]])
def test_the_three_places_of_an_mlp_are_matched(model, layers: list[int]) -> None:
    """Its output at its input, and the gradient of the sum of that, by torch alone."""
    values, (record, *_) = probes.collect(model, TEXTS[:1], layers=layers)
    names = probes.hook_names("mlp", record["layer"])
    x = values[names["input"]].double().requires_grad_()
    y = model.blocks[layers[0]].mlp(x[None])[0]
    (mu,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(values[names["output"]], y.detach().float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values[names["centroid"]], mu.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("component", ["mlp", "block"])
def test_a_cotangent_of_the_logits_reaches_the_centroids(model, component) -> None:
    """Such centroids have hook points of the model, and need the pass to its end."""
    for cotangent in (
        lch.cotangents.Logit(5),
        lch.cotangents.Logit(5, foil=6),
        lch.cotangents.Random(3),
    ):
        values, sites = probes.collect(
            model, TEXTS[:2], layers=[1], component=component, cotangent=cotangent
        )
        assert [site["part"] for site in sites] == list(probes.PARTS)
        assert {site["layer"] for site in sites} == {1}
        assert sites[0]["cotangent"] == cotangent.name
        assert list(values) == [site["hook"] for site in sites]
        with lch.attach(model, layers=[1], site=component, cotangent=cotangent) as handle:
            (name,) = handle.centroid_names
            for text, row in zip(TEXTS, values[name], strict=False):
                _, cache = model.run_with_cache(model.to_tokens(text), names_filter=name)
                torch.testing.assert_close(row, cache[name][0, -1].float(), rtol=1e-5, atol=1e-7)


def test_a_metric_of_the_logits_is_a_cotangent_too(model) -> None:
    metric = lch.cotangents.logit_difference(5, 6)
    values, (site, *_) = probes.collect(model, TEXTS[:1], layers=[1], cotangent=metric)
    x, names, kept = model.to_tokens(TEXTS[0]), probes.hook_names("mlp", 1), []

    def keep(value, hook):
        kept.append(value.detach().requires_grad_())
        return kept[-1]

    logits = model.run_with_hooks(x, fwd_hooks=[(names["output"], keep)])
    (v,) = torch.autograd.grad(logits[0, -1, 5] - logits[0, -1, 6], kept)
    _, cache = model.run_with_cache(x, names_filter=names["input"])
    h = cache[names["input"]].detach().requires_grad_()
    (mu,) = torch.autograd.grad(model.blocks[1].mlp(h), h, v)
    torch.testing.assert_close(values[site["hook"]][0], mu[0, -1].float(), rtol=1e-4, atol=1e-6)


def test_tokens_are_the_statements_own(model) -> None:
    text = TEXTS[1]
    name = "blocks.2.mlp.hook_in"
    _, cache = model.run_with_cache(model.to_tokens(text), names_filter=name)
    rows = cache[name][0].float()
    before = int(model.to_tokens(text)[0, 0]) == model.tokenizer.bos_token_id
    expected = {"last": rows[-1], "mean": rows[int(before) :].mean(0), 3: rows[-3:].mean(0)}
    for token, value in expected.items():
        found, _ = probes.collect(model, [text], layers=[2], token=token)
        torch.testing.assert_close(found[name][0], value, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_read_is_refused(model, as_users_run: None) -> None:
    with pytest.raises(lch.InputError, match=f"more than the model's context of {model.cfg.n_ctx}"):
        probes.collect(model, ["Tom saw an apple." * 60], layers=[0])
    with pytest.raises(lch.InputError, match="has no tokens"):
        probes.collect(model, [""], layers=[0])
    with pytest.raises(lch.InputError, match="token 'first' is not known"):
        probes.collect(model, TEXTS, token="first")
    with pytest.raises(lch.InputError, match="component 'head' is not known"):
        probes.collect(model, TEXTS, component="head")
    with pytest.raises(lch.InputError, match="probes read a TransformerBridge, not a Linear"):
        probes.collect(torch.nn.Linear(2, 2), TEXTS)
    with pytest.raises(lch.SiteError):
        probes.collect(model, TEXTS, layers=[9])

"""Reports on features, held to the whole text at once, and the page they make."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, ActivationsStore, TopKSAE, TopKSAEConfig, Transcoder, TranscoderConfig
from sae_lens.saes.abstopk_sae import AbsTopKSAE, AbsTopKSAEConfig
from torch import Tensor
from torch.nn.functional import normalize
from typer.testing import CliRunner

import lch_plugin as lch
from lch_plugin.cli import app
from lch_plugin.cotangents import Random
from lch_plugin.demo.corpus import stories
from lch_plugin.demonstration.run import pack, to_text
from lch_plugin.max_activating import ActivatingExample, max_activating_examples
from lch_plugin.saes import FeatureReport, HookedModel, features
from lch_plugin.saes.sources.hook_points import provenance
from tests import models
from tests.browser import CHROMIUM, browse
from tests.slow import all_but

HOOK = "blocks.2.mlp.hook_centroid"
D_SAE = 96


@cache
def model() -> Any:
    return lch.load_demo_model()


@cache
def tokens() -> Tensor:
    """32 rows of 48 tokens of stories."""
    return pack(model(), stories(200, split="test", seed=0))[:32, :48]


@cache
def values(hook: str = HOOK) -> Tensor:
    with lch.attach(model(), 2), torch.no_grad():
        return model().run_with_cache(
            tokens(), names_filter=[hook], attention_mask=torch.ones_like(tokens())
        )[1][hook]


def dictionary(hook: str = HOOK, x: Tensor | None = None, k: int = 6) -> TopKSAE:
    """An SAE whose features are what some tokens have that the mean has not."""
    x = (values(hook) if x is None else x).flatten(0, 1)
    sae = TopKSAE(TopKSAEConfig(d_in=x.shape[-1], d_sae=D_SAE, k=k))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.context_size = hook, 48
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:D_SAE]
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(0))
        sae.W_dec.copy_(normalize(x[rows] - x.mean(0), dim=-1))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


@cache
def report() -> FeatureReport:
    return features(model(), dictionary(), tokens(), n_features=5, max_density=0.3)


def test_numbers_are_those_of_the_whole_text_at_once() -> None:
    feature_acts = dictionary().encode(values())
    fires = feature_acts > 0
    assert report().n_tokens == tokens().numel()
    torch.testing.assert_close(report().density, fires.float().mean((0, 1)))
    energy = feature_acts.square().sum((0, 1))
    torch.testing.assert_close(report().energy, energy / energy.sum())
    allowed = energy * (fires.float().mean((0, 1)) <= 0.3)
    assert [f.index for f in report().features] == allowed.topk(5).indices.tolist()
    for f in report().features:
        own = feature_acts[..., f.index]
        assert f.maximum == pytest.approx(own.max().item(), rel=1e-5)
        assert sum(f.histogram) == int((own > 0).sum())
        truth = torch.histc(own[own > 0], len(f.histogram), 0, own.max().item())
        # An activation on the edge of two bins may be in either.
        assert int((truth - torch.tensor(f.histogram)).abs().sum()) <= 2
        assert f.density == pytest.approx(float((own > 0).float().mean()))


def test_examples_are_the_highest_peaks_of_the_text() -> None:
    feature_acts, text = dictionary().encode(values()), to_text(model(), tokens())
    for f in report().features:
        expected = max_activating_examples(feature_acts[..., f.index], text, 10)
        assert len(f.contexts) == len(expected) == 10
        for found, truth in zip(f.contexts, expected, strict=True):
            assert (found.tokens, found.peak) == (truth.tokens, truth.peak)
            assert found.values == pytest.approx(truth.values, abs=1e-4)


def test_lower_bands_hold_tokens_of_their_activations() -> None:
    feature_acts = dictionary().encode(values())
    for f in report().features:
        own = feature_acts[..., f.index]
        assert [band.high for band in f.bands] == pytest.approx(
            [f.maximum * q for q in (0.75, 0.5, 0.25)]
        )
        for band in f.bands:
            n_tokens = int(((own > band.low) & (own <= band.high)).sum())
            assert abs(band.n_tokens - n_tokens) <= 1
            assert len(band.contexts) == min(
                3, int(((own > band.low) & (own <= band.high)).any(1).sum())
            )
            for c in band.contexts:
                assert band.low * 0.999 <= c.values[c.peak] <= band.high * 1.001


def test_the_seed_draws_the_lower_activations_and_nothing_else() -> None:
    settings: dict[str, Any] = {"indices": [f.index for f in report().features[:3]]}
    one, again, other = (
        features(model(), dictionary(), tokens(), seed=seed, **settings).features
        for seed in (0, 0, 1)
    )
    assert one == again
    assert one != other
    for f, g in zip(one, other, strict=True):
        assert dataclasses.replace(f, bands=[]) == dataclasses.replace(g, bands=[])


def test_the_batch_size_changes_nothing() -> None:
    small = features(model(), dictionary(), tokens(), n_features=5, max_density=0.3, batch_size=5)
    for f, g in zip(report().features, small.features, strict=True):
        assert f.index == g.index
        for c, d in zip(
            f.contexts + [c for b in f.bands for c in b.contexts],
            g.contexts + [c for b in g.bands for c in b.contexts],
            strict=True,
        ):
            assert (c.tokens, c.peak) == (d.tokens, d.peak)
        assert f.histogram == pytest.approx(g.histogram, abs=1)
        assert [t.token for t in f.promoted] == [t.token for t in g.promoted]


def test_neurons_add_up_to_the_centroid_along_the_feature() -> None:
    sae, feature_acts = dictionary(), dictionary().encode(values())
    for f in report().features:
        peaks, positions = feature_acts[..., f.index].max(1)
        rows = peaks.topk(10).indices
        mu = values()[rows, positions[rows]]
        along = (mu @ normalize(sae.W_dec[f.index], dim=0)).mean().item()
        assert f.along == pytest.approx(along, rel=1e-4)
        magnitudes = [abs(n.term) for n in f.neurons]
        assert magnitudes == sorted(magnitudes, reverse=True)


def test_promoted_tokens_are_those_that_a_small_push_promotes() -> None:
    f = report().features[0]
    direction, feature_acts = (
        normalize(dictionary().W_dec[f.index], dim=0),
        dictionary().encode(values()),
    )
    peaks, positions = feature_acts[..., f.index].max(1)
    rows = peaks.topk(10).indices
    moved = []
    for row in rows.tolist():
        at = [int(positions[row])]
        with torch.no_grad(), lch.saes.steering(model(), HOOK, 0.02 * direction, at):
            steered = model()(tokens()[row : row + 1])[0, at[0]]
        with torch.no_grad():
            moved.append((steered - model()(tokens()[row : row + 1])[0, at[0]]) / 0.02)
    change = torch.stack(moved)
    change = change - change.mean(-1, keepdim=True)
    mean = change.mean(0)
    top = {model().to_string(i) for i in mean.topk(20).indices}
    assert {t.token for t in f.promoted} <= top
    assert f.promoted[0].logit == pytest.approx(float(mean.max()), rel=0.05)
    agreement = torch.nn.functional.cosine_similarity(change, mean[None]).mean()
    assert f.agreement == pytest.approx(float(agreement), abs=0.02)


def test_neighbours_have_the_nearest_decoder_rows() -> None:
    rows = normalize(dictionary().W_dec, dim=-1)
    for f in report().features:
        cosines = rows @ rows[f.index]
        cosines[f.index] = -1
        top = cosines.topk(5)
        assert [n.index for n in f.neighbours] == top.indices.tolist()
        assert [n.cosine for n in f.neighbours] == pytest.approx(top.values.tolist(), abs=1e-5)


def test_every_source_of_the_same_tokens_gives_the_same(tmp_path: Path) -> None:
    sae = dictionary()
    settings: dict[str, Any] = {"indices": [f.index for f in report().features[:2]]}
    dataset = Dataset.from_dict({"tokens": tokens().tolist()})
    cached = lch.saes.cache(model(), dataset, tmp_path / "cache", hook_names=HOOK, context_size=48)
    found = [features(model(), sae, text, **settings) for text in (tokens(), dataset, cached)]
    for other in found[1:]:
        for f, g in zip(found[0].features, other.features, strict=True):
            assert [c.tokens for c in f.contexts] == [c.tokens for c in g.contexts]
            assert [t.token for t in f.promoted] == [t.token for t in g.promoted]
            assert f.histogram == pytest.approx(g.histogram, abs=1)
    assert found[2].record["text"] == str(tmp_path / "cache")


def test_activations_with_signs_are_ranked_by_magnitude(tmp_path: Path) -> None:
    """As SAELens' AbsTopK has them. A feature that is only ever negative fires as well."""
    plain = dictionary()
    sae = AbsTopKSAE(AbsTopKSAEConfig(d_in=128, d_sae=D_SAE, k=6))
    sae.load_state_dict(plain.state_dict())
    sae.cfg.metadata = plain.cfg.metadata
    with torch.no_grad():
        sae.b_enc[5] = -1e3
    found = features(model(), sae, tokens(), indices=[5, 3])
    feature_acts = sae.encode(values())
    torch.testing.assert_close(found.density, (feature_acts != 0).float().mean((0, 1)))
    assert found.density[5] == 1
    for f in found.features:
        own = feature_acts[..., f.index]
        assert f.maximum == pytest.approx(own.abs().max().item(), rel=1e-5)
        assert sum(f.histogram) == int((own != 0).sum())
        peaks = own.abs().amax(1).topk(10).values
        assert [abs(c.values[c.peak]) for c in f.contexts] == pytest.approx(
            peaks.tolist(), rel=1e-4
        )
    assert all(c.values[c.peak] < 0 for c in found.features[0].contexts)
    found.save(tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "never fires" not in page
    assert "--a:1.00" in page


def test_text_is_put_together_as_for_training(tmp_path: Path) -> None:
    told, sae = list(stories(60, split="test", seed=0)), dictionary()
    sae.cfg.metadata.prepend_bos = True
    dataset = Dataset.from_dict({"text": told})
    ids = ActivationsStore.from_sae(model(), sae, dataset, total_tokens=1).get_batch_tokens(12)
    settings: dict[str, Any] = {"indices": [3], "n_tokens": ids.numel()}
    from_list = features(model(), sae, told, **settings)
    assert from_list.n_tokens == ids.numel()
    assert from_list.features == features(model(), sae, ids, indices=[3]).features
    file = tmp_path / "stories.txt"
    file.write_text("\n".join(told))
    from_file = features(model(), sae, file, **settings)
    assert from_file.features == from_list.features
    assert from_file.record["text"] == str(file)
    sae.cfg.metadata.context_size = 32
    assert features(model(), sae, told, indices=[3], n_tokens=320).record["context_size"] == 32


def test_what_the_sae_was_not_trained_on_does_not_count() -> None:
    sae, bos = dictionary(), model().tokenizer.bos_token_id
    sae.cfg.metadata.exclude_special_tokens = [bos]
    sae.cfg.metadata.seqpos_slice = (1, 40)
    found = features(model(), sae, tokens(), indices=[0, 1, 2])
    inside = tokens()[:, 1:40]
    assert found.n_tokens == int((inside != bos).sum())
    feature_acts = sae.encode(values())[:, 1:40][inside != bos]
    torch.testing.assert_close(found.density, (feature_acts > 0).float().mean(0))
    for f in found.features:
        assert all(c.tokens[c.peak] != model().tokenizer.bos_token for c in f.contexts)


def test_huggingface_and_hooked_transformers_have_the_same_features() -> None:
    ids = models.tokens(12, 16)
    bridge = models.bridge("gpt2")
    name = "transformer.h.1.mlp"
    wrapped = HookedModel(models.huggingface("gpt2"), models.tokenizer(), name)
    hook = "blocks.1.mlp.hook_centroid"
    with lch.attach(bridge, 1), torch.no_grad():
        x = bridge.run_with_cache(ids)[1][hook]
    found = []
    for lens, own in ((bridge, hook), (models.hooked(), hook), (wrapped, f"{name}.hook_centroid")):
        sae = dictionary(own, x)
        found.append(features(lens, sae, ids, n_features=5, max_density=1.0).features)
    for others in found[1:]:
        for f, g in zip(found[0], others, strict=True):
            assert f.index == g.index
            assert [c.tokens for c in f.contexts] == [c.tokens for c in g.contexts]
            assert [t.token for t in f.promoted] == [t.token for t in g.promoted]
            assert [n.index for n in f.neurons] == [n.index for n in g.neurons]
            assert f.along == pytest.approx(g.along, rel=1e-3)


@pytest.mark.parametrize("hook", ["blocks.2.mlp.hook_in", "blocks.1.attn.hook_z"])
def test_saes_on_activations_have_features_too(hook: str) -> None:
    with torch.no_grad():
        x = model().run_with_cache(
            tokens(), names_filter=[hook], attention_mask=torch.ones_like(tokens())
        )[1][hook]
    (f, *_) = features(model(), dictionary(hook, x.flatten(2)), tokens(), n_features=2).features
    assert f.contexts
    assert f.promoted
    assert f.along is None
    assert not f.neurons


def test_attention_and_blocks_are_attached_for_as_long_as_it_takes() -> None:
    for hook in ("blocks.1.attn.hook_centroid", "blocks.3.hook_centroid"):
        with lch.attach(model(), site=[lch.Site("attn", 1), lch.Site("block", 3)]), torch.no_grad():
            x = model().run_with_cache(
                tokens(), names_filter=[hook], attention_mask=torch.ones_like(tokens())
            )[1][hook]
        (f,) = features(
            model(), dictionary(hook, x), tokens(), n_features=1, max_density=1.0
        ).features
        assert f.promoted
        assert f.along is None
        assert hook not in model().hook_dict


def test_inference_mode_and_indices_from_a_tensor(tmp_path: Path) -> None:
    chosen = [f.index for f in report().features[:2]]
    with torch.inference_mode():
        found = features(model(), dictionary(), tokens(), indices=torch.tensor(chosen))
    assert [f.index for f in found.features] == chosen
    for f, g in zip(found.features, report().features, strict=False):
        assert f.promoted == g.promoted
    found.save(tmp_path / "out")


def test_a_feature_that_never_fires_is_shown_as_such(tmp_path: Path) -> None:
    sae = dictionary()
    with torch.no_grad():
        sae.b_enc[7] = -1e6
    found = features(model(), sae, tokens(), indices=[7])
    (f,) = found.features
    assert f.density == f.maximum == sum(f.histogram) == 0
    assert f.contexts == f.promoted == f.neurons == []
    found.save(tmp_path / "out")
    assert "never fires" in (tmp_path / "out" / "report.html").read_text()


# ------------------------------------------------------------------------------ bad input


@pytest.mark.usefixtures("as_users_run")
def test_bad_input_is_refused_with_the_cure() -> None:
    sae, ids = dictionary(), tokens()[:2]
    for arguments, message in (
        ({"indices": [D_SAE]}, "features 0 to 95"),
        ({"indices": []}, "features 0 to 95"),
        ({"n_features": 0}, "at least 1"),
        ({"n_tokens": 0}, "at least 1"),
        ({"max_density": 0.0}, "share of tokens"),
        ({"max_density": 1e-9}, "Raise max_density"),
    ):
        with pytest.raises(lch.InputError, match=message):
            features(model(), sae, ids, **arguments)
    for text, message in (
        (ids.float(), "integers of shape"),
        (ids[0], "integers of shape"),
        (ids + 10**6, "vocabulary"),
        (["short"], "makes no row of 48 tokens"),
        (Dataset.from_dict({"label": [1]}), "columns"),
        (Dataset.from_dict({"tokens": [[1, 2]]}), "fewer than the 48"),
    ):
        with pytest.raises(lch.InputError, match=message):
            features(model(), sae, text)
    with pytest.raises(lch.InputError, match="HookedModel"):
        features(models.huggingface("gpt2"), sae, ids)
    with pytest.raises(lch.InputError, match="d_in=32"):
        features(models.bridge("gpt2"), sae, models.tokens())
    with pytest.raises(lch.SiteError, match="no hook point"):
        features(model(), sae, ids, hook_name="blocks.2.mlp.hook_nothing")


@pytest.mark.usefixtures("as_users_run")
def test_saes_that_do_not_fit_are_refused() -> None:
    ids = tokens()[:2]
    sae = dictionary()
    sae.cfg.metadata.hook_name = None
    with pytest.raises(lch.InputError, match="Pass hook_name"):
        features(model(), sae, ids)
    sae = dictionary()
    sae.cfg.metadata.hook_head_index = 1
    with pytest.raises(lch.InputError, match="head 1 alone"):
        features(model(), sae, ids)
    with pytest.raises(lch.InputError, match="is a Transcoder"):
        features(
            model(),
            Transcoder(TranscoderConfig(d_in=128, d_out=128, d_sae=8, apply_b_dec_to_input=False)),
            ids,
        )
    sae = dictionary()
    sae.cfg.metadata.lch_centroid = {"site": "mlp", "layer": 2, "cotangent": Random(0).name}
    with pytest.raises(lch.InputError, match=r"cotangent was .* and is ones"):
        features(model(), sae, ids)
    with lch.attach(model(), 2, cotangent=Random(0)):
        assert features(model(), sae, ids, indices=[0]).features
    sae = dictionary()
    with lch.attach(model(), site=lch.Site("mlp", 2, radius=0.1, n_samples=2)):
        local = provenance(model(), HOOK)
    sae.cfg.metadata.lch_centroid = local
    with pytest.raises(lch.InputError, match=r"radius was 0.1 and is None"):
        features(model(), sae, ids)
    with pytest.raises(lch.InputError, match="has activations"):
        features(model(), sae, ids, hook_name="blocks.2.mlp.hook_in")


@pytest.mark.usefixtures("as_users_run")
def test_saes_on_rows_of_a_huggingface_model_fit_the_same_model_elsewhere() -> None:
    """Which calls its places by other names; what rows are of counts."""
    hf, name = models.huggingface("gpt2"), "transformer.h.1.mlp"
    hook, ids = "blocks.1.mlp.hook_centroid", models.tokens(12, 16)
    bridge = models.bridge("gpt2")
    with lch.attach(bridge, 1), torch.no_grad():
        sae = dictionary(hook, bridge.run_with_cache(ids)[1][hook])
    for of, other in (("centroid", "blocks.1.mlp.hook_in"), ("input", hook)):
        sae.cfg.metadata.lch_centroid = lch.saes.Rows(hf, [ids], name, of=of).record()  # type: ignore[arg-type]
        right = hook if of == "centroid" else "blocks.1.mlp.hook_in"
        settings: dict[str, Any] = {"indices": [0], "hook_name": right}
        assert features(bridge, sae, ids, **settings).features
        with pytest.raises(lch.InputError, match=f"trained on the {of}"):
            features(bridge, sae, ids, **settings | {"hook_name": other})
    wrapped = HookedModel(models.huggingface("gpt2"), models.tokenizer(), name)
    with pytest.raises(lch.InputError, match="trained on the input"):
        features(wrapped, sae, ids, hook_name=f"{name}.hook_centroid")


def test_an_sae_that_stands_at_the_hook_is_named() -> None:
    from sae_lens import HookedSAETransformer

    lens = models.hooked(cls=HookedSAETransformer)
    hook = "blocks.1.mlp.hook_centroid"
    with lch.attach(lens, 1), torch.no_grad():
        x = lens.run_with_cache(models.tokens(8, 16))[1][hook]
        sae = dictionary(hook, x)
        lens.add_sae(sae)
        with pytest.raises(lch.InputError, match=r"reset_saes\(\)"):
            features(lens, sae, models.tokens(8, 16))
        lens.reset_saes()
        assert features(lens, sae, models.tokens(8, 16), n_features=1, max_density=1.0).features


# ------------------------------------------------------------------------------- the page

HOSTILE = ["</script><script>alert(1)</script>", "<b>", "&amp;", '"onmouseover="x', "\n", "{{ 1 }}"]


class Page(HTMLParser):
    """Tags, and the text of what can be searched."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def hostile() -> FeatureReport:
    """The report, with text in it that means something to a browser."""
    first, *rest = report().features
    excerpt = ActivatingExample(HOSTILE, [1.0, 0.5, 0.2, 0.1, 0.3, 0.0], 0)
    promoted = [dataclasses.replace(first.promoted[0], token=t) for t in HOSTILE]
    changed = dataclasses.replace(first, contexts=[excerpt], promoted=promoted)
    return dataclasses.replace(report(), features=[changed, *rest])


def test_the_page_holds_everything_and_asks_for_nothing(tmp_path: Path) -> None:
    report().save(tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results == json.loads(json.dumps(report().to_dict()))
    assert results["record"]["hooks"][HOOK]["centroid"]["cotangent"] == "ones"
    page = Page(tmp_path / "out" / "report.html")
    articles = [attrs["id"] for tag, attrs in page.tags if tag == "article"]
    assert articles == [f"f{f.index}" for f in report().features]
    assert not [t for t in page.tags if t[0] in ("link", "img", "iframe")]
    assert not [a for _, a in page.tags if "src" in a or str(a.get("href", "#"))[0] != "#"]
    assert "://" not in (tmp_path / "out" / "report.html").read_text()
    text = "".join(page.text)
    for f in report().features:
        for c in f.contexts:
            assert "".join(c.tokens) in text


def test_tokens_that_are_markup_stay_text(tmp_path: Path) -> None:
    hostile().save(tmp_path / "out")
    page = Page(tmp_path / "out" / "report.html")
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "b" not in [tag for tag, _ in page.tags]
    assert not [a for _, a in page.tags if "onmouseover" in a]
    assert "".join(HOSTILE).replace("\n", "↵") in "".join(page.text)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["features"][0]["contexts"][0]["tokens"] == HOSTILE


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_draws_searches_and_sorts(tmp_path: Path) -> None:
    hostile().save(tmp_path / "out")
    script = """
      const visible = () => [...document.querySelectorAll("article")]
        .filter(a => a.offsetHeight > 0).map(a => Number(a.dataset.index));
      const type = text => { search.value = text; search.dispatchEvent(new Event("input")); };
      const choose = key => { sort.value = key; sort.dispatchEvent(new Event("change")); };
      const found = { all: visible(), form: form.offsetHeight > 0, status: status.textContent,
        bars: document.querySelector("svg path").getBBox().width };
      type(String(found.all[2])); found.number = visible(); found.said = status.textContent;
      type("<\\/SCRIPT>"); found.markup = visible();
      type("no such text"); found.none = visible();
      type(""); choose("density"); found.density = visible();
      choose("index"); found.index = visible();
      return found;
    """
    found, said = browse(tmp_path / "out" / "report.html", script, tmp_path / "profile")
    assert not said
    shown = [f.index for f in report().features]
    assert found["all"] == shown
    assert found["form"]
    assert found["status"] == "5 of 5 features"
    assert found["bars"] > 0
    assert shown[2] in found["number"]
    assert len(found["number"]) < 5
    assert found["said"] == f"{len(found['number'])} of 5 features"
    assert found["markup"] == [shown[0]]
    assert found["none"] == []
    by_density = sorted(report().features, key=lambda f: -f.density)
    assert found["density"] == [f.index for f in by_density]
    assert found["index"] == sorted(shown)


# --------------------------------------------------------------------------- command line


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    directory, out = tmp_path / "sae", tmp_path / "out"
    sae = dictionary()
    sae.save_model(directory)
    arguments = ["sae", "features", str(directory), "--n-tokens", "960", "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--feature", "3"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    results = json.loads((out / "results.json").read_text())
    assert [f["index"] for f in results["features"]] == [3]
    assert results["n_tokens"] == 960
    with pytest.raises(lch.OutputError, match="exists"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.parametrize("command", all_but(["features"], ["features", "evaluate"]))
def test_the_commands_take_a_hook_that_the_metadata_lack(command: str, tmp_path: Path) -> None:
    sae = dictionary()
    sae.cfg.metadata.hook_name = None
    sae.save_model(tmp_path / "sae")
    arguments = ["sae", command, str(tmp_path / "sae"), "--n-tokens", "480"]
    arguments += ["--n-features", "1", "--batch-size", "4", "--out", str(tmp_path / "out")]
    with pytest.raises(lch.InputError, match="Pass hook_name"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    found = CliRunner().invoke(app, [*arguments, "--hook", HOOK], catch_exceptions=False)
    assert found.exit_code == 0, found.output


def test_the_command_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    for arguments, message in (
        ([str(tmp_path)], "holds no SAE"),
        ([str(tmp_path), "--model", "gpt2"], "needs a --text"),
    ):
        command = ["sae", "features", *arguments, "--out", str(tmp_path / "out")]
        with pytest.raises(lch.InputError, match=message):
            CliRunner().invoke(app, command, catch_exceptions=False)


def test_an_sae_is_read_from_its_directory(tmp_path: Path) -> None:
    from lch_plugin.saes.evaluation.feature_acts import load_sae

    dictionary().save_model(tmp_path / "sae")
    assert isinstance(load_sae(tmp_path / "sae"), SAE)

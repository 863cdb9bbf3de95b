"""The paper's experiment: what it measures and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import lch_plugin as lch
from lch_plugin.circuits.reports import neuron_run
from lch_plugin.circuits.reports.direct import promoted_tokens
from lch_plugin.demo.tasks import pear_apple
from tests import models

# In one process, so that what the fixtures make is made once.
pytestmark = pytest.mark.xdist_group("neuron_run")

EXAMPLE = pear_apple()
PROMPT, TWIN = EXAMPLE.prompt, EXAMPLE.corrupt
SETTINGS: dict[str, Any] = {"n_samples": 8, "seed": 3}
PAIR: dict[str, Any] = {"answer": " an", "foil": " a", "corrupt": TWIN}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("position", [-1, None])
def test_patching_a_neuron_alone_is_a_real_intervention(family: str, position: int | None) -> None:
    """Held to HuggingFace's own model, the input of whose last projection is edited."""
    model, original = (
        models.bridge(family, torch.float64),
        models.huggingface(family, torch.float64),
    )
    ids, twin = models.tokens(batch=2)
    metric = lch.circuits.logit_difference([[1]], [[2]])
    batch = lch.circuits.Prompts(ids[None], metric, twin[None])
    name = lch.adapters.transformer_lens.locate_mlps(model, 1)[0].post_activation_name
    mlp = original.get_submodule(models.FAMILIES[family].layers)[1].mlp
    projection = mlp.c_proj if family == "gpt2" else mlp.down_proj
    neurons = list(range(0, models.D_MLP, 2))  # More than run together.
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        hook = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        original(ids[None])
        hook.remove()
        truth = []
        for j in neurons:

            def put(module: torch.nn.Module, args: tuple, j: int = j) -> torch.Tensor:
                value, where = args[0].clone(), slice(None) if position is None else position
                value[:, where, j] = seen[0][:, where, j]
                return value

            hook = projection.register_forward_pre_hook(put)
            truth.append(metric.fn(original(twin[None]).logits))
            hook.remove()
    found = neuron_run.patched_alone(model, batch, name, neurons, position)
    torch.testing.assert_close(found, torch.cat(truth), rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def demo() -> TransformerBridge:
    """The embedded model, whose tokenizer reads text."""
    return lch.load_demo_model()


@pytest.fixture(scope="module")
def written(demo: TransformerBridge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything, on a neuron that papers are made to speak of."""
    out = tmp_path_factory.mktemp("runs") / "all"
    published = neuron_run.Published(
        "A text.", 5, rank=7, percentile=85.5, recovered=0.5, source="A paper."
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(neuron_run.PUBLISHED, (Path(demo.cfg.model_name).name, 2), published)
        neuron_run.run(demo, PROMPT, -2, out, **PAIR, **SETTINGS)
    return out


def test_results_are_those_of_the_library(demo: TransformerBridge, written: Path) -> None:
    results = json.loads((written / "results.json").read_text())
    tokens, twin = demo.to_tokens(PROMPT), demo.to_tokens(TWIN)
    an, a = (demo.to_single_token(token) for token in (" an", " a"))
    metric = lch.circuits.logit_difference([[an]], [[a]])
    run = results["run"]
    assert (run["layer"], run["n_neurons"], run["radius"], run["seed"]) == (2, 512, 0.25, 3)
    assert run["hook"] == "blocks.2.mlp.out.hook_in"
    assert {"torch", "transformer-lens", "lch-plugin"} <= run["versions"].keys()
    for name, of in (("untargeted", None), ("targeted", metric)):
        scored = lch.circuits.neuron_attribution(
            demo, tokens, 2, n_samples=8, metric=of, generator=torch.Generator().manual_seed(3)
        )
        ranking = results["rankings"][name]
        assert ranking == [n.index for n in scored.top(20, by="magnitude")]
        for index in ranking:
            neuron, score = scored.neuron(2, index), results["neurons"][str(index)]["scores"][name]
            assert score["score"] == pytest.approx(neuron.score, rel=1e-5)
            assert (score["rank"], score["percentile"]) == (neuron.rank, neuron.percentile)
        stable = lch.circuits.stability(demo, tokens, 2, n_samples=8, metric=of).to_dict()
        assert results["stability"][name] == stable
    with torch.no_grad():
        clean, corrupt = (float(metric.fn(demo(ids))) for ids in (tokens, twin))
    assert results["logit_differences"] == pytest.approx({"clean": clean, "corrupt": corrupt})
    batch = lch.circuits.Prompts(tokens, metric, twin)
    for place, position in (("last", -1), ("everywhere", None)):
        (patched,) = neuron_run.patched_alone(demo, batch, run["hook"], [5], position).tolist()
        recovered = results["neurons"]["5"]["recovered"][place]
        assert recovered == pytest.approx((patched - corrupt) / (clean - corrupt), rel=1e-4)
    assert results["neurons"]["5"]["promotes"] == promoted_tokens(demo, 2, [5])[0]
    assert results["published"]["rank"] == 7
    assert results["published"]["prompt"] == "A text."


def test_the_page_says_what_was_published_and_what_was_measured(written: Path) -> None:
    page = (written / "report.html").read_text()
    results = json.loads((written / "results.json").read_text())
    assert "Neuron 5, published and measured" in page
    assert "<code>A text.</code>: the two rows need not agree" in page
    assert "targeted score,<br>logits</th>" in page
    for text in ("about 7", "85.5", "about 0.50", "A paper.", PROMPT, TWIN):
        assert text in page
    assert f"{results['neurons']['5']['recovered']['last']:.2f} at the last token" in page
    for index in {*results["rankings"]["untargeted"], *results["rankings"]["targeted"]}:
        assert f"<td>{index}</td>" in page
    assert "http" not in page.replace("http-equiv", "")
    assert {p.name for p in written.glob("*.png")} == {
        *("untargeted_layer.png", "targeted_layer.png", "model.png")
    }


def test_without_answer_and_foil_there_are_no_targeted_scores(
    demo: TransformerBridge, tmp_path: Path
) -> None:
    neuron_run.run(demo, PROMPT, 0, tmp_path / "one", radius=0.5, **SETTINGS)
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert list(results["rankings"]) == list(results["stability"]) == ["untargeted"]
    assert results["published"] is None
    assert results["logit_differences"] == {}
    assert all(n["recovered"] == {} for n in results["neurons"].values())
    page = (tmp_path / "one" / "report.html").read_text()
    assert "recovered" not in page.lower()
    assert "targeted<br>" not in page.replace("untargeted", "")
    scored = lch.circuits.neuron_attribution(
        demo,
        demo.to_tokens(PROMPT),
        0,
        radius=0.5,
        n_samples=8,
        generator=torch.Generator().manual_seed(3),
    )
    (top,) = scored.top(1)
    first = results["neurons"][str(results["rankings"]["untargeted"][0])]
    assert first["scores"]["untargeted"]["score"] == pytest.approx(top.score, rel=1e-5)


def test_the_an_neuron_of_the_embedded_model(written: Path) -> None:
    """First of its layer, it writes towards " an" and alone brings back a fifth."""
    results = json.loads((written / "results.json").read_text())
    top = results["neurons"][str(results["rankings"]["targeted"][0])]
    assert top["scores"]["targeted"]["rank"] == 1
    assert top["promotes"][0] == " an"
    assert top["recovered"]["last"] > 0.15


@pytest.mark.usefixtures("as_users_run")
def test_bad_input_is_refused_before_anything_is_written(
    demo: TransformerBridge, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for settings, match in [
        ({"answer": " an"}, "needs both"),
        ({"foil": " a"}, "needs both"),
        ({"corrupt": TWIN}, "no answer and foil"),
        ({**PAIR, "corrupt": "I climbed"}, "equal lengths"),
        ({**PAIR, "corrupt": PROMPT}, "nothing to recover"),
        ({**PAIR, "answer": " an apple"}, "2 tokens"),
        ({**PAIR, "answer": " a"}, "both answer and foil"),
        ({"radius": -1.0}, "radius"),
        ({"n_samples": 0}, "n_samples"),
    ]:
        with pytest.raises(lch.InputError, match=match):
            neuron_run.run(demo, PROMPT, 1, out, **settings)
    with pytest.raises(lch.SiteError, match="layers 0 to 3"):
        neuron_run.run(demo, PROMPT, 4, out)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(lch.OutputError, match="other content"):
        neuron_run.run(demo, PROMPT, 1, out)

"""``lch lens``: a page whose numbers add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lch_plugin as lch
from lch_plugin.demo import DEMO_MODEL_DIR
from lch_plugin.lens.run import run
from tests.browser import CHROMIUM, browse

PROMPT = "Tom saw an apple and picked an"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lens") / "out"
    run(lch.load(DEMO_MODEL_DIR), PROMPT, out, tokens=[" apple"], layers=[0, -1], n_targets=2, k=3)
    return out


@pytest.fixture(scope="module")
def results(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "results.json").read_text())
    return found


def test_cells_and_rest_add_up_to_each_logit(results: dict[str, Any]) -> None:
    assert results["layers"] == [0, 4]
    assert [of["target"] for of in results["targets"]] == [6, 7]
    logits = lch.load_demo_model()(PROMPT)[0]
    for of in results["targets"]:
        assert of["tokens"][0] == " apple"
        z = logits[of["target"]] - logits[of["target"]].mean()
        total = torch.tensor(of["parts"]).sum(1) + torch.tensor(of["rest"])
        expected = z[of["token_ids"]].detach()
        torch.testing.assert_close(total, expected.expand_as(total), rtol=1e-3, atol=1e-3)


def test_the_last_cell_says_what_the_model_says(results: dict[str, Any]) -> None:
    last = results["targets"][-1]
    top = last["top"][-1]
    likeliest = lch.load_demo_model()(PROMPT)[0, -1].topk(3).indices.tolist()
    assert top["ids"][-1] == likeliest
    assert 0.5 < top["shares"][-1][0] <= 1


def test_numbers_are_those_of_a_reading(results: dict[str, Any]) -> None:
    model = lch.load_demo_model()
    last = results["targets"][-1]
    reading = lch.lens.read(model, PROMPT, layers=[0, -1], tokens=last["token_ids"])
    parts = torch.tensor(last["parts"])
    # Differences of tokens do not know of the mean.
    torch.testing.assert_close(
        parts[..., 0] - parts[..., 1],
        reading.logits[..., 0] - reading.logits[..., 1],
        rtol=1e-3,
        atol=1e-3,
    )


def test_tokens_layers_and_biases_add_up_to_each_logit(results: dict[str, Any]) -> None:
    assert results["writers"] == ["embed", "0", "1", "2", "3", "unembed"]
    for of in results["targets"]:
        flow, biases = torch.tensor(of["flow"]), torch.tensor(of["biases"])
        assert flow.shape == (6, 8, len(of["tokens"]))
        total = flow.sum((0, 1)) + biases.sum(0)
        torch.testing.assert_close(total, torch.tensor(of["logits"]), rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(flow.sum(0), torch.tensor(of["parts"])[0], rtol=1e-3, atol=1e-2)


def test_the_page_needs_nothing_else(directory: Path, results: dict[str, Any]) -> None:
    page = (directory / "report.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("data:image/png;base64,") == 2
    assert results["run"]["linearization"] == "detached"
    assert (directory / "lens.png").stat().st_size > 1000


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_draws_what_is_chosen_and_says_what_a_cell_holds(
    directory: Path, results: dict[str, Any], tmp_path: Path
) -> None:
    script = """
        const cells = () => [...document.querySelectorAll("#grid tbody tr")].map(
            (row) => [...row.querySelectorAll("td")].map((cell) => cell.textContent));
        const first = cells();
        document.getElementById("show").value = 1;
        document.getElementById("show").onchange();
        const followed = cells();
        document.querySelectorAll("#grid tbody tr")[1].querySelector("td").click();
        const flow = () => [...document.querySelectorAll("#flow tbody tr")].map(
            (row) => [...row.children].map((cell) => cell.textContent));
        const said = flow();
        document.getElementById("less").value = 2;
        document.getElementById("less").onchange();
        return {said, difference: flow(), total: document.getElementById("total").textContent,
                first, followed, cell: document.getElementById("cell").textContent,
                wide: document.documentElement.scrollWidth > innerWidth};
    """
    found, said = browse(directory / "report.html", script, tmp_path, width=500)
    assert said == ""
    last = results["targets"][-1]
    token = results["texts"][str(last["top"][-1]["ids"][-1][0])]
    assert found["first"][0][-1].startswith(token)
    assert found["followed"][0][-2:] == [
        f"{last['parts'][-1][-1][0]:.2f}",
        f"{last['rest'][-1][0]:.2f}",
    ]
    assert found["cell"].startswith("layer 0")
    assert not found["wide"]
    # The second picture: rows of tokens, of biases and of sums; then the difference of two tokens.
    rows = found["said"]
    assert [row[0] for row in rows] == [
        *(f"{p}: {word}" for p, word in enumerate(results["words"])),
        *("biases", "sum"),
    ]
    assert rows[4][3:-1] == [f"{layer[4][0]:.2f}" for layer in last["flow"][1:-1]]
    assert float(rows[-1][1]) == pytest.approx(last["logits"][0], abs=0.02)
    logits = last["logits"][0] - last["logits"][1]
    assert float(found["difference"][-1][1]) == pytest.approx(logits, abs=0.02)
    assert found["total"].startswith(f"{found['difference'][-1][1]} = ")


def test_a_notebook_shows_the_first_token() -> None:
    reading = lch.lens.read(lch.load_demo_model(), "A <b> tree", tokens=[" apple", " pear"])
    page = reading._repr_html_()
    assert "&#x27; apple&#x27;" in page
    assert "<b>" not in page
    assert page.count("<tr>") == 1 + len(reading.layers)

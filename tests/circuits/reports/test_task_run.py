"""``lch circuit``: the whole run on the embedded model, its files, and what it refuses."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import networkx as nx
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import lch_plugin as lch
from lch_plugin.circuits import Circuit, NodeScores, graphs
from lch_plugin.circuits.prompt_batches import deal
from lch_plugin.circuits.reports import plots, task_run
from lch_plugin.cli import app
from tests.browser import CHROMIUM, browse

# In one process, so that what the fixtures make is made once.
pytestmark = pytest.mark.xdist_group("task_run")

# Prompts of one length: one forward pass for each circuit.
N, SHARE, SEED = 5, 0.05, 10


@cache
def model() -> Any:
    return lch.load_demo_model()


@cache
def scores() -> NodeScores:
    train = lch.circuits.task(model(), "an", N + N // 2, split="train", seed=SEED)
    found_on, _ = deal(train, (2, 1))
    return lch.circuits.node_attribution(model(), found_on)


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["circuit", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("circuit") / "out"
    arguments = ("--n", str(N), "--share", str(SHARE), "--seed", str(SEED))
    return out, invoke("--task", "an", *arguments, "--out", str(out))


def results(made: tuple[Path, str]) -> dict[str, Any]:
    return json.loads((made[0] / "results.json").read_text())


# ------------------------------------------------------------------------------- the whole run


def test_five_percent_of_the_nodes_recover_four_fifths(made: tuple[Path, str]) -> None:
    found = results(made)["circuit"]
    assert found["share"] <= 0.05
    assert found["recovered"] >= 0.8
    assert found["interval"][0] <= found["recovered"] <= found["interval"][1]
    assert len(found["random"]) == 10
    assert max(found["random"]) < 0.2
    out, said = made
    low, high = found["interval"]
    interval = f"95% interval {100 * low:.1f}% to {100 * high:.1f}%"
    assert f"recovers {100 * found['recovered']:.1f}% ({interval})" in said
    assert f"with {found['n_nodes']} nodes, {100 * found['share']:.1f}% of all" in said
    page = " ".join((out / "report.html").read_text().split())
    assert f"<b>{100 * found['recovered']:.1f} %</b>" in page
    assert f"[{100 * low:.1f} %, {100 * high:.1f} %]" in page
    assert f"with {found['n_nodes']} nodes, <b>{100 * found['share']:.1f} %</b>" in page


def test_it_is_found_on_one_split_and_tested_on_the_other(made: tuple[Path, str]) -> None:
    saved = json.loads((made[0] / "circuit.json").read_text())
    circuit = Circuit.from_dict(scores().points, saved["nodes"])
    expected = scores().circuit(int(SHARE * len(scores().values)))
    assert circuit.nodes == expected.nodes
    test = lch.circuits.task(model(), "an", N, seed=SEED)
    with torch.no_grad():
        metric = torch.cat([batch.measure(model()(batch.clean)) for batch in test])
    found = results(made)
    assert found["circuit"]["metric_full"] == pytest.approx(float(metric.mean()), rel=1e-5)
    assert found["circuit"]["n_prompts"] == N
    assert found["run"]["n_positive"] == int((metric > 0).sum())
    page = " ".join((made[0] / "report.html").read_text().split())
    assert f"above zero on {found['run']['n_positive']} of the {N} held-out prompts" in page
    assert saved["seed"] == found["run"]["seed"] == SEED
    assert saved["model"] == found["run"]["model"]
    (at_share,) = [r for r in found["by_size"]["circuits"] if r["share"] == SHARE]
    assert at_share["recovered"] == pytest.approx(found["circuit"]["recovered"])


def test_nodes_are_listed_with_rank_and_what_they_are_worth(made: tuple[Path, str]) -> None:
    found = results(made)
    listed = found["top_nodes"]
    top = scores().top(len(listed))
    assert len(listed) == 20
    for row, one in zip(listed, top, strict=True):
        assert row["node"] == str(one.node)
        assert row["score"] == pytest.approx(one.score, rel=1e-4)
        assert (row["rank"], row["percentile"]) == (one.rank, one.percentile)
        assert row["fall"] == found["circuit"]["falls"].get(str(one.node))
        assert len(row["promotes"]) == 5 or row["kind"] == "head"
    ranked = scores().top(found["circuit"]["n_nodes"])
    assert found["circuit"]["falls"].keys() == {str(one.node) for one in ranked[:5] + ranked[-5:]}
    table = pd.read_csv(made[0] / "scores.csv")
    assert table["node"].tolist() == scores().to_dataframe()["node"].tolist()


def test_areas_and_controls_are_on_the_page(made: tuple[Path, str]) -> None:
    by_size = results(made)["by_size"]
    page = " ".join((made[0] / "report.html").read_text().split())
    for name in ("cpr", "cmd"):
        low, high = by_size[f"{name}_interval"]
        random = sum(by_size[f"random_{name}"]) / len(by_size[f"random_{name}"])
        value = f'<b>{by_size[name]:.3f}</b> <small class="soft">[{low:.3f}, {high:.3f}]</small>'
        assert f"{value}, random {random:.3f}" in page
    assert "those that score highest and lowest of the circuit" in page


def test_the_graph_is_of_the_circuit_and_of_one_held_out_prompt(made: tuple[Path, str]) -> None:
    out, _ = made
    graph = graphs.load_graph(out / "graph.json")
    nodes = {str(node) for node in scores().circuit(int(SHARE * len(scores().values))).nodes}
    kept = {
        key.split("@")[0] for key, d in graph.nodes(data=True) if d["kind"] in ("head", "neuron")
    }
    assert kept
    assert kept <= nodes
    shown = lch.circuits.task(model(), "an", N, seed=SEED)[0]
    assert graph.graph["prompt"] == model().to_string(shown.clean[0])
    assert graph.graph["pruning"]["n_nodes"] > len(graph)
    carried = nx.read_graphml(out / "graph.graphml")
    assert set(carried.nodes) == set(graph.nodes)
    assert set(carried.edges) == set(graph.edges)
    mib = json.loads((out / "mib.json").read_text())
    assert {"a0.h0", "m3", "logits"} <= mib["nodes"].keys()


def test_a_browser_shows_the_graph_in_the_report(made: tuple[Path, str], tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    out, _ = made
    page = out / "report.html"
    assert "://" not in page.read_text()
    script = """
      const marks = [...document.querySelectorAll(".drawing .node")];
      const top = document.querySelector("tbody tr");
      marks[marks.length - 1].dispatchEvent(new MouseEvent("click", { bubbles: true }));
      return { nodes: marks.length, panel: document.querySelector(".detail").textContent,
               pictures: [...document.images].map(i => i.complete && i.naturalWidth > 0),
               fits: document.documentElement.scrollWidth <= document.documentElement.clientWidth,
               requests: performance.getEntriesByType("resource")
                 .filter(r => !r.name.startsWith("data:")).length };
    """
    found, said = browse(page, script, tmp_path, width=600)
    assert not said
    graph = graphs.load_graph(out / "graph.json")
    assert found["nodes"] == len(graph)
    last = list(graph)[-1]
    assert last in found["panel"] or graph.nodes[last]["kind"] == "metric"
    assert f"{graph.nodes[last]['contribution']:+.3f}".replace("-", "−") in found["panel"]
    assert found["pictures"] == [True, True]
    assert found["fits"]
    assert found["requests"] == 0


def test_the_plot_has_every_node_and_names_the_largest() -> None:
    circuit = scores().circuit(103)
    figure = plots.node_scores(scores(), circuit, n_named=5)
    (axis,) = figure.axes
    drawn = {points.get_label(): points.get_offsets() for points in axis.collections}
    assert sum(map(len, drawn.values())) == len(scores().values)
    inside = [v for name, v in drawn.items() if "in the circuit" in name]
    assert sum(map(len, inside)) == len(circuit)
    lowest = min(float(y) for v in inside for y in v[:, 1])
    assert lowest == pytest.approx(float(scores().values[circuit.keep].min()))
    names = [text.get_text() for text in axis.texts]
    assert names == [str(one.node) for one in scores().top(5, by="magnitude")]


@pytest.mark.slow
def test_another_metric(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--n", "4", "--share", "0.01", "--seed", "3", "--out", str(out))
    said = invoke("--task", "agreement", "--metric", "log_odds", *arguments)
    assert "of the log odds with 20 nodes" in said
    found = json.loads((out / "results.json").read_text())
    assert (found["run"]["metric"], found["run"]["units"]) == ("log_odds", "nats")
    batches = lch.circuits.task(model(), "agreement", 4, metric=lch.circuits.log_odds, seed=3)
    with torch.no_grad():
        metric = torch.cat([batch.measure(model()(batch.clean)) for batch in batches])
    assert found["circuit"]["metric_full"] == pytest.approx(float(metric.mean()), rel=1e-5)
    assert graphs.load_graph(out / "graph.json").graph["metric"]["name"] == "log_odds"
    page = " ".join((out / "report.html").read_text().split())
    assert "to first order at the logits of the prompt" in page


def test_the_smallest_circuit_that_recovers_a_share_and_what_it_says_of_it(tmp_path: Path) -> None:
    """Chosen by prompts that it was neither found nor tested on."""
    out = tmp_path / "out"
    said = invoke("--task", "an", "--recover", "0.7", "--n", "8", "--out", str(out))
    found = json.loads((out / "results.json").read_text())
    train = lch.circuits.task(model(), "an", 12, split="train")
    found_on, sized_on = deal(train, (2, 1))
    chosen = lch.circuits.smallest_circuit(
        model(), sized_on, lch.circuits.node_attribution(model(), found_on), 0.7
    )
    assert found["circuit"]["circuit"] == chosen.to_dict()
    assert (found["run"]["recover"], found["run"]["n_sized_on"]) == (0.7, 4)
    inside = 0.7 <= found["circuit"]["recovered"] <= 1.3
    assert ("asked for" in said) != inside
    page = " ".join((out / "report.html").read_text().split())
    assert "recover 70.0 % to 130.0 % of the logit difference" in page
    outside = {**found["circuit"], "recovered": 1.5}
    assert "That is more than the 70% to 130%" in task_run.summary({**found, "circuit": outside})


def test_prompts_from_a_file_and_a_method_and_a_number_of_nodes(tmp_path: Path) -> None:
    rows = [text for batch in lch.circuits.task(model(), "agreement", 24) for text in batch.texts]
    path, out = tmp_path / "mine.json", tmp_path / "out"
    given = [
        {"clean": clean, "corrupt": corrupt, "answer": [" are"], "foil": [" is"]}
        for clean, corrupt in rows
    ]
    path.write_text(json.dumps(given))
    options = ("--nodes", "30", "--method", "detached", "--out", str(out))
    said = invoke("--prompts", str(path), *options)
    found = json.loads((out / "results.json").read_text())
    assert found["circuit"]["n_nodes"] == 30
    assert (found["run"]["task"], found["run"]["method"]) == ("mine.json", "detached")
    right = lch.circuits.solved(model(), lch.circuits.read_prompts(model(), path))
    n_right = sum(map(len, right))
    assert 5 <= n_right < 24  # Of singular subjects the answer is wrong.
    assert f"gets {n_right} of 24 prompts right" in said
    hands = [sum(map(len, hand)) for hand in deal(right, (2, 1, 2))]
    assert [found["run"]["n_prompts"], found["circuit"]["n_prompts"]] == [hands[0], hands[2]]
    solved = {clean for batch in right for clean, _ in batch.texts}
    wrong = [row for row in given if row["clean"] not in solved]
    path.write_text(json.dumps([row for row in given if row["clean"] in solved][:3] + wrong))
    with pytest.raises(lch.InputError, match=r"mine.json that the model gets right .* too few"):
        invoke("--prompts", str(path), "--out", str(tmp_path / "another"))


def test_the_fewest_prompts_of_a_file_are_dealt_two_to_each_purpose() -> None:
    fewest = task_run._FEWEST_OF_FILE
    metric = lch.circuits.logit_difference([[1]] * fewest, [[2]] * fewest)
    batch = lch.circuits.Prompts(torch.arange(fewest)[:, None], metric)
    for n, least in ((fewest, task_run._FEWEST), (fewest - 1, task_run._FEWEST - 1)):
        hands = deal([batch[:n]], task_run._DEALT)
        assert min(sum(map(len, hand)) for hand in hands) == least


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clean,corrupt,answer,foil\nan apple,a pear, an, a\n", "1 prompt in .* is too few: at le"),
        ("clean,answer,foil\nan apple, an, a\n", "no corrupt prompts"),
        ("clean,corrupt,answer\nan apple,a pear, an\n", "'foil'"),
    ],
)
def test_a_file_is_looked_at_before_a_model_is_loaded(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lch_plugin.loading.load", None)
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(lch.InputError, match=message):
        invoke("--prompts", str(path), "--out", str(tmp_path / "out"))


def test_a_run_that_is_cut_short_keeps_its_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, arguments = tmp_path / "out", ("--task", "an", "--n", str(N), "--seed", str(SEED))

    def stop(*_args: Any, **_kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(task_run, "faithfulness", stop)
        with pytest.raises(KeyboardInterrupt):
            task_run.run(model(), "an", out, n=N, seed=SEED, share=SHARE)
    assert not out.exists()
    kept = pd.read_csv(tmp_path / ".out.partial" / "scores.csv")
    assert kept["node"].tolist() == scores().to_dataframe()["node"].tolist()
    invoke(*arguments, "--share", str(SHARE), "--out", str(out))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_neurons_of_a_prompt(tmp_path: Path) -> None:
    settings = ("--radius", "0.5", "--samples", "8", "--seed", "3", "--out", str(tmp_path / "out"))
    said = invoke("--prompt", "I climbed up the apple tree and picked", "--layer", "2", *settings)
    assert said.endswith("report.html")
    run = json.loads((tmp_path / "out" / "results.json").read_text())["run"]
    assert (run["layer"], run["radius"], run["n_samples"], run["seed"]) == (2, 0.5, 8, 3)


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --task"),
        (["--task", "an", "--prompt", "I"], "give one of --task"),
        (["--task", "an", "--prompts", "mine.csv"], "give one of --task"),
        (["--task", "sums"], "no task or file of prompts is called 'sums'. There are an, ioi"),
        (["--prompts", "absent.csv"], "no task or file of prompts is called 'absent.csv'"),
        (["--prompts", "absent.csv", "--n", "9"], "--n has no meaning with --prompts"),
        (["--task", "an", "--n", "3"], "n=3"),
        (["--task", "an", "--recover", "1.0"], "recover=1.0"),
        (["--task", "an", "--recover", "0.5", "--nodes", "3"], "give one of recover, nodes and"),
        (["--task", "an", "--nodes", "0"], "nodes=0"),
        (["--task", "an", "--method", "best"], "no method is called 'best'; there are integrated"),
        (["--task", "an", "--share", "0"], "share=0.0"),
        (["--task", "an", "--share", "1"], "share=1.0"),
        (["--task", "an", "--metric", "odds"], "no metric of tasks is called 'odds'"),
        (["--task", "an", "--layer", "0"], "--layer has no meaning with --task"),
        (["--task", "an", "--samples", "8"], "--samples has no meaning with --task"),
        (["--prompt", "I", "--layer", "0", "--share", "0.1"], "--share has no meaning"),
        (["--prompt", "I"], "needs a --layer"),
        (["--prompt", " ", "--layer", "0"], "--prompt is empty"),
        (["--prompt", "I", "--layer", "0", "--answer", " an"], "go together"),
    ],
)
def test_mistakes_are_refused_before_a_model_is_loaded(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lch_plugin.loading.load", None)
    with pytest.raises(lch.InputError, match=message):
        invoke(*arguments, "--out", str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_one_node_is_not_one_nodes() -> None:
    judged = {"recovered": 0.5, "interval": [0.25, 0.75], "confidence": 0.9, "random": [0.0, 0.5]}
    run = {"task": "an", "metric": "logit_difference", "recover": None}
    one = task_run.summary({"run": run, "circuit": {**judged, "n_nodes": 1, "share": 0.001}})
    assert "(90% interval 25.0% to 75.0%)" in one
    assert "with 1 node, 0.1% of" in one
    assert "2 random circuits" in one
    assert "recover 25.0% (range 0.0% to 50.0%)" in one


def test_a_directory_with_content_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lch_plugin.loading.load", None)
    (tmp_path / "kept").touch()
    with pytest.raises(lch.OutputError, match="exists with other content"):
        invoke("--task", "an", "--out", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]

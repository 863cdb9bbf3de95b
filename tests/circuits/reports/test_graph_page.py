"""The interactive page of a graph: places of the nodes, numbers, and a browser that uses it."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lch_plugin as lch
from lch_plugin.circuits import grouped, merge
from lch_plugin.circuits.kinds import KINDS
from lch_plugin.circuits.nodes import Node, ScoredNode
from lch_plugin.circuits.reports.graph_layout import layout
from lch_plugin.circuits.reports.graph_page import NodeDetail, page_data, write_graph_page
from tests.browser import CHROMIUM, browse

TOKENS = ["<bos>", " the", "</script><script>alert(1)</script>", "<b>", "\n", "&lt;", " {{ 1 }}"]
LAST = len(TOKENS) - 1
RANKS = {"embedding": 0, "attention": 1, "MLP": 2, "metric": 3}


def node(
    graph: nx.DiGraph,
    key: str,
    kind: str,
    layer: int,
    position: int,
    contribution: float,
    **more: Any,
) -> None:
    graph.add_node(
        key,
        kind=kind,
        layer=layer,
        position=position,
        token=graph.graph["tokens"][position],
        contribution=contribution,
        **{"offset": 0.0, "index": 0, **more},
    )


def small(n_neurons: int = 30, seed: int = 0, share_of_edges: float = 0.5) -> nx.DiGraph:
    """A graph of the form that `attribution_graph` gives, with every kind of node."""
    rng = random.Random(seed)
    graph = nx.DiGraph(
        tokens=TOKENS, prompt="".join(TOKENS[1:]), corrupt=None, linearization="detached",
        metric={"name": "logit_difference", "value": 3.21, "reference": 0.0}, model="a model",
    )  # fmt: skip
    for p in range(len(TOKENS)):
        node(graph, f"embedding@{p}", "embedding", -1, p, rng.gauss(0, 0.2))
        node(graph, f"position@{p}", "position", -1, p, rng.gauss(0, 0.1))
    for layer in range(3):
        for head in range(2):
            for p in (3, LAST):
                node(graph, f"a{layer}.h{head}@{p}", "head", layer, p, rng.gauss(0, 1), index=head)
        node(graph, f"rest a{layer}@{LAST}", "attn_rest", layer, LAST, rng.gauss(0, 0.1))
        node(graph, f"rest m{layer}@{LAST}", "mlp_rest", layer, LAST, rng.gauss(0, 0.1))
    for i in range(n_neurons):
        node(
            graph, f"m1.n{i}@{LAST}", "neuron", 1, LAST, rng.gauss(0, 0.3), index=i,
            activation=-1.5, influence=rng.random(), offset=0.25,
        )  # fmt: skip
    node(graph, f"m2@{LAST}", "mlp", 2, LAST, 0.5)
    node(graph, f"m0.f7@{LAST}", "feature", 0, LAST, 0.5, index=7)
    node(graph, "metric", "metric", 3, LAST, 3.21, offset=-0.5)
    place = {key: (d["layer"], RANKS[KINDS[d["kind"]].row]) for key, d in graph.nodes(data=True)}
    for source, target in combinations(sorted(graph, key=place.__getitem__), 2):
        if place[source] < place[target] and rng.random() < share_of_edges:
            graph.add_edge(source, target, weight=rng.gauss(0, 0.1))
    return graph


DETAILS = {
    "a1.h0@3": NodeDetail(
        promoted=[("<b>", 1.25), (" an", 0.5)],
        suppressed=[("</script>", -0.75)],
        attention=[0.1, 0.2, 0.3, 0.4],
        scored=ScoredNode(Node("head", 1, 0), 0.625, 2, 87.5),
    )
}


# ---------------------------------------------------------------------------------- the layout


@given(n_neurons=st.integers(0, 300), seed=st.integers(0, 5))
@settings(max_examples=10, deadline=None)
def test_no_node_hides_another_and_all_stand_inside(n_neurons: int, seed: int) -> None:
    graph = small(n_neurons, seed, share_of_edges=0)
    placed = layout(graph)
    assert placed.nodes.keys() == set(graph)
    nodes = sorted(placed.nodes.values())
    for i, (x, y) in enumerate(nodes):
        for other_x, other_y in nodes[i + 1 :]:
            if other_x - x >= 14:
                break
            assert math.hypot(other_x - x, other_y - y) >= 14
        assert 7 <= x <= placed.width - 7
        assert 7 <= y <= placed.height - 7
    for key, (x, _) in placed.nodes.items():
        left, width = placed.columns[graph.nodes[key]["position"]]
        assert left <= x <= left + width


def test_positions_where_little_happens_leave_room_to_those_where_much_does() -> None:
    graph = small(n_neurons=6, share_of_edges=0)
    placed = layout(graph)
    widths = [width for _, width in placed.columns]
    assert placed.width == pytest.approx(580)
    assert widths[LAST] > 0.4 * placed.width
    assert all(15 < width < 60 for width in widths[:3])
    # Few nodes stand in one line, with room for their names.
    row = {y for key, (_, y) in placed.nodes.items() if key.startswith("m1.n")}
    assert len(row) == 1
    assert all(placed.room[key] > 30 for key in placed.nodes if key.startswith("m1.n"))
    # Where nothing tells positions apart, they are of one width.
    for key in [key for key, d in graph.nodes(data=True) if d["kind"] != "embedding"]:
        graph.remove_node(key)
    assert len({round(width, 6) for _, width in layout(graph).columns}) == 1


def test_layers_go_upward() -> None:
    graph = small()
    placed = layout(graph)
    row = {key: (d["layer"], RANKS[KINDS[d["kind"]].row]) for key, d in graph.nodes(data=True)}
    for s, t in graph.edges:
        assert placed.nodes[s][1] > placed.nodes[t][1]
    for a, b in combinations(graph, 2):
        if row[a] < row[b]:
            assert placed.nodes[a][1] > placed.nodes[b][1]
    labels = [(n, part) for n, part, _ in placed.rows]
    assert labels == sorted(set(labels), key=lambda one: (one[0], RANKS[one[1]]))
    assert labels[0] == (-1, "embedding")
    assert labels[-1] == (3, "metric")


# ------------------------------------------------------------------------------------ the data


def test_numbers_are_those_of_the_graph() -> None:
    graph = small()
    data = page_data(graph, DETAILS)
    assert json.loads(json.dumps(data)) == data
    keys = [n["key"] for n in data["nodes"]]
    assert keys == list(graph)
    found = {(keys[s], keys[t]): weight for s, t, weight in data["edges"]}
    assert found == {(s, t): w for s, t, w in graph.edges(data="weight")}
    weights = [abs(weight) for _, _, weight in data["edges"]]
    assert weights == sorted(weights, reverse=True)
    for n in data["nodes"]:
        own = graph.nodes[n["key"]]
        assert (n["contribution"], n["token"]) == (own["contribution"], own["token"])
        assert n["offset"] == own.get("offset")
        peers = [d["contribution"] for _, d in graph.nodes(data=True) if d["kind"] == n["kind"]]
        assert n["rank"] == 1 + sum(c > n["contribution"] for c in peers)
        assert n["of"] == len(peers)
        assert n["percentile"] == 100 * sum(c < n["contribution"] for c in peers) / len(peers)
    head = data["nodes"][keys.index("a1.h0@3")]
    assert head["title"] == "Head 0 of layer 1"
    assert head["promoted"] == [["<b>", 1.25], [" an", 0.5]]
    assert head["scored"] == {"score": 0.625, "rank": 2, "percentile": 87.5}


@pytest.mark.parametrize(
    ("metric", "units"),
    [
        ("logit_difference", "logits"),
        ("log_odds", "nats"),
        ("kl_divergence", "nats"),
        ("mine", "units of the metric"),
    ],
)
def test_units_follow_the_metric(metric: str, units: str) -> None:
    graph = small()
    graph.graph["metric"]["name"] = metric
    assert page_data(graph)["units"] == units


def test_what_is_no_attribution_graph_is_refused() -> None:
    for graph, message in (
        (nx.DiGraph(**small().graph), "of 0 nodes"),
        (nx.DiGraph([("a", "b")]), "without the attributes .*'tokens'"),
        (nx.DiGraph([("a", "b")], **small().graph), "node 'a' cannot be drawn"),
    ):
        with pytest.raises(lch.InputError, match=message):
            page_data(graph)
    for name, value in (("position", len(TOKENS)), ("kind", "gadget")):
        graph = small()
        graph.nodes["metric"][name] = value
        with pytest.raises(lch.InputError, match="node 'metric' cannot be drawn"):
            page_data(graph)


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(lch.OutputError, match="cannot be written"):
        write_graph_page(small(), Path(__file__) / "page.html")
    (tmp_path / "page.html").mkdir()
    with pytest.raises(lch.OutputError, match="Choose another path"):
        write_graph_page(small(), tmp_path / "page.html")
    assert not list((tmp_path / "page.html").iterdir())
    assert "<html" in (tmp_path / "page.html-2" / "page.html").read_text()  # It is kept.


# ------------------------------------------------------------------------------------ the page


class Tags(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "graph.html"
    path.write_text("of an earlier run")
    write_graph_page(small(), path, DETAILS)
    return path


def test_the_page_asks_for_nothing_and_tokens_stay_text(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "://" not in text
    tags = Tags(page).found
    assert [tag for tag, _ in tags].count("script") == 2
    assert not {"b", "link", "img", "iframe"} & {tag for tag, _ in tags}
    assert not [attrs for _, attrs in tags if "src" in attrs or "href" in attrs]
    embedded = re.search(r'<script type="application/json">(.*?)</script>', text, re.S)
    assert embedded is not None
    assert json.loads(embedded[1]) == page_data(small(), DETAILS)


def test_without_a_script_there_is_a_table(page: Path) -> None:
    rows = [attrs["data-node"] for tag, attrs in Tags(page).found if tag == "tr" and attrs]
    assert rows == [str(i) for i in range(len(small()))]


SCRIPT = """
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const json = document.querySelector("script[type='application/json']");
  const nodes = JSON.parse(json.textContent).nodes;
  const marks = all(".drawing .node"), panel = document.querySelector(".detail");
  const key = mark => nodes[mark.dataset.node].key;
  const mark = name => marks.find(m => key(m) === name);
  const focused = () => key(document.activeElement);
  const selected = () => marks.filter(m => m.classList.contains("selected")).map(key);
  const stops = () => marks.filter(m => m.getAttribute("tabindex") === "0").map(key);
  const send = (target, event) => target.dispatchEvent(event);
  const point = (target, name) => send(target, new PointerEvent(name, { bubbles: true }));
  const press = (name, target = document.activeElement) =>
    send(target, new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
  const set = (input, value) => { input.value = value; send(input, new Event("input")); };
  const [search, slider] = all(".tools input"), edges = () => all(".faint path").length;
  const found = {}, head = mark("a1.h0@3");

  found.nodes = marks.length;
  found.boxes = marks.map(m => {
    const box = m.querySelector(".shape").getBoundingClientRect();
    return [box.x, box.y, box.width, box.height];
  });
  found.names = marks.filter(m => m.querySelector("text")).map(
    m => [key(m), m.querySelector("text").textContent]);
  const [view, drawn] = [".drawing", ".drawing svg:not(.labels)"].map(
    s => document.querySelector(s).getBoundingClientRect());
  found.unused = view.right - drawn.right;
  found.stops = stops();
  found.label = head.getAttribute("aria-label");
  found.legend = document.querySelector(".legend").textContent;
  found.fits = document.documentElement.scrollWidth <= document.documentElement.clientWidth;

  found.opened = selected();
  press("Escape");
  point(head, "pointerover");
  found.tip = document.querySelector(".tip").textContent;
  found.strong = all(".strong path").length;
  point(head, "pointerout");
  found.tipGone = document.querySelector(".tip").hidden && all(".strong path").length === 0;

  send(head, new MouseEvent("click", { bubbles: true }));
  found.clicked = selected();
  found.pressed = head.getAttribute("aria-pressed");
  found.detail = panel.textContent;
  found.attention = all(".attention span", panel).map(s => [s.textContent, s.title]);
  found.lists = all(".links", panel).map(list => all("li", list).map(
    row => [row.querySelector("button").textContent, row.querySelector("span").textContent]));
  all(".links button", panel)[0].click();
  found.jumped = [selected(), focused(), panel.querySelector("code").textContent];

  mark("metric").focus();
  press("ArrowDown"); found.down = focused();
  press("ArrowUp"); found.up = focused();
  mark("embedding@0").focus();
  press("ArrowRight"); found.right = focused();
  press("ArrowLeft"); found.left = focused();
  press("Enter"); found.entered = selected(); found.stopsAfter = stops();
  press("Escape"); found.cleared = [selected(), panel.querySelector("h3").textContent];

  press("/", document.body); found.slash = document.activeElement === search;
  const fits = query => {
    set(search, query);
    return marks.filter(m => !m.classList.contains("off")).map(key);
  };
  found.byKind = fits("feature");
  found.status = document.querySelector("[role=status]").textContent;
  found.byName = fits("m1.n3@");
  found.byToken = fits("<B>");
  found.rows = all("tbody tr").filter(row => !row.hidden).length;
  found.none = fits("nothing of the kind");
  fits("m1.n3@");
  document.querySelector(".tools").requestSubmit(); found.submitted = focused();
  press("Escape"); found.all = marks.every(m => !m.classList.contains("off"));

  set(slider, 0); found.edges = edges();
  set(slider, 50); found.half = edges();
  set(slider, 100);
  found.heaviest = [edges(), document.querySelector(".tools output").textContent];

  document.querySelector("details.list").open = true;
  const header = all("thead th").find(th => th.textContent.startsWith("contribution"));
  const column = () => all("tbody tr").map(row => nodes[row.dataset.node].contribution);
  header.querySelector("button").click(); found.sorted = column();
  found.sort = header.getAttribute("aria-sort");
  header.querySelector("button").click(); found.reversed = column();
  all("tbody button")[0].click(); found.fromTable = selected();
  found.requests = performance.getEntriesByType("resource").length;
  return found;
"""


@pytest.fixture(scope="module")
def browsed(page: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    found, said = browse(page, SCRIPT, tmp_path_factory.mktemp("profile"))
    assert not said
    return found


def test_a_browser_draws_every_node_apart(browsed: dict[str, Any]) -> None:
    assert browsed["nodes"] == len(browsed["boxes"]) == len(small())
    assert browsed["requests"] == 0
    assert browsed["fits"]
    # Named are heads and others with an index; the drawing takes the room there is.
    assert ["a1.h0@3", "h0"] in browsed["names"]
    assert ["m0.f7@6", "f7"] in browsed["names"]
    assert {key for key, _ in browsed["names"]} <= {k for k in small() if "." in k}
    assert abs(browsed["unused"]) <= 2
    assert "neurons (30)" in browsed["legend"]
    assert "features (1)" in browsed["legend"]
    for (x, y, w, h), (x2, y2, w2, h2) in combinations(browsed["boxes"], 2):
        assert w > 3
        assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y


def test_rows_of_rests_alone_are_thin_and_have_no_name() -> None:
    graph = small().copy()
    kept = [k for k, d in graph.nodes(data=True) if d["layer"] != 1 or "rest" in d["kind"]]
    assert {d["kind"] for k, d in graph.nodes(data=True) if d["layer"] == 1 and k in kept}
    folded, whole = layout(graph.subgraph(kept).copy()), layout(graph)
    assert {n for n, _, _ in folded.rows} == {n for n, _, _ in whole.rows} - {1}
    assert folded.height < whole.height - 2 * 30


def test_many_layers_stand_closer() -> None:
    deep = small(n_neurons=0).copy()
    for layer in range(3, 30):
        node(deep, f"a{layer}.h0@{LAST}", "head", layer, LAST, 0.5)
        node(deep, f"m{layer}.n1@{LAST}", "neuron", layer, LAST, 0.5)
    deep.nodes["metric"]["layer"] = 30
    placed = layout(deep)
    assert len(placed.rows) > 60
    assert placed.height < 40 * len(placed.rows)
    # Room for the name below a node.
    heights = sorted({y for _, _, y in placed.rows})
    assert min(b - a for a, b in pairwise(heights)) >= 24


def signed(x: float) -> str:
    return f"{x:+.3f}".replace("-", "−")


def test_a_click_shows_what_the_node_does(browsed: dict[str, Any]) -> None:
    graph, key = small(), "a1.h0@3"
    worth = f"{signed(graph.nodes[key]['contribution'])} logits"
    assert browsed["label"] == f"Head 0 of layer 1 at position 3, “<b>”: {worth}"
    assert worth in browsed["tip"]
    assert browsed["strong"] == graph.degree(key)
    assert browsed["tipGone"]
    assert browsed["clicked"] == [key]
    assert browsed["pressed"] == "true"
    peers = sorted(d["contribution"] for _, d in graph.nodes(data=True) if d["kind"] == "head")
    place = peers.index(graph.nodes[key]["contribution"])
    for text in (
        "Head 0 of layer 1",
        worth,
        f"{len(peers) - place} of {len(peers)} heads drawn, percentile {100 * place / 12:.1f}",
        "+0.625 logits, rank 2, percentile 87.50 of all heads",
        "<b> +1.250",
        "</script> −0.750",
    ):
        assert text in browsed["detail"]
    assert browsed["attention"][3] == ["<b>", "3: 0.400"]
    into, out_of = graph.in_edges(key, "weight"), graph.out_edges(key, "weight")
    for listed, edges, end in zip(browsed["lists"], (into, out_of), (0, 1), strict=True):
        strongest = sorted(edges, key=lambda edge: -abs(edge[2]))[:8]
        assert listed == [[edge[end], signed(edge[2])] for edge in strongest]
    first = browsed["lists"][0][0][0]
    assert browsed["jumped"] == [[first], first, first]


def test_the_keyboard_moves_selects_and_clears(browsed: dict[str, Any]) -> None:
    strongest = max(
        (
            key
            for key, d in small().nodes(data=True)
            if d["kind"] in ("head", "mlp", "neuron", "feature")
        ),
        key=lambda key: abs(small().nodes[key]["contribution"]),
    )
    assert browsed["opened"] == browsed["stops"] == [strongest]
    assert browsed["down"] in (f"m2@{LAST}", f"rest m2@{LAST}")
    assert browsed["up"] == "metric"
    assert browsed["right"] in ("embedding@1", "position@1")
    assert browsed["left"] in ("embedding@0", "position@0")
    assert browsed["entered"] == browsed["stopsAfter"] == [browsed["left"]]
    assert browsed["cleared"] == [[], "What a node does"]


def test_the_search_filters_nodes_and_rows(browsed: dict[str, Any]) -> None:
    graph = small()
    assert browsed["slash"]
    assert browsed["byKind"] == [f"m0.f7@{LAST}"]
    assert browsed["status"] == f"1 of {len(graph)} nodes"
    assert browsed["byName"] == [f"m1.n3@{LAST}"]
    at_b = [key for key, d in graph.nodes(data=True) if d["token"] == "<b>"]
    assert browsed["byToken"] == at_b
    assert browsed["rows"] == len(at_b)
    assert browsed["none"] == []
    assert browsed["submitted"] == f"m1.n3@{LAST}"
    assert browsed["all"]


def test_the_threshold_and_the_table(browsed: dict[str, Any]) -> None:
    graph = small()
    n_edges = graph.number_of_edges()
    assert browsed["edges"] == n_edges
    assert 1 < browsed["half"] < n_edges
    heaviest = max(abs(w) for _, _, w in graph.edges(data="weight"))
    assert browsed["heaviest"] == [1, f"{heaviest:.3f} logits: 1 of {n_edges}"]
    contributions = sorted(d["contribution"] for _, d in graph.nodes(data=True))
    assert browsed["sort"] == "descending"
    assert browsed["sorted"] == contributions[::-1]
    assert browsed["reversed"] == contributions
    lowest = min(graph, key=lambda key: graph.nodes[key]["contribution"])
    assert browsed["fromTable"] == [lowest]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_narrow_window_scrolls_the_drawing_alone(tmp_path: Path) -> None:
    page = tmp_path / "graph.html"
    write_graph_page(small(300), page)
    script = """
      const root = document.documentElement, drawing = document.querySelector(".drawing");
      const [panel, box, chosen] = [".detail", ".drawing", ".node.selected .halo"].map(
        selector => document.querySelector(selector).getBoundingClientRect());
      return { fits: root.scrollWidth <= root.clientWidth,
               scrolls: drawing.scrollWidth > drawing.clientWidth,
               shown: chosen.left > box.left + 84 && chosen.right < box.right,
               below: panel.top >= box.bottom };
    """
    found, said = browse(page, script, tmp_path / "profile", width=390)
    assert not said
    assert found == {"fits": True, "scrolls": True, "shown": True, "below": True}


SUPERNODES = """
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const json = document.querySelector("script[type='application/json']");
  const { nodes, edges } = JSON.parse(json.textContent);
  const marks = all(".drawing .node"), panel = document.querySelector(".detail");
  const mark = name => marks.find(m => nodes[m.dataset.node].key === name);
  const key = m => nodes[m.dataset.node].key, found = {};
  const seen = () => marks.filter(m => getComputedStyle(m).display !== "none").map(key);
  const lines = () => all(".faint path").length;
  const press = name => document.activeElement.dispatchEvent(
    new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
  const slider = document.querySelector(".tools input[type=range]");
  slider.value = 0; slider.dispatchEvent(new Event("input"));
  found.folded = [seen(), lines(), mark("heads").getAttribute("aria-expanded")];
  found.label = mark("heads").querySelector("text").textContent;
  mark("heads").dispatchEvent(new MouseEvent("click", { bubbles: true }));
  found.unfolded = [seen(), lines(), mark("heads").getAttribute("aria-expanded")];
  found.panel = panel.textContent;
  found.members = all(".links", panel).at(-1).textContent;
  all("button", panel).find(b => b.textContent === "Fold").click();
  found.again = [seen(), lines()];
  found.inputs = all(".links", panel)[1].textContent;
  // A member that is out of sight is shown when somebody goes there.
  all("tbody button").find(b => b.textContent === "a1.h1@3").click();
  found.jumped = [seen().includes("a1.h1@3"), panel.querySelector("code").textContent];
  all("button", panel).find(b => b.textContent === "heads").click();
  all("button", panel).find(b => b.textContent === "Fold").click();
  mark("heads").focus(); press("Enter");
  found.entered = [seen().includes("heads"), key(document.activeElement)];
  const search = document.querySelector(".tools input[type=search]");
  all("button", panel).find(b => b.textContent === "Fold").click();
  search.value = "a1.h1@3"; search.dispatchEvent(new Event("input"));
  found.fits = seen().filter(k => !mark(k).classList.contains("off"));
  return found;
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_supernodes_are_boxes_that_unfold(tmp_path: Path) -> None:
    groups = {"heads": ["a0.h0@3", "a1.h1@3", "a2.h1@3"], "rests": [f"rest m{i}@6" for i in (0, 1)]}
    whole, page = small(), tmp_path / "graph.html"
    whole.add_edge("a0.h0@3", "a1.h1@3", weight=0.125)
    graph = grouped(whole, groups)
    write_graph_page(graph, page)
    found, said = browse(page, SUPERNODES, tmp_path / "profile")
    assert not said
    members = {member for group in groups.values() for member in group}
    merged = merge(graph)
    assert set(found["folded"][0]) == set(merged)
    assert found["folded"][1:] == [merged.number_of_edges(), "false"]
    assert found["label"] == "heads"
    one = merge(graph, {"rests": groups["rests"]})
    assert set(found["unfolded"][0]) == set(one)
    assert found["unfolded"][1:] == [one.number_of_edges(), "true"]
    assert signed(merged.nodes["heads"]["contribution"]) in found["panel"]
    assert f"{signed(merged.nodes['heads']['internal'])} of it flows" in found["panel"]
    for member in groups["heads"]:
        worth = signed(graph.nodes[member]["contribution"])
        assert f"{member}{worth}" in found["members"]
    assert found["again"] == found["folded"][:2]
    source, _, weight = max(merged.in_edges("heads", "weight"), key=lambda edge: abs(edge[2]))
    assert found["inputs"].startswith(f"{source}{signed(weight)}")
    assert found["jumped"] == [True, "a1.h1@3"]
    assert found["entered"][0] is False
    assert found["entered"][1] in members
    assert found["fits"] == ["heads"]


def test_supernodes_come_after_the_nodes() -> None:
    group = ["a1.h0@3", "m2@6"]
    graph = grouped(small(), {"two": group})
    data, plain = page_data(graph), page_data(small())
    assert [n["key"] for n in data["nodes"]] == [*small(), "two"]
    assert data["edges"] == plain["edges"]
    two = data["nodes"][-1]
    assert [data["nodes"][i]["key"] for i in two["members"]] == group
    largest = max(group, key=lambda key: abs(graph.nodes[key]["contribution"]))
    own = next(n for n in data["nodes"] if n["key"] == largest)
    assert (two["x"], two["y"]) == (own["x"], own["y"])
    assert page_data(merge(graph))["nodes"][-2]["kind"] != "metric"

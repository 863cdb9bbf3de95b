
"use strict";
{
  const root = document.currentScript.closest(".graph");
  const graph = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  const { nodes, tokens } = graph;
  const [form, drawing, detail, legend, table] =
    [".tools", ".drawing", ".detail", ".legend", "table"].map(s => root.querySelector(s));
  const [search, slider] = form.querySelectorAll("input");
  const [shownEdges, status] = [form.querySelector("output"), form.querySelector("[role=status]")];
  // Room on the left for the names of rows and the first token's text, on the right, and below.
  const LEFT = 84, EDGE = 46, RIGHT = 14, TOP = 8, LONGEST = 12;
  const BOTTOM = 26 + 5.5 * Math.min(LONGEST, Math.max(...tokens.map(token => token.length)));
  // Edges drawn at first.
  const FAINT = 400;
  const KINDS = { embedding: "token embedding", position: "position embedding", head: "head",
    neuron: "neuron", mlp: "MLP", feature: "feature", attn_rest: "rest of an attention",
    mlp_rest: "rest of an MLP", supernode: "supernode", metric: "metric" };
  const PLURAL = { ...Object.fromEntries(Object.entries(KINDS).map(([k, v]) => [k, v + "s"])),
    attn_rest: "rests of attention", mlp_rest: "rests of MLPs" };
  const SHAPES = { embedding: "M-5-5h10v10h-10z", position: "M0-6.5L6.5 0L0 6.5L-6.5 0z",
    head: "M0-6.5L6.2 5H-6.2z", neuron: "M-5.5 0a5.5 5.5 0 1 0 11 0a5.5 5.5 0 1 0-11 0z",
    mlp: "M-7-4.5h14v9h-14z", feature: "M0-6.5L6.2-2L3.8 5.3H-3.8L-6.2-2z",
    attn_rest: "M0-6.5L6.2 5H-6.2z", mlp_rest: "M-5-5h10v10h-10z",
    supernode: "M-9-6.5h18v13h-18zM-6-3.5h12v7h-12z", metric: "M-8-6h16v12h-16z" };

  // ------------------------------------------------------------------------------ small parts
  const html = (name, attributes = {}, ...children) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const space = document.createRange().createContextualFragment("<svg/>").firstChild.namespaceURI;
  const svg = (name, attributes = {}, ...children) => {
    const element = document.createElementNS(space, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const number = x => Math.abs(x) >= 1e-3 || x === 0 ? x.toFixed(3) : x.toExponential(1);
  const signed = x => (x < 0 ? "" : "+") + number(x).replaceAll("-", "−").replace("e+", "e");
  const minus = text => text.replace(/^-/, "−");
  const visible = token => token.replaceAll("\n", "↵");
  const shortened = text => text.length > LONGEST ? text.slice(0, LONGEST - 1) + "…" : text;
  const paired = graph.corrupt !== null;
  const versus = paired ? ", less that of its corrupt twin" : "";
  const removing = paired ? "Replacing it by what it is on the corrupt twin" : "Removing it";
  const where = n => n.kind === "metric" ? "" : ` at position ${n.position}`;

  // ------------------------------------------------------------- supernodes, folded or unfolded
  const owner = nodes.map(() => null), unfolded = new Set();
  nodes.forEach((n, i) => n.members?.forEach(m => { owner[m] = i; }));
  // Where a node is to be seen: in its supernode, as long as that is folded.
  const seenAs = i => owner[i] === null || unfolded.has(owner[i]) ? i : owner[i];
  const isSeen = i => seenAs(i) === i && !unfolded.has(i);
  // The edges between what is to be seen, the heaviest first, and of each node its own.
  let edges, incoming, outgoing;
  function connect() {
    const sums = new Map();
    for (const [s, t, weight] of graph.edges) {
      const [a, b] = [seenAs(s), seenAs(t)], pair = a * nodes.length + b;
      if (a !== b) sums.set(pair, (sums.get(pair) ?? 0) + weight);
    }
    edges = [...sums].map(([pair, weight]) => [Math.floor(pair / nodes.length), pair % nodes.length, weight])
      .sort((a, b) => Math.abs(b[2]) - Math.abs(a[2]));
    [incoming, outgoing] = [nodes.map(() => []), nodes.map(() => [])];
    edges.forEach((edge, i) => { outgoing[edge[0]].push(i); incoming[edge[1]].push(i); });
  }
  connect();

  // ------------------------------------------------------------------------------ the drawing
  const heaviest = edges.length ? Math.abs(edges[0][2]) : 1;
  const largest = Math.max(...nodes.filter(n => n.kind !== "metric").map(n => Math.abs(n.contribution)), 1e-12);
  const height = TOP + graph.height + BOTTOM;
  // In a wide window everything moves apart; in a narrow one the drawing scrolls.
  for (const element of [form, drawing, detail]) element.hidden = false;
  const stretch = Math.max(1, (drawing.clientWidth - LEFT - EDGE - RIGHT) / graph.width);
  for (const one of [...nodes, ...graph.columns]) one.x *= stretch;

  function curve([s, t, weight]) {
    const [a, b] = [nodes[s], nodes[t]], bend = (a.y - b.y) / 2;
    const path = svg("path", { d: `M${a.x} ${a.y}C${a.x} ${a.y - bend} ${b.x} ${b.y + bend} ${b.x} ${b.y}`,
      "stroke-width": (0.6 + 5.4 * Math.abs(weight) / heaviest).toFixed(2) });
    if (weight < 0) path.setAttribute("class", "negative");
    return path;
  }
  const shape = (kind, scale = 1) =>
    svg("path", { class: "shape", d: SHAPES[kind], style: "stroke-dasharray:none", transform: `scale(${scale.toFixed(2)})` });

  const picture = svg("svg", { width: graph.width * stretch + EDGE + RIGHT, height, role: "group",
    "aria-label": `Attribution graph of ${nodes.length} nodes and ${edges.length} edges. ` +
      "Arrow keys move, Enter selects, Escape clears." });
  const labels = svg("svg", { class: "labels", width: LEFT, height, "aria-hidden": "true" });
  const plane = svg("g", { transform: `translate(${EDGE} ${TOP})` });
  graph.columns.forEach((column, i) => {
    column.width *= stretch;
    if (i % 2 === 0) plane.append(svg("rect", { class: "stripe", x: column.x, y: 0, width: column.width, height: graph.height }));
    const token = visible(tokens[i]), short = shortened(token);
    const [x, y] = [column.x + column.width / 2 + 4, graph.height + 12];
    plane.append(svg("text", { transform: `translate(${x} ${y}) rotate(-50)`, "text-anchor": "end", "xml:space": "preserve" },
      svg("title", {}, `${i}: “${token}”`), short));
  });
  graph.rows.forEach(row => {
    const name = row.part === "embedding" || row.part === "metric" ? row.part : `${row.layer} ${row.part}`;
    labels.append(svg("text", { x: LEFT - 8, y: TOP + row.y + 4, "text-anchor": "end" }, name));
  });
  const faint = svg("g", { class: "faint" }), strong = svg("g", { class: "strong" });
  // A row says which layer: a head, neuron or feature needs no more than its index beside.
  const name = n => {
    const text = n.members ? shortened(n.key) : n.key.match(/\.([hnf]\d+)@/)?.[1];
    return n.members || text && 6.5 * text.length < n.room * stretch ? [svg("text", { y: 19, "text-anchor": "middle" }, text)] : [];
  };
  const marks = nodes.map((n, i) => {
    const scale = n.kind === "metric" ? 1.2 : 0.62 + 0.5 * Math.sqrt(Math.abs(n.contribution) / largest);
    const more = n.members ? { "aria-expanded": "false" } : {};
    return svg("g", { ...more, class: `node ${n.kind}${n.contribution < 0 ? " negative" : ""}`, "data-node": i,
      transform: `translate(${n.x} ${n.y})`, role: "button", tabindex: -1, "aria-pressed": "false",
      "aria-label": `${n.title}${where(n)}, “${visible(n.token)}”: ${signed(n.contribution)} ${graph.units}` },
      svg("circle", { r: 8.5, fill: "transparent" }), shape(n.kind, scale), svg("circle", { class: "halo", r: 9 }), ...name(n));
  });
  plane.append(faint, strong, svg("g", {}, ...marks));
  picture.append(plane);
  const tip = html("div", { class: "tip", role: "tooltip", hidden: "" });
  drawing.append(labels, picture, tip);

  const kinds = Object.keys(KINDS).filter(kind => kind !== "metric" && nodes.some(n => n.kind === kind));
  legend.append(...kinds.map(kind => html("li", {},
    svg("svg", { width: 16, height: 16, viewBox: "-8 -8 16 16", class: kind, "aria-hidden": "true" },
      svg("g", { class: "node" }, shape(kind, 0.9))),
    `${PLURAL[kind]} (${nodes.filter(n => n.kind === kind).length})`)),
    html("li", {}, "hollow: negative contribution"), html("li", { class: "rise" }, "— positive edge"),
    html("li", { class: "fall" }, "- - negative edge"));

  // ---------------------------------------------------------------- what is looked at, and chosen
  let selected = null, hovered = null, current = nodes.findIndex(n => n.kind === "metric");
  if (current < 0) current = 0;
  // What is meant by a node: of an unfolded supernode, its members.
  const meant = i => unfolded.has(i) ? nodes[i].members : [i];

  function emphasise() {
    const i = hovered ?? selected;
    marks.forEach(mark => mark.classList.remove("near"));
    strong.replaceChildren();
    plane.classList.toggle("focused", i !== null);
    if (i === null) return;
    const touched = new Set(meant(i).flatMap(m => [...incoming[m], ...outgoing[m]]));
    for (const near of [...meant(i), ...[...touched].flatMap(e => edges[e].slice(0, 2))]) marks[near].classList.add("near");
    // The heaviest last, on top.
    strong.append(...[...touched].sort((a, b) => b - a).map(e => curve(edges[e])));
  }
  function hover(i) {
    hovered = i;
    emphasise();
    tip.hidden = i === null;
    if (i === null) return;
    const n = nodes[i];
    tip.replaceChildren(html("b", {}, n.title), html("br"), `${n.key}   “${visible(n.token)}”`, html("br"),
      `${signed(n.contribution)} ${graph.units}`);
    const left = n.x + LEFT + EDGE + 12, room = drawing.scrollLeft + drawing.clientWidth - tip.offsetWidth - 4;
    tip.style.left = `${Math.max(drawing.scrollLeft, Math.min(left, room))}px`;
    tip.style.top = `${n.y < 80 ? n.y + TOP + 14 : n.y + TOP - tip.offsetHeight - 12}px`;
  }
  function select(i) {
    if (selected !== null) {
      marks[selected].classList.remove("selected");
      marks[selected].setAttribute("aria-pressed", "false");
    }
    selected = i;
    if (i !== null) {
      marks[i].classList.add("selected");
      marks[i].setAttribute("aria-pressed", "true");
      rove(meant(i)[0]);
    }
    emphasise();
    describe(i);
  }
  // Draw what is to be seen now.
  function redraw() {
    connect();
    marks.forEach((mark, i) => {
      mark.toggleAttribute("hidden", !isSeen(i));
      if (nodes[i].members) mark.setAttribute("aria-expanded", unfolded.has(i));
    });
    threshold();
    rove(meant(seenAs(current))[0]);
    emphasise();
  }
  function fold(i, on) {
    if (on) unfolded.delete(i); else unfolded.add(i);
    redraw();
  }
  // A click on a node, or Enter: a supernode unfolds.
  function act(i) {
    const focused = i !== null && document.activeElement === marks[i];
    if (i !== null && nodes[i].members) fold(i, false);
    select(i);
    if (focused) marks[current].focus();
  }
  // One node is in the order of the Tab key; arrows move on from there.
  function rove(i) {
    marks[current].setAttribute("tabindex", -1);
    current = i;
    marks[i].setAttribute("tabindex", 0);
  }
  function go(i) {
    rove(i);
    marks[i].focus();
    marks[i].scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  function jump(i) {
    if (seenAs(i) !== i) fold(owner[i], false);
    go(meant(i)[0]);
    hover(null);
    select(i);
  }

  // -------------------------------------------------------------------------------- the panel
  // A node with a number, and a bar beside others of which the largest is `most`.
  function listed(other, value, most) {
    const name = html("button", { type: "button", "data-node": other }, nodes[other].key);
    const bar = html("i", { style: `width:${(100 * Math.abs(value) / most).toFixed(0)}%` });
    bar.classList.toggle("negative", value < 0);
    return html("li", {}, name, bar, html("span", {}, signed(value)));
  }
  function links(title, ids, end, note) {
    if (!ids.length) return [];
    const most = Math.abs(edges[ids[0]][2]);
    const rows = ids.slice(0, 8).map(e => listed(edges[e][end], edges[e][2], most));
    const rest = ids.length > 8 ? [html("p", { class: "soft" }, `and ${ids.length - 8} more`)] : [];
    return [html("h4", {}, title), html("ul", { class: "links" }, ...rows), ...rest, ...note];
  }
  function written(title, pairs) {
    if (!pairs.length) return [];
    return [html("h4", {}, title), html("ul", { class: "writes" }, ...pairs.map(([token, logit]) =>
      html("li", {}, html("code", {}, visible(token)), " ",
        html("small", { class: logit < 0 ? "fall" : "rise" }, signed(logit)))))];
  }
  function members(i) {
    if (!nodes[i].members) return [];
    const open = unfolded.has(i), toggle = html("button", { type: "button" }, open ? "Fold" : "Unfold");
    toggle.addEventListener("click", () => { fold(i, open); select(i); });
    const worth = m => nodes[m].contribution, own = [...nodes[i].members].sort((a, b) => Math.abs(worth(b)) - Math.abs(worth(a)));
    return [html("h4", {}, "Members"), html("ul", { class: "links" },
      ...own.map(m => listed(m, worth(m), Math.abs(worth(own[0])) || 1))), html("p", {}, toggle)];
  }
  function describe(i) {
    if (i === null) {
      detail.replaceChildren(html("h3", {}, "What a node does"),
        html("p", {}, "Click a node, or press Enter on it, to see what it adds to the metric, " +
          "where that comes from and where it goes."),
        html("p", { class: "soft" }, "Layers go upward, positions across. Larger is a larger contribution. " +
          "Arrow keys move between nodes, Escape clears, / searches."));
      return;
    }
    const n = nodes[i], facts = [];
    const fact = (name, ...value) => facts.push(html("dt", {}, name), html("dd", {}, ...value));
    fact("Contribution", html("b", {}, `${signed(n.contribution)} ${graph.units}`));
    if (n.kind !== "metric") fact("Rank", `${n.rank} of ${n.of} ${n.of === 1 ? KINDS[n.kind] : PLURAL[n.kind]} drawn, percentile ${n.percentile.toFixed(1)}`);
    if (n.scored) fact("On the task", `${signed(n.scored.score)} ${graph.units}, rank ${n.scored.rank}, percentile ${n.scored.percentile.toFixed(2)} of all ${PLURAL[n.kind]}`);
    if (n.influence !== null) fact("Influence", number(n.influence));
    if (n.activation !== null) fact("Activation", minus(number(n.activation)));
    if (n.pattern !== null) fact("Where it looks", `${signed(n.pattern)} ${graph.units}`, ...(n.pattern_rest === null ? [] : [`, ${signed(n.pattern_rest)} of it said by no edge`]));
    if (owner[i] !== null) fact("Part of", html("button", { type: "button", "data-node": owner[i] }, nodes[owner[i]].key));
    const bias = n.offset ? [html("p", { class: "soft" }, `${signed(n.offset)} offset of its own expert`)] : [];
    const heat = n.attention.length ? [html("h4", {}, "Attends to"), html("p", { class: "attention" },
      ...n.attention.map((a, at) => html("span", { style: `--a:${a.toFixed(3)}`, title: `${at}: ${a.toFixed(3)}` }, visible(tokens[at]))))] : [];
    const said = n.members ? "The sum over its members" +
        (n.internal ? `; ${signed(n.internal)} of it flows from one to another` : "") + "." :
      n.kind === "metric" ? `Of this prompt${versus}.` :
      `${removing} ${n.contribution < 0 ? "raises" : "lowers"} the metric by that much, with experts held fixed.`;
    detail.replaceChildren(
      html("h3", {}, n.title),
      html("p", { class: "soft" }, html("code", {}, n.key), n.members ? "" : n.kind === "metric" ? ` ${graph.metric}` : ` “${visible(n.token)}”`),
      html("dl", {}, ...facts),
      html("p", { class: "soft" }, said), ...members(i),
      ...links("Strongest inputs", incoming[i], 0, bias), ...links("Strongest outputs", outgoing[i], 1, []),
      ...written("Writes towards", n.promoted), ...written("Writes away from", n.suppressed), ...heat);
    detail.scrollTop = 0;
  }

  // ------------------------------------------------------------------- search, threshold, table
  const rows = Array.from(table.tBodies[0].rows);
  const haystacks = nodes.map(n => [n.key, n.title, KINDS[n.kind], n.token].map(text => text.toLowerCase()));
  function filter() {
    const query = search.value.toLowerCase();
    const fits = haystacks.map(texts => texts.some(text => text.includes(query)));
    marks.forEach((mark, i) => mark.classList.toggle("off", !fits[i] && !nodes[i].members?.some(m => fits[m])));
    for (const row of rows) row.hidden = !fits[row.dataset.node];
    status.textContent = query ? `${fits.filter(Boolean).length} of ${nodes.length} nodes` : "";
    return fits.indexOf(true);
  }
  // The slider is linear in the logarithm of the weight.
  const lightest = edges.length ? Math.max(Math.abs(edges.at(-1)[2]), heaviest * 1e-6) : 1;
  const range = Math.log(heaviest / lightest) || 1;
  function threshold() {
    const least = Number(slider.value) === 0 ? 0 : lightest * Math.exp(range * slider.value / 100);
    const drawn = edges.filter(edge => Math.abs(edge[2]) >= least * (1 - 1e-9));
    faint.replaceChildren(...drawn.reverse().map(curve));
    // The fewer there are, the clearer each may be.
    faint.style.setProperty("--faint", Math.min(0.5, 2.6 / Math.sqrt(drawn.length + 1)).toFixed(2));
    shownEdges.textContent = `${number(least)} ${graph.units}: ${drawn.length} of ${edges.length}`;
  }
  function sortable(th, column) {
    const button = html("button", { type: "button" }, ...th.childNodes);
    th.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = th.getAttribute("aria-sort") === "descending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      th.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = ["key", "kind", "layer", "position", "token", "contribution", "percentile", "influence"][column];
      const value = row => nodes[row.dataset.node][key] ?? -Infinity;
      rows.sort((a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0) * (up ? 1 : -1));
      table.tBodies[0].append(...rows);
    });
  }
  for (const row of rows) {
    const cell = row.cells[0];
    cell.replaceChildren(html("button", { type: "button", "data-node": row.dataset.node }, cell.textContent));
  }
  Array.from(table.tHead.rows[0].cells).forEach(sortable);

  // ------------------------------------------------------------------------------- listening
  const nodeOf = event => {
    const mark = event.target.closest?.(".node[data-node]");
    return mark ? Number(mark.dataset.node) : null;
  };
  // To the next node in that direction; sideways within the row first.
  function towards(key) {
    const from = nodes[current], side = key === "ArrowLeft" || key === "ArrowRight";
    const sign = key === "ArrowLeft" || key === "ArrowUp" ? -1 : 1;
    let best = null, least = Infinity;
    nodes.forEach((n, i) => {
      const [dx, dy] = [n.x - from.x, n.y - from.y];
      const [along, across] = side ? [sign * dx, Math.abs(dy)] : [sign * dy, Math.abs(dx)];
      if (i === current || !isSeen(i) || along <= 0.5 || marks[i].classList.contains("off")) return;
      const distance = along + (side ? 30 : 2) * across;
      if (distance < least) [best, least] = [i, distance];
    });
    return best;
  }
  picture.addEventListener("pointerover", event => { if (nodeOf(event) !== null) hover(nodeOf(event)); });
  picture.addEventListener("pointerout", event => { if (nodeOf(event) !== null) hover(null); });
  picture.addEventListener("focusin", event => { if (nodeOf(event) !== null) { rove(nodeOf(event)); hover(current); } });
  picture.addEventListener("focusout", () => hover(null));
  picture.addEventListener("click", event => act(nodeOf(event)));
  picture.addEventListener("keydown", event => {
    if (nodeOf(event) === null) return;
    if (event.key === "Enter" || event.key === " ") { act(current); event.preventDefault(); }
    else if (event.key.startsWith("Arrow")) {
      const next = towards(event.key);
      if (next !== null) go(next);
      event.preventDefault();
    }
  });
  root.addEventListener("click", event => {
    const button = event.target.closest("button[data-node]");
    if (button) jump(Number(button.dataset.node));
  });
  document.addEventListener("keydown", event => {
    if (event.key === "/" && !event.target.closest?.("input, textarea, select")) { event.preventDefault(); search.focus(); }
    if (event.key === "Escape") { hover(null); select(null); search.value = ""; filter(); }
  });
  form.addEventListener("submit", event => {
    event.preventDefault();
    const first = filter();
    if (first >= 0) go(meant(seenAs(first))[0]);
  });
  search.addEventListener("input", filter);
  slider.addEventListener("input", threshold);

  const few = edges.length ? Math.abs(edges[Math.min(FAINT, edges.length) - 1][2]) : lightest;
  slider.value = edges.length <= FAINT ? 0 : Math.ceil(200 * Math.log(few / lightest) / range) / 2;
  redraw();
  // What to begin with: the node that does most.
  const doers = nodes.map((n, i) => [Math.abs(n.contribution), i])
    .filter(([, i]) => isSeen(i) && !["metric", "embedding", "position", "attn_rest", "mlp_rest"].includes(nodes[i].kind));
  select(doers.length ? doers.sort((a, b) => b[0] - a[0])[0][1] : null);
  drawing.scrollLeft = nodes[current].x + EDGE - (drawing.clientWidth - LEFT) / 2;
}

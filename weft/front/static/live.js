// What the server is at.

import { Histogram, Steps, Throughput } from "./charts.js";
import { count, h, say, seconds } from "./dom.js";
import { BlockMap } from "./kvmap.js";
import { bar, timeline } from "./timeline.js";

const FIGURES = [
  ["running", "running", (f) => f.stats.running],
  ["waiting", "in the queue", (f) => f.stats.waiting],
  ["finished", "answered", (f) => Object.values(f.finished).reduce((a, b) => a + b, 0)],
  ["generation", "tokens generated", (f) => f.stats.generation_tokens],
  ["prompt", "prompt tokens computed", (f) => f.stats.prompt_tokens],
  ["hits", "prompt tokens from the cache", (f) => f.stats.prefix_hit_tokens],
  ["preemptions", "preemptions", (f) => f.stats.preemptions],
  ["steps", "steps", (f) => f.stats.steps],
];

const figures = {};
const charts = {};
const rows = new Map();
let [last, since, blocks, open, table, ends, problem, model] = [null, 0, [], null, null, null, null, ""];

export function build(root) {
  const card = (title, ...inside) => h("section", { class: "card" }, h("h2", {}, title), ...inside);
  const numbers = FIGURES.map(([name, words]) => {
    figures[name] = h("b", { id: `n-${name}` }, "–");
    return h("div", { class: "figure" }, figures[name], h("span", {}, words));
  });
  charts.steps = new Steps();
  charts.speed = new Throughput();
  charts.ttft = new Histogram("ttft", "first tokens");
  charts.tpot = new Histogram("tpot", "later tokens");
  charts.map = new BlockMap();
  ends = h("p", { id: "ends", class: "quiet" });
  problem = h("p", { class: "wrong", role: "alert", hidden: true });
  table = h("tbody", { id: "requests" });
  const heads = ["Request", "State", "Prompt", "Cached", "Output", "Age"].map((text, i) => h("th", { scope: "col", class: i > 1 ? "number" : null }, text));
  root.append(
    h("h1", { class: "unseen" }, "Live"),
    problem,
    h("div", { class: "figures" }, ...numbers),
    h(
      "div", { class: "cards" },
      card("Rows of each step", charts.steps.element),
      card("Tokens a second", charts.speed.element),
      h("section", { class: "card whole" }, h("h2", {}, "KV blocks"), charts.map.element),
      card("Time to the first token", charts.ttft.element),
      card("Time for each later token", charts.tpot.element),
      h(
        "section", { class: "card whole" }, h("h2", {}, "Requests"),
        h(
          "div", { class: "scroll" },
          h("table", {}, h("thead", {}, h("tr", {}, ...heads, h("th", { scope: "col", class: "bar" }, "Timeline"))), table),
        ),
        h("p", { class: "quiet", id: "no-requests" }, "No request since this page watches. Ask something in the chat."),
        ends,
      ),
    ),
  );
  new ResizeObserver(redraw).observe(root);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  setInterval(idle, 500);
}

function redraw() {
  charts.steps.draw();
  charts.map.draw();
  if (last) charts.speed.draw(last.t_s + (performance.now() - since) / 1000);
}

/** The server says nothing while nothing changes; time passes all the same. */
function idle() {
  const passed = (performance.now() - since) / 1000;
  if (last && passed > 0.9 && !last.open_requests && !document.hidden) charts.speed.add(last.t_s + passed, last.stats);
}

/** Nothing of another model's stays. */
function clear() {
  [last, blocks] = [null, []];
  requests([]);
  for (const chart of [charts.steps, charts.speed, charts.ttft, charts.tpot]) chart.clear();
}

export function take({ hello, frame, problem: wrong }) {
  problem.hidden = !wrong;
  say(problem, wrong);
  const name = hello?.models[0] ?? model;
  if (model && name !== model) clear();
  model = name;
  if (!frame) return;
  [last, since] = [frame, performance.now()];
  blocks = frame.blocks ?? blocks;
  for (const [name, , value] of FIGURES) say(figures[name], count(value(frame)));
  const told = Object.entries(frame.finished).filter(([, n]) => n);
  say(ends, told.length ? `Ended since the server started: ${told.map(([why, n]) => `${why} ${count(n)}`).join(", ")}.` : "");
  charts.steps.add(frame.steps, frame.left_out);
  charts.speed.add(frame.t_s, frame.stats);
  charts.ttft.show(frame.histograms.ttft);
  charts.tpot.show(frame.histograms.tpot);
  charts.map.show(blocks, frame.stats.kv_blocks_total || hello?.kv_blocks || 0, hello?.block_tokens ?? 0);
  requests(frame.requests);
}

/** Rows are kept by request, so that what is open or focused stays. */
function requests(list) {
  const seen = new Set();
  const order = [...list].sort((a, b) => b.id - a.id);
  for (const one of order) {
    seen.add(one.id);
    if (!rows.has(one.id)) rows.set(one.id, row(one.id));
    update(rows.get(one.id), one);
  }
  for (const [id, kept] of rows) {
    if (seen.has(id)) continue;
    kept.line.remove();
    kept.more.remove();
    rows.delete(id);
    if (open === id) open = null;
  }
  order.forEach(({ id }, i) => {
    const { line, more } = rows.get(id);
    if (table.children[2 * i] !== line) table.insertBefore(more, table.insertBefore(line, table.children[2 * i] ?? null).nextSibling);
  });
  document.getElementById("no-requests").hidden = order.length > 0;
}

function row(id) {
  const cells = ["state", "prompt", "cached", "output", "age"].map((name) => h("td", { class: name === "state" ? "tag" : "number" }));
  const chart = h("td", { class: "bar" });
  const button = h("button", { type: "button", class: "link", "aria-expanded": "false", onclick: () => toggle(id) }, `#${id}`);
  const line = h("tr", { data: { request: id } }, h("td", {}, button), ...cells, chart);
  const inside = h("td", { colspan: 7 });
  return { cells, chart, button, line, inside, more: h("tr", { class: "more", hidden: true }, inside), drawn: "", one: null };
}

/** What the prefix index had of its prompt: told at its end, and in its timeline before. */
function cached({ cached_tokens: told, timeline: moments }) {
  return told || (moments.find(({ event }) => event === "started")?.detail.cached_tokens ?? 0);
}

function update(kept, one) {
  kept.one = one;
  const { cells, chart, line } = kept;
  line.dataset.state = one.state;
  const texts = [one.state, count(one.prompt_tokens), count(cached(one)), count(one.output_tokens), seconds(one.age_s)];
  if (one.state === "finished") texts[4] = seconds(one.timeline.at(-1)?.t_s ?? one.age_s);
  texts.forEach((text, i) => say(cells[i], text));
  const now = one.state === "finished" ? 0 : one.age_s;
  const drawn = `${one.state} ${one.timeline.length} ${now.toFixed(1)}`;
  if (drawn === kept.drawn) return;
  kept.drawn = drawn;
  chart.replaceChildren(one.timeline.length ? bar(one.timeline, now) : h("span", { class: "quiet" }, "came before"));
  if (open === one.id) kept.inside.replaceChildren(timeline(one.timeline, now));
}

function toggle(id) {
  open = open === id ? null : id;
  for (const [key, { button, more, inside, one }] of rows) {
    button.setAttribute("aria-expanded", String(open === key));
    more.hidden = open !== key;
    if (open === key) inside.replaceChildren(timeline(one.timeline, one.state === "finished" ? 0 : one.age_s));
  }
}

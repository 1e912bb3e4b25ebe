// The memory plan: what was set aside for what, before anything was allocated.

import { bytes, count, h, s, share } from "./dom.js";

const PARTS = [
  ["weights_bytes", "weights", "Weights"],
  ["draft_bytes", "draft", "Draft model"],
  ["adapters_bytes", "adapters", "Adapters"],
  ["kv_bytes", "kv", "KV pool"],
  ["tiers_bytes", "tiers", "KV kept in memory besides"],
  ["workspace_bytes", "workspace", "Workspace"],
  ["reserve_bytes", "reserve", "Reserve"],
];

let [root, shown] = [null, ""];

export function build(element) {
  root = element;
  root.append(h("h1", { class: "unseen" }, "Memory"), h("p", { class: "empty" }, "Waiting for the server's plan …"));
}

function words(name, hello) {
  const { plan } = hello;
  return {
    weights_bytes: `computed on ${hello.device}, in ${hello.dtype}`,
    kv_bytes: `${count(plan.kv_blocks)} blocks of ${count(plan.block_tokens)} tokens, ${bytes(plan.kv_bytes_per_token)} for each token`,
    workspace_bytes: "what a step needs at most",
    reserve_bytes: "interpreter, libraries, what allocators leave over",
  }[name] ?? "";
}

export function take({ hello }) {
  if (!hello || !root) return;
  const mark = JSON.stringify(hello);
  if (mark === shown) return;
  shown = mark;
  const facts = [
    ["Models", hello.models.join(", ")],
    ["Context", `${count(hello.max_model_len)} tokens`],
    ["Sequences at once", count(hello.max_num_seqs)],
    ["Computed on", `${hello.device}, ${hello.dtype}`],
    ["Techniques", hello.stack.join("  ") || "none"],
    ["weft", hello.version],
  ];
  root.replaceChildren(
    h("h1", { class: "unseen" }, "Memory"),
    hello.plan ? drawn(hello) : h("p", { class: "empty" }, "This engine has no memory plan."),
    h(
      "section", { class: "card" }, h("h2", {}, "What is served"),
      h("dl", {}, ...facts.flatMap(([name, text]) => [h("dt", {}, name), h("dd", {}, text)])),
    ),
  );
}

function drawn(hello) {
  const { plan: told } = hello;
  const parts = PARTS.filter(([name]) => told[name]);
  const total = told.total_bytes;
  let x = 0;
  const strip = parts.map(([name, fill, text]) => {
    const width = (1000 * told[name]) / total;
    x += width;
    return s("rect", { x: x - width, width: Math.max(width - 2, 1.5), y: 0, height: 10, class: `plan-${fill}` }, s("title", {}, `${text}: ${bytes(told[name])}`));
  });
  const rows = parts.map(([name, fill, text]) =>
    h(
      "tr", { data: { part: name, bytes: told[name] } },
      h("th", { scope: "row" }, h("i", { class: `swatch plan-${fill}` }), text),
      h("td", { class: "number" }, bytes(told[name])),
      h("td", { class: "number quiet" }, `${((100 * told[name]) / total).toFixed(1)} %`),
      h("td", { class: "quiet wide" }, words(name, hello)),
    ));
  const taken = told.available_bytes ? (100 * total) / told.available_bytes : 0;
  return h(
    "section", { class: "card" }, h("h2", {}, "Memory plan"),
    h("p", { class: "big" }, h("b", { id: "plan-total" }, bytes(total)), h("span", { class: "quiet" }, ` of ${bytes(told.available_bytes)} available (${told.available_source ?? "host"})`)),
    s("svg", { class: "strip", role: "img", "aria-label": "Parts of the plan", viewBox: "0 0 1000 10", preserveAspectRatio: "none" }, ...strip),
    h("table", { id: "plan" }, h("tbody", {}, ...rows)),
    h("p", { class: "quiet" }, `The plan takes ${taken.toFixed(1)} % of what the machine leaves. Nothing beyond it is allocated.`),
    taken ? share(taken / 100, "Share of the memory available") : null,
  );
}

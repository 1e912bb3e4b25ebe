// One request's life as a bar and a list.

import { count, h, s, seconds } from "./dom.js";

const WORDS = {
  grammar: "grammar looked at",
  queued: "queued",
  started: "entered the step",
  resumed: "came back",
  chunk: "prompt computed",
  first_token: "first token",
  speculation: "guesses verified",
  preempted: "preempted",
  engine_died: "engine died",
  finished: "finished",
};

/** Which phase begins with an event. */
const PHASE = {
  grammar: "wait", queued: "wait", started: "prompt", resumed: "prompt", first_token: "decode", preempted: "wait",
  engine_died: "died",
};
const PHASES = { wait: "waiting", prompt: "prompt", decode: "decoding", died: "engine down" };

/** Phases [{phase, from, to}] of a request; now_s: its age, while it lives. */
export function phases(moments, now_s = 0) {
  const found = [];
  let decoding = false;
  for (const { t_s, event, detail } of moments) {
    if (detail?.sequence) continue;
    const last = found.at(-1);
    if (event === "finished") {
      if (last) last.to = t_s;
      return found;
    }
    decoding ||= event === "first_token";
    let phase = PHASE[event];
    if (event === "speculation" && last?.phase !== "decode") phase = "decode";
    if (event === "chunk" && last?.phase !== "prompt" && !decoding) phase = "prompt";
    if (!phase || phase === last?.phase) continue;
    if (last) last.to = t_s;
    found.push({ phase, from: t_s, to: Math.max(t_s, now_s) });
  }
  return found;
}

/** The bar alone. */
export function bar(moments, now_s = 0, { label = true } = {}) {
  const parts = phases(moments, now_s);
  const total = Math.max(...parts.map((part) => part.to), 1e-9);
  const text = parts.map((p) => `${PHASES[p.phase]} ${seconds(p.to - p.from)}`).join(", ");
  return s(
    "svg", { class: "timeline-bar", role: "img", "aria-label": text, preserveAspectRatio: "none", viewBox: "0 0 1000 10" },
    ...parts.map((p) =>
      s(
        "rect",
        { x: (1000 * p.from) / total, width: Math.max(3, (1000 * (p.to - p.from)) / total), y: 0, height: 10, class: `phase-${p.phase}` },
        label && s("title", {}, `${PHASES[p.phase]}: ${seconds(p.to - p.from)}`),
      ),
    ),
  );
}

function words({ event, detail = {} }) {
  const d = detail;
  const told = {
    queued: () => `behind ${count(d.behind ?? 0)}, with ${count(d.running ?? 0)} running`,
    started: () => `${count(d.cached_tokens ?? 0)} tokens from the cache, ${count(d.sequences ?? 1)} in the step`,
    resumed: () => `${count(d.cached_tokens ?? 0)} tokens from the cache`,
    chunk: () => `rows ${count(d.start)} to ${count(d.stop)}`,
    first_token: () => (d.cached_tokens ? `${count(d.cached_tokens)} tokens were cached` : ""),
    speculation: () => `${count(d.accepted)} of ${count(d.guesses)} accepted in ${count(d.steps)} steps`,
    finished: () => `${d.reason}, ${count(d.output_tokens ?? 0)} tokens`,
    engine_died: () => d.reason ?? "",
    grammar: () => seconds(d.seconds ?? 0),
  }[event];
  return told ? told() : "";
}

/** Bar, legend and list. */
export function timeline(moments, now_s = 0) {
  const seen = [...new Set(phases(moments, now_s).map((p) => p.phase))];
  return h(
    "div", { class: "timeline" },
    bar(moments, now_s),
    h("p", { class: "legend" }, ...seen.map((p) => h("span", {}, h("i", { class: `swatch phase-${p}` }), PHASES[p]))),
    h(
      "ol", {},
      ...moments.map((m) =>
        h(
          "li", { data: { event: m.event } },
          h("span", { class: "when" }, seconds(m.t_s)),
          h("b", {}, WORDS[m.event] ?? m.event),
          h("span", { class: "quiet" }, words(m)),
        ),
      ),
    ),
  );
}

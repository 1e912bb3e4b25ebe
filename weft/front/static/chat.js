// The playground: a conversation, its settings, and what became of each answer.

import { Failure, events, request, sentence } from "./api.js";
import { count, h, say, seconds } from "./dom.js";
import { timeline } from "./timeline.js";
import { Tokens } from "./tokens.js";

const SETTINGS = "weft.settings";
const NUMBERS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.05, placeholder: "default" }],
  ["top_p", "Top p", { min: 0.01, max: 1, step: 0.01, placeholder: "default" }],
  ["max_tokens", "Longest answer", { min: 1, step: 1, placeholder: "tokens" }],
  ["seed", "Seed", { min: 0, step: 1, placeholder: "by chance" }],
];

let [messages, running, fields] = [[], null, {}];
const parts = {};

export function build(root) {
  parts.log = h("div", { id: "log", class: "log", "aria-live": "polite", "aria-label": "Conversation" });
  parts.input = h("textarea", {
    id: "message", rows: 2, placeholder: "Write a message", "aria-label": "Message", onkeydown: onKey,
  });
  parts.send = h("button", { id: "send", type: "submit", class: "primary" }, "Send");
  parts.stop = h("button", { id: "stop", type: "button", hidden: true, onclick: () => running?.abort() }, "Stop");
  parts.clear = h("button", { id: "clear", type: "button", class: "plain", onclick: clear }, "New chat");
  parts.again = h("button", { id: "again", type: "button", class: "plain", onclick: again, disabled: true }, "Answer again");
  const form = h(
    "form", { class: "composer", onsubmit: onSubmit }, parts.input,
    h("div", { class: "row" }, parts.clear, parts.again, h("span", { class: "grow" }), parts.stop, parts.send),
  );
  root.append(
    h("h1", { class: "unseen" }, "Chat"),
    h("div", { class: "split" }, h("div", { class: "talk" }, parts.log, form), settings()),
  );
  clear();
}

function settings() {
  fields.model = h("select", { id: "model", name: "model" });
  fields.system = h("textarea", { id: "system", rows: 3, placeholder: "None" });
  const label = (id, text, field) => h("div", { class: "field" }, h("label", { for: id }, text), field);
  const box = h("div", { class: "settings" }, label("model", "Model", fields.model), label("system", "System prompt", fields.system));
  const grid = h("div", { class: "pair" });
  for (const [name, text, attributes] of NUMBERS) {
    fields[name] = h("input", { id: name, type: "number", inputmode: "decimal", ...attributes });
    grid.append(label(name, text, fields[name]));
  }
  fields.logprobs = h("input", { id: "logprobs", type: "checkbox" });
  box.append(grid, h("label", { class: "check" }, fields.logprobs, "Colour tokens by their probability"));
  const kept = JSON.parse(sessionStorage.getItem(SETTINGS) ?? "{}");
  for (const [name, field] of Object.entries(fields)) {
    if (name === "model") continue;
    if (field.type === "checkbox") field.checked = Boolean(kept[name]);
    else field.value = kept[name] ?? (name === "max_tokens" ? "256" : "");
  }
  box.addEventListener("change", keep);
  const details = h("details", { class: "card aside" }, h("summary", {}, "Settings"), box);
  details.open = matchMedia("(min-width: 56rem)").matches;
  return details;
}

function keep() {
  const told = Object.entries(fields).map(([name, f]) => [name, f.type === "checkbox" ? f.checked : f.value]);
  sessionStorage.setItem(SETTINGS, JSON.stringify(Object.fromEntries(told)));
}

/** Names that may be asked for; called when the server is ready. */
export async function models() {
  const { data } = await (await request("v1/models")).json();
  const before = fields.model.value;
  fields.model.replaceChildren(...data.map(({ id }) => h("option", { value: id }, id)));
  if (data.some(({ id }) => id === before)) fields.model.value = before;
}

function clear() {
  running?.abort();
  messages = [];
  parts.log.replaceChildren(
    h(
      "div", { class: "empty" }, h("h2", {}, "Ask the model something"),
      h("p", {}, "Everything stays on this server. Enter sends, Shift and Enter begin a new line."),
    ),
  );
  parts.again.disabled = true;
  parts.input.focus({ preventScroll: true });
}

function onKey(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    event.target.form.requestSubmit();
  }
}

async function onSubmit(event) {
  event.preventDefault();
  const text = parts.input.value.trim();
  if (!text || running) return;
  parts.input.value = "";
  if (!messages.length) parts.log.replaceChildren();
  messages.push({ role: "user", content: text });
  parts.log.append(h("article", { class: "said user" }, h("p", { class: "text" }, text)));
  await answer();
}

/** The last answer once more. */
async function again() {
  if (running) return;
  if (messages.at(-1)?.role === "assistant") messages.pop();
  parts.log.querySelector(".said.model:last-child")?.remove();
  if (messages.length) await answer();
}

function body() {
  const system = fields.system.value.trim();
  const told = {
    model: fields.model.value || undefined,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    stream: true,
    stream_options: { include_usage: true },
    weft: { timeline: true },
  };
  for (const [name] of NUMBERS) if (fields[name].value !== "") told[name] = Number(fields[name].value);
  if (fields.logprobs.checked) Object.assign(told, { logprobs: true, top_logprobs: 5 });
  return told;
}

async function answer() {
  const wrong = NUMBERS.find(([name]) => !fields[name].checkValidity());
  const turn = new Turn();
  parts.log.append(turn.element);
  if (wrong) {
    turn.fail(new Failure(`${wrong[1]}: ${sentence(fields[wrong[0]].validationMessage)}`));
    parts.again.disabled = false;
    return;
  }
  running = new AbortController();
  busy(true);
  try {
    turn.began = performance.now();
    const response = await request("v1/chat/completions", { body: body(), signal: running.signal });
    for await (const { data } of events(response)) {
      if (data === "[DONE]") break;
      turn.take(JSON.parse(data));
      follow();
    }
    turn.end();
  } catch (error) {
    if (error.name === "AbortError") turn.end("stopped");
    else turn.fail(error instanceof Failure ? error : new Failure("The connection broke in mid-answer."));
  } finally {
    running = null;
    busy(false);
    if (turn.content && turn.element.isConnected) messages.push({ role: "assistant", content: turn.content });
    follow();
  }
}

function busy(now) {
  parts.stop.hidden = !now;
  parts.send.hidden = now;
  parts.again.disabled = now || !messages.length;
  parts.log.setAttribute("aria-busy", String(now));
}

/** Stay at the end while the reader is there. */
function follow() {
  const { scrollHeight, scrollTop, clientHeight } = parts.log;
  if (scrollHeight - scrollTop - clientHeight < 160) parts.log.scrollTop = scrollHeight;
}

/** One answer as it comes. */
class Turn {
  constructor() {
    this.content = "";
    this.tokens = null;
    this.usage = this.moments = this.reason = null;
    this.firstAt = this.began = 0;
    this.text = h("div", { class: "text" });
    this.meta = h("p", { class: "meta quiet" }, "waiting …");
    this.thoughts = h("details", { class: "thoughts", hidden: true }, h("summary", {}, "Thoughts"), h("p", { class: "text" }));
    this.element = h("article", { class: "said model", data: { state: "running" } }, this.thoughts, this.text, this.meta);
  }

  take(chunk) {
    if (chunk.error) throw new Failure(sentence(chunk.error.message));
    this.usage = chunk.usage ?? this.usage;
    this.moments = chunk.weft?.timeline ?? this.moments;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    this.reason = choice.finish_reason ?? this.reason;
    const { content, reasoning_content: thought } = choice.delta ?? {};
    if ((content || thought) && !this.firstAt) {
      this.firstAt = performance.now();
      say(this.meta, "answering …");
    }
    if (thought) {
      this.thoughts.hidden = false;
      this.thoughts.lastChild.append(thought);
    }
    if (content) this.content += content;
    if (choice.logprobs?.content?.length) {
      if (!this.tokens) {
        this.tokens = new Tokens();
        this.text.replaceChildren(this.tokens.element);
      }
      this.tokens.add(choice.logprobs.content);
    } else if (content && !this.tokens) this.text.append(content);
  }

  /** how: stopped, or nothing for an end of the answer's own. */
  end(how) {
    const told = [];
    // By the server's clock: text may reach a busy browser all at once.
    const at = Object.fromEntries((this.moments ?? []).map(({ event, t_s }) => [event, t_s]));
    const took = at.finished - at.first_token;
    if (this.usage) {
      const { completion_tokens: made, prompt_tokens: given, prompt_tokens_details: d } = this.usage;
      told.push(`${count(made)} tokens`);
      if (made > 1 && took > 0) told.push(`${count((made - 1) / took)} a second`);
      told.push(`prompt ${count(given)}${d?.cached_tokens ? `, ${count(d.cached_tokens)} cached` : ""}`);
    }
    if (this.firstAt) told.push(`first after ${seconds((this.firstAt - this.began) / 1000)}`);
    if (how) told.unshift("stopped by you");
    else if (this.reason === "length") told.push("cut at the longest answer");
    say(this.meta, told.join(" · ") || "an empty answer");
    this.element.dataset.state = how ?? "done";
    this.tokens?.end(this.reason === "stop" ? this.content : null);
    if (this.moments) {
      this.element.append(h("details", { class: "what" }, h("summary", {}, "What became of it"), timeline(this.moments)));
    }
  }

  fail(error) {
    this.meta.remove();
    this.element.dataset.state = "failed";
    this.element.append(h("p", { class: "wrong", role: "alert" }, error.message));
  }
}

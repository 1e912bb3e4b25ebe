// Views by the address's hash, and who is told what.

import * as chat from "./chat.js";
import { h } from "./dom.js";
import * as feed from "./feed.js";
import * as live from "./live.js";
import * as memory from "./memory.js";
import { onReady, watch } from "./state.js";

const VIEWS = { chat, live, memory };
const WATCHING = new Set(["live", "memory"]);

const which = document.getElementById("which");
const engine = document.getElementById("engine");

let ready = false;
let named = false;
let several = false;

for (const [name, view] of Object.entries(VIEWS)) view.build(document.getElementById(name));

function view() {
  const asked = location.hash.slice(1);
  return asked in VIEWS ? asked : "chat";
}

function show() {
  const name = view();
  which.hidden = !(several && WATCHING.has(name));
  for (const key of Object.keys(VIEWS)) document.getElementById(key).hidden = key !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${name[0].toUpperCase()}${name.slice(1)} · weft`;
  window.scrollTo(0, 0);
  feed.want(ready && WATCHING.has(name));
}

onReady(async (now) => {
  if (now && !ready) {
    ready = true; // and stays so: the feed outlives an engine, and tells how that goes
    show();
  }
  if (!now) named = false;
  else if (!named) {
    named = true;
    await chat.models().catch(() => { named = false; });
  }
});

/** Of several models each has a feed, and the reader says whose is shown. */
feed.onFrame(({ hello }) => {
  const names = hello?.engines ?? [];
  several = names.length > 1;
  which.hidden = !(several && WATCHING.has(view()));
  if ([...engine.options].map(({ value }) => value).join("\n") === names.join("\n")) return;
  engine.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
  engine.value = hello?.models.find((name) => names.includes(name)) ?? names[0] ?? "";
});
engine.addEventListener("change", () => feed.choose(engine.value));
feed.onFrame(live.take);
feed.onFrame(memory.take);
addEventListener("hashchange", show);
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  document.getElementById("main").focus();
});
show();
watch();

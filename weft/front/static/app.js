// Views by the address's hash, and who is told what.

import * as chat from "./chat.js";
import * as feed from "./feed.js";
import * as live from "./live.js";
import * as memory from "./memory.js";
import { onReady, watch } from "./state.js";

const VIEWS = { chat, live, memory };
const WATCHING = new Set(["live", "memory"]);

let ready = false;
let named = false;

for (const [name, view] of Object.entries(VIEWS)) view.build(document.getElementById(name));

function show() {
  const asked = location.hash.slice(1);
  const name = asked in VIEWS ? asked : "chat";
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

feed.onFrame(live.take);
feed.onFrame(memory.take);
addEventListener("hashchange", show);
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  document.getElementById("main").focus();
});
show();
watch();

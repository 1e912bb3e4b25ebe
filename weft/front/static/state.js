// What the header says: how the server is, from /health and, while somebody watches, from the feed.

import { health, sentence } from "./api.js";
import { say } from "./dom.js";

const WORDS = {
  loading: "loading the model",
  ok: "ready",
  draining: "shutting down",
  stalled: "not advancing",
  down: "engine down, starting again",
  recovered: "engine recovered",
  lost: "connection lost, trying again",
};
const SHOW_RECOVERY_MS = 8000;

let [restarts, up, restarted, recoveredAt, shown, draining] = [null, false, false, -Infinity, "", false];
const listeners = new Set();

/** f(ready) whenever the server begins or ceases to answer requests. */
export function onReady(f) {
  listeners.add(f);
}

/** Take in a state {status, reason, engine_restarts} of the feed, which knows the engine and not whether the server ends. */
export function take(state) {
  if (!draining) judge(state);
}

/** state: null for no answer. */
function judge(state) {
  const now = performance.now();
  let name = "lost";
  if (state) {
    name = state.status in WORDS ? state.status : "stalled";
    if (restarts !== null && state.engine_restarts > restarts) restarted = true;
    if (restarts !== null && state.engine_restarts < restarts) [up, restarted] = [false, false]; // another server
    restarts = state.engine_restarts;
    if (name === "loading" && up) name = "down";
    // A restart is counted when the engine ends; it has recovered when it answers again, however long that takes.
    if (name === "ok" && restarted) [restarted, recoveredAt] = [false, now];
    if (name === "ok" && now - recoveredAt < SHOW_RECOVERY_MS) name = "recovered";
  }
  show(name, state);
  const ready = name === "ok" || name === "recovered";
  if (ready) up = true;
  if (name === "lost") up = false;
  for (const f of listeners) f(ready);
}

function show(name, state) {
  const pill = document.getElementById("state");
  const again = restarts ? ` · ${restarts} restart${restarts === 1 ? "" : "s"}` : "";
  say(pill.querySelector("span"), WORDS[name] + (state ? again : ""));
  pill.title = state?.reason ? sentence(state.reason) : "";
  pill.dataset.restarts = restarts ?? 0;
  if (name !== shown) pill.dataset.state = name;
  shown = name;
}

/** Look again and again, more often while it is not well. */
export async function watch() {
  for (;;) {
    const told = await health();
    draining = told?.status === "draining";
    judge(told);
    const calm = shown === "ok" && !document.hidden;
    await new Promise((resolve) => setTimeout(resolve, calm ? 2000 : 500));
  }
}

// The live feed (GET /v1/weft/live), held open while somebody looks, and taken up again when it breaks.

import { events, request } from "./api.js";
import { take } from "./state.js";

const listeners = new Set();
let [wanted, running, hello, model] = [false, null, null, ""];

/** f({hello, frame}) for each that comes. */
export function onFrame(f) {
  listeners.add(f);
}

/** Whether a view that shows it is open. */
export function want(now) {
  wanted = now;
  if (wanted && !document.hidden) run();
  else running?.abort();
}

/** Of which model, where the server has several. */
export function choose(name) {
  if (name === model) return;
  model = name;
  running?.abort();
}

document.addEventListener("visibilitychange", () => want(wanted));

async function run() {
  if (running) return;
  const mine = (running = new AbortController());
  let problem = "";
  while (!mine.signal.aborted) {
    try {
      const path = model ? `v1/weft/live?model=${encodeURIComponent(model)}` : "v1/weft/live";
      const response = await request(path, { signal: mine.signal });
      for await (const { event, data } of events(response)) {
        const told = JSON.parse(data);
        if (event === "hello") hello = told;
        else take(told.state);
        problem = "";
        for (const f of listeners) f({ hello, frame: event === "frame" ? told : null, problem });
      }
    } catch (error) {
      if (error.name === "AbortError") break;
      problem = error.message;
      for (const f of listeners) f({ hello, frame: null, problem });
    }
    await new Promise((resolve) => setTimeout(resolve, 700));
  }
  if (running === mine) running = null;
  if (wanted && !document.hidden) run();
}

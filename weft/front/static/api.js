// The server's own API: requests with the key, errors in words, and streams of events.

const KEY = "weft.key";
const base = new URL(".", document.baseURI);

/** What went wrong, to be shown as it is. */
export class Failure extends Error {
  constructor(message, { status = 0, code = "" } = {}) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

let asking = null;

/** Ask for the key in the dialog; one dialog for however many requests wait for it. wrong: one was sent and refused. */
function askKey(wrong) {
  asking ??= new Promise((resolve) => {
    const [dialog, form, field] = ["key", "key-form", "key-field"].map((id) => document.getElementById(id));
    const before = document.activeElement;
    document.getElementById("key-wrong").hidden = !wrong;
    const done = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, field.value);
      field.value = "";
      form.removeEventListener("submit", done);
      dialog.close(); // the focus goes back to where it was, which on a new page is nowhere
      if (before === document.body) document.getElementById("main").focus({ preventScroll: true });
      asking = null;
      resolve();
    };
    form.addEventListener("submit", done);
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    if (!dialog.open) dialog.showModal();
    field.focus();
  });
  return asking;
}

/** A response whose status is good. body: sent as JSON. signal: ends it. Asks for the key when the server does. */
export async function request(path, { body, signal } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = {};
    if (body !== undefined) headers["content-type"] = "application/json";
    if (key) headers.authorization = `Bearer ${key}`;
    let response;
    try {
      response = await fetch(new URL(path, base), {
        method: body === undefined ? "GET" : "POST",
        headers,
        body: body === undefined ? undefined : JSON.stringify(body),
        signal,
        cache: "no-store",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure("The server does not answer. Is it still running?");
    }
    if (response.status === 401) {
      await response.body?.cancel();
      if (key === sessionStorage.getItem(KEY)) await askKey(Boolean(key));
      continue;
    }
    if (!response.ok) throw await failure(response);
    return response;
  }
}

async function failure(response) {
  let told = null;
  try {
    told = (await response.json()).error;
  } catch {
    // no JSON: whatever stands between this page and the server has answered
  }
  const wait = response.headers.get("retry-after");
  const later = wait && [429, 503].includes(response.status) ? ` Try again in ${wait} s.` : "";
  const message = told?.message ?? `The server answered ${response.status}.`;
  return new Failure(sentence(message) + later, { status: response.status, code: told?.code ?? "" });
}

/** A message as a sentence. */
export function sentence(text) {
  const first = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(first) ? first : `${first}.`;
}

/** Events {event, data} of a response, as they come. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let [rest, event, data] = ["", "message", []];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { event, data: data.join("\n") };
          [event, data] = ["message", []];
        } else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line.startsWith("event:")) event = line.slice(6).trim();
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** How the server is, also while it loads or drains; null where nobody answers. */
export async function health() {
  try {
    const response = await fetch(new URL("health", base), { cache: "no-store", signal: AbortSignal.timeout(5000) });
    return await response.json();
  } catch {
    return null;
  }
}

// An answer as tokens, coloured by how likely each was; what else could have stood there on hover or focus.

import { h, share } from "./dom.js";

const percent = (logprob) => {
  const p = 100 * Math.exp(logprob);
  return p >= 99.95 ? "100 %" : p >= 0.1 ? `${p.toFixed(1)} %` : "< 0.1 %";
};

/** Five shades: from what was nearly certain to what was a surprise. */
export function shade(logprob) {
  const p = Math.exp(logprob);
  return p >= 0.9 ? 0 : p >= 0.5 ? 1 : p >= 0.2 ? 2 : p >= 0.05 ? 3 : 4;
}

const visible = (text) => (text === "" ? "∅" : text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥"));

let panel = null;

export class Tokens {
  constructor() {
    this.list = h("span", {
      class: "tokens", role: "group", "aria-label": "Tokens; arrow keys go from one to the next",
      onpointerover: (e) => this.open(e.target), onpointerleave: () => close(), onfocusin: (e) => this.open(e.target),
      onfocusout: () => close(), onkeydown: (e) => this.move(e),
    });
    const words = ["≥ 90 %", "≥ 50 %", "≥ 20 %", "≥ 5 %", "less"];
    const legend = words.map((word, i) => h("span", {}, h("i", { class: `swatch shade-${i}` }), word));
    this.element = h("div", {}, this.list, h("p", { class: "legend" }, ...legend));
    this.told = new WeakMap();
    this.decoder = new TextDecoder();
  }

  /** entries: OpenAI's, with `token`, `logprob`, `bytes` and `top_logprobs`. */
  add(entries) {
    for (const entry of entries) {
      const text = entry.bytes ? this.decoder.decode(new Uint8Array(entry.bytes), { stream: true }) : entry.token;
      const first = !this.list.firstChild;
      const one = h("span", { class: `token shade-${shade(entry.logprob)}`, tabindex: first ? 0 : -1 }, text);
      this.told.set(one, entry);
      this.list.append(one);
    }
  }

  /** content: of an answer that the model ended, else null.  The token by which it did so is no part of the text. */
  end(content) {
    const rest = this.decoder.decode();
    const last = this.list.lastChild;
    if (rest) last?.append(rest);
    if (last && content !== null && !content.endsWith(last.textContent)) {
      last.textContent = "";
      last.classList.add("ended");
    }
  }

  move(event) {
    const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    const next = step && event.target[step];
    if (event.key === "Escape") close();
    if (!next) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  open(target) {
    const entry = this.told.get(target);
    if (!entry) return;
    close();
    const rows = [...entry.top_logprobs].sort((a, b) => b.logprob - a.logprob);
    if (!rows.some(({ token }) => token === entry.token)) rows.push(entry);
    panel = h(
      "div", { class: "alternatives", role: "tooltip", id: "alternatives" },
      ...rows.map((row) =>
        h(
          "div", { class: row.token === entry.token ? "chosen" : null },
          h("code", {}, visible(row.token)), share(Math.exp(row.logprob)), h("span", {}, percent(row.logprob)),
        ),
      ),
    );
    document.body.append(panel);
    target.setAttribute("aria-describedby", "alternatives");
    const [at, size] = [target.getBoundingClientRect(), panel.getBoundingClientRect()];
    const below = at.bottom + size.height + 8 < innerHeight;
    panel.style.left = `${Math.max(8, Math.min(at.left, innerWidth - size.width - 8))}px`;
    panel.style.top = `${below ? at.bottom + 4 : Math.max(4, at.top - size.height - 4)}px`;
  }
}

function close() {
  document.querySelector("[aria-describedby=alternatives]")?.removeAttribute("aria-describedby");
  panel?.remove();
  panel = null;
}

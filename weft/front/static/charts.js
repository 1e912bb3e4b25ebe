// Charts on canvases and in SVG. Each has its numbers as text beside it.

import { colour, count, h, s, say, seconds, sharp } from "./dom.js";

/** Steps as stacked bars: rows of prompts, of answers, of guesses. */
export class Steps {
  static MOST = 120;
  static KINDS = [["prompt_rows", "prompt", "rows of prompts"], ["decode_rows", "decode", "rows of answers"], ["guess_rows", "guess", "guesses"]];

  constructor() {
    this.canvas = h("canvas", { role: "img", "aria-label": "Rows of the last steps" });
    this.text = h("p", { class: "quiet", id: "step-text" });
    const legend = Steps.KINDS.map(([, name, words]) => h("span", {}, h("i", { class: `swatch fill-${name}` }), words));
    this.element = h("div", { class: "chart" }, this.canvas, h("p", { class: "legend" }, ...legend), this.text);
    this.clear();
  }

  clear() {
    this.steps = [];
    this.missed = Object.fromEntries(["steps", ...Steps.KINDS.map(([key]) => key)].map((key) => [key, 0]));
    say(this.text, "No step yet.");
    this.draw();
  }

  /** missed: what steps were made of that came too fast for a frame of the feed. */
  add(steps, missed) {
    for (const key of Object.keys(this.missed)) this.missed[key] += missed?.[key] ?? 0;
    if (steps.length && this.steps.length && steps[0].step < this.steps.at(-1).step) this.steps = [];
    this.steps = [...this.steps, ...steps].slice(-Steps.MOST);
    this.draw();
  }

  draw() {
    const [width, height] = [this.element.clientWidth, 140];
    if (!width) return;
    const c = sharp(this.canvas, width, height);
    const most = Math.max(8, ...this.steps.map((one) => Steps.KINDS.reduce((sum, [key]) => sum + one[key], 0)));
    axis(c, width, height, count(most));
    const wide = width / Steps.MOST;
    this.steps.forEach((one, i) => {
      const x = width - (this.steps.length - i) * wide;
      let y = height;
      for (const [key, name] of Steps.KINDS) {
        const tall = (one[key] / most) * (height - 14);
        c.fillStyle = colour(name);
        c.fillRect(x, y - tall, Math.max(1, wide - 1), tall);
        y -= tall;
      }
    });
    const last = this.steps.at(-1);
    if (last) {
      const words = (of) => Steps.KINDS.filter(([key]) => of[key]).map(([key, , name]) => `${count(of[key])} ${name}`).join(", ") || "no rows";
      const fast = this.missed.steps ? ` Too fast to be drawn: ${count(this.missed.steps)} steps with ${words(this.missed)}.` : "";
      say(this.text, `Step ${count(last.step)}: ${words(last)}, ${count(last.requests)} sequence${last.requests === 1 ? "" : "s"}.${fast}`);
      this.canvas.dataset.steps = this.steps.length;
    }
  }
}

function axis(c, width, height, text) {
  c.fillStyle = colour("quiet");
  c.font = "11px system-ui, sans-serif";
  c.fillText(text, 0, 10);
  c.fillStyle = colour("line");
  c.fillRect(0, height - 1, width, 1);
}

/** Tokens a second over the last minute. */
export class Throughput {
  static SPAN_S = 60;
  static WINDOW_S = 1;

  constructor() {
    this.samples = [];
    this.canvas = h("canvas", { role: "img", "aria-label": "Tokens a second over the last minute" });
    this.text = h("p", { class: "quiet" }, "Nothing computed in the last minute.");
    const legend = [["decode", "answers"], ["prompt", "prompts"]].map(([name, words]) =>
      h("span", {}, h("i", { class: `swatch fill-${name}` }), words));
    this.element = h("div", { class: "chart" }, this.canvas, h("p", { class: "legend" }, ...legend), this.text);
  }

  clear() {
    this.samples = [];
    say(this.text, "Nothing computed in the last minute.");
  }

  add(t, stats) {
    const last = this.samples.at(-1);
    if (last && (t < last.t || stats.generation_tokens < last.made)) this.samples = [];
    this.samples.push({ t, made: stats.generation_tokens, read: stats.prompt_tokens });
    while (this.samples.length > 2 && this.samples[1].t < t - Throughput.SPAN_S - Throughput.WINDOW_S) this.samples.shift();
    this.draw(t);
  }

  /** Tokens a second of `key` in the window that ends at sample i. */
  rate(i, key) {
    const end = this.samples[i];
    let k = i;
    while (k > 0 && end.t - this.samples[k].t < Throughput.WINDOW_S) k -= 1;
    const begin = this.samples[k];
    return end.t > begin.t ? (end[key] - begin[key]) / Math.max(end.t - begin.t, Throughput.WINDOW_S) : 0;
  }

  draw(now) {
    const [width, height] = [this.element.clientWidth, 140];
    if (!width || !this.samples.length) return;
    const c = sharp(this.canvas, width, height);
    const rates = this.samples.map((sample, i) => ({ t: sample.t, made: this.rate(i, "made"), read: this.rate(i, "read") }));
    const most = Math.max(10, ...rates.flatMap(({ made, read }) => [made, read]));
    axis(c, width, height, `${count(most)} a second`);
    for (const [key, name] of [["read", "prompt"], ["made", "decode"]]) {
      c.strokeStyle = colour(name);
      c.lineWidth = 2;
      c.lineJoin = "round";
      c.beginPath();
      for (const rate of rates) c.lineTo(width - ((now - rate.t) / Throughput.SPAN_S) * width, height - 2 - (rate[key] / most) * (height - 18));
      c.stroke();
    }
    const { made, read } = rates.at(-1);
    say(this.text, `Now ${count(made)} tokens of answers and ${count(read)} of prompts a second.`);
  }
}

/** A histogram {buckets, counts}: counts of what was at most each bound, and above the last. */
export class Histogram {
  constructor(name, what) {
    this.name = name;
    this.what = what;
    this.picture = h("div", {});
    this.text = h("p", { class: "quiet", id: `${name}-text`, data: { count: 0 } }, "Nothing yet.");
    this.element = h("div", { class: "chart" }, this.picture, this.text);
    this.before = "";
  }

  clear() {
    this.before = "";
    this.text.dataset.count = 0;
    say(this.text, "Nothing yet.");
    this.picture.replaceChildren();
  }

  show({ buckets, counts }) {
    if (this.before === counts.join()) return;
    this.before = counts.join();
    const total = counts.reduce((a, b) => a + b, 0);
    this.text.dataset.count = total;
    if (!total) return;
    const quantile = (q) => {
      let sum = 0;
      const at = counts.findIndex((n) => (sum += n) >= q * total);
      return at < buckets.length ? `at most ${seconds(buckets[at])}` : `above ${seconds(buckets.at(-1))}`;
    };
    say(this.text, `${count(total)} ${this.what}; half ${quantile(0.5)}, 95 % ${quantile(0.95)}.`);
    let [from, to] = [counts.findIndex(Boolean), counts.findLastIndex(Boolean)];
    while (to - from < 7 && (from > 0 || to < counts.length - 1)) [from, to] = [Math.max(0, from - 1), Math.min(counts.length - 1, to + 1)];
    const [shown, most] = [counts.slice(from, to + 1), Math.max(...counts)];
    const wide = 100 / shown.length;
    const name = (i) => (i < buckets.length ? `≤ ${seconds(buckets[i])}` : `> ${seconds(buckets.at(-1))}`);
    this.picture.replaceChildren(
      s(
        "svg", { class: "histogram", role: "img", "aria-label": this.text.textContent, viewBox: "0 0 100 40", preserveAspectRatio: "none" },
        ...shown.map((n, i) =>
          s(
            "rect", { x: i * wide + 0.4, width: wide - 0.8, y: 40 - (38 * n) / most, height: (38 * n) / most, class: "fill" },
            s("title", {}, `${name(from + i)}: ${count(n)}`),
          ),
        ),
      ),
      h("p", { class: "ends quiet" }, h("span", {}, name(from)), h("span", {}, name(to))),
    );
  }
}

// The blocks of the KV pool, a cell for each: free, kept for a prefix that may come again, in use, shared.

import { colour, count, h, say, sharp } from "./dom.js";

const SHOWN = 16384;
export const KINDS = [
  ["free", "free", () => "holds nothing"],
  ["cached", "cached", () => "kept for a prefix that may come again"],
  ["used", "in use", () => "of one sequence"],
  ["shared", "shared", () => "of several sequences"],
];
const LETTER = { free: "f", cached: "c", used: "u", shared: "s" };

export class BlockMap {
  constructor() {
    this.canvas = h("canvas", { id: "kv-map", role: "img", "aria-labelledby": "kv-text", onpointermove: (e) => this.point(e) });
    this.numbers = {};
    const legend = KINDS.map(([name, words]) => {
      this.numbers[name] = h("b", { id: `kv-${name}` }, "0");
      return h("span", {}, h("i", { class: `swatch fill-${name}`, id: `kv-swatch-${name}` }), `${words} `, this.numbers[name]);
    });
    this.text = h("p", { class: "quiet", id: "kv-text" }, "");
    this.element = h("div", { class: "chart" }, this.canvas, h("p", { class: "legend" }, ...legend), this.text);
    [this.blocks, this.total, this.tokens] = [[], 0, 0];
  }

  /** blocks: [[block, references, request]] of those that hold something; total: cells in all; tokens: that fit each. */
  show(blocks, total, tokens) {
    [this.blocks, this.total, this.tokens] = [blocks, Math.min(total, SHOWN), tokens];
    this.more = total > SHOWN;
    this.draw();
  }

  draw() {
    const width = this.element.clientWidth;
    if (!width || !this.total) return;
    let cell = 14;
    while (cell > 3 && Math.ceil(this.total / Math.floor(width / cell)) * cell > 300) cell -= 1;
    const columns = Math.min(this.total, Math.floor(width / cell));
    const rows = Math.ceil(this.total / columns);
    const c = sharp(this.canvas, columns * cell, rows * cell);
    const kinds = new Array(this.total).fill("free");
    this.at = new Map();
    for (const [block, references, owner] of this.blocks) {
      if (block >= this.total) continue;
      kinds[block] = references > 1 ? "shared" : references ? "used" : "cached";
      this.at.set(block, { references, owner });
    }
    const fills = Object.fromEntries(KINDS.map(([name]) => [name, colour(name)]));
    const gap = cell > 5 ? 2 : 1;
    kinds.forEach((kind, i) => {
      c.fillStyle = fills[kind];
      c.fillRect((i % columns) * cell, Math.floor(i / columns) * cell, cell - gap, cell - gap);
    });
    const counts = { free: 0, cached: 0, used: 0, shared: 0 };
    for (const kind of kinds) counts[kind] += 1;
    for (const [name] of KINDS) say(this.numbers[name], count(counts[name]));
    Object.assign(this.canvas.dataset, {
      ...counts, columns, cell, total: this.total, cells: kinds.map((kind) => LETTER[kind]).join(""),
    });
    this.columns = columns;
    this.cell = cell;
    const share = this.more ? `the first ${count(this.total)} blocks` : `${count(this.total)} blocks`;
    this.words = `${share} of ${count(this.tokens)} tokens each`;
    say(this.text, `${this.words}.`);
  }

  /** Say which block is under the pointer. */
  point(event) {
    const [x, y] = [Math.floor(event.offsetX / this.cell), Math.floor(event.offsetY / this.cell)];
    const block = y * this.columns + x;
    if (x >= this.columns || !(block < this.total)) return;
    const found = this.at.get(block);
    const what = !found ? "free" : found.references ? `${found.references} reference${found.references > 1 ? "s" : ""}, request ${found.owner}` : "cached";
    say(this.text, `${this.words}. Block ${block}: ${what}.`);
  }
}

// Elements without markup: whatever a model or a server says goes in as text, never as HTML.

/** h("p", {class: "x", onclick: f, data: {n: 1}}, "text", child): an element. Strings become text nodes. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

const SVG = "http://www.w3.org/2000/svg";

/** The same for SVG. */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "data") for (const [key, one] of Object.entries(value)) element.dataset[key] = one;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Change a text only when it differs, so that nothing that is selected or read aloud is disturbed. */
export function say(element, text) {
  const now = String(text);
  if (element.textContent !== now) element.textContent = now;
}

const whole = new Intl.NumberFormat("en");

export const count = (value) => whole.format(Math.round(value));

export function seconds(value) {
  if (!value) return "0 s";
  if (value < 0.001) return `${(value * 1e6).toFixed(0)} µs`;
  if (value < 1) return `${(value * 1e3).toFixed(value < 0.01 ? 1 : 0)} ms`;
  if (value < 120) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  return `${(value / 60).toFixed(1)} min`;
}

export function bytes(value) {
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (value >= size) return `${(value / size).toFixed(value >= 100 * size ? 0 : value >= 10 * size ? 1 : 2)} ${unit}`;
  }
  return `${value} bytes`;
}

/** A bar of which `part`, 0 to 1, is filled. */
export function share(part, words = "") {
  const label = words ? { role: "img", "aria-label": words } : { "aria-hidden": "true" };
  const fill = s("rect", { width: 100 * Math.min(1, part), height: 10 });
  return s("svg", { class: "share", viewBox: "0 0 100 10", preserveAspectRatio: "none", ...label }, fill);
}

/** A colour of the style sheet, for canvases. */
export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** A canvas that is sharp on its screen; its context, scaled to CSS pixels. */
export function sharp(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const [w, v] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== v) {
    canvas.width = w;
    canvas.height = v;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

// The heat map of experts by MoE layer: a canvas, the value under the pointer or the arrow keys, a table.
import { byId, count, el, say } from "./dom.js";

const LABEL_PX = 34; // left of the cells: the layers' numbers
const STEPS = 5; // colours --heat-0 to --heat-4

let shown = null; // {layers: [{layer, tokens, total, hosts}], experts, most}
let place = null; // {row, expert} that is pointed at

/** Sums what replicas say (`tokens`, `hosted` by layer) and shows it. Returns whether there are experts. */
export function showHeat(loads) {
  const names = Object.keys(loads[0]?.tokens ?? {}).sort((a, b) => a - b);
  const layers = names.map((layer) => {
    const tokens = loads[0].tokens[layer].map((_, e) => loads.reduce((sum, load) => sum + (load.tokens[layer]?.[e] ?? 0), 0));
    const hosts = loads.length === 1 ? loads[0].hosted?.[layer] : undefined;
    return { layer, tokens, total: tokens.reduce((a, b) => a + b, 0), hosts, imbalance: loads[0].imbalance?.[layer] };
  });
  const experts = Math.max(0, ...layers.map(({ tokens }) => tokens.length));
  shown = { layers, experts, most: 1 };
  shown.most = Math.max(2, ...layers.flatMap((row) => row.tokens.map((_, e) => share(row, e))));
  if (place && !(place.row < layers.length && place.expert < experts)) place = null;
  draw();
  tellPlace();
  fillTable(loads.length === 1);
  say(byId("heat-most"), `${count(shown.most)} × an even share`);
  return experts > 0;
}

/** Tokens of an expert over those it would have if all had the same. */
function share(row, expert) {
  return row.total ? (row.tokens[expert] * row.tokens.length) / row.total : 0;
}

function geometry(canvas) {
  const width = canvas.clientWidth;
  const cell = (width - LABEL_PX) / Math.max(1, shown.experts);
  const height = Math.max(8, Math.min(26, cell * 1.4, 420 / Math.max(1, shown.layers.length)));
  return { width, cell, row: height };
}

function draw() {
  const canvas = byId("heat");
  if (!shown?.experts || !canvas.clientWidth) return;
  const { width, cell, row } = geometry(canvas);
  const scale = devicePixelRatio || 1;
  canvas.style.height = `${row * shown.layers.length}px`;
  canvas.width = width * scale;
  canvas.height = row * shown.layers.length * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const style = getComputedStyle(canvas);
  const ramp = Array.from({ length: STEPS }, (_, i) => rgb(style.getPropertyValue(`--heat-${i}`)));
  const gap = cell > 5 ? 1 : 0;
  pen.font = `10px ${style.fontFamily}`;
  pen.textBaseline = "middle";
  const every = Math.ceil(12 / row);
  shown.layers.forEach((layer, r) => {
    pen.fillStyle = style.color;
    if (r % every === 0) pen.fillText(layer.layer, 0, (r + 0.5) * row);
    layer.tokens.forEach((_, e) => {
      pen.fillStyle = colour(ramp, share(layer, e) / shown.most);
      pen.fillRect(LABEL_PX + e * cell, r * row, cell - gap, row - (row > 5 ? 1 : 0));
    });
  });
  if (place) {
    pen.strokeStyle = style.getPropertyValue("--ink");
    pen.lineWidth = 2;
    pen.strokeRect(LABEL_PX + place.expert * cell, place.row * row, cell, row);
  }
}

function rgb(hex) {
  const value = Number.parseInt(hex.trim().slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

function colour(ramp, at) {
  const place = Math.min(1, at) * (STEPS - 1);
  const low = Math.min(STEPS - 2, Math.floor(place));
  return `rgb(${ramp[low].map((from, i) => Math.round(from + (ramp[low + 1][i] - from) * (place - low))).join(" ")})`;
}

function tellPlace() {
  if (!place) return say(byId("heat-value"), "");
  const row = shown.layers[place.row];
  const ranks = (row.hosts ?? []).flatMap((experts, rank) => (experts.includes(place.expert) ? [rank] : []));
  const where = ranks.length ? `; on ep rank ${ranks.join(", ")}` : "";
  say(byId("heat-value"), `Layer ${row.layer}, expert ${place.expert}: ${row.tokens[place.expert].toLocaleString("en")} tokens, `
    + `${share(row, place.expert).toFixed(2)} × an even share${where}`);
}

function fillTable(isOne) {
  const head = ["Layer", "Tokens", "Busiest expert", "Its share of an even one", "Unused experts", ...(isOne ? ["Busiest ep rank over the mean"] : [])];
  const rows = shown.layers.map((row) => {
    const busiest = row.tokens.indexOf(Math.max(...row.tokens));
    const cells = [row.layer, row.total.toLocaleString("en"), busiest, `${share(row, busiest).toFixed(2)} ×`, row.tokens.filter((n) => !n).length];
    if (isOne) cells.push(row.imbalance?.toFixed(2) ?? "–");
    return el("tr", {}, ...cells.map((cell, i) => el(i ? "td" : "th", {}, String(cell))));
  });
  byId("heat-table").replaceChildren(
    el("thead", {}, el("tr", {}, ...head.map((name) => el("th", { scope: "col" }, name)))), el("tbody", {}, ...rows));
}

function move(next) {
  place = next;
  draw();
  tellPlace();
}

/** Connects the canvas. */
export function startHeat() {
  const canvas = byId("heat");
  canvas.onpointermove = canvas.onpointerdown = (event) => {
    if (!shown?.experts) return;
    const { cell, row } = geometry(canvas);
    const expert = Math.floor((event.offsetX - LABEL_PX) / cell);
    const at = Math.floor(event.offsetY / row);
    move(expert >= 0 && expert < shown.experts && shown.layers[at] ? { row: at, expert } : null);
  };
  canvas.onpointerleave = () => document.activeElement !== canvas && move(null);
  canvas.onfocus = () => shown?.experts && !place && move({ row: 0, expert: 0 });
  canvas.onblur = () => move(null);
  canvas.onkeydown = (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step || !place) return;
    event.preventDefault();
    const row = Math.max(0, Math.min(shown.layers.length - 1, place.row + step[0]));
    move({ row, expert: Math.max(0, Math.min(shown.experts - 1, place.expert + step[1])) });
  };
  new ResizeObserver(draw).observe(canvas.parentElement);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

// A chart of one or two series over the last minutes, and a meter.
import { count, duration, el } from "./dom.js";

export const SPAN_S = 600;
const SVG = "http://www.w3.org/2000/svg";

/** An element that shows `series` ({name, of: point to number}); `draw(points)` takes points with a time `t` in seconds. */
export function lineChart(title, series) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${SPAN_S} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  const lines = series.map((_, i) => ["area", "line"].map((kind) => {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("class", `${kind} s${i}`);
    svg.append(path);
    return path;
  }));
  const now = el("p", { className: "now" });
  const top = el("span", { className: "top" });
  const mark = el("i", { className: "mark", hidden: true });
  const plot = el("div", { className: "plot" }, svg, top, mark);
  const ends = el("p", { className: "ends", "aria-hidden": "true" }, el("span", {}, "10 min ago"), el("span", {}, "now"));
  const chart = el("figure", { className: "card chart" }, el("figcaption", {}, title), now, plot, ends);
  let points = [];
  let at = null; // the point that the pointer is on

  const tell = () => {
    const point = at ?? points.at(-1);
    const parts = series.map(({ name, of }, i) =>
      el("span", { className: `value s${i}` }, el("b", {}, point ? count(of(point)) : "–"), name && ` ${name}`));
    const ago = at ? [el("span", { className: "ago" }, `${duration(points.at(-1).t - at.t)} ago`)] : [];
    now.replaceChildren(...parts, ...ago);
  };

  chart.draw = (given) => {
    points = given;
    if (!points.includes(at)) leave();
    const last = points.at(-1)?.t ?? 0;
    const most = nice(Math.max(1, ...points.flatMap((point) => series.map(({ of }) => of(point)))));
    series.forEach(({ of }, i) => {
      const path = points.map((p) => `${(SPAN_S - (last - p.t)).toFixed(1)},${(100 - (96 * of(p)) / most).toFixed(2)}`);
      const [area, line] = lines[i];
      const start = points.length ? SPAN_S - (last - points[0].t) : SPAN_S;
      line.setAttribute("d", path.length ? `M${path.join("L")}` : "");
      area.setAttribute("d", path.length && i === 0 ? `M${start},100L${path.join("L")}L${SPAN_S},100Z` : "");
    });
    top.textContent = count(most);
    tell();
    const said = series.map(({ name, of }) => `${name} ${points.length ? count(of(points.at(-1))) : "unknown"}`);
    svg.setAttribute("aria-label", `${title} over the last ten minutes, up to ${count(most)}; now ${said.join(", ")}`);
  };

  const leave = () => {
    at = null;
    mark.hidden = true;
  };
  plot.onpointermove = (event) => {
    if (!points.length) return;
    const box = plot.getBoundingClientRect();
    const t = points.at(-1).t - SPAN_S * (1 - (event.clientX - box.left) / box.width);
    at = points.reduce((best, point) => (Math.abs(point.t - t) < Math.abs(best.t - t) ? point : best));
    mark.hidden = false;
    mark.style.left = `${100 * (1 - (points.at(-1).t - at.t) / SPAN_S)}%`;
    tell();
  };
  plot.onpointerleave = () => {
    leave();
    tell();
  };
  return chart;
}

/** The least of 1, 1.5, 2, 3, 5, 8, 10, … that is not below `value`. */
function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 5, 8, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

/** A bar of two parts; `set(share, more, words)` fills both, shares of the whole from 0 to 1. */
export function meter(label) {
  const [first, second, text] = [el("i"), el("i", { className: "more" }), el("b")];
  const track = el("div", { className: "track", role: "meter", "aria-label": label }, first, second);
  const made = el("div", { className: "meter" }, el("span", {}, label), text, track);
  made.set = (share, more, words) => {
    const filled = Math.min(1, share || 0);
    first.style.width = `${100 * filled}%`;
    second.style.width = `${100 * Math.min(1 - filled, more || 0)}%`;
    first.classList.toggle("full", filled > 0.9);
    track.setAttribute("aria-valuenow", Math.round(100 * filled));
    track.setAttribute("aria-valuetext", words);
    text.textContent = words;
  };
  return made;
}

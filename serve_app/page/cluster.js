// The view of the cluster: polls `v1/cluster` and `v1/cluster/experts` while it is visible.
import { call } from "./api.js";
import { lineChart, meter, SPAN_S } from "./charts.js";
import { arrange, bytes, byId, count, duration, el, percent, say } from "./dom.js";
import { showHeat, startHeat } from "./heat.js";

const POLL_MS = 2000;
const EXPERTS_MS = 10_000;

const history = []; // points of the charts
const before = new Map(); // replica to its last counters and their time
const cards = new Map(); // replica to its element
const sections = new Map(); // model to its element
const tiles = new Map(); // label to its element
let mostRequests = 4; // of one replica so far: the length of the bar
let charts = [];
let loads = []; // of experts, by replica
let isVisible = false;
let timer = 0;
let expertsAt = -Infinity;

/** Starts or ends polling with the view's visibility. */
export function showCluster(visible) {
  isVisible = visible;
  wake();
}

function wake() {
  clearTimeout(timer);
  if (isVisible && !document.hidden) poll();
}

async function poll() {
  await Promise.all([readCluster(), performance.now() - expertsAt >= EXPERTS_MS && readExperts()]);
  clearTimeout(timer);
  if (isVisible && !document.hidden) timer = setTimeout(poll, POLL_MS);
}

async function readCluster() {
  const note = byId("cluster-note");
  try {
    showState(await (await call("v1/cluster")).json());
    note.hidden = true;
  } catch (error) {
    say(note, history.length ? `${error.message} What follows is the last reading.` : error.message);
    note.hidden = false;
  }
}

async function readExperts() {
  expertsAt = performance.now();
  try {
    loads = (await (await call("v1/cluster/experts")).json()).data ?? [];
    showExperts();
  } catch {
    byId("experts").hidden = true; // the note above the charts says what is wrong
  }
}

function showState(state) {
  const now = performance.now() / 1000;
  const replicas = (state.models ?? []).flatMap((model) => (model.replicas ?? []).map((replica) => ({ model, replica })));
  const point = { t: now, generated: 0, prompt: 0, running: 0, waiting: 0 };
  const seen = new Set();
  let kv = null;
  let isKnown = !replicas.length;
  for (const { model, replica } of replicas) {
    const key = `${model.id}/${replica.id}`;
    const load = replica.load ?? {};
    const rates = ratesOf(key, load, now);
    seen.add(key);
    isKnown ||= rates.generated !== undefined;
    point.generated += rates.generated ?? 0;
    point.prompt += rates.prompt ?? 0;
    point.running += load.num_requests_running ?? 0;
    point.waiting += load.num_requests_waiting ?? 0;
    if (load.kv_cache_usage !== undefined) kv = Math.max(kv ?? 0, load.kv_cache_usage);
    if (!cards.has(key)) cards.set(key, replicaCard());
    cards.get(key).show(replica, rates);
  }
  for (const known of [cards, before]) for (const key of known.keys()) if (!seen.has(key)) known.delete(key);
  byId("charts").hidden = false;
  if (isKnown) history.push(point);
  while (history.length && now - history[0].t > SPAN_S) history.shift();
  for (const chart of charts) chart.draw(history);
  showModels(state.models ?? []);
  const ingress = state.ingress ?? {};
  const limit = ingress.limit === undefined ? "" : ` of ${count(ingress.limit)}`;
  tile("Requests in flight", ingress.in_flight === undefined ? "–" : `${count(ingress.in_flight)}${limit}`);
  tile("Fullest KV cache", percent(kv));
  tile("Replicas", count(replicas.length));
  tile("Up for", duration(state.uptime_s));
  tile("Version", state.version ?? "–");
}

/** Tokens per second since the last reading; nothing at the first one, or after counters began anew. */
function ratesOf(key, load, t) {
  const last = before.get(key);
  before.set(key, { ...load, t });
  if (!last || !(t > last.t)) return {};
  const rate = (name) => (load[name] >= last[name] ? (load[name] - last[name]) / (t - last.t) : undefined);
  return { generated: rate("generation_tokens"), prompt: rate("prompt_tokens") };
}

function tile(label, value) {
  if (!tiles.has(label)) {
    tiles.set(label, el("dd"));
    byId("tiles").append(el("div", {}, el("dt", {}, label), tiles.get(label)));
  }
  say(tiles.get(label), value);
}

function showModels(models) {
  arrange(byId("models"), models.map((model) => {
    if (!sections.has(model.id)) sections.set(model.id, modelSection(model.id));
    const section = sections.get(model.id);
    section.show(model);
    return section;
  }));
}

function modelSection(id) {
  const badge = el("span");
  const scale = el("span", { className: "faint" });
  const problem = el("p", { className: "problem" });
  const grid = el("div", { className: "replicas" });
  const section = el("section", {}, el("div", { className: "title" }, el("h2", {}, id), badge, scale), problem, grid);
  section.show = (model) => {
    badge.className = `badge ${model.status ?? ""}`;
    say(badge, model.status ?? "unknown");
    const range = `${count(model.min_replicas)} to ${count(model.max_replicas)}`;
    say(scale, `${count(model.replicas_running)} of ${range} replicas run`);
    say(problem, model.message ?? "");
    arrange(grid, (model.replicas ?? []).map((replica) => cards.get(`${id}/${replica.id}`)));
  };
  return section;
}

function replicaCard() {
  const [name, health, layout, problem, facts, about] = ["h3", "span", "span", "p", "p", "p"].map((tag) => el(tag));
  const kv = meter("KV cache");
  const queue = meter("Requests");
  const body = el("tbody");
  const head = ["Rank", "Host", "Process", "Card", "Memory"].map((text) => el("th", { scope: "col" }, text));
  const summary = el("summary");
  const table = el("table", {}, el("thead", {}, el("tr", {}, ...head)), body);
  const ranks = el("details", {}, summary, about, el("div", { className: "wide" }, table));
  const card = el("article", { className: "card replica" }, el("div", { className: "title" }, name, health, layout),
    problem, el("div", { className: "meters" }, kv, queue), facts, ranks);
  layout.className = about.className = "faint";
  problem.className = "problem";
  facts.className = "facts";
  card.show = (replica, rates) => {
    const load = replica.load ?? {};
    const running = load.num_requests_running;
    const waiting = load.num_requests_waiting;
    say(name, String(replica.id ?? ""));
    say(layout, replica.layout ?? "");
    health.className = `badge ${replica.healthy ? "ready" : "unhealthy"}`;
    say(health, replica.healthy ? "healthy" : "unhealthy");
    say(problem, replica.message ?? "");
    mostRequests = Math.max(mostRequests, running + waiting || 0);
    kv.set(load.kv_cache_usage, 0, percent(load.kv_cache_usage));
    queue.set(running / mostRequests, waiting / mostRequests, `${count(running)} run, ${count(waiting)} wait`);
    const told = [`${count(rates.generated)} tokens/s generated`, `${count(rates.prompt)} read`];
    if (load.num_preemptions) told.push(`${count(load.num_preemptions)} preemptions`);
    if (load.step_age_s > 1 && running) told.push(`last step ${duration(load.step_age_s)} ago`);
    say(facts, told.join(" · "));
    const list = replica.ranks ?? [];
    say(summary, `${list.length} ${list.length === 1 ? "rank" : "ranks"}`);
    say(about, [replica.backends, replica.collectives].filter(Boolean).join(" · "));
    body.replaceChildren(...list.map((rank) =>
      el("tr", {}, ...[rank.rank, rank.host, rank.pid, rank.card?.name ?? "CPU", bytes(rank.memory_bytes)].map(
        (cell) => el("td", { title: rank.card?.uuid ?? "" }, String(cell ?? "–"))))));
  };
  return card;
}

function showExperts() {
  const choice = byId("experts-of");
  const names = [...(loads.length > 1 ? ["all replicas"] : []), ...loads.map((_, i) => `replica ${i + 1}`)];
  if (choice.length !== names.length) choice.replaceChildren(...names.map((name) => el("option", {}, name)));
  choice.hidden = loads.length < 2;
  const one = choice.selectedIndex - 1;
  const section = byId("experts");
  section.hidden = false; // the canvas is measured
  section.hidden = !showHeat(one >= 0 ? [loads[one]] : loads);
}

/** Connects the view. */
export function startCluster() {
  charts = [
    lineChart("Tokens generated per second", [{ name: "", of: (point) => point.generated }]),
    lineChart("Prompt tokens per second", [{ name: "", of: (point) => point.prompt }]),
    lineChart("Requests", [
      { name: "running", of: (point) => point.running },
      { name: "waiting", of: (point) => point.waiting },
    ]),
  ];
  byId("charts").append(...charts);
  for (const chart of charts) chart.draw(history);
  byId("experts-of").onchange = showExperts;
  document.addEventListener("visibilitychange", wake);
  startHeat();
}

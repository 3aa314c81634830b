// The conversation: asks, streams answers, stops, regenerates.
import { turnView } from "./answer.js";
import { ApiError, call } from "./api.js";
import { button, byId, say } from "./dom.js";
import { requestFields, settings } from "./settings.js";
import { events } from "./stream.js";

const STORED = "qwen3_dist.turns";
const EXAMPLES = ["What is the capital of France?", "What is 12 + 30?", "Write a short poem about the sea."];
const NEAR_PX = 80; // within which of its end the conversation is followed

const turns = restore();
const views = new Map(); // turn to element
let running = null; // AbortController of the answer that streams

function restore() {
  try {
    const stored = JSON.parse(sessionStorage.getItem(STORED) ?? "[]");
    return stored.map((turn) => (turn.running ? { ...turn, running: false, stopped: true } : turn));
  } catch {
    return [];
  }
}

function store() {
  try {
    sessionStorage.setItem(STORED, JSON.stringify(turns));
  } catch {
    // the conversation holds until the page is left
  }
}

/** What the API is sent: the system prompt and all turns but answers of which nothing came. */
function messages() {
  const sent = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  for (const turn of turns) {
    if (turn.role === "user") sent.push({ role: "user", content: turn.content });
    if (turn.role === "tool") sent.push({ role: "tool", tool_call_id: turn.id, content: turn.content });
    if (turn.role !== "assistant" || !(turn.content || turn.calls.length)) continue;
    const message = { role: "assistant", content: turn.content };
    if (turn.reasoning) message.reasoning_content = turn.reasoning;
    if (turn.calls.length) {
      message.tool_calls = turn.calls.map(({ id, name, arguments: text }) =>
        ({ id, type: "function", function: { name, arguments: text } }));
    }
    sent.push(message);
  }
  return sent;
}

function show() {
  const scroll = byId("scroll");
  const follows = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR_PX;
  for (const [turn, view] of views) {
    if (turns.includes(turn)) continue;
    view.remove();
    views.delete(turn);
  }
  for (const turn of turns) {
    if (!views.has(turn)) {
      views.set(turn, turnView(turn, { regenerate, results }));
      byId("log").append(views.get(turn));
    }
    views.get(turn).show(turn === turns.at(-1));
  }
  byId("empty").hidden = turns.length > 0;
  byId("clear").hidden = !turns.length;
  byId("send").hidden = Boolean(running);
  byId("stop").hidden = !running;
  if (follows) scroll.scrollTop = scroll.scrollHeight;
}

function ask(text) {
  if (running || !text.trim()) return;
  turns.push({ role: "user", content: text });
  answer();
}

function results(texts) {
  const { calls } = turns.at(-1);
  texts.forEach((content, i) => turns.push({ role: "tool", id: calls[i].id, content }));
  answer();
}

function regenerate() {
  if (running) return;
  turns.pop();
  answer();
}

async function answer() {
  const model = byId("model").value;
  const turn = { role: "assistant", model, content: "", reasoning: "", calls: [], running: true };
  const control = (running = new AbortController());
  const times = { begun: performance.now() };
  const asked = { messages: messages(), stream: true, stream_options: { include_usage: true } };
  if (model) asked.model = model;
  turns.push(turn);
  store();
  show();
  byId("scroll").scrollTop = byId("scroll").scrollHeight;
  say(byId("spoken"), "The model answers.");
  try {
    Object.assign(asked, requestFields());
    const response = await call("v1/chat/completions", asked, control.signal);
    for await (const event of events(response)) {
      read(event, turn, times);
      drawSoon();
    }
    measure(turn, times);
  } catch (error) {
    if (control.signal.aborted) turn.stopped = true;
    else turn.error = error instanceof ApiError ? error.message : `The page failed: ${error.message}`;
  }
  turn.running = false;
  running = null;
  store();
  show();
  say(byId("spoken"), turn.error ? "The answer failed." : turn.stopped ? "Stopped." : "The answer is complete.");
}

/** Adds a chunk of the stream to `turn`. */
function read(event, turn, times) {
  if (event.usage) turn.tokens = event.usage.completion_tokens;
  const choice = event.choices?.[0];
  if (!choice) return;
  const { content, reasoning_content, reasoning, tool_calls: calls = [] } = choice.delta;
  const thought = reasoning_content ?? reasoning;
  turn.finish = choice.finish_reason ?? turn.finish;
  if (!content && !thought && !calls?.length) return;
  const now = performance.now();
  times.first ??= now;
  times.last = now;
  turn.firstS = (times.first - times.begun) / 1000;
  if (thought) turn.thoughtS = (now - times.first) / 1000;
  turn.reasoning += thought ?? "";
  turn.content += content ?? "";
  for (const part of calls ?? []) {
    const given = (turn.calls[part.index] ??= { id: part.id, name: "", arguments: "" });
    const body = part.function ?? part.custom ?? {};
    given.name += body.name ?? "";
    given.arguments += body.arguments ?? body.input ?? "";
  }
}

function measure(turn, times) {
  const seconds = (times.last - times.first) / 1000;
  if (turn.tokens > 1 && seconds > 0.01) turn.perS = (turn.tokens - 1) / seconds;
}

let isDue = false;

/** Draws once per frame, however many events come. */
function drawSoon() {
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    show();
  });
}

const stop = () => running?.abort();

function clear() {
  stop();
  turns.length = 0;
  store();
  show();
  focusQuestion();
}

/** Not on phones, whose keyboard would cover half the page. */
function focusQuestion() {
  if (matchMedia("(pointer: fine)").matches) byId("question").focus({ preventScroll: true });
}

/** Connects the chat's elements. */
export function startChat() {
  const question = byId("question");
  const fit = () => {
    question.style.height = "auto";
    question.style.height = `${question.scrollHeight}px`;
  };
  const send = (event) => {
    event.preventDefault();
    if (running || !question.value.trim()) return;
    ask(question.value);
    question.value = "";
    fit();
    if (document.activeElement !== question) byId("stop").focus();
  };
  byId("composer").onsubmit = send;
  question.oninput = fit;
  question.onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running && !byId("settings").open) stop();
  });
  byId("stop").onclick = () => {
    stop();
    focusQuestion();
  };
  byId("clear").onclick = clear;
  byId("examples").append(...EXAMPLES.map((text) => button(text, () => ask(text), "example")));
  show();
  byId("scroll").scrollTop = byId("scroll").scrollHeight;
  focusQuestion();
}

// One turn of the conversation as elements. A turn is plain data:
// {role: "user" | "tool", content} or {role: "assistant", model, content, reasoning, calls, error, stopped, finish,
// firstS, thoughtS, tokens, perS, running}; times are in seconds.
import { brief, button, copyButton, count, el, say } from "./dom.js";
import { render } from "./markdown.js";

const ENDS = { length: "cut off by the token limit", content_filter: "filtered" };

/** An element for `turn`. Its method `show()` brings it up to date. */
export function turnView(turn, actions) {
  return turn.role === "assistant" ? answerView(turn, actions) : askedView(turn);
}

function askedView(turn) {
  const name = turn.role === "tool" ? "Result of the call" : "You";
  const text = el("div", { className: "text" }, turn.content);
  const view = el("article", { className: `turn ${turn.role}` }, el("h2", { className: "unseen" }, name), text);
  view.show = () => {};
  return view;
}

function answerView(turn, actions) {
  const summary = el("summary");
  const thoughts = el("div", { className: "thoughts" });
  const folded = el("details", { className: "thinking" }, summary, thoughts);
  const text = el("div", { className: "text" });
  const calls = el("div", { className: "calls" });
  const problem = el("p", { className: "problem", role: "alert" });
  const facts = el("span", { className: "facts" });
  const again = button("Regenerate", actions.regenerate);
  const copy = copyButton(() => turn.content);
  const foot = el("footer", {}, facts, copy, again);
  const wait = el("span", { className: "wait", "aria-hidden": "true" });
  const view = el("article", { className: "turn assistant" },
    el("h2", { className: "who" }, turn.model), folded, text, calls, wait, problem, foot);

  view.show = (isLast) => {
    view.setAttribute("aria-busy", String(Boolean(turn.running)));
    folded.hidden = !turn.reasoning;
    const isThinking = turn.running && !turn.content && !turn.calls.length;
    folded.classList.toggle("now", isThinking);
    say(summary, isThinking ? "Thinking…" : `Thought for ${brief(turn.thoughtS)}`);
    say(thoughts, turn.reasoning.trim());
    render(text, turn.content);
    showCalls(calls, turn.calls);
    const answers = isLast && !turn.running && !turn.error && turn.calls.length;
    if (!answers) calls.querySelector("form")?.remove();
    else if (!calls.querySelector("form")) calls.append(resultForm(turn.calls, actions.results));
    wait.hidden = !turn.running || Boolean(turn.reasoning && isThinking);
    say(problem, turn.error ?? "");
    foot.hidden = turn.running;
    say(facts, factsOf(turn));
    copy.hidden = !turn.content;
    again.hidden = !isLast;
  };
  return view;
}

function factsOf(turn) {
  const facts = [];
  if (turn.firstS !== undefined) facts.push(`first token after ${turn.firstS.toFixed(2)} s`);
  if (turn.tokens !== undefined) facts.push(`${count(turn.tokens)} tokens`);
  if (turn.perS !== undefined) facts.push(`${count(turn.perS)} tokens/s`);
  if (turn.stopped) facts.push("stopped");
  if (ENDS[turn.finish]) facts.push(ENDS[turn.finish]);
  return facts.join(" · ");
}

function showCalls(parent, calls) {
  calls.forEach((call, i) => {
    const old = parent.querySelectorAll(".call")[i];
    const shown = old ?? el("div", { className: "call" }, el("strong"), el("pre", { tabIndex: 0 }, el("code")));
    if (!old) parent.append(shown);
    say(shown.querySelector("strong"), call.name);
    say(shown.querySelector("code"), indented(call.arguments));
  });
}

function indented(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // not whole yet, or not JSON
  }
}

/** Fields for the results of `calls`; `send` gets their texts. */
function resultForm(calls, send) {
  const fields = calls.map((call) => el("textarea", { rows: 1, required: true, placeholder: "What the tool returned" }));
  const labels = calls.map((call, i) => el("label", {}, `Result of ${call.name}`, fields[i]));
  const onsubmit = (event) => {
    event.preventDefault();
    send(fields.map((field) => field.value));
  };
  return el("form", { className: "results", onsubmit }, ...labels, el("button", { type: "submit" }, "Send the result"));
}

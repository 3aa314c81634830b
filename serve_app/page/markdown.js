// A small part of Markdown as elements: paragraphs, headings, lists, code, tables, bold, italics.
// Model text becomes text nodes, so markup inside it stays text. Links and pictures stay text too.
import { copyButton, el } from "./dom.js";

const INLINE = /`([^`\n]+)`|\*\*(?=\S)(.+?)(?<=\S)\*\*|(?<![*\w])\*(?=[^\s*])([^*\n]+?)(?<=\S)\*(?![*\w])/gs;
const FENCE = /^(\s*)(```+|~~~+)\s*([\w+#.-]*)[^`]*$/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;

/** Shows `text` in `parent`. Blocks that did not change since the last call keep their elements. */
export function render(parent, text) {
  const sources = blocks(text);
  sources.forEach((source, i) => {
    const old = parent.children[i];
    if (old?.source === source) return;
    const made = element(source);
    made.source = source;
    if (old) old.replaceWith(made);
    else parent.append(made);
  });
  while (parent.children.length > sources.length) parent.lastChild.remove();
}

/** The sources of the blocks of `text`, in order. A fence that is still open reaches to the end. */
export function blocks(text) {
  const found = [];
  let current = [];
  let fence = null;
  const end = () => {
    if (current.length) found.push(current.join("\n"));
    current = [];
  };
  for (const line of text.split(/\r?\n/)) {
    if (fence) {
      current.push(line);
      if (line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], "")) {
        fence = null;
        end();
      }
      continue;
    }
    const opened = FENCE.exec(line);
    if (opened) {
      end();
      fence = opened[2];
      current.push(line);
    } else if (HEADING.test(line) || (RULE.test(line) && !current.length)) {
      end();
      current.push(line);
      end();
    } else if (!line.trim()) {
      end();
    } else {
      if (ITEM.test(line) && current.length && !ITEM.test(current[0])) end();
      current.push(line);
    }
  }
  end();
  return found;
}

function element(source) {
  const lines = source.split("\n");
  const fence = FENCE.exec(lines[0]);
  if (fence) return codeBlock(lines, fence);
  const heading = HEADING.exec(source);
  if (heading) return inline(el(`h${Math.min(heading[1].length + 2, 6)}`), heading[2]);
  if (RULE.test(source)) return el("hr");
  if (ITEM.test(lines[0])) return list(lines);
  if (lines.length > 1 && /^\s*\|/.test(lines[0]) && /^[\s|:-]+$/.test(lines[1])) return table(lines);
  return inline(el("p"), source);
}

function codeBlock(lines, [, indent, fence, language]) {
  const closed = lines.length > 1 && lines.at(-1).trim().startsWith(fence);
  const inner = lines.slice(1, closed ? -1 : undefined);
  const code = inner.map((line) => (line.startsWith(indent) ? line.slice(indent.length) : line)).join("\n");
  const head = el("div", { className: "code-head" }, el("span", {}, language || "text"), copyButton(() => code));
  return el("div", { className: "code-block" }, head, el("pre", { tabIndex: 0 }, el("code", {}, code)));
}

function list(lines) {
  const stack = []; // of open lists, from the outermost
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (!item) {
      inline(stack.at(-1).element.lastChild, `\n${line.trim()}`);
      continue;
    }
    const [, indent, number, text] = item;
    while (stack.length > 1 && indent.length < stack.at(-1).indent) stack.pop();
    if (!stack.length || indent.length > stack.at(-1).indent + 1) {
      const made = number ? el("ol", { start: Number(number) }) : el("ul");
      stack.at(-1)?.element.lastChild.append(made);
      stack.push({ element: made, indent: indent.length });
    }
    stack.at(-1).element.append(inline(el("li"), text));
  }
  return stack[0].element;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, tag) => el("tr", {}, ...cells(line).map((cell) => inline(el(tag), cell)));
  const body = lines.slice(2).map((line) => row(line, "td"));
  return el("div", { className: "wide" },
    el("table", {}, el("thead", {}, row(lines[0], "th")), el("tbody", {}, ...body)));
}

function inline(parent, text) {
  let from = 0;
  for (const match of text.matchAll(INLINE)) {
    const [all, code, bold, italic] = match;
    parent.append(text.slice(from, match.index));
    parent.append(code ? el("code", {}, code) : inline(el(bold ? "strong" : "em"), bold ?? italic));
    from = match.index + all.length;
  }
  parent.append(text.slice(from));
  return parent;
}

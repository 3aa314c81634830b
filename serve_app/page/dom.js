// Small helpers for elements and numbers. Text becomes text nodes only; nothing here parses HTML.

export const byId = (id) => document.getElementById(id);

/** An element. `props` are its properties, or attributes where the name has a dash or is "role" or "for". */
export function el(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.includes("-") || name === "role" || name === "for") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

export function button(label, onclick, className = "link") {
  return el("button", { type: "button", className, onclick }, label);
}

/** A button that copies what `text()` gives, also where the page came by plain HTTP. */
export function copyButton(text) {
  const made = button("Copy", async () => {
    try {
      await navigator.clipboard.writeText(text());
    } catch {
      const area = el("textarea", { value: text(), className: "unseen" });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
      made.focus();
    }
    made.textContent = "Copied";
    setTimeout(() => (made.textContent = "Copy"), 1500);
  });
  return made;
}

/** Sets an element's text only if it differs, so that selections and screen readers are left alone. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Gives `parent` exactly `children`, and touches nothing if it has them already. */
export function arrange(parent, children) {
  const isSame = parent.children.length === children.length && children.every((child, i) => parent.children[i] === child);
  if (!isSame) parent.replaceChildren(...children);
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const some = new Intl.NumberFormat("en", { maximumSignificantDigits: 2 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

/** A number for people: two digits below 10, whole below 100,000, then 123K. A dash for what is no number. */
export function count(value) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  if (Math.abs(value) < 10) return some.format(value);
  return (Math.abs(value) < 1e5 ? whole : short).format(value);
}

export const percent = (share) => (typeof share === "number" ? `${Math.round(share * 100)}%` : "–");

export function bytes(value) {
  if (typeof value !== "number") return "–";
  return value < 2 ** 30 ? `${count(value / 2 ** 20)} MiB` : `${(value / 2 ** 30).toFixed(1)} GiB`;
}

/** A short time, such as that to the first token. */
export const brief = (seconds) => (!(seconds >= 0.1) ? "under 0.1 s" : `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`);

export function duration(seconds) {
  if (typeof seconds !== "number") return "–";
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  const hours = Math.floor(seconds / 3600);
  return hours < 48 ? `${hours} h ${Math.floor((seconds % 3600) / 60)} min` : `${Math.floor(hours / 24)} days`;
}

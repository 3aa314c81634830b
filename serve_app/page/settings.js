// The settings dialog, and what it stores in the browser.
import { byId } from "./dom.js";

const STORED = "qwen3_dist.settings";
const KEY = "qwen3_dist.key";
const DEFAULTS = {
  key: "", keepKey: false, system: "", temperature: "", topP: "", maxTokens: "", thinking: "", tools: "",
};

export const settings = { ...DEFAULTS, ...read() };

function read() {
  try {
    const stored = JSON.parse(localStorage.getItem(STORED) ?? "{}");
    return { ...stored, key: sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "" };
  } catch {
    return {}; // storage is blocked or holds something else
  }
}

function write() {
  const { key, ...others } = settings;
  try {
    localStorage.setItem(STORED, JSON.stringify(others));
    sessionStorage.setItem(KEY, key);
    if (settings.keepKey) localStorage.setItem(KEY, key);
    else localStorage.removeItem(KEY);
  } catch {
    // the settings hold until the page is left
  }
}

/** The list of tools in `text`. Throws an Error that says what is wrong. */
export function readTools(text) {
  if (!text.trim()) return [];
  let tools;
  try {
    tools = JSON.parse(text);
  } catch (error) {
    throw new Error(`Tools are not JSON: ${error.message}`);
  }
  if (!Array.isArray(tools)) throw new Error("Tools must be a JSON list: [ … ]");
  return tools;
}

/** The fields of a chat request that the settings say. */
export function requestFields() {
  const fields = {};
  if (settings.temperature !== "") fields.temperature = Number(settings.temperature);
  if (settings.topP !== "") fields.top_p = Number(settings.topP);
  if (settings.maxTokens !== "") fields.max_completion_tokens = Number(settings.maxTokens);
  if (settings.thinking) fields.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  const tools = readTools(settings.tools);
  if (tools.length) fields.tools = tools;
  return fields;
}

/** Connects the dialog; `saved` is called after each change. */
export function startSettings(saved) {
  const dialog = byId("settings");
  const form = dialog.querySelector("form");
  const fields = Object.keys(DEFAULTS).map((name) => form.elements[name]);
  const part = (field) => (field.type === "checkbox" ? "checked" : "value");
  byId("open-settings").onclick = () => openSettings();
  byId("cancel-settings").onclick = () => dialog.close();
  form.onsubmit = (event) => {
    try {
      readTools(form.elements.tools.value);
    } catch (error) {
      event.preventDefault();
      byId("settings-error").textContent = error.message;
      form.elements.tools.focus();
      return;
    }
    for (const field of fields) settings[field.name] = field[part(field)];
    settings.key = settings.key.trim();
    write();
    saved();
  };
  dialog.onclick = (event) => {
    if (event.target === dialog) dialog.close(); // its backdrop
  };
  dialog.addEventListener("open-it", () => {
    for (const field of fields) field[part(field)] = settings[field.name];
    byId("settings-error").textContent = "";
    dialog.showModal();
  });
}

export function openSettings() {
  byId("settings").dispatchEvent(new Event("open-it"));
}

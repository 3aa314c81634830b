// Starts the page: its two views, the list of models, the settings.
import { ApiError, call } from "./api.js";
import { startChat } from "./chat.js";
import { showCluster, startCluster } from "./cluster.js";
import { byId, el } from "./dom.js";
import { openSettings, startSettings } from "./settings.js";

const VIEWS = ["chat", "cluster"];

function showView() {
  const name = location.hash.slice(1);
  const shown = VIEWS.includes(name) ? name : VIEWS[0];
  for (const view of VIEWS) byId(view).hidden = view !== shown;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${shown}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  byId("model").hidden = shown !== "chat";
  showCluster(shown === "cluster");
}

async function listModels() {
  const model = byId("model");
  const chosen = model.value;
  try {
    const { data } = await (await call("v1/models")).json();
    model.replaceChildren(...data.map(({ id }) => el("option", { value: id, textContent: id })));
    if (data.some(({ id }) => id === chosen)) model.value = chosen;
    model.disabled = false;
  } catch (error) {
    model.replaceChildren(el("option", { value: "", textContent: "no models" }));
    model.title = error.message;
    model.disabled = true;
    if (error instanceof ApiError && error.status === 401) openSettings();
  }
}

startSettings(() => {
  listModels();
  showView();
});
startChat();
startCluster();
addEventListener("hashchange", showView);
showView();
listModels();

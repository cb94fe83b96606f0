// What the buttons of the adapters do: load or replace, pin, unload.

import { ask, button, byId, notice } from "./dom.js";
import { call, callJson } from "./server.js";

let changed = () => {};

/** `listener` is called whenever an action has changed what is loaded. */
export function onChange(listener) {
  changed = listener;
}

const pathOf = (name) => `v1/adapters/${encodeURIComponent(name)}`;
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;
const choose = (name, value) => (document.querySelector(`input[name="${name}"][value="${value}"]`).checked = true);

/** Do it and say so; what the server refuses is said, with the button `retry` if there is one. */
async function attempt(doing, action, retry = null) {
  const told = notice(`${doing} …`);
  try {
    const done = await action();
    notice(done, { fades: true });
  } catch (error) {
    notice(`${doing}: ${error.message}`, { bad: true, action: retry });
  } finally {
    told.remove();
    changed();
  }
}

/** Ask what to load; `card`: the adapter it shall replace. */
export function askToLoad(card = null) {
  const { name = "", path = "", pinned = false, version = "" } = card ?? {};
  return fillLoadForm({ name, path, pinned, version, taken: card ? "version" : "refuse" });
}

for (const radio of document.querySelectorAll('input[name="load-taken"]')) {
  radio.addEventListener("change", () => (byId("load-version").required = chosen("load-taken") === "version"));
}

async function fillLoadForm({ name, path, pinned, version, taken }) {
  byId("load-name").value = name;
  byId("load-path").value = path;
  byId("load-pinned").checked = pinned;
  byId("load-version").value = version;
  byId("load-version").required = taken === "version";
  choose("load-taken", taken);
  if ((await ask(byId("load-dialog"))) === "load") await load();
}

async function load() {
  const given = {
    name: byId("load-name").value,
    path: byId("load-path").value,
    pinned: byId("load-pinned").checked,
    version: byId("load-version").value,
    taken: chosen("load-taken"),
  };
  const body = { path: given.path, pinned: given.pinned };
  if (given.taken === "refuse") body.if_version = 0;
  if (given.taken === "version") body.if_version = Number(given.version);
  const retry = button("Change and try again", () => {
    retry.parentNode.remove();
    fillLoadForm(given);
  });
  const put = async () => {
    const card = await callJson(pathOf(given.name), { method: "PUT", body });
    return `${card.name} is loaded, version ${card.version}.`;
  };
  await attempt(`Loading ${given.name}`, put, retry);
}

export function setPinned(card, pinned) {
  return attempt(`${pinned ? "Pinning" : "Unpinning"} ${card.name}`, async () => {
    await call(pathOf(card.name), { method: "PATCH", body: { pinned, if_version: card.version } });
    return `${card.name} is ${pinned ? "pinned" : "no longer pinned"}.`;
  });
}

export async function askToUnload(card) {
  byId("unload-title").textContent = `Unload ${card.name}?`;
  byId("unload-message").textContent =
    `Version ${card.version}, ${card.running} requests run, ${card.waiting} wait. The name is gone at once.`;
  choose("unload-how", "wait");
  if ((await ask(byId("unload-dialog"))) !== "unload") return;
  const how = chosen("unload-how");
  const query = new URLSearchParams({ if_version: card.version });
  if (how === "force") query.set("force", "true");
  if (how === "drain") query.set("drain_s", byId("unload-seconds").value || "0");
  await unload(card.name, query, how !== "force");
}

/** `mayHasten`: while it waits for requests, a button can end them. */
async function unload(name, query, mayHasten) {
  const hasten = button("End its requests now", () => {
    hasten.disabled = true;
    // The first call then answers; its answer is what counts.
    call(`${pathOf(name)}?force=true`, { method: "DELETE" }).catch((error) => notice(error.message, { bad: true }));
  });
  const told = notice(`Unloading ${name} …`, { action: mayHasten ? hasten : null });
  const done = call(`${pathOf(name)}?${query}`, { method: "DELETE" });
  setTimeout(changed, 200); // the name is gone long before the answer, if requests run
  try {
    await done;
    notice(`${name} is unloaded.`, { fades: true });
  } catch (error) {
    notice(`Unloading ${name}: ${error.message}`, { bad: true });
  } finally {
    told.remove();
    changed();
  }
}

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

/** Do it and say so; what the server refuses is said and no error. */
async function attempt(doing, action) {
  const told = notice(`${doing} …`);
  try {
    const done = await action();
    notice(done, { fades: true });
    return true;
  } catch (error) {
    notice(`${doing}: ${error.message}`, { bad: true });
    return false;
  } finally {
    told.remove();
    changed();
  }
}

/** Ask what to load; `card`: the adapter it shall replace. A refusal opens the form again with what was written. */
export async function askToLoad(card = null) {
  byId("load-title").textContent = card ? "Replace an adapter" : "Load an adapter";
  byId("load-name").value = card?.name ?? "";
  byId("load-path").value = card?.path ?? "";
  byId("load-pinned").checked = card?.pinned ?? false;
  byId("load-version").value = card?.version ?? "";
  choose("load-taken", card ? "version" : "refuse");
  do {
    if ((await ask(byId("load-dialog"))) !== "load") return;
  } while (!(await load()));
}

async function load() {
  const name = byId("load-name").value;
  const body = { path: byId("load-path").value, pinned: byId("load-pinned").checked };
  const taken = chosen("load-taken");
  if (taken === "refuse") body.if_version = 0;
  if (taken === "version") body.if_version = byId("load-version").valueAsNumber || 0;
  return attempt(`Loading ${name}`, async () => {
    const card = await callJson(pathOf(name), { method: "PUT", body });
    return `${card.name} is loaded, version ${card.version}.`;
  });
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

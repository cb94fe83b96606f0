// The table of adapters. Rows stay where they are and change their texts, so that focus and selection survive.

import { ago, button, byId, bytes, el, setText, whole } from "./dom.js";
import { askToLoad, askToUnload, setPinned } from "./adapter_actions.js";

const MAX_ROWS = 200; // more are found by name
const COLUMNS = [
  ["Version", "number", (card) => String(card.version)],
  ["Tier", "", (card) => card.tier],
  ["Rank", "number", (card) => String(card.rank)],
  ["Size", "number", (card) => bytes(card.bytes)],
  ["Pinned", "", (card) => (card.pinned ? "pinned" : "")],
  ["Running / waiting", "number", (card) => `${whole(card.running)} / ${whole(card.waiting)}`],
  ["Loads", "number", (card) => whole(card.loads)],
  ["Evictions", "number", (card) => whole(card.evictions)],
  ["Hits", "number", (card) => `${whole(card.hits)} of ${whole(card.requests)}`],
  ["Last use", "", (card) => (card.last_use === null ? "never" : ago(card.last_use, Date.now() / 1000))],
];

const body = byId("adapters").tBodies[0];
const find = byId("adapters-find");
const rows = new Map(); // name -> {node, show}
let cards = [];

find.addEventListener("input", draw);
byId("adapters-load").addEventListener("click", () => askToLoad());

/** Show these cards, in this order; `problem` in their place if they could not be had. */
export function drawAdapters(newCards, problem = null) {
  cards = newCards;
  const message = byId("adapters-message");
  message.hidden = problem === null;
  setText(message, problem ?? "");
  byId("adapters-load").disabled = problem !== null;
  draw();
}

function draw() {
  const wanted = find.value.trim().toLowerCase();
  const found = cards.filter(({ name, path }) => `${name}\n${path}`.toLowerCase().includes(wanted));
  const shown = found.slice(0, MAX_ROWS);
  const more = found.length > shown.length ? `, the first ${MAX_ROWS} of ${whole(found.length)} found` : "";
  setText(byId("adapters-count"), `${whole(cards.length)} loaded${more}`);
  const names = new Set(shown.map(({ name }) => name));
  for (const [name, row] of rows) {
    if (names.has(name)) continue;
    row.node.remove();
    rows.delete(name);
  }
  shown.forEach((card, i) => {
    if (!rows.has(card.name)) rows.set(card.name, makeRow());
    const row = rows.get(card.name);
    row.show(card);
    if (body.children[i] !== row.node) body.insertBefore(row.node, body.children[i] ?? null);
  });
}

function makeRow() {
  let card = null;
  const name = el("span", { class: "name" });
  const place = el("span", { class: "name quiet path" });
  const cells = COLUMNS.map(([label, kind]) => el("td", { class: kind, "data-label": label }));
  const pin = button("Pin", () => setPinned(card, !card.pinned));
  const replace = button("Replace…", () => askToLoad(card));
  const unload = button("Unload…", () => askToUnload(card));
  const actions = el("td", { class: "actions" }, pin, replace, unload);
  const node = el("tr", {}, el("th", { scope: "row" }, name, place), ...cells, actions);
  function show(newCard) {
    card = newCard;
    setText(name, card.name);
    setText(place, card.path);
    place.title = `${card.modules.join(", ")}; digest ${card.digest}`;
    COLUMNS.forEach(([, , text], i) => setText(cells[i], text(card)));
    cells[1].dataset.tier = card.tier;
    setText(pin, card.pinned ? "Unpin" : "Pin");
    for (const one of [pin, replace, unload]) one.setAttribute("aria-label", `${one.textContent} ${card.name}`);
  }
  return { node, show };
}

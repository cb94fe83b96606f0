// One prompt through several adapters at once, a column for each.

import { byId, el, setText } from "./dom.js";
import { Column } from "./column.js";

const BASE = ""; // no adapter has an empty name
const MAX_STREAMS = 4; // of the six connections that a browser opens to one server; the rest is for this page's other calls

const choices = new Map(); // name -> {node, box}
const form = byId("play");
const stop = byId("play-stop");
let columns = [];
let running = 0; // runs that have not ended

/** Offer the base model and these adapters; what was ticked stays so. */
export function offerAdapters(names) {
  const wanted = new Set([BASE, ...names]);
  const list = byId("play-adapters");
  for (const [name, { node }] of choices) {
    if (wanted.has(name)) continue;
    node.remove();
    choices.delete(name);
  }
  [...wanted].forEach((name, i) => {
    if (!choices.has(name)) choices.set(name, makeChoice(name, i < 3));
    const { node } = choices.get(name);
    if (list.children[i] !== node) list.insertBefore(node, list.children[i] ?? null);
  });
}

function makeChoice(name, ticked) {
  const box = el("input", { type: "checkbox" });
  box.checked = ticked && choices.size < 3;
  return { box, node: el("label", { class: "inline" }, box, " ", titleOf(name)) };
}

function titleOf(name) {
  return name === BASE ? el("em", {}, "base model") : el("span", { class: "name" }, name);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const names = [...choices].filter(([, { box }]) => box.checked).map(([name]) => name);
  setText(byId("play-message"), names.length ? "" : "Tick at least one.");
  if (names.length) run(names);
});
stop.addEventListener("click", () => columns.forEach((column) => column.stop()));
byId("play-prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});

async function run(names) {
  columns.forEach((column) => column.stop());
  columns = names.map((name) => new Column(titleOf(name), request(name)));
  byId("play-columns").replaceChildren(...columns.map(({ node }) => node));
  stop.disabled = false;
  running += 1;
  const waiting = [...columns];
  const drain = async () => {
    for (let column = waiting.shift(); column; column = waiting.shift()) await column.run();
  };
  await Promise.all(Array.from({ length: MAX_STREAMS }, drain));
  running -= 1;
  stop.disabled = running > 0 ? stop.disabled : true;
}

/** What to send for one adapter: a path and a body. */
function request(name) {
  const prompt = byId("play-prompt").value;
  const maxTokens = byId("play-tokens").valueAsNumber;
  const sampling = { temperature: byId("play-temperature").valueAsNumber, top_p: byId("play-top-p").valueAsNumber };
  const seed = byId("play-seed").valueAsNumber;
  if (!Number.isNaN(seed)) sampling.seed = seed;
  const lora = name === BASE ? null : name;
  if (byId("play-kind").value === "text") {
    const body = { text: prompt, lora_path: lora, stream: true };
    return { path: "generate", body: { ...body, sampling_params: { ...sampling, max_new_tokens: maxTokens } } };
  }
  const messages = [{ role: "user", content: prompt }];
  const body = { model: baseModel, lora_path: lora, messages, stream: true, stream_options: { include_usage: true } };
  return { path: "v1/chat/completions", body: { ...body, ...sampling, max_tokens: maxTokens } };
}

let baseModel = "";

/** The base model's name, as OpenAI's routes want it. */
export function setBaseModel(name) {
  baseModel = name;
}

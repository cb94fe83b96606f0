// The page pool as a picture: one bar, and what its parts are.

import { byId, bytes, el, setText, whole } from "./dom.js";

const USES = [
  ["kv_held", "KV in use", "of requests that run"],
  ["kv_cached", "KV cached", "prefixes that nobody reads now; given up when pages are needed"],
  ["adapter_held", "Adapters in use", "that run, are pinned, or are being copied"],
  ["adapter_cached", "Adapters idle", "on the GPU, given up when pages are needed"],
  ["free", "Free", ""],
];

const parts = USES.map(([use, label, meaning]) => {
  const segment = el("div", { class: `segment ${use}`, "data-use": use });
  const number = el("dd", {});
  byId("pool-bar").append(segment);
  byId("pool-legend").append(
    el("div", { title: meaning }, el("dt", {}, el("i", { class: `swatch ${use}` }), label), number),
  );
  return { use, label, segment, number };
});

/** Draw a moment of metrics.js. */
export function drawPool({ pages, hostPages, pageBytes, model }) {
  const total = parts.reduce((sum, { use }) => sum + pages[use], 0);
  const told = [];
  for (const { use, label, segment, number } of parts) {
    const count = pages[use];
    const share = total ? count / total : 0;
    const text = `${bytes(count * pageBytes)} · ${whole(count)} pages · ${percent(share)}`;
    segment.style.flexGrow = share;
    segment.hidden = count === 0;
    segment.title = `${label}: ${text}`;
    segment.dataset.pages = number.dataset.pages = count;
    setText(number, text);
    told.push(`${label} ${text}`);
  }
  byId("pool-bar").setAttribute("aria-label", `The page pool: ${told.join("; ")}`);
  const where = Number(model.tp_size) > 1 ? ` on each of ${model.tp_size} ranks` : "";
  setText(byId("pool-total"), `${bytes(total * pageBytes)}${where}: ${whole(total)} pages of ${bytes(pageBytes)}`);
  const [used, free] = [hostPages.adapter, hostPages.free];
  const host = `${bytes(used * pageBytes)} of ${bytes((used + free) * pageBytes)}`;
  setText(byId("pool-host"), `Adapters' copies in the host's memory: ${host}${where}.`);
}

function percent(share) {
  const value = share * 100;
  if (value > 0 && value < 0.1) return "< 0.1 %";
  return `${value.toFixed(value < 10 ? 1 : 0)} %`;
}

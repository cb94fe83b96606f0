// Asks the server again and again, and gives what it answers to the parts of the page.

import { drawAdapters } from "./adapters.js";
import { onChange } from "./adapter_actions.js";
import { Chart } from "./charts.js";
import { byId, rate, seconds, setText, whole } from "./dom.js";
import { History, growth, parse, quantile } from "./metrics.js";
import { offerAdapters, setBaseModel } from "./playground.js";
import { drawPool } from "./pool.js";
import { askForKey, call, callJson, onKeyChange } from "./server.js";

const PAUSE_MS = 2000;
const MAX_PAUSE_MS = 10000;
const COST_FACTOR = 4; // a pause is at least so many times as long as the asking, however many adapters there are
const ANSWER_MS = 10000;
const SPAN_MS = 5 * 60000;
const WINDOW_MS = 30000; // of percentiles: in two seconds too few tokens come to have any
const NAMES_EVERY_MS = 15000; // of the adapters' names, for whom no admin key opens their table

let locked = false; // nothing is to be had until there is another key
let refused = null; // why the table of adapters is not to be had until there is another key
let namesAt = -Infinity;
let timer = null;
let asking = null; // the round under way
let again = false; // something changed meanwhile

const history = new History(SPAN_MS);
const charts = [
  {
    chart: new Chart("Tokens per second", ["generated", "read"], { format: rate, least: 1, spanMs: SPAN_MS }),
    series: () => [history.series(growth("generated")), history.series(growth("read"))],
  },
  {
    chart: new Chart("Requests", ["running", "waiting"], { format: whole, least: 2, spanMs: SPAN_MS }),
    series: () => [history.series((now) => now.running), history.series((now) => now.waiting)],
  },
  percentiles("Time to first token", "firstToken"),
  percentiles("Time from token to token", "nextToken"),
];

function percentiles(title, field) {
  const chart = new Chart(title, ["p50", "p95"], { format: seconds, least: 0.001, spanMs: SPAN_MS });
  const series = () => [0.5, 0.95].map((q) => history.windowed(WINDOW_MS, quantile(field, q)));
  return { chart, series };
}

byId("charts").append(...charts.map(({ chart }) => chart.node));

function setStatus(state, text) {
  byId("status").dataset.state = state;
  setText(byId("status"), text);
}

async function askMetrics() {
  try {
    const response = await call("metrics", { timeoutMs: ANSWER_MS });
    const moment = parse(await response.text(), Date.now());
    history.add(moment);
    setText(byId("model"), moment.model.model);
    setBaseModel(moment.model.model);
    byId("pool-message").hidden = true;
    drawPool(moment);
    for (const { chart, series } of charts) chart.draw(series(), moment.at);
    setStatus("serving", "serving");
  } catch (error) {
    locked = error.status === 401;
    setStatus("failed", error.message);
  }
}

async function askAdapters() {
  try {
    if (refused === null) {
      const { data } = await callJson("v1/adapters", { timeoutMs: ANSWER_MS });
      drawAdapters(data);
      offerAdapters(data.map(({ name }) => name));
    }
  } catch (error) {
    // What cannot be reached now shows its last state; the status says that it is old.
    if (error.status !== 401 && error.status !== 403) return;
    refused = error.message;
    drawAdapters([], refused);
  }
  if (refused !== null && performance.now() - namesAt > NAMES_EVERY_MS) await askNames();
}

/** The playground needs the names alone, which any key opens. */
async function askNames() {
  namesAt = performance.now();
  try {
    const { data } = await callJson("v1/models", { timeoutMs: ANSWER_MS });
    offerAdapters(data.filter(({ parent }) => parent !== null).map(({ id }) => id));
  } catch {
    offerAdapters([]); // the status says why
  }
}

/** One round now, then one after each pause while somebody looks at the page. */
function refresh() {
  if (asking !== null) {
    again = true;
    return;
  }
  clearTimeout(timer);
  const began = performance.now();
  asking = Promise.all([askMetrics(), askAdapters()]).finally(() => {
    asking = null;
    const pause = Math.min(Math.max(PAUSE_MS, COST_FACTOR * (performance.now() - began)), MAX_PAUSE_MS);
    if (!document.hidden && (again || !locked)) timer = setTimeout(refresh, again ? 0 : pause);
    again = false;
  });
}

document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : refresh()));
byId("key-button").addEventListener("click", () => askForKey("The key that this page sends."));
onChange(refresh);
onKeyChange(() => {
  [locked, refused, namesAt] = [false, null, -Infinity];
  refresh();
});
refresh();

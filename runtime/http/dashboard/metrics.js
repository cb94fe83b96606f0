// The text of /metrics as numbers, a memory of the last minutes, and what follows from two moments of it.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { n: "\n", "\\": "\\", '"': '"' };
const FAMILIES = {
  generated: "manylora:generation_tokens_total",
  read: "manylora:prompt_tokens_total",
  steps: "manylora:steps_total",
  running: "manylora:num_requests_running",
  waiting: "manylora:num_requests_waiting",
  pageBytes: "manylora:page_bytes",
};
const FIRST_TOKEN = "manylora:time_to_first_token_seconds_bucket";
const NEXT_TOKEN = "manylora:inter_token_latency_seconds_bucket";

function* samples(text) {
  for (const line of text.split("\n")) {
    const match = SAMPLE.exec(line);
    if (!match) continue; // a comment
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(LABEL)) {
      labels[name] = value.replace(/\\(.)/g, (_, letter) => ESCAPES[letter] ?? letter);
    }
    yield { name: match[1], labels, value: match[3] === "+Inf" ? Infinity : Number(match[3]) };
  }
}

/** One moment: the numbers of FAMILIES; pages and hostPages by use; model's labels; histograms as [bound, count up to
 * it] rows. `at`: milliseconds of the browser's own clock. */
export function parse(text, at) {
  const moment = { at, pages: {}, hostPages: {}, model: {}, firstToken: [], nextToken: [] };
  const fields = new Map(Object.entries(FAMILIES).map(([field, name]) => [name, field]));
  for (const { name, labels, value } of samples(text)) {
    const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
    if (fields.has(name)) moment[fields.get(name)] = value;
    else if (name === "manylora:num_pages") moment.pages[labels.use] = value;
    else if (name === "manylora:num_host_pages") moment.hostPages[labels.use] = value;
    else if (name === "manylora:model_info") moment.model = labels;
    else if (name === FIRST_TOKEN) moment.firstToken.push([bound, value]);
    else if (name === NEXT_TOKEN) moment.nextToken.push([bound, value]);
  }
  return moment;
}

/** Moments of the last `spanMs`, oldest first. */
export class History {
  constructor(spanMs) {
    [this.spanMs, this.moments] = [spanMs, []];
  }

  add(moment) {
    const before = this.moments.at(-1);
    // A server that was started again counts from 0: nothing of before can be compared.
    if (before && (moment.steps < before.steps || moment.generated < before.generated)) this.moments = [];
    this.moments.push(moment);
    // One older moment stays, so that the oldest line begins at the edge.
    while (this.moments.length > 2 && this.moments[1].at < moment.at - this.spanMs) this.moments.shift();
  }

  /** [time, value] for every moment but the first; value(moment, the one before). */
  series(value) {
    return this.moments.slice(1).map((moment, i) => [moment.at, value(moment, this.moments[i])]);
  }

  /** The same with the youngest moment that is at least `windowMs` older, or else the oldest. */
  windowed(windowMs, value) {
    let from = 0;
    return this.moments.slice(1).map((moment, i) => {
      while (from < i && this.moments[from + 1].at <= moment.at - windowMs) from += 1;
      return [moment.at, value(moment, this.moments[from])];
    });
  }
}

/** How fast a counter grew between two moments, per second. */
export function growth(field) {
  return (now, before) => ((now[field] - before[field]) * 1000) / (now.at - before.at);
}

/** The quantile of what a histogram saw between two moments, in seconds; null if that was nothing. Within a bucket it
 * is taken to be spread evenly; above the last bound it is that bound. */
export function quantile(field, q) {
  return (now, before) => {
    const counts = now[field].map(([, count], i) => count - before[field][i][1]);
    const total = counts.at(-1) ?? 0;
    if (!total) return null;
    const index = counts.findIndex((count) => count >= q * total);
    const [low, below] = index ? [now[field][index - 1][0], counts[index - 1]] : [0, 0];
    const high = now[field][index][0];
    if (high === Infinity) return low;
    return low + ((high - low) * (q * total - below)) / (counts[index] - below);
  };
}

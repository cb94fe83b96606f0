// Lines over time, as small drawings with a legend that says the latest values.

import { el, setText } from "./dom.js";

const NAMESPACE = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [320, 140, 50, 6, 8, 18];

function svg(tag, attributes, ...children) {
  const node = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** The least of …, 1, 2, 4, 10, 20, 40, … that is not below `value`: from 2 on their halves are whole, too. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 10].map((factor) => factor * power).find((one) => one >= value * 0.9999);
}

/** A chart with `lines`: [{label}]; `format` says a value; `least`: what the axis shows at least. */
export class Chart {
  constructor(title, labels, { format, least, spanMs }) {
    Object.assign(this, { title, labels, format, least, spanMs });
    this.drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
    this.values = labels.map(() => el("b", {}, "–"));
    const legend = el("p", { class: "legend" });
    labels.forEach((label, i) => {
      legend.append(el("span", {}, el("i", { class: `swatch line-${i}` }), `${label} `, this.values[i]));
    });
    this.node = el("figure", { class: "chart" }, el("figcaption", {}, title), this.drawing, legend);
  }

  /** `series`: for each line [[time in ms, value or null], …], oldest first; `now`: the right edge. */
  draw(series, now) {
    const latest = series.map((points) => points.at(-1)?.[1] ?? null);
    latest.forEach((value, i) => setText(this.values[i], this.format(value)));
    const told = this.labels.map((label, i) => `${label} ${this.format(latest[i])}`).join(", ");
    this.drawing.setAttribute("aria-label", `${this.title}: ${told}`);

    const start = now - this.spanMs;
    const seen = series.flat().filter(([at, value]) => at >= start && value !== null);
    const top = roundUp(Math.max(this.least, ...seen.map(([, value]) => value)));
    const x = (at) => LEFT + ((at - start) / this.spanMs) * (WIDTH - LEFT - RIGHT);
    const y = (value) => TOP + (1 - value / top) * (HEIGHT - TOP - BOTTOM);
    this.drawing.replaceChildren(
      ...[0, 0.5, 1].flatMap((part) => this.#gridLine(top * part, y(top * part))),
      ...this.#minutes(start, now, x),
      ...series.map((points, i) =>
        svg("path", { class: `line line-${i}`, d: path(points.filter(([at]) => at >= start), x, y) }),
      ),
    );
  }

  #gridLine(value, height) {
    const label = svg("text", { x: LEFT - 6, y: height + 4, "text-anchor": "end" }, this.format(value));
    return [svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: height, y2: height }), label];
  }

  #minutes(start, now, x) {
    const marks = [];
    for (let minute = 0; minute * 60000 <= now - start; minute += minute ? 2 : 1) {
      const text = minute ? `−${minute} min` : "now";
      const anchor = minute ? (x(now - minute * 60000) > LEFT + 20 ? "middle" : "start") : "end";
      marks.push(svg("text", { x: x(now - minute * 60000), y: HEIGHT - 4, "text-anchor": anchor }, text));
    }
    return marks;
  }
}

/** Lines between neighbours that both have a value; a point that stands alone becomes a dot. */
function path(points, x, y) {
  let drawing = false;
  return points
    .map(([at, value], i) => {
      if (value === null) {
        drawing = false;
        return "";
      }
      const place = `${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
      const alone = !drawing && (points[i + 1]?.[1] ?? null) === null;
      const step = drawing ? `L${place}` : alone ? `M${place}h0.1` : `M${place}`;
      drawing = true;
      return step;
    })
    .join("");
}

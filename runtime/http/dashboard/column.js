// One answer of the playground while it comes: its text, how fast, and how it ended.

import { button, el, rate, seconds, setText } from "./dom.js";
import { call, events } from "./server.js";

export class Column {
  #controller = new AbortController();
  #text = "";
  #tokens = null; // null: not told yet
  #firstAt = null; // when the first and the latest token came, in ms
  #lastAt = null;
  #sentAt = null;
  #finish = "";
  #version = "";
  #drawn = true;

  /** `title`: a node; `request`: path and body of a streaming call. */
  constructor(title, request) {
    this.request = request;
    this.output = el("div", { class: "output", dir: "auto", "aria-live": "off" });
    this.state = el("p", { class: "quiet" }, "waits for a free connection");
    this.stopButton = button("Stop", () => this.stop());
    const head = el("div", { class: "bar" }, el("h3", {}, title), this.stopButton);
    this.node = el("article", { class: "column", "data-state": "waiting" }, head, this.output, this.state);
  }

  /** Ends when the answer has. Whatever goes wrong is said in the column. */
  async run() {
    if (this.#controller.signal.aborted) return;
    this.#enter("running");
    this.#sentAt = performance.now();
    try {
      const { path, body } = this.request;
      const signal = this.#controller.signal;
      const response = await call(path, { method: "POST", body, signal });
      for await (const event of events(response)) this.#take(event);
      this.#enter("ended");
    } catch (error) {
      if (this.#controller.signal.aborted) this.#enter("stopped");
      else this.#fail(error);
    } finally {
      this.stopButton.disabled = true;
      this.#draw();
    }
  }

  /** The connection is closed; the server ends the request. */
  stop() {
    if (this.node.dataset.state === "waiting") this.#enter("stopped");
    this.stopButton.disabled = true;
    this.#controller.abort();
  }

  #take(event) {
    if (event.object === "chat.completion.chunk") this.#takeChunk(event);
    else this.#takeAnswer(event);
    if (this.#drawn) requestAnimationFrame(() => this.#draw());
    this.#drawn = false;
  }

  /** Of /generate: all of the text so far. */
  #takeAnswer({ text, meta_info: about }) {
    this.#text = text;
    this.#tokens = about.completion_tokens;
    if (about.lora_version) this.#version = `version ${about.lora_version}`;
    this.#finish = about.finish_reason?.type ?? "";
    this.#note();
  }

  /** Of OpenAI's chats: a piece of the text; how many tokens, only in the end. */
  #takeChunk({ choices, usage }) {
    if (usage) this.#tokens = usage.completion_tokens;
    for (const { delta, finish_reason: reason } of choices) {
      if (delta.content) {
        this.#text += delta.content;
        this.#note();
      }
      this.#finish = reason ?? this.#finish;
    }
  }

  #note() {
    this.#lastAt = performance.now();
    this.#firstAt ??= this.#lastAt;
  }

  #enter(state) {
    this.node.dataset.state = state;
    this.#draw();
  }

  #fail(error) {
    this.node.dataset.state = "failed";
    this.output.after(el("p", { class: "message", role: "alert" }, error.message));
  }

  #draw() {
    this.#drawn = true;
    setText(this.output, this.#text);
    setText(this.state, this.#words().join(" · "));
  }

  #words() {
    const state = this.node.dataset.state;
    const words = [];
    if (state === "waiting") words.push("waits for a free connection");
    if (this.#tokens !== null) words.push(`${this.#tokens} tokens`);
    const speed = this.#speed();
    if (speed !== null) words.push(`${rate(speed)} tokens/s`);
    if (this.#firstAt !== null) words.push(`first after ${seconds((this.#firstAt - this.#sentAt) / 1000)}`);
    if (this.#version) words.push(this.#version);
    if (state === "ended") words.push(`ended: ${this.#finish}`);
    if (state === "running" || state === "stopped" || state === "failed") words.push(state);
    return words;
  }

  /** Tokens per second after the first token, as they came here; null until there are two. */
  #speed() {
    if (this.#tokens === null || this.#tokens < 2 || this.#lastAt === this.#firstAt) return null;
    return ((this.#tokens - 1) * 1000) / (this.#lastAt - this.#firstAt);
  }
}

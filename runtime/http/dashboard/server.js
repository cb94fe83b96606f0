// Calls of the server: the key, errors in its one shape, and answers that come as events.

import { ask, byId } from "./dom.js";

// In sessionStorage: a reload keeps the key, closing the tab forgets it, and no other tab or site has it.
const STORED_AS = "manylora-key";
let key = sessionStorage.getItem(STORED_AS);
let asking = null; // the open dialog's promise
let declined = false; // asked once and not given: it is asked again only by the button
const listeners = [];

/** What the server refused, or that it did not answer (`code` "unreachable", status 0). */
export class Problem extends Error {
  constructor(status, code, message) {
    super(message);
    [this.status, this.code] = [status, code];
  }
}

/** Call `listener` whenever there is another key, or none. */
export function onKeyChange(listener) {
  listeners.push(listener);
}

/** A response that is fine. Where the server wants a key the page asks for it, once. Throws Problem, or AbortError if
 * `signal` aborts. `timeoutMs`: for the answer, without the time that somebody looks for a key. */
export async function call(path, { method = "GET", body, signal, timeoutMs } = {}) {
  for (;;) {
    const sent = key;
    const headers = {};
    if (sent !== null) headers.Authorization = `Bearer ${sent}`;
    if (body !== undefined) headers["Content-Type"] = "application/json";
    const data = body === undefined ? undefined : JSON.stringify(body);
    const until = timeoutMs === undefined ? signal : AbortSignal.timeout(timeoutMs);
    let response;
    try {
      response = await fetch(path, { method, headers, body: data, signal: until, cache: "no-store" });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new Problem(0, "unreachable", "The server does not answer.");
    }
    if (response.ok) return response;
    const problem = await problemOf(response);
    if (problem.status === 401 && sent === null) problem.message = "This needs a key.";
    if (problem.status !== 401 || declined) throw problem;
    if (sent === key) await askForKey(problem.message);
    if (declined) throw problem;
  }
}

/** The JSON of an answer. */
export async function callJson(path, options) {
  return (await call(path, options)).json();
}

async function problemOf(response) {
  try {
    const { error } = await response.json();
    return new Problem(response.status, String(error.code), String(error.message));
  } catch {
    return new Problem(response.status, "unknown", `The server answered ${response.status}.`);
  }
}

/** Show the dialog for a key; all who want one wait for the same. */
export function askForKey(message) {
  asking ??= changeKey(message).finally(() => (asking = null));
  return asking;
}

async function changeKey(message) {
  const input = byId("key-input");
  byId("key-message").textContent = message;
  input.value = "";
  const choice = await ask(byId("key-dialog"));
  const given = input.value;
  input.value = "";
  if (choice === "use") [key, declined] = [given, false];
  else if (choice === "forget") [key, declined] = [null, true];
  else declined = true;
  if (key === null) sessionStorage.removeItem(STORED_AS);
  else sessionStorage.setItem(STORED_AS, key);
  if (choice !== "cancel") for (const listener of listeners) listener();
}

/** The JSON of each server-sent event of a response, up to [DONE]. Throws Problem if the stream tells of an error or
 * ends without [DONE]. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Problem(0, "cut_off", "The server ended the stream in the middle.");
    const frames = (rest + value).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      const data = frame.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Problem(200, String(event.error.code), String(event.error.message));
      yield event;
    }
  }
}

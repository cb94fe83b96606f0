// Elements, and words for numbers. Whatever the server says goes in as text, never as markup.

export const byId = (id) => document.getElementById(id);

/** An element with attributes and children; a child that is no node becomes text. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

/** Change a node's text only if it differs, so that a selection in it survives. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function button(text, onClick) {
  const node = el("button", { type: "button" }, text);
  node.addEventListener("click", onClick);
  return node;
}

/** Show a modal dialog; resolves to the value of the button that closed it, "cancel" for Escape. */
export function ask(dialog) {
  dialog.returnValue = "cancel";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue || "cancel"), { once: true });
  });
}

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(count) {
  let unit = 0;
  while (count >= 1024 && unit < UNITS.length - 1) [count, unit] = [count / 1024, unit + 1];
  return `${unit && count < 100 ? count.toFixed(1) : Math.round(count)} ${UNITS[unit]}`;
}

export function whole(count) {
  if (count === null) return "–";
  return Math.round(count).toLocaleString("en");
}

export function seconds(value) {
  if (value === null) return "–";
  if (value === 0) return "0";
  return value < 1 ? `${(value * 1000).toFixed(value < 0.01 ? 1 : 0)} ms` : `${value.toFixed(2)} s`;
}

export function rate(value) {
  if (value === null) return "–";
  return value && value < 10 ? value.toFixed(1) : whole(value);
}

/** How long ago a time was; both in seconds since 1970. */
export function ago(then, now) {
  const passed = Math.max(0, now - then);
  if (passed < 5) return "now";
  if (passed < 120) return `${Math.floor(passed)} s ago`;
  if (passed < 7200) return `${Math.floor(passed / 60)} min ago`;
  if (passed < 172800) return `${Math.floor(passed / 3600)} h ago`;
  return `${Math.floor(passed / 86400)} days ago`;
}

/** Tell what was done or went wrong; stays until it is closed, or for a while if `fades`. `action`: a button. */
export function notice(text, { bad = false, fades = false, action = null } = {}) {
  const node = el("p", { class: bad ? "notice bad" : "notice" }, el("span", { class: "name" }, text));
  if (action) node.append(action);
  const close = button("×", () => node.remove());
  close.setAttribute("aria-label", "Close");
  node.append(close);
  byId("notices").append(node);
  if (fades) setTimeout(() => node.remove(), 8000);
  return node;
}

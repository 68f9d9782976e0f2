// Builds elements. Text only ever becomes text: no function here reads markup, and hidden characters are spelled out.

const SVG = "http://www.w3.org/2000/svg";
// Controls, format marks such as bidi overrides, lone surrogates and separators, as `printable` of align.errors. Line
// breaks, tabs and the two joiners of ordinary Persian, Hindi and emoji stay.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/gu;
const HARMLESS = "\n\t\u200c\u200d";

export function visible(text) {
  return String(text).replace(HIDDEN, (character) => {
    if (HARMLESS.includes(character)) return character;
    const number = character.codePointAt(0);
    if (number < 0x100) return "\\x" + number.toString(16).padStart(2, "0");
    if (number < 0x10000) return "\\u" + number.toString(16).padStart(4, "0");
    return "\\U" + number.toString(16).padStart(8, "0");
  });
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name.replace(/^on/, ""), value);
    else if (name === "class") node.setAttribute("class", value);
    else if (name === "value" || name === "checked" || name === "disabled" || name === "selected") node[name] = value;
    else if (name === "style") throw new Error("inline styles are forbidden by the policy: use a class");
    else node.setAttribute(name, value === true ? "" : visible(value));
  }
  add(node, children);
  return node;
}

function add(node, children) {
  for (const child of children) {
    if (child === null || child === undefined || child === false) continue;
    if (Array.isArray(child)) add(node, child);
    else node.append(child instanceof Node ? child : document.createTextNode(visible(child)));
  }
}

// element("a", { href: "#/runs", onclick: handler }, "text", otherElement, [more])
export function element(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function drawing(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

export function replace(node, ...children) {
  node.replaceChildren();
  add(node, children);
  return node;
}

// Replaces the content only if `state` differs from the state before, so focus and selection survive an equal update.
export function update(node, state, build) {
  const text = JSON.stringify(state);
  if (node.studioState === text) return false;
  node.studioState = text;
  replace(node, build());
  return true;
}

export function problem(error) {
  return element("p", { class: "problem", role: "alert" }, error && error.message ? error.message : String(error));
}

export function ago(seconds) {
  const passed = Math.max(0, Date.now() / 1000 - seconds);
  if (passed < 60) return "now";
  if (passed < 3600) return `${Math.floor(passed / 60)} min ago`;
  if (passed < 86400) return `${Math.floor(passed / 3600)} h ago`;
  const days = Math.floor(passed / 86400);
  return days < 60 ? `${days} d ago` : new Date(seconds * 1000).toISOString().slice(0, 10);
}

export function moment(seconds) {
  return new Date(seconds * 1000).toISOString().slice(0, 16).replace("T", " ") + " UTC";
}

// Loads the style of a view once.
export function useStyle(name) {
  const href = `/static/views/${name}.css`;
  if (document.querySelector(`link[href="${href}"]`)) return;
  document.head.append(element("link", { rel: "stylesheet", href }));
}

// Numbers, words and links of the views of rollouts and evaluations.
import { element } from "../dom.js";

const MINUS = "−";

export function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value); // "nan" and "inf" have no number in JSON
  if (Number.isInteger(value)) return grouped(value);
  const rounded = Math.abs(value) >= 1000 ? value.toFixed(0) : String(Number(value.toPrecision(digits)));
  return (Number(rounded) === 0 ? "0" : rounded).replace("-", MINUS);
}
export function grouped(value) {
  return Math.abs(value)
    .toString()
    .replace(/\B(?=(\d{3})+$)/g, ",")
    .replace(/^/, value < 0 ? MINUS : "");
}
export function count(value, noun) {
  return `${grouped(value)} ${noun}${value === 1 ? "" : "s"}`;
}

// The words of a search, and its phrases in double quotes; as `split_words` of the server.
export function splitWords(text) {
  return [...(text || "").matchAll(/"([^"]+)"|([^\s"]+)/g)].map((match) => match[1] || match[2]);
}
export function wordPattern(text) {
  const words = splitWords(text).map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  return words.length ? new RegExp(words.join("|"), "giu") : null;
}

// A text with the words of a search marked.
export function marked(text, pattern) {
  if (!pattern || !text) return text;
  const parts = [];
  let start = 0;
  for (const match of text.matchAll(pattern)) {
    if (!match[0]) break;
    parts.push(text.slice(start, match.index), element("mark", null, match[0]));
    start = match.index + match[0].length;
  }
  parts.push(text.slice(start));
  return parts;
}

export function textBox(className, ...content) {
  return element("div", { class: className, dir: "auto" }, ...content);
}

export function roleName(role) {
  return element("span", { class: "role" }, role || "");
}

// Messages as the page of a report shows them: a text, or a list with roles.
export function messages(prompt) {
  const turns = typeof prompt === "string" ? [{ role: "user", content: prompt }] : prompt || [];
  return turns.map((turn) =>
    element("div", { class: "turn" }, roleName(turn.role), textBox("text", plain(turn.content ?? turn.text))),
  );
}
function plain(content) {
  if (content === null || content === undefined) return "";
  return typeof content === "string" ? content : JSON.stringify(content, null, 1);
}

export function thought(text) {
  return text
    ? element("details", { class: "thought" }, element("summary", { class: "small" }, "thought"), textBox("text", text))
    : null;
}

// An answer with the words that another answer has in their place. Marked by lines, not only by color.
export function difference(pieces) {
  const tags = { added: "ins", removed: "del" };
  return pieces.map(([kind, text]) => (tags[kind] ? element(tags[kind], null, text) : text));
}

// An episode as `episode_view` of the report describes it.
export function conversation(episode) {
  return element(
    "div",
    { class: "conversation" },
    episode.entries.map((entry) =>
      element(
        "div",
        { class: "said" + (entry.policy ? " policy" : "") },
        roleName(entry.role),
        entry.note ? element("span", { class: "small" }, " " + entry.note) : null,
        thought(entry.thought),
        entry.text ? textBox("text", entry.text) : null,
        entry.calls.map((call) =>
          element(
            "div",
            { class: "call" + (call.ok ? "" : " wrong") },
            call.name ? element("code", null, `${call.name}(${call.arguments})`) : null,
            call.note ? element("span", { class: "small" }, (call.name ? " " : "") + call.note) : null,
            call.result ? textBox("text", call.result) : null,
          ),
        ),
        entry.left_out ? element("div", { class: "small" }, entry.left_out) : null,
      ),
    ),
    episode.left_out ? element("div", { class: "small" }, episode.left_out) : null,
    element("div", { class: episode.ok ? "small" : "cut" }, episode.end),
  );
}

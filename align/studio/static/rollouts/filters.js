// The conditions of a table: their form, their place in the address, and the chips that remove them.
import { element, replace } from "../dom.js";
import { grouped } from "./format.js";

const NUMBERS = {
  score: "score",
  kl: "KL",
  tokens: "tokens",
};
const YES_NO = { true: "yes", false: "no" };
export const FIELDS = [
  "first_update",
  "last_update",
  "prompt_id",
  "split",
  "part",
  "min_score",
  "max_score",
  "min_tokens",
  "max_tokens",
  "min_kl",
  "max_kl",
  "reason",
  "stop",
  "finished",
  "learned",
  "response_words",
  "prompt_words",
];
export const ORDER = ["sort", "sort_part", "descending", "offset"];

// The state of a table from the address; `update=12` is short for the rows of one update.
export function readState(query) {
  const state = {};
  for (const name of [...FIELDS, ...ORDER, "folder"]) if (query[name]) state[name] = query[name];
  if (query.update) Object.assign(state, { first_update: query.update, last_update: query.update });
  return state;
}
export function conditions(state) {
  return Object.fromEntries(FIELDS.filter((name) => state[name]).map((name) => [name, state[name]]));
}

function describe(state) {
  const chips = [];
  const chip = (text, ...names) => chips.push({ text, names });
  const { first_update: first, last_update: last } = state;
  if (first && first === last) chip(`update ${first}`, "first_update", "last_update");
  else if (first || last)
    chip(
      first && last ? `updates ${first} to ${last}` : first ? `from update ${first}` : `up to update ${last}`,
      "first_update",
      "last_update",
    );
  if (state.response_words) chip(`response has ${state.response_words}`, "response_words");
  if (state.prompt_words) chip(`prompt has ${state.prompt_words}`, "prompt_words");
  if (state.prompt_id) chip(`prompt ${state.prompt_id}`, "prompt_id");
  for (const [name, title] of Object.entries(NUMBERS)) {
    const low = state[`min_${name}`],
      high = state[`max_${name}`];
    const noun = name === "score" && state.part ? state.part : title;
    const names = [`min_${name}`, `max_${name}`, ...(name === "score" ? ["part"] : [])];
    if (low && high) chip(`${noun} ${low} to ${high}`, ...names);
    else if (low) chip(`${noun} ≥ ${low}`, ...names);
    else if (high) chip(`${noun} ≤ ${high}`, ...names);
  }
  for (const name of ["reason", "stop", "split"])
    if (state[name]) chip(`${name === "stop" ? "end" : name} ${state[name]}`, name);
  for (const name of ["finished", "learned"])
    if (state[name]) chip(`${name}: ${YES_NO[state[name]] || state[name]}`, name);
  return chips;
}

export function showChips(node, state, change) {
  const chips = describe(state);
  const none = (names) => Object.fromEntries(names.map((name) => [name, ""]));
  replace(
    node,
    chips.map(({ text, names }) =>
      element(
        "button",
        {
          type: "button",
          class: "chip remove",
          onclick: () => change(none(names)),
          "aria-label": `remove the filter: ${text}`,
        },
        text,
        element("span", { "aria-hidden": "true" }, " ×"),
      ),
    ),
    chips.length > 1
      ? element(
          "button",
          { type: "button", class: "chip remove all", onclick: () => change(none(FIELDS)) },
          "remove all",
        )
      : null,
  );
  return chips.length;
}

// The form; `change(patch)` gets what the user entered. Texts wait until the user stops typing.
export function filterForm(state, facets, change) {
  const controls = {};
  let timer = null;
  const later = (patch) => {
    clearTimeout(timer);
    timer = setTimeout(() => change(patch), 350);
  };
  function field(name, label, attributes) {
    const input = element("input", {
      name,
      value: state[name] || "",
      autocomplete: "off",
      spellcheck: "false",
      ...attributes,
    });
    input.addEventListener("input", () => {
      if (input.checkValidity()) later({ [name]: input.value.trim() });
    });
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter") {
        clearTimeout(timer);
        change({ [name]: input.value.trim() });
      }
    });
    controls[name] = input;
    return label ? element("label", null, label, input) : input;
  }
  function select(name, label, choices) {
    const input = element(
      "select",
      { name },
      element("option", { value: "" }, "any"),
      choices.map(([value, text]) => element("option", { value }, text)),
    );
    // A value of a link that the stage does not have is still a condition.
    if (state[name] && !choices.some(([value]) => value === state[name]))
      input.append(element("option", { value: state[name] }, state[name]));
    input.value = state[name] || "";
    input.addEventListener("change", () => change({ [name]: input.value }));
    controls[name] = input;
    return element("label", null, label, input);
  }
  const numbers = { type: "number", step: "any", inputmode: "decimal" };
  const range = (name, label, attributes) =>
    element(
      "fieldset",
      { class: "range" },
      element("legend", null, label),
      field(`min_${name}`, "", { ...attributes, placeholder: "from", "aria-label": `${label}, from` }),
      field(`max_${name}`, "", { ...attributes, placeholder: "to", "aria-label": `${label}, to` }),
    );
  const counted = (values) => Object.entries(values).map(([value, rows]) => [value, `${value} (${grouped(rows)})`]);
  const whole = { type: "number", step: 1, min: 0, inputmode: "numeric" };

  const part = facets.parts.length
    ? select(
        "part",
        "part of the score",
        facets.parts.map((name) => [name, name]),
      )
    : null;
  if (part) controls.part.options[0].textContent = "the score itself";
  const search = element(
    "div",
    { class: "search-row" },
    field("response_words", "", {
      type: "search",
      placeholder: "Words in the response  ( / )",
      "aria-label": "words in the response",
      maxlength: 200,
      class: "search",
    }),
    field("prompt_words", "", {
      type: "search",
      placeholder: "Words in the prompt",
      "aria-label": "words in the prompt",
      maxlength: 200,
    }),
  );
  const more = element(
    "details",
    { class: "more-filters" },
    element("summary", null, "Filters"),
    element(
      "div",
      { class: "controls" },
      element(
        "fieldset",
        { class: "range" },
        element("legend", null, "update"),
        field("first_update", "", { ...whole, placeholder: "from", "aria-label": "update, from" }),
        field("last_update", "", { ...whole, placeholder: "to", "aria-label": "update, to" }),
      ),
      part,
      range("score", "score", numbers),
      range("kl", "KL (nats)", numbers),
      range("tokens", "tokens", whole),
      Object.keys(facets.reasons).length ? select("reason", "reason", counted(facets.reasons)) : null,
      Object.keys(facets.stops).length ? select("stop", "end of the episode", counted(facets.stops)) : null,
      facets.columns.split
        ? select("split", "split", [
            ["train", "train"],
            ["test", "test"],
          ])
        : null,
      select("finished", "ended by itself", Object.entries(YES_NO)),
      select("learned", "learned from", Object.entries(YES_NO)),
      field("prompt_id", "id of the prompt", { type: "text", maxlength: 500 }),
    ),
  );
  return {
    node: element("form", { class: "filters", onsubmit: (event) => event.preventDefault() }, search, more),
    focus: () => controls.response_words.select(),
    toggle: () => {
      more.open = !more.open;
    },
    // Shows a state that did not come from the form, such as a chip that was removed.
    show: (next) => {
      for (const [name, input] of Object.entries(controls))
        if (input !== document.activeElement || !next[name]) input.value = next[name] || "";
    },
    end: () => clearTimeout(timer),
  };
}

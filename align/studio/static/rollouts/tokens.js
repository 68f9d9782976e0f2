// The tokens of a response, colored by one measure, with all numbers of the token that is pointed at or focused.
// Thickness of the underline repeats the color, and dots mark numbers below zero.
import { element, replace } from "../dom.js";
import { number } from "./format.js";

const LEVELS = 4;
const SHOWN = 3000;
const LISTS = [
  ["token_kl", "KL", "nats"],
  ["advantages", "Advantage", ""],
  ["raw_advantages", "Raw advantage", ""],
  ["values", "Value", ""],
  ["entropy", "Entropy", "nats"],
  ["sampler_logprobs", "Logprob, engine", ""],
  ["logprobs", "Logprob, policy", ""],
  ["ref_logprobs", "Logprob, reference", ""],
  ["step_rewards", "Step reward", ""],
  ["weights_update", "Weights of update", ""],
];
const COLORED = ["token_kl", "advantages", "raw_advantages", "values", "entropy", "gap", "step_rewards"];
const FLAGS = {
  response_mask: "sampled by the policy",
  learn_mask: "in the loss",
  forced: "forced by the thinking budget",
};

const isNumber = (value) => typeof value === "number";

// Difference of the policy's and the engine's log-probability: it shows numerical drift and older weights.
function gap(row) {
  if (!row.logprobs || !row.sampler_logprobs) return null;
  return row.logprobs.map((value, index) =>
    isNumber(value) && isNumber(row.sampler_logprobs[index]) ? value - row.sampler_logprobs[index] : null,
  );
}

export function measuresOf(row) {
  const lists = Object.fromEntries(
    LISTS.filter(([name]) => row[name]).map(([name, title, unit]) => [name, { title, unit, values: row[name] }]),
  );
  const difference = gap(row);
  if (difference) lists.gap = { title: "Policy − engine", unit: "nats", values: difference };
  return lists;
}

function scaleOf(values, isCounted) {
  const sizes = values
    .filter((value, index) => isNumber(value) && isCounted(index))
    .map(Math.abs)
    .sort((a, b) => a - b);
  return sizes.length ? sizes[Math.floor(0.99 * (sizes.length - 1))] : 0;
}

function maskOf(row, index) {
  if (row.forced && row.forced[index]) return "forced";
  if (row.response_mask && !row.response_mask[index]) return "env";
  if (row.learn_mask) return row.learn_mask[index] ? "learned" : "unlearned";
  return "sampled";
}
const MASKS = {
  learned: "in the loss",
  unlearned: "sampled, not in the loss",
  env: "from the environment",
  forced: "forced by the thinking budget",
  sampled: "sampled",
};

// Returns the node of a row with token texts; null without them.
export function tokenView(row) {
  const texts = row.token_texts;
  if (!texts || !texts.length) return null;
  const measures = measuresOf(row);
  const isSampled = (index) => !row.response_mask || row.response_mask[index];
  const choices = COLORED.filter((name) => measures[name] && measures[name].values.some(isNumber));
  const box = element("div", { class: "text tokens-box heat", tabindex: -1 });
  const legend = element("p", { class: "small legend" });
  const reading = element("dl", { class: "facts reading", role: "status" });
  const buttons = {};
  let shown = Math.min(SHOWN, texts.length);
  let current = "";
  let at = 0;

  function look(index) {
    if (current === "mask") return `tok mask-${maskOf(row, index)}`;
    if (current === "plain") return "tok";
    if (!isSampled(index)) return "tok env";
    const { values, scale } = measures[current];
    const value = values[index];
    const level = isNumber(value) && scale ? Math.min(LEVELS, Math.round((Math.abs(value) / scale) * LEVELS)) : 0;
    return `tok l${level}${isNumber(value) && value < 0 ? " below" : ""}`;
  }
  function draw() {
    replace(
      box,
      texts
        .slice(0, shown)
        .map((text, index) =>
          element(
            "span",
            { class: look(index) + (text ? "" : " part"), "data-index": index, tabindex: index === at ? 0 : -1 },
            text,
          ),
        ),
    );
  }
  function color(name) {
    current = name;
    for (const [each, button] of Object.entries(buttons)) button.setAttribute("aria-pressed", String(each === name));
    if (measures[name] && measures[name].scale === undefined)
      measures[name].scale = scaleOf(measures[name].values, isSampled);
    [...box.children].forEach((span, index) => span.setAttribute("class", look(index) + (texts[index] ? "" : " part")));
    replace(legend, explain(name));
  }
  function explain(name) {
    if (name === "plain") return "No color.";
    if (name === "mask") {
      const kinds = [...new Set(texts.map((_, index) => maskOf(row, index)))];
      return kinds.map((kind) => [element("span", { class: `tok mask-${kind}` }, MASKS[kind]), " "]);
    }
    const { title, unit, values, scale } = measures[name];
    const known = values.filter((value, index) => isNumber(value) && isSampled(index));
    const mean = known.reduce((sum, value) => sum + value, 0) / (known.length || 1);
    return [
      `${title}: `,
      element("span", { class: "tok l1" }, "little"),
      " ",
      element("span", { class: "tok l4" }, `${number(scale)} ${unit} and more`),
      known.some((value) => value < 0) ? [" ", element("span", { class: "tok l4 below" }, "below zero: dotted")] : null,
      ` · mean ${number(mean)}`,
    ];
  }
  function read(index) {
    const flags = Object.entries(FLAGS)
      .filter(([name]) => row[name])
      .map(([name, title]) => `${row[name][index] ? "" : "not "}${title}`);
    const id = row.token_ids ? `, id ${row.token_ids[index]}` : "";
    const rows = [
      ["token", element("code", null, JSON.stringify(texts[index]))],
      ["place", `${index + 1} of ${texts.length}${id}`],
      ...Object.values(measures).map(({ title, unit, values }) => [
        title,
        `${number(values[index], 4)} ${isNumber(values[index]) ? unit : ""}`,
      ]),
      ["masks", flags.join(", ")],
    ];
    replace(
      reading,
      rows
        .filter(([, value]) => value)
        .map(([title, value]) => [element("dt", null, title), element("dd", null, value)]),
    );
  }
  function go(index) {
    const span = box.children[index];
    if (!span) return;
    if (box.children[at]) box.children[at].tabIndex = -1;
    at = index;
    span.tabIndex = 0;
    span.focus({ preventScroll: true });
    span.scrollIntoView({ block: "nearest" });
  }
  // The next token of the highest level in a direction.
  function peak(step) {
    for (let index = at + step; index >= 0 && index < shown; index += step) {
      if (box.children[index].classList.contains("l4") || box.children[index].classList.contains("l3")) return index;
    }
    return at;
  }
  const indexOf = (target) =>
    target.dataset && target.dataset.index !== undefined ? Number(target.dataset.index) : -1;
  for (const name of ["pointerover", "focusin"])
    box.addEventListener(name, (event) => {
      if (indexOf(event.target) >= 0) read(indexOf(event.target));
    });
  box.addEventListener("click", (event) => {
    if (indexOf(event.target) >= 0) go(indexOf(event.target));
  });
  box.addEventListener("keydown", (event) => {
    const index = indexOf(event.target);
    const next = {
      ArrowRight: index + 1,
      ArrowLeft: index - 1,
      Home: 0,
      End: shown - 1,
      PageDown: peak(1),
      PageUp: peak(-1),
    }[event.key];
    if (index < 0 || next === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    go(next);
  });

  const bar = element("div", { class: "heat-buttons", role: "group", "aria-label": "color of the tokens" });
  const titles = {
    ...Object.fromEntries(choices.map((name) => [name, measures[name].title])),
    ...(row.response_mask || row.learn_mask ? { mask: "Masks" } : {}),
    plain: "None",
  };
  for (const [name, title] of Object.entries(titles)) {
    buttons[name] = element("button", { type: "button", "aria-pressed": "false", onclick: () => color(name) }, title);
    bar.append(buttons[name]);
  }
  current = "plain";
  draw();
  color(Object.keys(titles)[0]);
  read(0);
  const rest = texts.length - shown;
  const omitted = row.tokens_omitted || 0;
  const all =
    rest > 0
      ? element(
          "button",
          {
            type: "button",
            onclick: () => {
              shown = texts.length;
              draw();
              color(current);
              all.remove();
            },
          },
          `Show ${rest} more tokens`,
        )
      : null;
  return {
    node: element(
      "div",
      { class: "token-view" },
      bar,
      legend,
      element(
        "div",
        { class: "token-columns" },
        element(
          "div",
          null,
          box,
          all,
          omitted ? element("p", { class: "small" }, `${omitted} further tokens are stored.`) : null,
        ),
        element(
          "div",
          { class: "token-reading" },
          reading,
          element(
            "p",
            { class: "small" },
            "Point at a token, or move with ← →. PageDown and PageUp find the next strong one.",
          ),
        ),
      ),
    ),
    focus: () => go(at),
    next: (step) => {
      const names = Object.keys(titles);
      color(names[(names.indexOf(current) + step + names.length) % names.length]);
    },
  };
}

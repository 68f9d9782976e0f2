// The tokens of a reply with their probabilities, and the alternatives to the token that is pointed at or focused.
// Thickness of the underline repeats the color.
import { element, replace } from "../dom.js";
import { number } from "../rollouts/format.js";

const BOUNDS = [0.9, 0.5, 0.2, 0.05];
const LEGEND = ["90 % and more", "50 %", "20 %", "5 %", "less"];

export function percent(logprob) {
  if (logprob === null || logprob === undefined) return "–";
  const value = 100 * Math.exp(logprob);
  return value >= 0.01 ? `${value >= 99.995 ? 100 : Number(value.toPrecision(3))} %` : "< 0.01 %";
}

const level = (logprob) =>
  typeof logprob === "number" ? BOUNDS.filter((bound) => Math.exp(logprob) < bound).length : 0;

// Returns the node of a reply's tokens, and a function that moves the focus to them.
export function tokenView(tokens) {
  let at = 0;
  const reading = element("div", { class: "token-reading", role: "status" });
  const spans = tokens.map((token, index) =>
    element(
      "span",
      { class: `tok l${level(token.logprob)}`, "data-index": index, tabindex: index === 0 ? 0 : -1 },
      token.name,
    ),
  );
  const box = element("div", { class: "text heat tokens-box", dir: "auto" }, spans);
  function read(index) {
    const token = tokens[index];
    const top = token.top || [];
    replace(
      reading,
      element(
        "dl",
        { class: "facts" },
        element("dt", null, "token"),
        element("dd", null, element("code", null, JSON.stringify(token.name)), ` ${index + 1} of ${tokens.length}`),
        element("dt", null, "probability"),
        element("dd", null, percent(token.logprob)),
        element("dt", null, "log-probability"),
        element("dd", null, number(token.logprob, 4)),
      ),
      top.length
        ? element(
            "table",
            { class: "alternatives" },
            element(
              "thead",
              null,
              element(
                "tr",
                null,
                element("th", { scope: "col" }, "likeliest"),
                element("th", { scope: "col", class: "num" }, "probability"),
                element("th", { scope: "col", class: "num" }, "log-prob."),
              ),
            ),
            element(
              "tbody",
              null,
              top.map(([name, logprob]) =>
                element(
                  "tr",
                  { class: name === token.name && logprob === token.logprob ? "chosen" : null },
                  element("td", null, element("code", null, JSON.stringify(name))),
                  element("td", { class: "num" }, percent(logprob)),
                  element("td", { class: "num" }, number(logprob, 4)),
                ),
              ),
            ),
          )
        : null,
    );
  }
  function go(index) {
    if (!spans[index]) return;
    spans[at].tabIndex = -1;
    at = index;
    spans[at].tabIndex = 0;
    spans[at].focus({ preventScroll: true });
    spans[at].scrollIntoView({ block: "nearest" });
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
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    go(next);
  });
  read(0);
  const legend = element(
    "p",
    { class: "small legend" },
    "Probability: ",
    LEGEND.map((text, index) => [element("span", { class: `tok l${index}` }, text), " "]),
    "Move with ← →.",
  );
  return { node: element("div", { class: "token-probabilities" }, legend, box, reading), focus: () => go(at) };
}

// The form that adds a pair of answers to a set of annotations.
import { path, post } from "../api.js";
import { address } from "../app.js";
import { element, problem, replace } from "../dom.js";

const NAME = "chat.set";
const PATTERN = "[A-Za-z0-9][A-Za-z0-9_.\\-]{0,63}";

// The line of a pair, as a file of pairs has it.
export function pairLine(a, b, tools) {
  const names = Object.keys(a.answer.scores).filter(
    (name) => typeof a.answer.scores[name] === "number" && typeof b.answer.scores[name] === "number",
  );
  const scores = Object.fromEntries(names.map((name) => [name, [a.answer.scores[name], b.answer.scores[name]]]));
  return {
    prompt: a.prompt,
    a: a.answer.text,
    b: b.answer.text,
    systems: [a.title, b.title],
    ...(names.length ? { scores } : {}),
    ...(tools ? { tools } : {}),
  };
}

export function sendForm({ columns, tools, sets }) {
  const note = element("span", { role: "status" });
  const options = (chosen) =>
    columns.map((column, index) =>
      element("option", { value: index, selected: index === chosen }, `${column.letter} ${column.title}`),
    );
  const left = element("select", { name: "left", "aria-label": "First answer" }, options(0));
  const right = element("select", { name: "right", "aria-label": "Second answer" }, options(1));
  const set = element("input", {
    name: "set",
    required: true,
    pattern: PATTERN,
    placeholder: "name of a set",
    "aria-label": "Set of annotations",
    value: localStorage.getItem(NAME) || sets[0] || "",
    list: "annotation-sets",
    autocomplete: "off",
  });
  const form = element(
    "form",
    { class: "pair-form action" },
    columns.length > 2 ? [left, " and ", right] : null,
    set,
    element(
      "datalist",
      { id: "annotation-sets" },
      sets.map((name) => element("option", { value: name })),
    ),
    element("button", { type: "submit" }, "Send to annotation"),
    note,
  );
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const a = columns[Number(left.value)];
    const b = columns[Number(right.value)];
    try {
      if (a === b) throw new Error("Choose two different answers.");
      if (JSON.stringify(a.prompt) !== JSON.stringify(b.prompt))
        throw new Error("The answers follow different messages. Earlier, continue from one answer, and ask again.");
      const { added } = await post(path("annotate", set.value, "pairs"), {
        lines: JSON.stringify(pairLine(a, b, tools)),
      });
      localStorage.setItem(NAME, set.value);
      replace(
        note,
        added ? "added to " : "is already in ",
        element("a", { href: address("annotate", [set.value]) }, set.value),
      );
    } catch (error) {
      replace(note, problem(error));
    }
  });
  return form;
}

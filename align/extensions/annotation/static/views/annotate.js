// Sets of annotations: their list, and one set with its report, pairs, settings and files. question.js has the
// questions.
import { get, path, post } from "../api.js";
import { annotatorPanel, reportPanel } from "../annotate/report.js";
import { address } from "../app.js";
import { element, problem, replace, useStyle } from "../dom.js";
import { setKeys } from "../keys.js";
import { table } from "../tables.js";

const NAME = "annotate.name";
const NAME_PATTERN = "[A-Za-z0-9][A-Za-z0-9_\\-]{0,63}";
const ORDERS = { random: "random", closeness: "closest scores first", disagreement: "reward models disagree first" };

export const storedName = () => localStorage.getItem(NAME) || "";

// Runs an action of a form, and shows its answer or its error next to the form.
function onSubmit(form, note, action) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    replace(note);
    try {
      const text = await action(new FormData(form));
      if (text) replace(note, element("p", { class: "done-note", role: "status" }, text));
    } catch (error) {
      replace(note, problem(error));
    }
  });
}

const labeled = (text, field, hint) =>
  element("label", null, text, field, hint && element("span", { class: "small" }, hint));
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

// ---- pairs ----

function pairsForm(name, sources, done) {
  const note = element("div");
  const choices = sources.map((source) =>
    element(
      "option",
      { value: JSON.stringify([source.run, source.stage]) },
      `${source.run} · ${source.stage} (${source.kind})`,
    ),
  );
  const form = element(
    "form",
    { class: "controls" },
    name === null &&
      labeled("Name of the set", element("input", { name: "set", pattern: NAME_PATTERN, placeholder: "helpful-1" })),
    labeled(
      "Stage whose answers are compared",
      element(
        "select",
        { name: "source", disabled: !sources.length },
        element("option", { value: "" }, sources.length ? "choose a stage" : "no sample or evaluate stage is finished"),
        choices,
      ),
    ),
    labeled(
      "Pairs of each prompt",
      element("input", { name: "per_prompt", type: "number", min: 1, max: 1000, value: "1" }),
    ),
    labeled("or a file of JSON lines", element("input", { name: "file", type: "file", accept: ".jsonl" })),
    element("button", { class: "action" }, "Add pairs"),
  );
  onSubmit(form, note, async (fields) => {
    const set = name === null ? fields.get("set") : name;
    if (!set) throw new Error("Name the set.");
    const file = fields.get("file");
    const request = {};
    if (file && file.size) request.lines = await file.text();
    else if (fields.get("source")) [request.run, request.stage] = JSON.parse(fields.get("source"));
    else throw new Error("Choose a stage, or a file.");
    if (!request.lines) request.per_prompt = Number(fields.get("per_prompt"));
    const added = await post(path("annotate", set, "pairs"), request);
    done(set);
    return [`${plural(added.added, "new pair")} of ${added.read}`, ...added.skipped].join("; ") + ".";
  });
  return [form, note];
}

// ---- the list ----

async function showSets(main) {
  const [{ sets }, { sources }] = await Promise.all([get("annotate"), get("annotate/sources")]);
  const row = (set) =>
    element(
      "tr",
      null,
      element(
        "th",
        { scope: "row" },
        element("a", { href: address("annotate", [set.name]), class: "run-link" }, set.name),
      ),
      set.error
        ? element("td", { colspan: "2" }, problem(set.error))
        : [
            element("td", { class: "num" }, `${set.answered} of ${set.pairs}`),
            element("td", null, set.annotators.join(", ") || "no annotator yet"),
          ],
    );
  replace(
    main,
    element("div", { class: "view-head" }, element("h1", null, "Annotate")),
    element(
      "section",
      { class: "panel" },
      sets.length
        ? table(["Set", "Pairs answered#", "Annotators"], sets.map(row), "sets")
        : element("p", null, "No set yet. A set has pairs of answers, and what people said about them."),
    ),
    element(
      "section",
      { class: "panel" },
      element("h2", null, "New set"),
      pairsForm(null, sources, (name) => {
        location.hash = address("annotate", [name]);
      }),
    ),
  );
}

// ---- one set ----

function settingsPanel(name, content, reload) {
  const note = element("div");
  const number = (field, limits) =>
    element("input", { name: field, type: "number", value: String(content.settings[field]), ...limits });
  const form = element(
    "form",
    { class: "controls" },
    labeled("Overlap", number("overlap", { min: 0, max: 1, step: "any" }), "share that everybody answers"),
    labeled("Duplicates", number("duplicates", { min: 0, max: 1, step: "any" }), "share that comes twice"),
    labeled("Gold every", number("gold_every", { min: 2, step: 1 }), "questions"),
    labeled(
      "Order",
      element(
        "select",
        { name: "order" },
        Object.entries(ORDERS).map(([value, text]) =>
          element("option", { value, selected: value === content.settings.order }, text),
        ),
      ),
    ),
    element("button", { class: "action" }, "Save"),
  );
  onSubmit(form, note, async (fields) => {
    const numbers = Object.fromEntries(
      ["overlap", "duplicates", "gold_every"].map((field) => [field, Number(fields.get(field))]),
    );
    await post(path("annotate", name, "settings"), { ...numbers, order: fields.get("order") });
    await reload();
    return "Saved.";
  });
  return element(
    "details",
    { class: "panel-details" },
    element("summary", null, "How questions are selected"),
    form,
    note,
  );
}

function exchangePanel(name, sources, reload) {
  const note = element("div");
  const file = element("input", { type: "file", accept: ".json", "aria-label": "Label Studio's JSON" });
  file.addEventListener("change", async () => {
    try {
      const added = await post(path("annotate", name, "import"), { text: await file.files[0].text() });
      await reload();
      replace(
        note,
        element(
          "p",
          { class: "done-note", role: "status" },
          `${plural(added.pairs, "new pair")} and ${plural(added.answers, "new answer")}.`,
        ),
      );
    } catch (error) {
      replace(note, problem(error));
    }
    file.value = "";
  });
  return element(
    "details",
    { class: "panel-details" },
    element("summary", null, "Pairs and files"),
    pairsForm(name, sources, reload),
    element(
      "p",
      null,
      "Label Studio's JSON: ",
      element("a", { href: `/api/${path("annotate", name, "export")}`, download: `${name}.json` }, "export"),
      " or import ",
      file,
    ),
    note,
  );
}

async function showSet(main, name) {
  const body = element("div");
  const field = element("input", {
    name: "name",
    pattern: NAME_PATTERN,
    value: storedName(),
    placeholder: "ann",
    autocomplete: "off",
    "aria-label": "Your pseudonym",
  });
  const form = element(
    "form",
    { class: "start" },
    labeled("Your pseudonym", field),
    element("button", { class: "action" }, "Annotate"),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!field.value) {
      field.focus();
      return;
    }
    localStorage.setItem(NAME, field.value);
    location.hash = address("annotate", [name, "questions"], { name: field.value });
  });
  replace(
    main,
    element(
      "div",
      { class: "view-head" },
      element("h1", null, element("a", { href: address("annotate"), class: "crumb" }, "Annotate"), " / ", name),
      element("span", { class: "grow" }),
      form,
    ),
    body,
  );
  async function reload() {
    const [content, { sources }] = await Promise.all([get(path("annotate", name)), get("annotate/sources")]);
    replace(
      body,
      reportPanel(content),
      annotatorPanel(name, content, reload),
      element(
        "section",
        { class: "panel writes" },
        settingsPanel(name, content, reload),
        exchangePanel(name, sources, reload),
      ),
    );
  }
  setKeys(main, [
    { keys: ["a"], does: "annotate", run: () => form.requestSubmit() },
    {
      keys: ["u"],
      does: "all sets",
      run: () => {
        location.hash = address("annotate");
      },
    },
  ]);
  await reload();
}

export async function show(main, parameters) {
  useStyle("annotate");
  main.classList.add("annotate-view");
  const [name, page] = parameters.path;
  if (page === "questions")
    return (await import("./question.js")).show(main, name, parameters.query.name || storedName());
  if (name) return showSet(main, name);
  return showSets(main);
}

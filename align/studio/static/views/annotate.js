// Sets of annotations: their list, and one set with its report, pairs, settings and files. Questions are in question.js.
import { get, path, post } from "../api.js";
import { address } from "../app.js";
import { element, problem, replace } from "../dom.js";
import { setKeys } from "../keys.js";

const NAME = "annotate.name", NAME_PATTERN = "[A-Za-z0-9][A-Za-z0-9_\\-]{0,63}";
const ORDERS = { random: "random", closeness: "closest scores first", disagreement: "reward models disagree first" };

function useStyle() {
  const href = "/static/views/annotate.css";
  if (!document.querySelector(`link[href="${href}"]`)) document.head.append(element("link", { rel: "stylesheet", href }));
}

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

const labeled = (text, field, hint) => element("label", null, text, field, hint && element("span", { class: "small" }, hint));
// A heading that ends in "#" is of a column of numbers.
const heading = (text) => element("th", { scope: "col", class: text.endsWith("#") ? "num" : null }, text.replace(/#$/, ""));
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

// ---- pairs ----

function pairsForm(name, sources, done) {
  const note = element("div");
  const choices = sources.map((source) => element("option", { value: JSON.stringify([source.run, source.stage]) }, `${source.run} · ${source.stage} (${source.kind})`));
  const form = element("form", { class: "controls" },
    name === null && labeled("Name of the set", element("input", { name: "set", pattern: NAME_PATTERN, placeholder: "helpful-1" })),
    labeled("Stage whose answers are compared", element("select", { name: "source", disabled: !sources.length },
      element("option", { value: "" }, sources.length ? "choose a stage" : "no sample or evaluate stage is finished"), choices)),
    labeled("Pairs of each prompt", element("input", { name: "per_prompt", type: "number", min: 1, max: 1000, value: "1" })),
    labeled("or a file of JSON lines", element("input", { name: "file", type: "file", accept: ".jsonl" })),
    element("button", { class: "action" }, "Add pairs"));
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
    return `${plural(added.added, "new pair")} of ${added.read}.`;
  });
  return [form, note];
}

// ---- the list ----

async function showSets(main) {
  const [{ sets }, { sources }] = await Promise.all([get("annotate"), get("annotate/sources")]);
  const row = (set) => element("tr", null,
    element("th", { scope: "row" }, element("a", { href: address("annotate", [set.name]), class: "run-link" }, set.name)),
    set.error ? element("td", { colspan: "2" }, problem(set.error)) : [
      element("td", { class: "num" }, `${set.answered} of ${set.pairs}`),
      element("td", null, set.annotators.join(", ") || "no annotator yet")]);
  replace(main, element("div", { class: "view-head" }, element("h1", null, "Annotate")),
    element("section", { class: "panel" }, sets.length
      ? element("div", { class: "scroll" }, element("table", { class: "sets" }, element("thead", null, element("tr", null, ["Set", "Pairs answered#", "Annotators"].map(heading))), element("tbody", null, sets.map(row))))
      : element("p", null, "No set yet. A set has pairs of answers, and what people said about them.")),
    element("section", { class: "panel" }, element("h2", null, "New set"), pairsForm(null, sources, (name) => { location.hash = address("annotate", [name]); })));
}

// ---- one set ----

const share = (value) => !value || value.value === null ? "–"
  : `${value.value.toFixed(2)}${value.low === null ? "" : ` [${value.low.toFixed(2)}, ${value.high.toFixed(2)}]`}`;

function bar(comparison) {
  // Shares are drawn on a track from 0 to 1; the line is 1/2.
  const x = (value) => (200 * value).toFixed(1);
  const svg = "http://www.w3.org/2000/svg";
  const make = (tag, attributes) => {
    const node = document.createElementNS(svg, tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  };
  const picture = make("svg", { viewBox: "0 0 200 16", class: "share", role: "img", "aria-label": `${comparison.low.toFixed(2)} to ${comparison.high.toFixed(2)}` });
  picture.append(make("rect", { x: 0, y: 6, width: 200, height: 4, rx: 2, class: "share-track" }),
    make("rect", { x: x(comparison.low), y: 4, width: Math.max(1, 200 * (comparison.high - comparison.low)), height: 8, rx: 3, class: "share-range" }),
    make("line", { x1: 100, x2: 100, y1: 0, y2: 16, class: "share-half" }), make("circle", { cx: x(comparison.share), cy: 8, r: 4, class: "share-point" }));
  return picture;
}

const DECISIONS = { clear: "v-better", same: "", open: "" };

function reportPanel(content) {
  const report = content.report;
  const verdicts = Object.entries(report.verdicts).map(([name, count]) => `${name.replace("_", " ")} ${count}`).join(" · ");
  const stop = !report.comparisons.length ? null : element("p", { class: "decision" + (report.may_stop ? " v-better" : "") },
    report.may_stop ? "Every comparison is decided: you may stop." : "Not decided yet: continue.");
  const strengths = report.strengths && [...Object.entries(report.strengths.systems), ["left side", report.strengths.position]];
  return element("section", { class: "panel" }, element("h2", null, "Report"), stop,
    element("dl", { class: "facts" },
      element("dt", null, "Pairs answered"), element("dd", null, `${report.answered} of ${report.pairs}${verdicts ? ` (${verdicts})` : ""}`),
      element("dt", null, "Agreement (Krippendorff's α)"), element("dd", null, report.alpha ? share(report.alpha) : "needs two annotators with different verdicts"),
      element("dt", null, "Left side preferred"), element("dd", null, share(report.left)),
      strengths && [element("dt", null, "Bradley-Terry, log odds"), element("dd", null, strengths.map(([name, value]) => `${name} ${share(value)}`).join(" · "))],
      report.active > 0 && [element("dt", null, "Actively selected"), element("dd", null, `${report.active} answers, which the comparisons do not count`)]),
    report.comparisons.length > 0 && element("div", { class: "scroll" }, element("table", { class: "comparisons" },
      element("thead", null, element("tr", null, ["Comparison", "Share#", "", "Pairs#", "Result"].map(heading))),
      element("tbody", null, report.comparisons.map((line) => element("tr", null, element("th", { scope: "row" }, line.name),
        element("td", { class: "num" }, `${line.share.toFixed(3)} [${line.low.toFixed(3)}, ${line.high.toFixed(3)}]`), element("td", { class: "share-cell" }, bar(line)),
        element("td", { class: "num" }, `${line.n}, ${line.ties} undecided`), element("td", null, element("span", { class: `chip ${DECISIONS[line.decision]}` }, line.decision))))))));
}

function annotatorPanel(name, content, reload) {
  const note = element("div");
  const rows = Object.entries(content.report.annotators);
  const remove = async (annotator) => {
    if (!confirm(`Delete all answers of ${annotator}? This cannot be undone.`)) return;
    try {
      await post(path("annotate", name, "delete-annotator"), { annotator });
      await reload();
    } catch (error) {
      replace(note, problem(error));
    }
  };
  return element("section", { class: "panel" }, element("h2", null, "Annotators"), note, rows.length === 0 ? element("p", { class: "small" }, "Nobody has answered yet.")
    : element("div", { class: "scroll" }, element("table", null,
      element("thead", null, element("tr", null, ["Name", "Answers#", "Seconds a pair#", "Same on duplicates#", "Gold questions#", "Last#", ""].map(heading))),
      element("tbody", null, rows.map(([annotator, line]) => element("tr", null, element("th", { scope: "row" }, annotator),
        element("td", { class: "num" }, String(line.answers)), element("td", { class: "num" }, line.seconds.toFixed(1)),
        element("td", { class: "num" }, share(line.consistency)), element("td", { class: "num" }, share(line.gold)),
        element("td", { class: "small num" }, ((content.report.ledger[annotator] || {}).last || "").slice(0, 16).replace("T", " ")),
        element("td", null, element("button", { type: "button", class: "danger action", onclick: () => remove(annotator) }, "Delete answers"))))))));
}

function settingsPanel(name, content, reload) {
  const note = element("div");
  const number = (field, limits) => element("input", { name: field, type: "number", value: String(content.settings[field]), ...limits });
  const form = element("form", { class: "controls" },
    labeled("Overlap", number("overlap", { min: 0, max: 1, step: "any" }), "share that everybody answers"),
    labeled("Duplicates", number("duplicates", { min: 0, max: 1, step: "any" }), "share that comes twice"),
    labeled("Gold every", number("gold_every", { min: 2, step: 1 }), "questions"),
    labeled("Order", element("select", { name: "order" }, Object.entries(ORDERS).map(([value, text]) => element("option", { value, selected: value === content.settings.order }, text)))),
    element("button", { class: "action" }, "Save"));
  onSubmit(form, note, async (fields) => {
    const numbers = Object.fromEntries(["overlap", "duplicates", "gold_every"].map((field) => [field, Number(fields.get(field))]));
    await post(path("annotate", name, "settings"), { ...numbers, order: fields.get("order") });
    await reload();
    return "Saved.";
  });
  return element("details", { class: "panel-details" }, element("summary", null, "How questions are selected"), form, note);
}

function exchangePanel(name, sources, reload) {
  const note = element("div");
  const file = element("input", { type: "file", accept: ".json", "aria-label": "Label Studio's JSON" });
  file.addEventListener("change", async () => {
    try {
      const added = await post(path("annotate", name, "import"), { text: await file.files[0].text() });
      await reload();
      replace(note, element("p", { class: "done-note", role: "status" }, `${plural(added.pairs, "new pair")} and ${plural(added.answers, "new answer")}.`));
    } catch (error) {
      replace(note, problem(error));
    }
    file.value = "";
  });
  return element("details", { class: "panel-details" }, element("summary", null, "Pairs and files"), pairsForm(name, sources, reload),
    element("p", null, "Label Studio's JSON: ", element("a", { href: `/api/${path("annotate", name, "export")}`, download: `${name}.json` }, "export"), " or import ", file), note);
}

async function showSet(main, name) {
  const body = element("div");
  const field = element("input", { name: "name", pattern: NAME_PATTERN, value: storedName(), placeholder: "ann", autocomplete: "off", "aria-label": "Your pseudonym" });
  const form = element("form", { class: "start" }, labeled("Your pseudonym", field), element("button", { class: "action" }, "Annotate"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!field.value) {
      field.focus();
      return;
    }
    localStorage.setItem(NAME, field.value);
    location.hash = address("annotate", [name, "questions"], { name: field.value });
  });
  replace(main, element("div", { class: "view-head" }, element("h1", null, element("a", { href: address("annotate"), class: "crumb" }, "Annotate"), " / ", name), element("span", { class: "grow" }), form), body);
  async function reload() {
    const [content, { sources }] = await Promise.all([get(path("annotate", name)), get("annotate/sources")]);
    replace(body, reportPanel(content), annotatorPanel(name, content, reload),
      element("section", { class: "panel writes" }, settingsPanel(name, content, reload), exchangePanel(name, sources, reload)));
  }
  setKeys(main, [
    { keys: ["a"], does: "annotate", run: () => form.requestSubmit() },
    { keys: ["u"], does: "all sets", run: () => { location.hash = address("annotate"); } },
  ]);
  await reload();
}

export async function show(main, parameters) {
  useStyle();
  main.classList.add("annotate-view");
  const [name, page] = parameters.path;
  if (page === "questions") return (await import("./question.js")).show(main, name, parameters.query.name || storedName());
  if (name) return showSet(main, name);
  return showSets(main);
}

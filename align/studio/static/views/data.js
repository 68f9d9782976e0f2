// Data of the store's runs: rows of a build, dropped rows by reason, masks by token, findings, two builds compared.
import { get, path } from "../api.js";
import { address } from "../app.js";
import { element, problem, replace } from "../dom.js";
import { setKeys } from "../keys.js";

const PAGE = 10;
const TABS = ["rows", "dropped", "steps", "findings", "compare"];
const SPLITS = ["train", "test"];

function useStyle() {
  for (const href of ["/static/views/data.css"]) {
    if (!document.querySelector(`link[href="${href}"]`)) document.head.append(element("link", { rel: "stylesheet", href }));
  }
}

const number = (value) => Number(value || 0).toLocaleString("en");
const cells = (row, tag = "td") => row.map((value) => element(tag, { class: typeof value === "number" ? "num" : null }, typeof value === "number" ? number(value) : value));
// A heading that ends in "#" is of a column of numbers.
const table = (heads, rows, name) => element("div", { class: "scroll" }, element("table", { class: name },
  element("thead", null, element("tr", null, heads.map((text) => element("th", { scope: "col", class: text.endsWith("#") ? "num" : null }, text.replace(/#$/, ""))))), element("tbody", null, rows)));

// ---- the list ----

async function showStages(main) {
  const { stages } = await get("data");
  const row = (each) => element("tr", null,
    element("th", { scope: "row" }, element("a", { class: "run-link", href: address("data", [each.run, each.stage]) }, `${each.run} · ${each.stage}`)),
    element("td", null, each.kind), element("td", null, element("code", null, each.key)),
    cells([each.splits.train || 0, each.splits.test || 0, each.dropped]));
  replace(main, element("div", { class: "view-head" }, element("h1", null, "Data"), element("span", { class: "small" }, String(stages.length))),
    element("section", { class: "panel" }, stages.length ? table(["Build", "Stage", "Key", "Train#", "Test#", "Dropped#"], stages.map(row), "builds")
      : element("p", null, "No data stage is finished in this store.")));
  const links = () => [...main.querySelectorAll(".run-link")];
  const move = (by) => {
    const all = links();
    const index = all.indexOf(document.activeElement);
    const next = all[Math.min(all.length - 1, Math.max(0, index + by))];
    if (next) next.focus();
  };
  setKeys(main, [{ keys: ["j", "ArrowDown"], does: "next build", run: () => move(1) }, { keys: ["k", "ArrowUp"], does: "previous build", run: () => move(-1) }]);
}

// ---- rows ----

const SPECIAL = { trained: "t", special: "s" };

// Marks the words of a finding in the text of a piece, where they are there.
function marked(text, words) {
  const at = words ? text.indexOf(words) : -1;
  return at < 0 ? text : [text.slice(0, at), element("mark", null, words), text.slice(at + words.length)];
}

function tokenView(view, words) {
  const pieces = view.pieces.map((piece) => element("span", { class: Object.keys(SPECIAL).filter((name) => piece[name]).map((name) => SPECIAL[name]).join(" ") || null }, marked(piece.text, words)));
  return element("div", null, element("div", { class: "small" }, `${view.title} · ${number(view.tokens)} tokens, ${number(view.trained)} trained`, view.notes.map((note) => ` · ${note}`)),
    element("div", { class: "tokens", tabindex: "0" }, pieces));
}

const turn = (each, words) => element("div", { class: "turn" }, element("div", { class: "role" }, each.role), element("div", { class: "text" }, marked(each.text, words)));

export function rowView(row, words = "") {
  const head = element("div", { class: "small row-head" }, `row ${row.number + 1} · `, element("code", null, row.id || row.where || ""), row.source ? ` · ${row.source}` : "");
  if (row.reason !== undefined) {
    return element("article", { class: "sample" }, head, element("p", { class: "dropped-why" }, element("b", null, row.reason), ` in ${row.step}`, row.detail && row.detail !== "{}" ? ` · ${row.detail}` : ""),
      element("div", { class: "text dropped-row" }, row.text));
  }
  const kept = row.kept.length ? element("dl", { class: "facts" }, row.kept.map((column) => [element("dt", null, column.name), element("dd", null, column.text)])) : null;
  if (row.views) return element("article", { class: "sample" }, head, row.views.map((view) => tokenView(view, words)), kept);
  return element("article", { class: "sample" }, head, row.turns.map((each) => turn(each, words)),
    element("div", { class: row.answers.length > 1 ? "answers" : null }, row.answers.map((answer) => element("div", { class: "answer-box" },
      element("div", { class: "role" }, answer.title, answer.score === null || answer.score === undefined ? "" : ` · score ${answer.score}`), element("div", { class: "text" }, marked(answer.text, words))))), kept);
}

class Rows {
  constructor(page, split) {
    this.page = page;
    this.split = split;
    this.offset = 0;
    const { content, query } = page;
    const sources = content.sources.map((source) => source.source);
    const select = (label, name, values, chosen) => element("label", null, label, element("select", { name, onchange: () => this.load(0) },
      element("option", { value: "" }, "all"), values.map((value) => element("option", { value, selected: value === chosen }, value))));
    const parts = [];
    if (split !== "dropped") {
      this.splitField = element("select", { onchange: () => { this.split = this.splitField.value; this.load(0); } }, SPLITS.map((name) => element("option", { value: name, selected: name === split }, `${name} (${number(content.splits[name])})`)));
      parts.push(element("label", null, "Split", this.splitField), element("label", null, "Id begins with", element("input", { name: "id", type: "search", onchange: () => this.load(0) })));
      const models = content.models;
      parts.push(element("label", null, "Tokens of", element("select", { name: "model", disabled: !models.length, onchange: () => this.load(0) },
        element("option", { value: "" }, models.length ? "no model: texts" : "no stage has a tokenizer"), models.map((name) => element("option", { value: name, selected: name === query.model }, name)))));
    } else {
      const reasons = [...new Set(content.steps.flatMap((step) => step.reasons.map((reason) => reason.reason)))];
      parts.push(select("Reason", "reason", reasons, query.reason));
    }
    if (sources.length > 1) parts.push(select("Source", "source", sources, query.source));
    this.form = element("form", { class: "controls" }, parts);
    this.form.addEventListener("submit", (event) => { event.preventDefault(); this.load(0); });
    this.count = element("span", { class: "small num" });
    this.list = element("div", { "aria-live": "polite" });
    this.node = element("div", null, this.form, split !== "dropped" && content.models.length > 0 && element("p", { class: "small legend" }, element("span", { class: "tokens" }, element("span", { class: "t" }, "trained")), " ", element("span", { class: "tokens" }, element("span", { class: "s" }, "special")), " with a model's tokens"),
      element("div", { class: "pager" }, element("button", { type: "button", onclick: () => this.turn(-1) }, "← previous"), element("button", { type: "button", onclick: () => this.turn(1) }, "next →"), this.count), this.list);
  }

  async load(offset) {
    const fields = Object.fromEntries(new FormData(this.form));
    const request = (this.request = {});
    try {
      const content = await get(`${this.page.place}/rows`, { ...fields, split: this.split, offset, limit: PAGE });
      if (this.request !== request) return;
      this.offset = offset;
      this.matches = content.matches;
      const last = Math.min(offset + PAGE, content.matches);
      this.count.textContent = content.matches ? `${number(offset + 1)} to ${number(last)} of ${number(content.matches)}` : "no rows";
      replace(this.list, content.rows.map((row) => rowView(row)));
    } catch (error) {
      replace(this.list, problem(error));
    }
  }

  turn(by) {
    const offset = this.offset + by * PAGE;
    if (offset >= 0 && offset < (this.matches || 0)) this.load(offset);
  }
}

// ---- steps, findings, comparison ----

function stepsPanel(page) {
  const { content } = page;
  const dropped = (reason) => address("data", page.parts, { tab: "dropped", reason: reason.reason });
  const rows = content.steps.map((step) => element("tr", null, element("th", { scope: "row" }, step.step), cells([step.rows_in, step.added, step.changed, step.rows_out, step.lost]),
    element("td", null, step.reasons.map((reason) => element("div", { class: "small" }, element("a", { href: dropped(reason) }, `${number(reason.rows)} × ${reason.reason}`))))));
  const sources = content.sources.map((source) => element("tr", null, element("th", { scope: "row" }, source.source), element("td", { class: source.unknown ? "unknown" : null }, source.license), cells([source.rows_in, source.rows_out, source.lost])));
  return [rows.length ? table(["Step", "Rows in#", "Added#", "Changed#", "Rows out#", "Dropped#", "Reasons"], rows, "steps") : element("p", { class: "small" }, "This stage has no steps."),
    sources.length > 0 && [element("h3", null, "Sources"), table(["Source", "License", "Rows in#", "Rows out#", "Dropped#"], sources, "sources")]];
}

const excerptWords = (excerpt) => {
  const quoted = /['"]((?:[^'"\\]|\\.){3,})['"]/.exec(excerpt);
  return (quoted ? quoted[1] : excerpt.replace(/^[a-z ]+: /, "")).replace(/\\n/g, "\n").slice(0, 60);
};

function findingsPanel(page) {
  const { content } = page;
  if (!content.findings.length) return element("p", null, "No stage that learns from these rows has findings. ", element("code", null, "align data lint"), " looks at a build for a model.");
  const openRow = async (box, stage, example) => {
    const { split, row } = example.place;
    const model = content.models.includes(stage) ? stage : content.models[0] || "";
    replace(box, element("p", { class: "small" }, "…"));
    try {
      replace(box, rowView(await get(`${page.place}/rows/${split}/${row - 1}`, { model }), excerptWords(example.excerpt)));
      const mark = box.querySelector("mark");
      if (mark) mark.scrollIntoView({ block: "nearest" });
    } catch (error) {
      replace(box, problem(error));
    }
  };
  const exampleView = (stage, example) => {
    const box = element("div");
    const place = example.place && element("button", { type: "button", class: "link", onclick: () => (box.childElementCount ? replace(box) : openRow(box, stage, example)) }, `${example.place.split} row ${example.place.row}`);
    return element("li", null, place, " ", element("span", { class: "excerpt" }, example.excerpt), box);
  };
  return content.findings.map(({ stage, findings }) => [element("h3", { class: findings.length ? null : "quiet" }, stage, findings.length ? "" : ": no findings"), findings.map((finding) => element("details", { class: "finding", open: findings.length < 4 },
    element("summary", null, element("span", { class: `severity ${finding.severity}` }, finding.severity), " ", element("b", null, finding.name), finding.count ? ` · ${number(finding.count)} of ${number(finding.of)} rows` : "", finding.waived ? " · waived" : ""),
    element("p", null, finding.what, ". ", element("span", { class: "small" }, finding.remedy)), element("ul", null, (finding.examples || []).map((example) => exampleView(stage, example)))))]);
}

function comparisonView(content) {
  const kinds = ["unchanged", "changed", "new answer", "moved out", "moved in", "removed", "added"];
  const moved = Object.entries(content.moved).filter(([, count]) => count).map(([name, count]) => `${number(count)} ${name}`).join(", ");
  const ledgers = (entries, name) => entries.length > 0 && table([name, "Rows out A#", "B#", "Dropped A#", "B#"], entries.map((entry) => element("tr", null, element("th", { scope: "row" }, entry[name]),
    [entry.a, entry.b].map((side) => element("td", { class: "num" }, side ? number(side.rows_out) : "–")), [entry.a, entry.b].map((side) => element("td", { class: "num" }, side ? number(Object.values(side.dropped).reduce((sum, count) => sum + count, 0)) : "–")))), null);
  return [
    element("p", { class: "decision" }, content.identical ? "The same rows in the same order." : content["same rows"] ? "The same rows, in another order or format." : `A is ${content.a}, B is ${content.b}.`),
    content.trained_then_tested > 0 && element("p", { class: "warnings" }, `⚠ ${number(content.trained_then_tested)} prompts of A's train split are in B's test split: do not test a model that was trained on A with B.`),
    table(["Split", "Source", "A#", "B#", ...kinds.map((kind) => `${kind}#`)], content.groups.map((group) => element("tr", null, element("th", { scope: "row" }, group.split), element("td", null, group.source), cells([group.a, group.b, ...kinds.map((kind) => group[kind])]))), null),
    moved && element("p", null, `Moved: ${moved}.`),
    Object.entries(content.examples).map(([kind, examples]) => examples.length > 0 && [element("h3", null, kind), examples.map((example) => element("div", { class: "sample" }, element("div", { class: "small" }, `${example.split} · `, element("code", null, example.id), ` · ${example.source}`),
      element("div", { class: "text" }, example.text), Object.entries(example.fields || {}).map(([name, [before, after]]) => element("div", { class: "small" }, element("b", null, name), ": ", element("del", null, String(before)), " → ", element("ins", null, String(after))))))]),
    ledgers(content.sources, "source"), ledgers(content.steps, "step")];
}

async function comparePanel(page) {
  const { stages } = await get("data");
  const [run, stage] = page.parts;
  const others = stages.filter((each) => each.run !== run || each.stage !== stage);
  const result = element("div");
  const field = element("select", null, element("option", { value: "" }, others.length ? "choose a build" : "there is no other build"),
    others.map((each) => element("option", { value: JSON.stringify([each.run, each.stage]) }, `${each.run} · ${each.stage} (${each.key})`)));
  field.addEventListener("change", async () => {
    if (!field.value) return;
    const [otherRun, otherStage] = JSON.parse(field.value);
    replace(result, element("p", { class: "small" }, "…"));
    try {
      replace(result, comparisonView(await get("data/compare", { a_run: otherRun, a_stage: otherStage, b_run: run, b_stage: stage })));
    } catch (error) {
      replace(result, problem(error));
    }
  });
  return [element("form", { class: "controls" }, element("label", null, "Compare with (A); this build is B", field)), result];
}

// ---- one build ----

async function showBuild(main, parts, query) {
  const place = path("data", ...parts);
  const allBuilds = { keys: ["u"], does: "all builds", run: () => { location.hash = address("data"); } };
  setKeys(main, [allBuilds]);
  const page = { place, parts, query, content: await get(place) };
  const body = element("div", { class: "tab-body" });
  const bar = element("div", { class: "tabs", role: "tablist", "aria-label": "Parts" });
  let rows = null;
  const heads = { findings: () => ` ${page.content.findings.reduce((sum, each) => sum + each.findings.length, 0)}`, dropped: () => ` ${number(page.content.steps.reduce((sum, step) => sum + step.lost, 0))}` };
  async function choose(tab) {
    rows = null;
    replace(bar, TABS.map((name) => element("button", { type: "button", role: "tab", "aria-selected": String(name === tab), onclick: () => choose(name) }, name, heads[name] && element("span", { class: "small" }, heads[name]()))));
    try {
      if (tab === "steps") replace(body, stepsPanel(page));
      else if (tab === "findings") replace(body, findingsPanel(page));
      else if (tab === "compare") replace(body, await comparePanel(page));
      else if (tab === "dropped" && !page.content.has.dropped) replace(body, element("p", null, "This stage stores no dropped rows."));
      else {
        rows = new Rows(page, tab === "dropped" ? "dropped" : page.content.has.train ? "train" : "test");
        replace(body, rows.node);
        await rows.load(0);
      }
    } catch (error) {
      replace(body, problem(error));
    }
  }
  replace(main, element("div", { class: "view-head" }, element("h1", null, element("a", { href: address("data"), class: "crumb" }, "Data"), " / ", parts.join(" · ")), element("span", { class: "small" }, Object.entries(page.content.splits).map(([name, count]) => `${name} ${number(count)}`).join(" · "))),
    element("section", { class: "panel" }, bar, body));
  setKeys(main, [
    { keys: ["n", "ArrowRight"], does: "next rows", run: () => rows && rows.turn(1) },
    { keys: ["p", "ArrowLeft"], does: "previous rows", run: () => rows && rows.turn(-1) },
    { keys: ["r"], does: "rows", run: () => choose("rows") }, { keys: ["d"], does: "dropped rows", run: () => choose("dropped") },
    { keys: ["s"], does: "steps", run: () => choose("steps") }, { keys: ["f"], does: "findings", run: () => choose("findings") },
    { keys: ["c"], does: "compare", run: () => choose("compare") }, allBuilds,
  ]);
  await choose(TABS.includes(query.tab) ? query.tab : "rows");
}

export async function show(main, parameters) {
  useStyle();
  main.classList.add("data-view");
  const [run, stage] = parameters.path;
  return run && stage ? showBuild(main, [run, stage], parameters.query) : showStages(main);
}

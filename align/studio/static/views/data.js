// Data of the store's runs: rows of a build, dropped rows by reason, masks by token, findings, two builds compared.
import { get, path } from "../api.js";
import { address } from "../app.js";
import { comparePanel, findingsPanel, stepsPanel } from "../data/ledgers.js";
import { Rows } from "../data/rows.js";
import { element, problem, replace, useStyle } from "../dom.js";
import { setKeys } from "../keys.js";
import { amount, cells, table } from "../tables.js";

const TABS = ["rows", "dropped", "steps", "findings", "compare"];

// ---- the list ----

async function showStages(main) {
  const { stages } = await get("data");
  const row = (each) =>
    element(
      "tr",
      null,
      element(
        "th",
        { scope: "row" },
        element(
          "a",
          { class: "run-link", href: address("data", [each.run, each.stage]) },
          `${each.run} · ${each.stage}`,
        ),
      ),
      element("td", null, each.kind),
      element("td", null, element("code", null, each.key)),
      cells([each.splits.train || 0, each.splits.test || 0, each.dropped]),
    );
  replace(
    main,
    element(
      "div",
      { class: "view-head" },
      element("h1", null, "Data"),
      element("span", { class: "small" }, String(stages.length)),
    ),
    element(
      "section",
      { class: "panel" },
      stages.length
        ? table(["Build", "Stage", "Key", "Train#", "Test#", "Dropped#"], stages.map(row), "builds")
        : element("p", null, "No data stage is finished in this store."),
    ),
  );
  const links = () => [...main.querySelectorAll(".run-link")];
  const move = (by) => {
    const all = links();
    const index = all.indexOf(document.activeElement);
    const next = all[Math.min(all.length - 1, Math.max(0, index + by))];
    if (next) next.focus();
  };
  setKeys(main, [
    { keys: ["j", "ArrowDown"], does: "next build", run: () => move(1) },
    { keys: ["k", "ArrowUp"], does: "previous build", run: () => move(-1) },
  ]);
}

// ---- one build ----

async function showBuild(main, parts, query) {
  const place = path("data", ...parts);
  const allBuilds = {
    keys: ["u"],
    does: "all builds",
    run: () => {
      location.hash = address("data");
    },
  };
  setKeys(main, [allBuilds]);
  const page = { place, parts, query, content: await get(place) };
  const body = element("div", { class: "tab-body" });
  const bar = element("div", { class: "tabs", role: "tablist", "aria-label": "Parts" });
  let rows = null;
  const heads = {
    findings: () => ` ${page.content.findings.reduce((sum, each) => sum + each.findings.length, 0)}`,
    dropped: () => ` ${amount(page.content.steps.reduce((sum, step) => sum + step.lost, 0))}`,
  };
  async function choose(tab) {
    rows = null;
    replace(
      bar,
      TABS.map((name) =>
        element(
          "button",
          { type: "button", role: "tab", "aria-selected": String(name === tab), onclick: () => choose(name) },
          name,
          heads[name] && element("span", { class: "small" }, heads[name]()),
        ),
      ),
    );
    try {
      if (tab === "steps") replace(body, stepsPanel(page));
      else if (tab === "findings") replace(body, findingsPanel(page));
      else if (tab === "compare") replace(body, await comparePanel(page));
      else if (tab === "dropped" && !page.content.has.dropped)
        replace(body, element("p", null, "This stage stores no dropped rows."));
      else {
        rows = new Rows(page, tab === "dropped" ? "dropped" : page.content.has.train ? "train" : "test");
        replace(body, rows.node);
        await rows.load(0);
      }
    } catch (error) {
      replace(body, problem(error));
    }
  }
  replace(
    main,
    element(
      "div",
      { class: "view-head" },
      element("h1", null, element("a", { href: address("data"), class: "crumb" }, "Data"), " / ", parts.join(" · ")),
      element(
        "span",
        { class: "small" },
        Object.entries(page.content.splits)
          .map(([name, count]) => `${name} ${amount(count)}`)
          .join(" · "),
      ),
    ),
    element("section", { class: "panel" }, bar, body),
  );
  setKeys(main, [
    { keys: ["n", "ArrowRight"], does: "next rows", run: () => rows && rows.turn(1) },
    { keys: ["p", "ArrowLeft"], does: "previous rows", run: () => rows && rows.turn(-1) },
    { keys: ["r"], does: "rows", run: () => choose("rows") },
    { keys: ["d"], does: "dropped rows", run: () => choose("dropped") },
    { keys: ["s"], does: "steps", run: () => choose("steps") },
    { keys: ["f"], does: "findings", run: () => choose("findings") },
    { keys: ["c"], does: "compare", run: () => choose("compare") },
    allBuilds,
  ]);
  await choose(TABS.includes(query.tab) ? query.tab : "rows");
}

export async function show(main, parameters) {
  useStyle("data");
  main.classList.add("data-view");
  const [run, stage] = parameters.path;
  return run && stage ? showBuild(main, [run, stage], parameters.query) : showStages(main);
}

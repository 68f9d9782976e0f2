// The view of stored rollouts: #/rollouts, #/rollouts/RUN/STAGE, and below it /row?id= and /prompt?prompt_id=.
import { get } from "../api.js";
import { address } from "../app.js";
import { element, replace } from "../dom.js";
import { backKey, setKeys } from "../keys.js";
import { showPrompt } from "../rollouts/prompt.js";
import { showRow } from "../rollouts/row.js";
import { showTable } from "../rollouts/table.js";
import { table } from "../tables.js";

const PAGES = { row: [showRow, "Rollout"], prompt: [showPrompt, "One prompt"] };

export async function show(main, { path, query }) {
  const [run, stage, page] = path;
  if (page in PAGES) setKeys(main, [backKey("back", () => history.back())]);
  const { runs } = await get("rollouts");
  if (!stage) {
    replace(
      main,
      element("div", { class: "view-head" }, element("h1", null, "Rollouts")),
      stageList(run ? runs.filter((each) => each.run === run) : runs),
    );
    return null;
  }
  const [showPage, title] = PAGES[page] || [showTable, "Rollouts"];
  const body = element("div");
  replace(
    main,
    element(
      "div",
      { class: "view-head" },
      element("h1", null, title),
      page in PAGES
        ? element("a", { href: address("rollouts", [run, stage], { folder: query.folder }) }, `${run} / ${stage}`)
        : stageChoice(runs, run, stage, query),
    ),
    body,
  );
  return showPage(body, run, stage, query);
}

function stageList(runs) {
  if (!runs.length) {
    return element(
      "p",
      { class: "empty" },
      "No run of this store has stored rollouts. Stages such as ppo, grpo and sample store what they sample.",
    );
  }
  const stageLine = (run, stage) => {
    const notes = [stage.kind];
    if (stage.running) notes.push("not finished");
    if (stage.folders.includes("validations")) notes.push("validations");
    const link = element("a", { href: address("rollouts", [run, stage.stage], firstFolder(stage)) }, stage.stage);
    return element("div", null, link, " ", element("span", { class: "small" }, notes.join(", ")));
  };
  const rows = runs.map(({ run, stages }) =>
    element(
      "tr",
      null,
      element("th", { scope: "row" }, run),
      element(
        "td",
        null,
        stages.map((stage) => stageLine(run, stage)),
      ),
    ),
  );
  return element("section", { class: "panel" }, table(["run", "stages with rollouts"], rows));
}
const firstFolder = (stage) => (stage.folders.includes("rollouts") ? {} : { folder: stage.folders[0] });

// The stage and the folder of the table.
function stageChoice(runs, run, stage, query) {
  const choices = runs.flatMap((each) =>
    each.stages.map((one) => ({
      value: address("rollouts", [each.run, one.stage], firstFolder(one)),
      title: `${each.run} / ${one.stage}`,
      run: each.run,
      ...one,
    })),
  );
  const current = choices.find((each) => each.run === run && each.stage === stage);
  const go = (event) => {
    location.hash = event.target.value;
  };
  const folder = query.folder || "rollouts";
  return [
    current
      ? element(
          "select",
          { "aria-label": "run and stage", onchange: go },
          choices.map((each) => element("option", { value: each.value, selected: each === current }, each.title)),
        )
      : element("b", null, `${run} / ${stage}`),
    current && current.folders.length > 1
      ? element(
          "span",
          { class: "folders" },
          current.folders.map((name) =>
            element(
              "a",
              {
                href: address("rollouts", [run, stage], name === "rollouts" ? {} : { folder: name }),
                "aria-current": name === folder ? "page" : null,
              },
              name,
            ),
          ),
        )
      : null,
    current && current.running ? element("span", { class: "state s-runs" }, "not finished") : null,
  ];
}

// The view of evaluations: #/evaluations, #/evaluations/RUN/STAGE, and below it /NUMBER for an item.
import { get } from "../api.js";
import { address } from "../app.js";
import { element, replace } from "../dom.js";
import { backKey, setKeys } from "../keys.js";
import { showItem } from "../evaluations/item.js";
import { showItems } from "../evaluations/items.js";
import { table } from "../tables.js";

export async function show(main, { path, query }) {
  const [run, stage, number] = path;
  if (number !== undefined)
    setKeys(main, [
      backKey("back to the items", () => {
        location.hash = address("evaluations", [run, stage], query);
      }),
    ]);
  const { runs } = await get("evaluations");
  if (!stage) {
    replace(
      main,
      element("div", { class: "view-head" }, element("h1", null, "Evaluations")),
      stageList(run ? runs.filter((each) => each.run === run) : runs),
    );
    return null;
  }
  const body = element("div");
  const choices = runs.flatMap((each) =>
    each.stages.map((one) => ({ value: address("evaluations", [each.run, one]), title: `${each.run} / ${one}` })),
  );
  const here = address("evaluations", [run, stage]);
  const head =
    number === undefined
      ? element(
          "select",
          {
            "aria-label": "run and stage",
            onchange: (event) => {
              location.hash = event.target.value;
            },
          },
          choices.map((each) => element("option", { value: each.value, selected: each.value === here }, each.title)),
        )
      : element("a", { href: address("evaluations", [run, stage], query) }, `${run} / ${stage}`);
  replace(
    main,
    element(
      "div",
      { class: "view-head" },
      element("h1", null, number === undefined ? "Evaluation" : `Item ${Number(number) + 1}`),
      head,
    ),
    body,
  );
  return number === undefined ? showItems(body, run, stage, query) : showItem(body, run, stage, number, query);
}

function stageList(runs) {
  if (!runs.length) return element("p", { class: "empty" }, "No run of this store has a finished evaluation.");
  const link = (run, stage) => element("a", { href: address("evaluations", [run, stage]) }, stage);
  const rows = runs.map(({ run, stages }) =>
    element(
      "tr",
      null,
      element("th", { scope: "row" }, run),
      element(
        "td",
        null,
        stages.map((stage) => element("div", null, link(run, stage))),
      ),
    ),
  );
  return element("section", { class: "panel" }, table(["run", "evaluations"], rows));
}

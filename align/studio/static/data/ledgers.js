// The parts of a build next to its rows: steps with their reasons, findings of the linter, a comparison of two builds.
import { get } from "../api.js";
import { address } from "../app.js";
import { element, problem, replace } from "../dom.js";
import { amount, cells, table } from "../tables.js";
import { rowView } from "./rows.js";

export function stepsPanel(page) {
  const { content } = page;
  const dropped = (reason) => address("data", page.parts, { tab: "dropped", reason: reason.reason });
  const rows = content.steps.map((step) =>
    element(
      "tr",
      null,
      element("th", { scope: "row" }, step.step),
      cells([step.rows_in, step.added, step.changed, step.rows_out, step.lost]),
      element(
        "td",
        null,
        step.reasons.map((reason) =>
          element(
            "div",
            { class: "small" },
            element("a", { href: dropped(reason) }, `${amount(reason.rows)} × ${reason.reason}`),
          ),
        ),
      ),
    ),
  );
  const sources = content.sources.map((source) =>
    element(
      "tr",
      null,
      element("th", { scope: "row" }, source.source),
      element("td", { class: source.unknown ? "unknown" : null }, source.license),
      cells([source.rows_in, source.rows_out, source.lost]),
    ),
  );
  return [
    rows.length
      ? table(["Step", "Rows in#", "Added#", "Changed#", "Rows out#", "Dropped#", "Reasons"], rows, "steps")
      : element("p", { class: "small" }, "This stage has no steps."),
    sources.length > 0 && [
      element("h3", null, "Sources"),
      table(["Source", "License", "Rows in#", "Rows out#", "Dropped#"], sources, "sources"),
    ],
  ];
}

const excerptWords = (excerpt) => {
  const quoted = /['"]((?:[^'"\\]|\\.){3,})['"]/.exec(excerpt);
  return (quoted ? quoted[1] : excerpt.replace(/^[a-z ]+: /, "")).replace(/\\n/g, "\n").slice(0, 60);
};

export function findingsPanel(page) {
  const { content } = page;
  if (!content.findings.length)
    return element(
      "p",
      null,
      "No stage that learns from these rows has findings. ",
      element("code", null, "align data lint"),
      " looks at a build for a model.",
    );
  const openRow = async (box, stage, example) => {
    const { split, row } = example.place;
    const model = content.models.includes(stage) ? stage : content.models[0] || "";
    replace(box, element("p", { class: "small" }, "…"));
    try {
      replace(
        box,
        rowView(await get(`${page.place}/rows/${split}/${row - 1}`, { model }), excerptWords(example.excerpt)),
      );
      const mark = box.querySelector("mark");
      if (mark) mark.scrollIntoView({ block: "nearest" });
    } catch (error) {
      replace(box, problem(error));
    }
  };
  const exampleView = (stage, example) => {
    const box = element("div");
    const place =
      example.place &&
      element(
        "button",
        {
          type: "button",
          class: "link",
          onclick: () => (box.childElementCount ? replace(box) : openRow(box, stage, example)),
        },
        `${example.place.split} row ${example.place.row}`,
      );
    return element("li", null, place, " ", element("span", { class: "excerpt" }, example.excerpt), box);
  };
  return content.findings.map(({ stage, findings }) => [
    element("h3", { class: findings.length ? null : "quiet" }, stage, findings.length ? "" : ": no findings"),
    findings.map((finding) =>
      element(
        "details",
        { class: "finding", open: findings.length < 4 },
        element(
          "summary",
          null,
          element("span", { class: `severity ${finding.severity}` }, finding.severity),
          " ",
          element("b", null, finding.name),
          finding.count ? ` · ${amount(finding.count)} of ${amount(finding.of)} rows` : "",
          finding.waived ? " · waived" : "",
        ),
        element("p", null, finding.what, ". ", element("span", { class: "small" }, finding.remedy)),
        element(
          "ul",
          null,
          (finding.examples || []).map((example) => exampleView(stage, example)),
        ),
      ),
    ),
  ]);
}

function comparisonView(content) {
  const kinds = ["unchanged", "changed", "new answer", "moved out", "moved in", "removed", "added"];
  const moved = Object.entries(content.moved)
    .filter(([, count]) => count)
    .map(([name, count]) => `${amount(count)} ${name}`)
    .join(", ");
  const ledgers = (entries, name) =>
    entries.length > 0 &&
    table(
      [name, "Rows out A#", "B#", "Dropped A#", "B#"],
      entries.map((entry) =>
        element(
          "tr",
          null,
          element("th", { scope: "row" }, entry[name]),
          [entry.a, entry.b].map((side) => element("td", { class: "num" }, side ? amount(side.rows_out) : "–")),
          [entry.a, entry.b].map((side) =>
            element(
              "td",
              { class: "num" },
              side ? amount(Object.values(side.dropped).reduce((sum, count) => sum + count, 0)) : "–",
            ),
          ),
        ),
      ),
      null,
    );
  return [
    element(
      "p",
      { class: "decision" },
      content.identical
        ? "The same rows in the same order."
        : content["same rows"]
          ? "The same rows, in another order or format."
          : `A is ${content.a}, B is ${content.b}.`,
    ),
    content.trained_then_tested > 0 &&
      element(
        "p",
        { class: "warnings" },
        `⚠ ${amount(content.trained_then_tested)} prompts of A's train split are in B's test split: `,
        "do not test a model that was trained on A with B.",
      ),
    table(
      ["Split", "Source", "A#", "B#", ...kinds.map((kind) => `${kind}#`)],
      content.groups.map((group) =>
        element(
          "tr",
          null,
          element("th", { scope: "row" }, group.split),
          element("td", null, group.source),
          cells([group.a, group.b, ...kinds.map((kind) => group[kind])]),
        ),
      ),
      null,
    ),
    moved && element("p", null, `Moved: ${moved}.`),
    Object.entries(content.examples).map(
      ([kind, examples]) =>
        examples.length > 0 && [
          element("h3", null, kind),
          examples.map((example) =>
            element(
              "div",
              { class: "sample" },
              element(
                "div",
                { class: "small" },
                `${example.split} · `,
                element("code", null, example.id),
                ` · ${example.source}`,
              ),
              element("div", { class: "text" }, example.text),
              Object.entries(example.fields || {}).map(([name, [before, after]]) =>
                element(
                  "div",
                  { class: "small" },
                  element("b", null, name),
                  ": ",
                  element("del", null, String(before)),
                  " → ",
                  element("ins", null, String(after)),
                ),
              ),
            ),
          ),
        ],
    ),
    ledgers(content.sources, "source"),
    ledgers(content.steps, "step"),
  ];
}

export async function comparePanel(page) {
  const { stages } = await get("data");
  const [run, stage] = page.parts;
  const others = stages.filter((each) => each.run !== run || each.stage !== stage);
  const result = element("div");
  const field = element(
    "select",
    null,
    element("option", { value: "" }, others.length ? "choose a build" : "there is no other build"),
    others.map((each) =>
      element("option", { value: JSON.stringify([each.run, each.stage]) }, `${each.run} · ${each.stage} (${each.key})`),
    ),
  );
  field.addEventListener("change", async () => {
    if (!field.value) return;
    const [otherRun, otherStage] = JSON.parse(field.value);
    replace(result, element("p", { class: "small" }, "…"));
    try {
      replace(
        result,
        comparisonView(await get("data/compare", { a_run: otherRun, a_stage: otherStage, b_run: run, b_stage: stage })),
      );
    } catch (error) {
      replace(result, problem(error));
    }
  });
  return [
    element("form", { class: "controls" }, element("label", null, "Compare with (A); this build is B", field)),
    result,
  ];
}

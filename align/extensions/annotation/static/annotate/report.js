// The report of a set of annotations: comparisons, strengths, agreement, and its annotators.
import { path, post } from "../api.js";
import { drawing, element, problem, replace } from "../dom.js";
import { table } from "../tables.js";

const share = (value) =>
  !value || value.value === null
    ? "–"
    : `${value.value.toFixed(2)}${value.low === null ? "" : ` [${value.low.toFixed(2)}, ${value.high.toFixed(2)}]`}`;

function bar(comparison) {
  // Shares are drawn on a track from 0 to 1; the line is 1/2.
  const x = (value) => (200 * value).toFixed(1);
  const label = `${comparison.low.toFixed(2)} to ${comparison.high.toFixed(2)}`;
  const width = Math.max(1, 200 * (comparison.high - comparison.low));
  return drawing(
    "svg",
    { viewBox: "0 0 200 16", class: "share", role: "img", "aria-label": label },
    drawing("rect", { x: 0, y: 6, width: 200, height: 4, rx: 2, class: "share-track" }),
    drawing("rect", { x: x(comparison.low), y: 4, width, height: 8, rx: 3, class: "share-range" }),
    drawing("line", { x1: 100, x2: 100, y1: 0, y2: 16, class: "share-half" }),
    drawing("circle", { cx: x(comparison.share), cy: 8, r: 4, class: "share-point" }),
  );
}

const DECISIONS = { clear: "v-better", same: "", open: "" };
const ANNOTATOR_HEADINGS = [
  "Name",
  "Answers#",
  "Seconds a pair#",
  "Same on duplicates#",
  "Gold questions#",
  "Last#",
  "",
];

export function reportPanel(content) {
  const report = content.report;
  const verdicts = Object.entries(report.verdicts)
    .map(([name, count]) => `${name.replace("_", " ")} ${count}`)
    .join(" · ");
  const stop = !report.comparisons.length
    ? null
    : element(
        "p",
        { class: "decision" + (report.may_stop ? " v-better" : "") },
        report.may_stop ? "Every comparison is decided: you may stop." : "Not decided yet: continue.",
      );
  const strengths = report.strengths && [
    ...Object.entries(report.strengths.systems),
    ["left side", report.strengths.position],
  ];
  return element(
    "section",
    { class: "panel" },
    element("h2", null, "Report"),
    stop,
    element(
      "dl",
      { class: "facts" },
      element("dt", null, "Pairs answered"),
      element("dd", null, `${report.answered} of ${report.pairs}${verdicts ? ` (${verdicts})` : ""}`),
      element("dt", null, "Agreement (Krippendorff's α)"),
      element("dd", null, report.alpha ? share(report.alpha) : "needs two annotators with different verdicts"),
      element("dt", null, "Left side preferred"),
      element("dd", null, share(report.left)),
      strengths && [
        element("dt", null, "Bradley-Terry, log odds"),
        element("dd", null, strengths.map(([name, value]) => `${name} ${share(value)}`).join(" · ")),
      ],
      report.active > 0 && [
        element("dt", null, "Actively selected"),
        element("dd", null, `${report.active} answers, which the comparisons do not count`),
      ],
    ),
    report.comparisons.length > 0 && comparisonTable(report.comparisons),
  );
}

function comparisonTable(comparisons) {
  const row = (line) =>
    element(
      "tr",
      null,
      element("th", { scope: "row" }, line.name),
      element("td", { class: "num" }, `${line.share.toFixed(3)} [${line.low.toFixed(3)}, ${line.high.toFixed(3)}]`),
      element("td", { class: "share-cell" }, bar(line)),
      element("td", { class: "num" }, `${line.n}, ${line.ties} undecided`),
      element("td", null, element("span", { class: `chip ${DECISIONS[line.decision]}` }, line.decision)),
    );
  return table(["Comparison", "Share#", "", "Pairs#", "Result"], comparisons.map(row), "comparisons");
}

export function annotatorPanel(name, content, reload) {
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
  const row = ([annotator, line]) => {
    const last = ((content.report.ledger[annotator] || {}).last || "").slice(0, 16).replace("T", " ");
    const button = { type: "button", class: "danger action", onclick: () => remove(annotator) };
    return element(
      "tr",
      null,
      element("th", { scope: "row" }, annotator),
      element("td", { class: "num" }, String(line.answers)),
      element("td", { class: "num" }, line.seconds.toFixed(1)),
      element("td", { class: "num" }, share(line.consistency)),
      element("td", { class: "num" }, share(line.gold)),
      element("td", { class: "small num" }, last),
      element("td", null, element("button", button, "Delete answers")),
    );
  };
  return element(
    "section",
    { class: "panel" },
    element("h2", null, "Annotators"),
    note,
    rows.length === 0
      ? element("p", { class: "small" }, "Nobody has answered yet.")
      : table(ANNOTATOR_HEADINGS, rows.map(row), "annotators"),
  );
}

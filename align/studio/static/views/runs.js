// Every run of the store, live. A run's own page is views/run.js.
import { get, stream } from "../api.js";
import { address, showConnection } from "../app.js";
import { ago, element, moment, problem, replace, update } from "../dom.js";
import { setKeys } from "../keys.js";

// State → mark. Words accompany each mark, so color alone tells nothing.
export const MARKS = { done: "✓", runs: "▶", waits: "◷", failed: "✗", stopped: "■", damaged: "⚠", "not begun": "·" };
const NOTABLE = ["runs", "waits", "failed", "damaged", "stopped"];

export function stateChip(state, text) {
  return element(
    "span",
    { class: "state s-" + state.replace(" ", "-") },
    element("span", { "aria-hidden": "true" }, MARKS[state] || "?"),
    " ",
    text === undefined ? state : text,
  );
}

function stageDots(stages) {
  return element(
    "span",
    { class: "dots" },
    stages.map((stage) =>
      element(
        "span",
        {
          class: "dot s-" + stage.state.replace(" ", "-"),
          title: `${stage.stage}: ${stage.state}${stage.what ? ", " + stage.what : ""}`,
        },
        MARKS[stage.state] || "?",
      ),
    ),
  );
}

const overall = (run) => NOTABLE.find((state) => run.counts[state]) || (run.counts["not begun"] ? "not begun" : "done");

function runRow(run) {
  const notes = run.stages.filter((stage) => NOTABLE.includes(stage.state));
  const done = run.counts.done || 0;
  return element(
    "tr",
    { "data-run": run.name },
    element(
      "th",
      { scope: "row" },
      element("a", { href: address("runs", [run.name]), class: "run-link" }, run.name),
      run.title !== run.name && element("div", { class: "small" }, run.title),
    ),
    element(
      "td",
      null,
      stateChip(overall(run)),
      element("div", { class: "small num" }, `${done} of ${run.stages.length} stages`),
    ),
    element("td", null, stageDots(run.stages)),
    element(
      "td",
      { class: "notes" },
      notes.map((stage) =>
        element("div", { class: "small" }, element("b", null, stage.stage), ` ${stage.what || stage.state}`),
      ),
    ),
    element("td", { class: "num small" }, element("time", { title: moment(run.when) }, ago(run.when))),
    element("td", null, run.page && element("a", { href: run.page, target: "_blank", rel: "noopener" }, "report")),
  );
}

const HEADINGS = ["Run", "State", "Stages", "Now, or what went wrong", "Started", ""];

export async function show(main, parameters) {
  if (parameters.path.length) return (await import("./run.js")).show(main, parameters);
  const filter = element("input", { type: "search", placeholder: "Name, state or stage", "aria-label": "Filter runs" });
  const count = element("span", { class: "small" });
  const notes = element("div");
  const body = element("tbody");
  const table = element(
    "table",
    { class: "runs" },
    element(
      "thead",
      null,
      element(
        "tr",
        null,
        HEADINGS.map((text) => element("th", { scope: "col", class: text === "Started" ? "num" : null }, text)),
      ),
    ),
    body,
  );
  replace(
    main,
    element(
      "div",
      { class: "view-head" },
      element("h1", null, "Runs"),
      count,
      element("span", { class: "grow" }),
      filter,
    ),
    notes,
    element("section", { class: "panel" }, element("div", { class: "scroll" }, table)),
  );

  let latest = null;
  const matches = (run, word) =>
    !word ||
    [run.name, run.title, overall(run), ...run.stages.map((stage) => `${stage.stage} ${stage.what}`)]
      .join("\n")
      .toLowerCase()
      .includes(word);
  function draw() {
    if (!latest) return;
    const word = filter.value.trim().toLowerCase();
    const runs = latest.runs.filter((run) => matches(run, word));
    count.textContent = word ? `${runs.length} of ${latest.runs.length}` : `${latest.runs.length}`;
    update(notes, [latest.damaged, latest.slurm_error], () => [
      latest.slurm_error &&
        element(
          "p",
          { class: "warnings" },
          `⚠ Slurm does not answer, so the state of its jobs is not known: ${latest.slurm_error}`,
        ),
      latest.damaged.map((text) => element("p", { class: "warnings" }, "⚠ " + text)),
    ]);
    // Rows that stay the same keep their elements, and with them the focus.
    const before = new Map([...body.children].map((row) => [row.dataset.run, row]));
    const rows = runs.map((run) => {
      const state = JSON.stringify([run, ago(run.when)]);
      const old = before.get(run.name);
      if (old && old.studioState === state) return old;
      const row = runRow(run);
      row.studioState = state;
      return row;
    });
    const focused =
      document.activeElement && document.activeElement.closest ? document.activeElement.closest("tr[data-run]") : null;
    const name = focused && body.contains(focused) ? focused.dataset.run : null;
    if (rows.length) body.replaceChildren(...rows);
    else
      replace(
        body,
        element(
          "tr",
          null,
          element(
            "td",
            { colspan: String(HEADINGS.length) },
            word ? "No run matches." : "This store has no runs yet. Start one with align run PIPELINE.",
          ),
        ),
      );
    if (name) focusRow(rows.find((row) => row.dataset.run === name));
  }
  const links = () => [...body.querySelectorAll(".run-link")];
  function focusRow(row) {
    if (row) row.querySelector(".run-link").focus({ preventScroll: true });
  }
  function move(by) {
    const all = links();
    const index = all.indexOf(document.activeElement);
    const next = all[Math.min(all.length - 1, Math.max(0, index < 0 ? (by > 0 ? 0 : all.length - 1) : index + by))];
    if (next) next.focus();
  }

  filter.addEventListener("input", draw);
  setKeys(main, [
    { keys: ["j", "ArrowDown"], does: "next run", run: () => move(1) },
    { keys: ["k", "ArrowUp"], does: "previous run", run: () => move(-1) },
    { keys: ["/"], does: "filter", run: () => filter.focus() },
  ]);
  latest = await get("runs");
  draw();
  return stream(
    "runs-stream",
    {
      state: (runs) => {
        latest = runs;
        draw();
      },
      problem: (error) => replace(notes, problem(error.error)),
    },
    showConnection,
  );
}

// Parts of a run's page that change as a whole: graph, progress, alarms, health, table of stages, settings.
import { address } from "../app.js";
import { drawing, element } from "../dom.js";
import { table } from "../tables.js";
import { stateChip } from "../views/runs.js";

export function drawGraph(graph, chosen, choose) {
  const curve = (a) => `M${a.x1} ${a.y1}C${a.x1 + 20} ${a.y1} ${a.x2 - 24} ${a.y2} ${a.x2 - 2} ${a.y2}`;
  const tip = drawing(
    "defs",
    null,
    drawing(
      "marker",
      { id: "tip", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" },
      drawing("path", { d: "M0 0 8 4 0 8z", class: "tip" }),
    ),
  );
  const boxes = graph.boxes.map((box) => {
    const open = () => choose(box.name);
    const press = (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        open();
      }
    };
    return drawing(
      "g",
      {
        class: `box ${box.status}${box.name === chosen ? " chosen" : ""}`,
        tabindex: 0,
        role: "button",
        "aria-pressed": String(box.name === chosen),
        "aria-label": `${box.name}: ${box.lines.join(", ")}`,
        onclick: open,
        onkeydown: press,
      },
      drawing("title", null, box.name),
      drawing("rect", { x: box.x, y: box.y, width: graph.box_width, height: graph.box_height, rx: 9 }),
      drawing("text", { x: box.x + 13, y: box.y + 25, class: "name" }, box.short),
      drawing(
        "text",
        { x: box.x + graph.box_width - 13, y: box.y + 25, "text-anchor": "end", class: "mark" },
        box.mark,
      ),
      box.lines.map((line, index) =>
        drawing("text", { x: box.x + 13, y: box.y + 46 + 18 * index, class: "line" }, line),
      ),
    );
  });
  return drawing(
    "svg",
    {
      class: "diagram",
      width: graph.width,
      height: graph.height,
      viewBox: `0 0 ${graph.width} ${graph.height}`,
      role: "group",
      "aria-label": "Stages and the data between them",
    },
    tip,
    graph.arrows.map((arrow) =>
      drawing("path", {
        d: curve(arrow),
        class: "arrow",
        fill: "none",
        "stroke-width": 1.4,
        "marker-end": "url(#tip)",
      }),
    ),
    boxes,
  );
}

export function progressRows(stages) {
  return stages
    .filter((stage) => stage.progress)
    .map((stage) => {
      const { share, text, phase, silence, seconds_left: left } = stage.progress;
      const bar = element("progress", { max: 1, "aria-label": `Progress of ${stage.stage}` });
      if (share !== null) bar.value = share;
      return element(
        "div",
        { class: "progress" },
        element("b", null, stage.stage),
        bar,
        element("span", { class: "num" }, share === null ? "" : `${Math.floor(100 * share)} %`),
        element("span", { class: "small" }, [text, phase, silence].filter(Boolean).join(" · ") || stage.what),
        left !== null &&
          element(
            "span",
            { class: "small num" },
            `done about ${new Date(Date.now() + 1000 * left).toTimeString().slice(0, 5)}`,
          ),
      );
    });
}

// Alarms of stages that learn from rollouts name their update: "update 12: KL: ...".
const ALARM_UPDATE = /^update (\d+):/;

export function rowLink(run, stage, update) {
  return element("a", { href: address("rollouts", [run, stage], { update }) }, `rollouts of update ${update}`);
}

export function alarmList(run, stages) {
  // Most warnings begin with the stage's name already.
  const rows = stages.flatMap((stage) =>
    stage.warnings.map((text) => ({
      stage: stage.stage,
      text: text.startsWith(stage.stage + ": ") ? text.slice(stage.stage.length + 2) : text,
      hasRows: stage.has_rollouts,
    })),
  );
  if (!rows.length) return null;
  return element(
    "section",
    { class: "panel" },
    element("h2", null, `Alarms and warnings (${rows.length})`),
    element(
      "ul",
      { class: "warnings" },
      rows.map((row) => {
        const update = row.hasRows && row.text.match(ALARM_UPDATE);
        return element(
          "li",
          null,
          "⚠ ",
          element("b", null, row.stage),
          " ",
          row.text,
          update ? [" ", rowLink(run, row.stage, update[1])] : null,
        );
      }),
    ),
  );
}

export function healthTable(health) {
  if (!health) return null;
  const columns = health.columns.map((column) => [`${column.title}#`, column.healthy]);
  const row = ({ stage, alarms, cells }) =>
    element(
      "tr",
      null,
      element("th", { scope: "row" }, stage),
      element("td", { class: alarms.length ? "bad" : "good" }, alarms.length ? alarms.join("; ") : "none"),
      cells.map((cell) => element("td", { class: "num" + (cell.ok ? "" : " bad") }, cell.text, cell.ok ? "" : " ✗")),
    );
  return element(
    "section",
    { class: "panel" },
    element("h2", null, "Health of training"),
    table(["Stage", "Alarms", ...columns], health.rows.map(row), "health"),
  );
}

export function stageTable(stages, chosen, choose) {
  const row = (stage) => {
    const cost = stage.cost || { time: "", memory: "", tokens: "", speed: "" };
    return element(
      "tr",
      { class: stage.stage === chosen ? "chosen" : null },
      element(
        "th",
        { scope: "row" },
        element("button", { type: "button", class: "link", onclick: () => choose(stage.stage) }, stage.stage),
        element("span", { class: "small" }, stage.kind === stage.stage ? "" : ` ${stage.kind}`),
      ),
      element("td", null, stateChip(stage.state)),
      ["time", "memory", "tokens", "speed"].map((name) => element("td", { class: "num" }, cost[name])),
      element("td", { class: "small" }, stage.what, stage.warnings.length ? ` ⚠ ${stage.warnings.length}` : ""),
    );
  };
  const headings = ["Stage", "State", "Time#", "Peak memory#", "Tokens#", "Speed#", "Detail"];
  return element(
    "section",
    { class: "panel" },
    element("h2", null, "Stages"),
    table(headings, stages.map(row), "stages"),
  );
}

export function settingsBlock(settings) {
  return [
    element("pre", { class: "yaml" }, settings.config),
    settings.metrics.length
      ? [
          element("h4", null, "Numbers in its record"),
          element(
            "dl",
            { class: "facts" },
            settings.metrics.map(([name, value]) => [element("dt", null, name), element("dd", null, value)]),
          ),
        ]
      : null,
    settings.facts.length
      ? [
          element("h4", null, "Provenance"),
          element(
            "dl",
            { class: "facts" },
            settings.facts.map(([name, value]) => [element("dt", null, name), element("dd", null, value)]),
          ),
        ]
      : null,
  ];
}

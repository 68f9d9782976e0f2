// Draws a stage's curves as small panels, with the geometry that curves.js and curve_view.js of the report page need:
// they read values off the panels, and enlarge, zoom and smooth them.
import { drawing, element, visible } from "./dom.js";

const WIDTH = 264;
const HEIGHT = 158;
const BOX = [44, 24, 256, 132]; // left, top, right, bottom
const STYLES = 7;
const DASHES = ["", "5 3", "6 2 1.5 2", "1.5 2", "6 2 1.5 2 1.5 2", "1.5 3", "8 3"];
const MARGIN = 0.05;
const OPEN_PANELS = 8; // as on the run page

export function numberText(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const text = size && (size < 1e-4 || size >= 1e5) ? value.toExponential(1) : String(Number(value.toPrecision(4)));
  return text.replace(/-/g, "−");
}

// Steps of 1, 2 or 5 times a power of ten.
function ticks(low, high, most) {
  if (!(high > low)) return [low];
  const power = 10 ** Math.floor(Math.log10((high - low) / most));
  const step = [1, 2, 5, 10].find((factor) => (high - low) / (factor * power) <= most) * power;
  const places = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++)
    places.push(Number((index * step).toPrecision(12)));
  return places;
}

function limits(values, margin) {
  let low = Infinity,
    high = -Infinity;
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low === high) {
    const room = Math.abs(low) * 0.1 || 1;
    return [low - room, high + room];
  }
  const room = (high - low) * margin;
  return [low - room, high + room];
}

// Returns the numbers of a panel as the scripts of the report page expect them.
function reading(stage, panel, changes) {
  // The place of a change is before the first step of the stage.
  const steps = [...panel.lines.flatMap((line) => line.x), ...changes.map((change) => change.x)];
  const values = panel.lines.flatMap((line) => [...line.y, ...(line.low || []), ...(line.high || [])]);
  const axes = { box: BOX, x: limits(steps, 0.02), y: limits(values, MARGIN) };
  return { stage, title: panel.title, ...axes, lines: panel.lines, changes };
}

function draw(curve) {
  const [left, top, right, bottom] = BOX;
  const across = (x) => left + ((x - curve.x[0]) / (curve.x[1] - curve.x[0])) * (right - left);
  const up = (y) => bottom - ((y - curve.y[0]) / (curve.y[1] - curve.y[0])) * (bottom - top);
  const place = (x, y) => across(x).toFixed(1) + " " + up(y).toFixed(1);
  const parts = [drawing("text", { x: 4, y: 14, class: "panel-title" }, curve.title)];
  for (const value of ticks(curve.y[0], curve.y[1], 4)) {
    parts.push(drawing("line", { x1: left, x2: right, y1: up(value), y2: up(value), class: "grid" }));
    parts.push(drawing("text", { x: left - 5, y: up(value) + 3.5, "text-anchor": "end" }, numberText(value)));
  }
  for (const step of ticks(curve.x[0], curve.x[1], 5).filter(Number.isInteger)) {
    parts.push(drawing("text", { x: across(step), y: bottom + 14, "text-anchor": "middle" }, String(step)));
  }
  for (const { x, text } of curve.changes) {
    const title = drawing("title", null, `After step ${x}: ${text}`);
    parts.push(drawing("line", { x1: across(x), x2: across(x), y1: top, y2: bottom, class: "change" }, title));
  }
  curve.lines.forEach((line, index) => {
    const style = index % STYLES;
    if (line.low) {
      const upper = line.x.map((x, point) => place(x, line.high[point])),
        lower = line.x.map((x, point) => place(x, line.low[point])).reverse();
      parts.push(drawing("path", { d: "M" + [...upper, ...lower].join("L") + "Z", class: "spread f" + style }));
    }
    parts.push(
      drawing("path", {
        d: "M" + line.x.map((x, point) => place(x, line.y[point])).join("L"),
        class: "line s" + style,
        fill: "none",
        "stroke-width": 1.6,
        "stroke-dasharray": DASHES[style],
      }),
    );
  });
  const changes = curve.lines.map(
    (line) => `${line.name} from ${numberText(line.y[0])} to ${numberText(line.y[line.y.length - 1])}`,
  );
  return drawing(
    "svg",
    {
      class: "plot",
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      role: "img",
      "aria-label": `${curve.title} over steps: ${changes.join(", ")}`,
    },
    parts,
  );
}

function legend(curve) {
  if (curve.lines.length < 2) return null;
  return element(
    "div",
    { class: "panel-legend small" },
    curve.lines.map((line, index) =>
      element(
        "span",
        null,
        drawing(
          "svg",
          { viewBox: "0 0 22 8", width: 22, height: 8, "aria-hidden": "true" },
          drawing("path", {
            d: "M0 4L22 4",
            class: "line s" + (index % STYLES),
            "stroke-width": 2,
            "stroke-dasharray": DASHES[index % STYLES],
          }),
        ),
        " ",
        line.name,
      ),
    ),
  );
}

// Fills `node` with the panels of a stage, with a line where its settings changed. While the reader points at a panel or has one enlarged, nothing is redrawn.
export function showPanels(node, stage, panels, changes = []) {
  if (node.matches(":hover") || document.querySelector("dialog.curve-view[open]")) return false;
  const focused = node.contains(document.activeElement) ? document.activeElement.dataset.title : null;
  const data = panels.map((panel) => reading(stage, panel, changes));
  const figures = data.map((curve, index) =>
    element("figure", { class: "curve", "data-curve": index, "data-title": curve.title }, draw(curve), legend(curve)),
  );
  const wasOpen = node.querySelector("details[open]") !== null;
  const folded = figures.slice(OPEN_PANELS);
  node.replaceChildren(element("div", { class: "panels" }, figures.slice(0, OPEN_PANELS)));
  if (folded.length) {
    node.append(
      element(
        "details",
        { open: wasOpen },
        element("summary", null, `${folded.length} more curve${folded.length === 1 ? "" : "s"}`),
        element("div", { class: "panels" }, folded),
      ),
    );
  }
  curveReader.attach(figures, () => data);
  curveView.attach(figures, () => data);
  const again = figures.find((figure) => focused !== null && figure.dataset.title === visible(focused));
  if (again) again.focus({ preventScroll: true });
  return true;
}

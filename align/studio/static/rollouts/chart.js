// A curve of means by update. A click, or Enter on a point, shows the rows of its updates.
import { drawing, element, replace } from "../dom.js";
import { count, number } from "./format.js";

const WIDTH = 1000;
const HEIGHT = 86;
const LEFT = 46;
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 18;

// `value(point)` is a number or null; `choose(point)` is called with the point that was chosen.
export function curve(points, title, value, choose) {
  const known = points.filter((point) => typeof value(point) === "number");
  if (known.length < 2) return null;
  const low = Math.min(...known.map(value)),
    high = Math.max(...known.map(value));
  const first = points[0].first_update,
    last = points[points.length - 1].last_update;
  const x = (point) =>
    LEFT +
    (((point.first_update + point.last_update) / 2 - first) / Math.max(1, last - first)) * (WIDTH - LEFT - RIGHT);
  const y = (point) => TOP + ((high - value(point)) / (high - low || 1)) * (HEIGHT - TOP - BOTTOM);
  const line = known
    .map((point, index) => `${index ? "L" : "M"}${x(point).toFixed(1)} ${y(point).toFixed(1)}`)
    .join("");
  const mark = drawing(
    "g",
    { class: "point", visibility: "hidden" },
    drawing("line", { y1: TOP, y2: HEIGHT - BOTTOM }),
    drawing("circle", { r: 3.5 }),
  );
  const picture = drawing(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", class: "mean-line", "aria-hidden": "true" },
    drawing("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM }),
    drawing("path", { class: "line s0", d: line, "vector-effect": "non-scaling-stroke" }),
    mark,
  );
  const reading = element("span", { class: "small reading", role: "status" });
  const box = element(
    "div",
    {
      class: "mean-curve",
      tabindex: 0,
      role: "slider",
      "aria-label": `${title} by update`,
      "aria-valuemin": first,
      "aria-valuemax": last,
      "aria-valuenow": known[known.length - 1].last_update,
    },
    picture,
    element("span", { class: "scale high" }, number(high)),
    element("span", { class: "scale low" }, number(low)),
  );
  let at = known.length - 1;

  const name = (point) =>
    point.first_update === point.last_update
      ? `update ${point.first_update}`
      : `updates ${point.first_update} to ${point.last_update}`;
  function point(index) {
    at = Math.max(0, Math.min(known.length - 1, index));
    const here = known[at];
    mark.setAttribute("visibility", "visible");
    mark.firstChild.setAttribute("x1", x(here));
    mark.firstChild.setAttribute("x2", x(here));
    mark.lastChild.setAttribute("cx", x(here));
    mark.lastChild.setAttribute("cy", y(here));
    box.setAttribute("aria-valuenow", here.last_update);
    box.setAttribute("aria-valuetext", `${name(here)}: ${number(value(here))}`);
    replace(
      reading,
      `${name(here)}: ${title} ${number(value(here))}, ${count(here.rows, "rollout")}. Click or Enter shows them.`,
    );
  }
  function nearest(event) {
    const edges = picture.getBoundingClientRect();
    const place = ((event.clientX - edges.left) / edges.width) * WIDTH;
    let best = 0;
    known.forEach((each, index) => {
      if (Math.abs(x(each) - place) < Math.abs(x(known[best]) - place)) best = index;
    });
    return best;
  }
  box.addEventListener("pointermove", (event) => point(nearest(event)));
  box.addEventListener("click", (event) => {
    point(nearest(event));
    choose(known[at]);
  });
  box.addEventListener("focus", () => point(at));
  box.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: 10, PageDown: -10, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined && event.key !== "Enter") return;
    event.preventDefault();
    event.stopPropagation();
    if (event.key === "Enter") choose(known[at]);
    else point(Math.max(-1, Math.min(known.length, at + step)));
  });
  replace(reading, `Mean ${title} by update ${first} to ${last}. Point at it, or focus it and press ← →.`);
  return element("div", { class: "means" }, box, reading);
}

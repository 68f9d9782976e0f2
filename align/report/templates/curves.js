// Reads values off the training curves: draws a line over the panel under the pointer and over the other panels of the
// same stage, and shows the values below each. `curveReader.attach(figures, read)` does it for the given figures, whose
// numbers `read` returns.
"use strict";
const curveReader = { attach: function (figures, read) {
  const NS = "http://www.w3.org/2000/svg";
  let data = null;  // parsed on first use: a long run has a megabyte of it
  const readings = new Map();

  const number = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    const text = size && (size < 1e-5 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
    return text.replace(/-/g, "−");
  };
  // Steps are counted: they keep all their digits. The mean of several has one behind the point.
  const stepText = (step) => String(Number(step.toFixed(1)));

  function nearest(xs, step) {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < step) low = middle; else high = middle;
    }
    return Math.abs(xs[low] - step) <= Math.abs(xs[high] - step) ? low : high;
  }

  function setUp(figure) {
    figure.tabIndex = 0;
    figure.setAttribute("role", "group");
    figure.setAttribute("aria-label", figure.querySelector("svg").getAttribute("aria-label"));
    const caption = document.createElement("figcaption");
    caption.className = "reading";
    figure.appendChild(caption);
    const panel = { figure, caption, svg: figure.querySelector("svg"), number: Number(figure.dataset.curve), overlay: null };
    readings.set(figure, panel);
    return panel;
  }

  function clear(panel) {
    if (panel.overlay) panel.overlay.remove();
    panel.overlay = null;
    panel.caption.textContent = "";
  }

  function draw(panel, step) {
    const curve = data[panel.number];
    clear(panel);
    const [left, top, right, bottom] = curve.box;
    const across = (x) => left + ((x - curve.x[0]) / (curve.x[1] - curve.x[0])) * (right - left);
    const up = (y) => bottom - ((y - curve.y[0]) / (curve.y[1] - curve.y[0])) * (bottom - top);
    const overlay = document.createElementNS(NS, "g");
    overlay.setAttribute("class", "crosshair");
    const parts = [];
    curve.lines.forEach((line, index) => {
      const point = nearest(line.x, step), x = line.x[point], y = line.y[point];
      if (!index) {
        const mark = document.createElementNS(NS, "line");
        for (const [name, value] of [["x1", across(x)], ["x2", across(x)], ["y1", top], ["y2", bottom]]) mark.setAttribute(name, value);
        overlay.appendChild(mark);
        parts.push("step " + stepText(x));
      }
      const dot = document.createElementNS(NS, "circle");
      for (const [name, value] of [["cx", across(x)], ["cy", up(y)], ["r", 2.4]]) dot.setAttribute(name, value);
      overlay.appendChild(dot);
      const range = line.low ? " (" + number(line.low[point]) + " to " + number(line.high[point]) + ")" : "";
      parts.push((curve.lines.length > 1 ? line.name + " " : "") + number(y) + range + (index && x !== curve.lines[0].x[nearest(curve.lines[0].x, step)] ? " at " + stepText(x) : ""));
    });
    panel.svg.appendChild(overlay);
    panel.overlay = overlay;
    panel.caption.textContent = parts.join(" · ");
    panel.step = step;
  }

  const panelsOfStage = (panel) => figures.map((figure) => readings.get(figure)).filter((each) => data[each.number].stage === data[panel.number].stage);
  function show(panel, step) {
    for (const each of panelsOfStage(panel)) draw(each, step);
    const xs = data[panel.number].lines[0].x;
    panel.figure.dispatchEvent(new CustomEvent("curve-step", { bubbles: true, detail: xs[nearest(xs, step)] }));
  }
  function hide(panel) {
    if (data) for (const each of panelsOfStage(panel)) clear(each);
  }
  function load() {
    data = data || read();
  }

  for (const figure of figures) {
    const panel = setUp(figure);
    panel.svg.addEventListener("pointermove", (event) => {
      load();
      const curve = data[panel.number], frame = panel.svg.getBoundingClientRect();
      const x = ((event.clientX - frame.left) / frame.width) * panel.svg.viewBox.baseVal.width;
      const share = (x - curve.box[0]) / (curve.box[2] - curve.box[0]);
      show(panel, curve.x[0] + Math.min(1, Math.max(0, share)) * (curve.x[1] - curve.x[0]));
    });
    panel.svg.addEventListener("pointerleave", () => hide(panel));
    figure.addEventListener("blur", () => hide(panel));
    figure.addEventListener("keydown", (event) => {
      const turn = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!turn) return;
      event.preventDefault();
      load();
      const xs = data[panel.number].lines[0].x;
      const end = turn > 0 ? 0 : xs.length - 1;
      const point = panel.overlay ? nearest(xs, panel.step) + turn : end;
      show(panel, xs[Math.min(xs.length - 1, Math.max(0, point))]);
    });
  }
} };
(function () {
  const source = document.getElementById("curves-data");
  if (!source) return;
  curveReader.attach([...document.querySelectorAll("figure.curve")], () => JSON.parse(source.textContent));
  for (const hint of document.querySelectorAll(".reading-hint")) hint.hidden = false;
})();

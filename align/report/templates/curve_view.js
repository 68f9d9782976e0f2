// Enlarges a training curve: drag to zoom, a slider to smooth, a switch for a log scale. Everything is drawn from the
// numbers on the page; names of metrics and runs only ever become text. `curveView.attach(figures, read)` does it for the
// given figures, whose numbers `read` returns.
"use strict";
const curveView = { attach: function (figures, read) {
  if (typeof HTMLDialogElement === "undefined") return;
  const NS = "http://www.w3.org/2000/svg";
  const BOX = { left: 70, top: 14 };
  let WIDTH = 0, HEIGHT = 0;  // by the window, so that labels have their size on a phone, too
  const STYLES = 7, DASHES = ["", "7 4", "9 3 2 3", "2 3", "9 3 2 3 2 3", "2 5", "12 5"];
  const MIN_SMOOTHED = 8;  // points: a line of a few held-out values is no noise
  const MIN_DRAG = 6;  // pixels: less is a click
  let data = null;
  let view = null;  // the open curve: its data, x limits, scale
  let smoothing = 0;  // stays from curve to curve

  const text = (value) => {
    const size = Math.abs(value);
    const short = size && (size < 1e-5 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
    return short.replace(/-/g, "−");
  };
  // Steps are counted: they keep all their digits. A place between two of them has one behind the point.
  const stepText = (step) => String(Number(step.toFixed(1)));
  const make = (name, attributes, parent) => {
    const element = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    parent.appendChild(element);
    return element;
  };
  const html = (name, className, parent, content) => {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (content) element.textContent = content;
    parent.appendChild(element);
    return element;
  };

  // Exponential mean over steps, divided by the sum of its weights: the first points are not drawn to zero.
  function smooth(values, weight) {
    let sum = 0, total = 0;
    return values.map((value) => {
      sum = weight * sum + (1 - weight) * value;
      total = weight * total + (1 - weight);
      return sum / total;
    });
  }

  // Steps of 1, 2 or 5 times a power of ten, as on the small panels.
  function ticks(low, high, most) {
    if (!(high > low)) return [low];
    const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999) * power;
    const places = [];
    for (let index = Math.ceil(low / step); index * step <= high + step * 1e-9; index++) places.push(Number((index * step).toPrecision(12)));
    return places;
  }
  // Labels of one axis have the decimals of the distance between them.
  function withDecimals(places) {
    const decimals = Math.max(0, -Math.floor(Math.log10(Math.abs(places[1] - places[0])) + 1e-9));
    return places.map((place) => place.toFixed(decimals).replace("-", "−"));
  }
  function valueLabels(places) {
    const most = Math.max(...places.map(Math.abs));
    return places.length < 2 || most < 0.01 || most >= 1e5 ? places.map(text) : withDecimals(places);
  }
  const stepLabels = (places) => (places.length < 2 ? places.map(stepText) : withDecimals(places));
  function logTicks(low, high) {
    const places = [];
    for (let power = Math.floor(low); power <= Math.ceil(high); power++) {
      for (const factor of high - low > 2 ? [1] : [1, 2, 5]) {
        const place = Math.log10(factor) + power;
        if (place >= low && place <= high) places.push(place);
      }
    }
    return places.length > 1 ? places : ticks(low, high, 5);
  }

  // One dialog on a page: figures that are drawn again bring a new one.
  for (const earlier of document.querySelectorAll("dialog.curve-view")) earlier.remove();
  const dialog = html("dialog", "curve-view", document.body);
  const bar = html("div", "curve-bar", dialog);
  const heading = html("h3", "", bar);
  const controls = html("div", "curve-controls", bar);
  const smoothLabel = html("label", "small", controls, "Smoothing ");
  const slider = html("input", "", smoothLabel);
  Object.assign(slider, { type: "range", min: "0", max: "0.99", step: "0.01", value: "0" });
  const amount = html("span", "num", smoothLabel, "0");
  const logLabel = html("label", "small", controls);
  const logBox = html("input", "", logLabel);
  logBox.type = "checkbox";
  logLabel.append(" log scale");
  const reset = html("button", "", controls, "Whole run");
  const close = html("button", "", controls, "Close");
  reset.type = close.type = "button";
  const legend = html("div", "curve-legend", dialog);
  const svg = make("svg", { class: "plot", role: "img" }, dialog);
  const reading = html("p", "small reading", dialog);
  html("p", "small", dialog, "Drag across to zoom in; + and − zoom, ← → move, 0 shows the whole run, Esc closes.");

  const allSteps = (lines) => {
    const steps = lines.flatMap((line) => [line.x[0], line.x[line.x.length - 1]]);
    return [Math.min(...steps), Math.max(...steps)];
  };
  const scale = (value) => (view.log ? Math.log10(value) : value);
  const across = (step) => BOX.left + ((step - view.x[0]) / (view.x[1] - view.x[0])) * (BOX.right - BOX.left);
  const up = (value) => BOX.bottom - ((scale(value) - view.y[0]) / (view.y[1] - view.y[0])) * (BOX.bottom - BOX.top);

  // The value of a line between its points; NaN beyond its ends.
  function valueAt(line, values, step) {
    const after = line.x.findIndex((x) => x >= step);
    if (after < 0 || (after === 0 && line.x[0] > step)) return NaN;
    if (line.x[after] === step) return values[after];
    const share = (step - line.x[after - 1]) / (line.x[after] - line.x[after - 1]);
    return values[after - 1] + share * (values[after] - values[after - 1]);
  }

  // Values in view decide the range upwards, so that a zoom across shows the small changes, too.
  function rangeOf(drawn) {
    const values = [];
    for (const line of drawn) {
      line.x.forEach((step, index) => {
        if (step >= view.x[0] && step <= view.x[1]) values.push(scale(line.y[index]), scale(line.smooth[index]));
      });
      // A line may cross the view without a point in it.
      for (const edge of view.x) values.push(scale(valueAt(line, line.y, edge)), scale(valueAt(line, line.smooth, edge)));
    }
    const finite = values.filter(Number.isFinite);
    if (!finite.length) return [0, 1];
    let low = finite[0], high = finite[0];
    for (const value of finite) { low = Math.min(low, value); high = Math.max(high, value); }
    const room = (high - low || Math.abs(high) * 0.1 || 1) * 0.06;
    return [low - room, high + room];
  }

  const pathOf = (line, values) => line.x.map((step, index) => (index ? "L" : "M") + across(step).toFixed(1) + " " + up(values[index]).toFixed(1)).join("");

  function drawAxes() {
    const steps = ticks(view.x[0], view.x[1], WIDTH / 110), stepTexts = stepLabels(steps);
    steps.forEach((step, index) => {
      make("line", { x1: across(step), x2: across(step), y1: BOX.top, y2: BOX.bottom, class: "grid" }, svg);
      make("text", { x: across(step), y: BOX.bottom + 18, "text-anchor": "middle" }, svg).textContent = stepTexts[index];
    });
    const values = view.log ? logTicks(view.y[0], view.y[1]).map((place) => 10 ** place) : ticks(view.y[0], view.y[1], 6);
    const valueTexts = view.log ? values.map(text) : valueLabels(values);
    values.forEach((value, index) => {
      make("line", { x1: BOX.left, x2: BOX.right, y1: up(value), y2: up(value), class: "grid" }, svg);
      make("text", { x: BOX.left - 8, y: up(value) + 4, "text-anchor": "end" }, svg).textContent = valueTexts[index];
    });
    make("text", { x: (BOX.left + BOX.right) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, svg).textContent = "step";
  }

  function draw() {
    svg.replaceChildren();
    legend.replaceChildren();
    const drawn = view.curve.lines.map((line) => ({ ...line, smooth: smoothing && line.x.length >= MIN_SMOOTHED ? smooth(line.y, smoothing) : line.y }));
    view.drawn = drawn;
    view.y = rangeOf(drawn);
    drawAxes();
    const clip = make("clipPath", { id: "curve-clip" }, make("defs", {}, svg));
    make("rect", { x: BOX.left, y: BOX.top, width: BOX.right - BOX.left, height: BOX.bottom - BOX.top }, clip);
    const inner = make("g", { "clip-path": "url(#curve-clip)" }, svg);
    for (const change of view.curve.changes || []) {
      const mark = make("line", { x1: across(change.x), x2: across(change.x), y1: BOX.top, y2: BOX.bottom, class: "change" }, inner);
      make("title", {}, mark).textContent = `After step ${stepText(change.x)}: ${change.text}`;
    }
    drawn.forEach((line, index) => {
      const style = (line.style ?? index) % STYLES;
      if (drawn.length > 1) {
        const key = html("span", "small", legend);
        const sample = make("svg", { viewBox: "0 0 28 8", width: 28, height: 8 }, key);
        make("path", { d: "M0 4L28 4", class: "line s" + style, "stroke-dasharray": DASHES[style], "stroke-width": 2 }, sample);
        key.append(" " + line.name);
      }
      const shape = { fill: "none", class: "line s" + style, "stroke-dasharray": DASHES[style] };
      if (smoothing) make("path", { ...shape, d: pathOf(line, line.y), opacity: 0.25, "stroke-width": 1.2 }, inner);
      make("path", { ...shape, d: pathOf(line, line.smooth), "stroke-width": 2 }, inner);
    });
    view.cursor = make("g", { class: "crosshair" }, svg);
    heading.textContent = view.curve.stage + ": " + view.curve.title;
    svg.setAttribute("aria-label", `${heading.textContent}, steps ${stepText(view.x[0])} to ${stepText(view.x[1])}`);
    amount.textContent = smoothing.toFixed(2);
    reading.textContent = drawn.map((line) => `${line.name} ${text(line.smooth[line.smooth.length - 1])}`).join(" · ") + " at the end";
  }

  function zoom(low, high) {
    const [first, last] = allSteps(view.curve.lines);
    const width = Math.min(last - first, Math.max(high - low, (last - first) / 1000)) || 1;
    const start = Math.min(Math.max(low, first), Math.max(first, last - width));
    view.x = [start, start + width];
    draw();
  }

  function fit() {
    [WIDTH, HEIGHT] = innerWidth < 640 ? [400, 380] : [960, 460];
    Object.assign(BOX, { right: WIDTH - 16, bottom: HEIGHT - 40 });
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  }

  function open(number) {
    data = data || read();
    const curve = data[number];
    view = { curve, x: allSteps(curve.lines), y: [0, 1], log: false };
    const canLog = curve.lines.every((line) => line.y.every((value) => value > 0));
    logBox.checked = false;
    logBox.disabled = !canLog;
    slider.value = String(smoothing);
    fit();
    draw();
    dialog.showModal();
  }

  const stepAt = (event) => {
    const frame = svg.getBoundingClientRect();
    const x = ((event.clientX - frame.left) / frame.width) * WIDTH;
    return view.x[0] + Math.min(1, Math.max(0, (x - BOX.left) / (BOX.right - BOX.left))) * (view.x[1] - view.x[0]);
  };
  function point(step, from) {
    view.cursor.replaceChildren();
    if (from !== null) {
      const [low, high] = [Math.min(from, step), Math.max(from, step)];
      make("rect", { x: across(low), y: BOX.top, width: across(high) - across(low), height: BOX.bottom - BOX.top, class: "brush" }, view.cursor);
    }
    make("line", { x1: across(step), x2: across(step), y1: BOX.top, y2: BOX.bottom }, view.cursor);
    const values = view.drawn.map((line) => {
      let best = 0;
      line.x.forEach((x, index) => { if (Math.abs(x - step) < Math.abs(line.x[best] - step)) best = index; });
      const mean = smoothing ? ` (smoothed ${text(line.smooth[best])})` : "";
      return `${line.name} ${text(line.y[best])}${mean}`;
    });
    reading.textContent = `step ${stepText(step)} · ${values.join(" · ")}`;
  }

  let dragFrom = null, dragX = 0;
  svg.addEventListener("pointerdown", (event) => {
    dragFrom = stepAt(event);
    dragX = event.clientX;
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointermove", (event) => point(stepAt(event), dragFrom));
  svg.addEventListener("pointerup", (event) => {
    const from = dragFrom, step = stepAt(event);
    dragFrom = null;
    if (from !== null && Math.abs(event.clientX - dragX) >= MIN_DRAG) zoom(Math.min(from, step), Math.max(from, step));
  });
  svg.addEventListener("dblclick", () => zoom(...allSteps(view.curve.lines)));
  slider.addEventListener("input", () => { smoothing = Number(slider.value); draw(); });
  logBox.addEventListener("change", () => { view.log = logBox.checked; draw(); });
  reset.addEventListener("click", () => zoom(...allSteps(view.curve.lines)));
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("keydown", (event) => {
    if (event.target === slider) return;
    const [low, high] = view.x, width = high - low, middle = (low + high) / 2;
    const moves = {
      "+": [middle - width / 4, middle + width / 4], "-": [middle - width, middle + width],
      ArrowLeft: [low - width / 4, high - width / 4], ArrowRight: [low + width / 4, high + width / 4], 0: allSteps(view.curve.lines),
    };
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    zoom(...move);
  });

  for (const figure of figures) {
    const number = Number(figure.dataset.curve);
    const button = html("button", "enlarge", figure, "⤢");
    button.type = "button";
    button.title = "Enlarge, zoom and smooth";
    button.setAttribute("aria-label", "Enlarge " + figure.querySelector("svg").getAttribute("aria-label"));
    button.addEventListener("click", () => open(number));
    figure.addEventListener("dblclick", () => open(number));
    figure.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.target === figure) open(number);
    });
  }
} };
(function () {
  const source = document.getElementById("curves-data");
  if (source) curveView.attach([...document.querySelectorAll("figure.curve")], () => JSON.parse(source.textContent));
})();

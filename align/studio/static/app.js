// The shell of the studio: it reads the address behind "#", and shows the view of its first part.
import { get } from "./api.js";
import { element, problem, replace } from "./dom.js";
import { setCommonKeys, setKeys, showHelp } from "./keys.js";

const main = document.getElementById("main");
const THEMES = { auto: "◐", dark: "●", light: "○" };
let views = [];
let cleanUp = null;
let shown = 0; // counts views, so that one that loads late does not replace a later one

// "#/runs/smoke?stage=ppo" → { view: "runs", path: ["smoke"], query: { stage: "ppo" } }
export function readAddress(hash = location.hash) {
  const [place, words] = hash.replace(/^#\/?/, "").split("?");
  const parts = place.split("/").filter(Boolean).map(decode);
  return { view: parts[0] || "", path: parts.slice(1), query: Object.fromEntries(new URLSearchParams(words || "")) };
}
function decode(part) {
  try {
    return decodeURIComponent(part);
  } catch (error) {
    return part;
  }
}
export function address(view, path = [], query = {}) {
  const pairs = Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const words = new URLSearchParams(pairs).toString();
  return "#/" + [view, ...path].map(encodeURIComponent).join("/") + (words ? "?" + words : "");
}

export function showConnection(isOpen) {
  const mark = document.getElementById("connection");
  mark.textContent = isOpen ? "live" : "no connection";
  mark.classList.toggle("lost", !isOpen);
}

function leave() {
  setKeys(main, []);
  const end = cleanUp;
  cleanUp = null;
  if (typeof end === "function") end();
  document.getElementById("connection").textContent = "";
}

async function showView() {
  const parameters = readAddress();
  const view = views.find((each) => each.name === parameters.view) || (parameters.view ? null : views[0]);
  const turn = ++shown;
  leave();
  for (const link of document.querySelectorAll("#views a")) {
    if (view && link.dataset.view === view.name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = view ? `${view.title} · align studio` : "align studio";
  if (!view) {
    replace(main, problem(`The studio has no view '${parameters.view}'.`));
    return;
  }
  const page = element("div", { class: "view" });
  try {
    const module = await import(`./views/${view.name}.js`);
    if (turn !== shown) return;
    main.replaceChildren(page);
    setKeys(main, []); // the view before may have set its keys while the module was loaded
    const end = await module.show(page, parameters);
    if (turn === shown) cleanUp = end;
    else if (typeof end === "function") end();
  } catch (error) {
    if (turn === shown) replace(main, problem(error));
  }
}

function nameTheme() {
  const button = document.getElementById("theme");
  const name = studioTheme.read();
  button.textContent = THEMES[name];
  button.setAttribute("aria-label", `Colors: ${name}`);
}

async function start() {
  const theme = document.getElementById("theme");
  const nextTheme = () => {
    studioTheme.next();
    nameTheme();
  };
  theme.addEventListener("click", nextTheme);
  nameTheme();
  document.getElementById("help").addEventListener("click", showHelp);
  let facts;
  try {
    facts = await get("studio");
  } catch (error) {
    replace(main, problem(error));
    return;
  }
  views = facts.views;
  replace(
    document.getElementById("views"),
    views.map((view) => element("a", { href: address(view.name), "data-view": view.name }, view.title)),
  );
  replace(
    document.getElementById("store"),
    "Store ",
    element("code", null, facts.store),
    facts.is_writable ? "" : " · read only",
    ` · align ${facts.version}`,
  );
  document.body.classList.toggle("read-only", !facts.is_writable);
  setCommonKeys([
    { keys: ["?"], does: "show or hide the keys", run: showHelp },
    { keys: ["t"], does: "colors: the system's, dark, light", run: nextTheme },
    ...views.slice(0, 9).map((view, index) => ({
      keys: [String(index + 1)],
      does: view.title,
      run: () => {
        location.hash = address(view.name);
      },
    })),
  ]);
  addEventListener("hashchange", showView);
  await showView();
}

start();

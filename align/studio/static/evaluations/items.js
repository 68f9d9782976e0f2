// The items of an evaluation: filters for words, tasks, wins and losses, and the scores of all systems.
import { get, path as encode } from "../api.js";
import { address } from "../app.js";
import { element, problem, replace } from "../dom.js";
import { setKeys } from "../keys.js";
import { count, grouped, marked, number, wordPattern } from "../rollouts/format.js";

const PAGE = 50;
const OUTCOMES = {
  win: "▲ won",
  loss: "▼ lost",
  tie: "= tied",
  disagreement: "⇄ the judge contradicts itself",
  unreadable: "? unreadable",
  none: "– not compared",
};
const FIELDS = ["task", "source", "metric", "first", "second", "outcome", "words", "sort", "descending", "offset"];
// Numbers of the items in the table, for the way from item to item.
export const listed = { key: "", numbers: [] };

export function completeQuery(facts, query) {
  const others = facts.systems.filter((name) => name !== facts.reference);
  const state = Object.fromEntries(FIELDS.filter((name) => query[name]).map((name) => [name, query[name]]));
  return { first: others[others.length - 1] || facts.systems[0] || "", second: facts.reference, ...state };
}

export async function showItems(main, run, stage, query) {
  const base = encode("evaluations", run, stage);
  const facts = await get(base);
  let state = completeQuery(facts, query);
  let page = null;
  let at = -1;
  let stop = null;
  let timer = null;
  const status = element("p", { class: "small status", role: "status" });
  const tabs = element("div", { class: "updates", role: "group", "aria-label": "outcome" });
  const place = element("div");
  const filters = element("div", { class: "controls" });
  const search = element("input", {
    type: "search",
    class: "search",
    placeholder: "Words in the prompt or an answer  ( / )",
    "aria-label": "words",
    maxlength: 200,
    value: state.words || "",
    autocomplete: "off",
  });
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => change({ words: search.value.trim() }), 350);
  });

  function change(patch) {
    const next = { ...state, ...patch };
    if (!("offset" in patch)) delete next.offset;
    if ("task" in patch) delete next.metric;
    state = Object.fromEntries(Object.entries(next).filter(([, value]) => value));
    history.replaceState(null, "", address("evaluations", [run, stage], state));
    drawFilters();
    load();
  }

  function choice(name, label, options, any) {
    const input = element(
      "select",
      { onchange: (event) => change({ [name]: event.target.value }) },
      any ? element("option", { value: "" }, any) : null,
      options.map(([value, title]) => element("option", { value, selected: state[name] === value }, title)),
    );
    return element("label", null, label, input);
  }
  function drawFilters() {
    const tasks = facts.tasks.filter((task) => !state.task || task.name === state.task);
    const metrics = new Map(tasks.flatMap((task) => task.metrics.map((metric) => [metric.name, metric.title])));
    const systems = facts.systems.map((name) => [name, name]);
    const primary = tasks.length === 1 ? `the task's own: ${tasks[0].primary}` : "each task's own";
    replace(
      filters,
      choice("first", "wins and losses of", systems),
      choice(
        "second",
        "against",
        systems.some(([name]) => name === state.second) ? systems : [[state.second, state.second], ...systems],
      ),
      choice("metric", "by", [...metrics], primary),
      facts.tasks.length > 1
        ? choice(
            "task",
            "task",
            facts.tasks.map((task) => [task.name, `${task.title} (${task.items})`]),
            "all tasks",
          )
        : null,
      facts.sources.length > 1
        ? choice(
            "source",
            "source",
            facts.sources.map((name) => [name, name]),
            "all sources",
          )
        : null,
      choice("sort", "order", [["order", "as asked"]], "largest change first"),
    );
  }

  async function load() {
    if (stop) stop.abort();
    stop = new AbortController();
    const { signal } = stop;
    place.classList.add("loading");
    try {
      page = await get(`${base}/items`, { ...state, limit: PAGE }, signal);
      draw();
    } catch (error) {
      if (signal.aborted) return;
      replace(place, problem(error));
    }
    place.classList.remove("loading");
  }

  const systems = facts.systems;
  const link = (row) => address("evaluations", [run, stage, String(row.number)], state);
  function draw() {
    const { rows, matches, total, outcomes } = page;
    const all = Object.values(outcomes).reduce((sum, value) => sum + value, 0);
    const tab = (value, title, rowCount) =>
      element(
        "button",
        {
          type: "button",
          "aria-pressed": String((state.outcome || "") === value),
          onclick: () => change({ outcome: value }),
        },
        `${title} ${grouped(rowCount)}`,
      );
    replace(
      tabs,
      tab("", "all", all),
      Object.keys(OUTCOMES)
        .filter((name) => outcomes[name] || state.outcome === name)
        .map((name) => tab(name, OUTCOMES[name], outcomes[name] || 0)),
    );
    const offset = Number(state.offset || 0);
    const last = Math.min(offset + PAGE, matches);
    replace(
      status,
      matches === total ? count(total, "item") : `${grouped(matches)} of ${count(total, "item")}`,
      matches > PAGE
        ? element(
            "span",
            { class: "pager" },
            ` · ${offset + 1} to ${last} `,
            element(
              "button",
              { type: "button", disabled: !offset, onclick: () => turn(-1), "aria-label": "previous page" },
              "‹",
            ),
            " ",
            element(
              "button",
              { type: "button", disabled: last >= matches, onclick: () => turn(1), "aria-label": "next page" },
              "›",
            ),
          )
        : null,
    );
    listed.key = `${run}/${stage}`;
    listed.numbers = rows.map((row) => row.number);
    if (!rows.length) {
      replace(place, element("p", { class: "empty" }, "No item meets the conditions."));
      return;
    }
    const hasTasks = facts.tasks.length > 1;
    const head = ["item", hasTasks ? "task" : null, ...systems, `${state.first} − ${state.second}`].filter(Boolean);
    const body = element(
      "tbody",
      null,
      rows.map((row, index) =>
        element(
          "tr",
          { onclick: (event) => open(index, event) },
          element(
            "td",
            { class: "excerpt" },
            element(
              "a",
              { href: link(row), tabindex: -1, dir: "auto" },
              marked(row.prompt, wordPattern(state.words)) || row.id,
            ),
            element("span", { class: "small source" }, row.source),
          ),
          hasTasks ? element("td", { class: "small" }, row.task) : null,
          systems.map((name) => element("td", { class: "num", "data-title": name }, number(row.scores[name]))),
          element("td", { class: "num", "data-title": "change" }, outcome(row)),
        ),
      ),
    );
    replace(
      place,
      element(
        "div",
        { class: "scroll", tabindex: -1 },
        element(
          "table",
          { class: "rollouts items" },
          element(
            "thead",
            null,
            element(
              "tr",
              null,
              head.map((title, index) =>
                element("th", { scope: "col", class: index >= (hasTasks ? 2 : 1) ? "num" : null }, title),
              ),
            ),
          ),
          body,
        ),
      ),
    );
    select(Math.min(at, rows.length - 1), false);
  }
  function outcome(row) {
    const look = { win: "v-better", loss: "v-worse" }[row.outcome] || "";
    const sign = row.change > 0 ? "+" : "";
    return element(
      "span",
      { class: `chip ${look}`, title: OUTCOMES[row.outcome] },
      `${OUTCOMES[row.outcome].slice(0, 1)} ${row.change === null ? "" : sign + number(row.change)}`,
    );
  }
  function turn(step) {
    const offset = Number(state.offset || 0) + step * PAGE;
    if (page && offset >= 0 && offset < page.matches) change({ offset: String(offset || "") });
  }
  function select(index, isMoved = true) {
    const rows = place.querySelectorAll("tbody tr");
    for (const row of rows) row.removeAttribute("aria-current");
    at = index;
    if (at < 0 || !rows[at]) return;
    rows[at].setAttribute("aria-current", "true");
    if (!isMoved) return;
    rows[at].querySelector("a").focus({ preventScroll: true });
    rows[at].scrollIntoView({ block: "nearest" });
  }
  function open(index, event) {
    if (event.target.closest("a, button") || String(getSelection())) return;
    location.hash = link(page.rows[index]);
  }
  const move = (step) => {
    if (page) select(Math.max(0, Math.min(page.rows.length - 1, at + step)));
  };
  const nextOutcome = () => {
    const names = ["", ...Object.keys(OUTCOMES).filter((name) => page.outcomes[name])];
    change({ outcome: names[(names.indexOf(state.outcome || "") + 1) % names.length] });
  };

  drawFilters();
  replace(
    main,
    element(
      "form",
      { class: "filters", onsubmit: (event) => event.preventDefault() },
      element("div", { class: "search-row" }, search),
      filters,
    ),
    tabs,
    status,
    place,
  );
  setKeys(main, [
    { keys: ["/"], does: "words in the prompt or an answer", run: () => search.select() },
    { keys: ["j", "ArrowDown"], does: "next item", run: () => move(1) },
    { keys: ["k", "ArrowUp"], does: "previous item", run: () => move(-1) },
    {
      keys: ["Enter"],
      does: "open the item",
      run: () => {
        if (page && at >= 0) location.hash = link(page.rows[at]);
      },
    },
    { keys: ["o"], does: "next outcome: all, won, lost, tied", run: nextOutcome },
    { keys: ["s"], does: "swap the two systems", run: () => change({ first: state.second, second: state.first }) },
    { keys: ["ArrowRight"], does: "next page", run: () => turn(1) },
    { keys: ["ArrowLeft"], does: "previous page", run: () => turn(-1) },
  ]);
  await load();
  return () => {
    clearTimeout(timer);
    if (stop) stop.abort();
  };
}

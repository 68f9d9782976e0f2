// The table of a stage's rollouts: filters, a curve of means, and pages of rows.
import { get, path as encode } from "../api.js";
import { address } from "../app.js";
import { element, problem, replace } from "../dom.js";
import { setKeys } from "../keys.js";
import { curve } from "./chart.js";
import { conditions, filterForm, readState, showChips } from "./filters.js";
import { count, grouped, marked, number, wordPattern } from "./format.js";

const PAGE = 50;
const selected = new Map(); // address of a table → id of the row that was opened, for the way back

const isNumber = (value) => typeof value === "number";

export async function showTable(main, run, stage, query) {
  let state = readState(query);
  const folder = state.folder || "rollouts";
  const base = encode("rollouts", run, stage, folder);
  const here = (next = state) => address("rollouts", [run, stage], next);
  const facets = await get(`${base}/facets`);
  const chips = element("div", { class: "chips" });
  const status = element("p", { class: "small status", role: "status" });
  const means = element("div", { class: "means-place" });
  const place = element("div");
  const measure = element("select", { "aria-label": "curve of", onchange: () => drawMeans() });
  let points = [];
  let rows = [];
  let page = null;
  let at = -1;
  let stop = null;

  // ---- the state is in the address, so a table can be linked

  function change(patch) {
    const next = { ...state };
    for (const [name, value] of Object.entries(patch)) {
      if (value) next[name] = value;
      else delete next[name];
    }
    if (!("offset" in patch)) delete next.offset;
    const isEqual = JSON.stringify(conditions(next)) === JSON.stringify(conditions(state));
    state = next;
    history.replaceState(null, "", here());
    form.show(state);
    load();
    if (!isEqual) loadMeans();
  }
  const form = filterForm(state, facets, change);

  // ---- rows

  async function load() {
    if (stop) stop.abort();
    stop = new AbortController();
    const { signal } = stop;
    showChips(chips, state, change);
    place.classList.add("loading");
    try {
      if (state.response_words || state.prompt_words) await search(signal);
      else await readPage(signal);
    } catch (error) {
      if (signal.aborted) return;
      replace(place, problem(error));
      replace(status);
    }
    if (!signal.aborted) place.classList.remove("loading");
  }
  function question(more) {
    const { folder: _, ...rest } = state;
    return { ...rest, limit: PAGE, ...more };
  }
  async function readPage(signal) {
    const began = performance.now();
    page = await get(base, question({}), signal);
    rows = page.rows;
    drawRows();
    const seconds = (performance.now() - began) / 1000;
    replace(
      status,
      page.matches === page.total
        ? count(page.total, "rollout")
        : `${grouped(page.matches)} of ${count(page.total, "rollout")}`,
      ` · ${seconds.toFixed(2)} s`,
      pager(),
    );
  }

  // A search reads the texts part by part: it shows what it has, and stops when the page is full.
  async function search(signal, previous = null) {
    const byUpdate = !state.sort || state.sort === "update";
    const wanted = (previous ? previous.wanted : 0) + PAGE;
    const progress = previous || { matches: 0, searched: 0, next: "", rows: [] };
    progress.wanted = wanted;
    while (true) {
      const part = await get(
        base,
        question({
          offset: null,
          after: progress.next || null,
          limit: byUpdate ? wanted - progress.rows.length : wanted,
        }),
        signal,
      );
      progress.rows = byUpdate ? [...progress.rows, ...part.rows] : merge(progress.rows, part.rows).slice(0, wanted);
      progress.matches += part.matches;
      progress.searched += part.searched;
      progress.next = part.next;
      rows = progress.rows;
      drawRows();
      const isFull = byUpdate && rows.length >= wanted;
      const isDone = !part.next;
      replace(
        status,
        `${grouped(progress.matches)} found in ${grouped(progress.searched)} of ${count(part.total, "rollout")}`,
        isDone ? "" : byUpdate ? `, ${state.descending === "false" ? "oldest" : "newest"} first` : "",
        isDone ? " · all searched" : "",
        isDone ? null : element("progress", { max: part.total, value: progress.searched, "aria-label": "searched" }),
        isDone
          ? null
          : isFull
            ? element(
                "button",
                {
                  type: "button",
                  onclick: () =>
                    search(signal, progress).catch((error) => {
                      if (!signal.aborted) replace(status, problem(error));
                    }),
                },
                "Search on",
              )
            : element("button", { type: "button", onclick: () => stop.abort() }, "Stop"),
      );
      if (isDone || isFull) return;
    }
  }
  function merge(before, more) {
    const sign = state.descending === "false" ? 1 : -1;
    const rank = (row) => (row.key === null ? Infinity : sign * row.key);
    return [...before, ...more]
      .map((row, index) => ({ row, index }))
      .sort((a, b) => rank(a.row) - rank(b.row) || a.index - b.index)
      .map(({ row }) => row);
  }

  function pager() {
    const offset = Number(state.offset || 0);
    if (page.matches <= PAGE) return null;
    const last = Math.min(offset + PAGE, page.matches);
    return element(
      "span",
      { class: "pager" },
      ` · ${grouped(offset + 1)} to ${grouped(last)} `,
      element(
        "button",
        { type: "button", disabled: !offset, onclick: () => turn(-1), "aria-label": "previous page" },
        "‹",
      ),
      " ",
      element(
        "button",
        { type: "button", disabled: last >= page.matches, onclick: () => turn(1), "aria-label": "next page" },
        "›",
      ),
    );
  }
  function turn(step) {
    const offset = Number(state.offset || 0) + step * PAGE;
    if (!page || offset < 0 || offset >= page.matches) return;
    at = -1;
    change({ offset: offset ? String(offset) : "" });
  }

  // ---- the table

  const columns = [
    {
      title: "update",
      sort: "update",
      cell: (row) => number(row.update),
      isShown: facets.first_update !== null,
      class: "num",
    },
    {
      title: "prompt",
      cell: (row) => element("div", { dir: "auto" }, marked(row.prompt, wordPattern(state.prompt_words))),
      class: "excerpt prompt",
    },
    {
      title: "response",
      cell: (row) =>
        element(
          "a",
          { href: link(row), tabindex: -1, dir: "auto" },
          marked(row.response, wordPattern(state.response_words)) || "(empty)",
        ),
      class: "excerpt",
    },
    {
      title: "score",
      sort: "score",
      cell: (row) => number(row.score),
      isShown: facets.columns.score,
      class: "num strong",
    },
    ...facets.parts
      .slice(0, 8)
      .map((part) => ({ title: part, sort: "part", part, cell: (row) => number(row.scores[part]), class: "num" })),
    { title: "gold", sort: "gold", cell: (row) => number(row.gold), isShown: facets.columns.gold, class: "num" },
    { title: "KL", sort: "kl", cell: (row) => number(row.kl), isShown: facets.columns.kl, class: "num" },
    { title: "tokens", sort: "tokens", cell: (row) => number(row.tokens), class: "num" },
    {
      title: "thought",
      sort: "thought_tokens",
      cell: (row) => number(row.thought_tokens),
      isShown: facets.columns.thought_tokens,
      class: "num",
    },
    { title: "turns", sort: "turns", cell: (row) => number(row.turns), isShown: facets.columns.turns, class: "num" },
    { title: "notes", cell: notes, class: "notes" },
  ].filter((column) => column.isShown === undefined || column.isShown);

  function notes(row) {
    const list = Object.entries(row.reasons || {}).map(([name, reason]) =>
      facets.parts.length > 1 ? `${name}: ${reason}` : reason,
    );
    if (row.stop && row.stop !== "finished") list.push(row.stop);
    else if (row.finished === false) list.push("cut");
    if (row.learned === false && folder === "rollouts" && facets.columns.kl) list.push("not learned from");
    return list.map((text) => element("span", { class: "chip" }, text));
  }
  function link(row) {
    return address("rollouts", [run, stage, "row"], { id: row.id, folder: state.folder });
  }
  const isSorted = (column) =>
    (state.sort || "update") === column.sort && (column.sort !== "part" || state.sort_part === column.part);
  function head(column) {
    if (!column.sort) return element("th", { scope: "col" }, column.title);
    const isDown = state.descending !== "false";
    const order = isSorted(column) ? (isDown ? "descending" : "ascending") : "none";
    const button = element(
      "button",
      {
        type: "button",
        class: "sorter",
        title: `sort by ${column.title}`,
        onclick: () =>
          change({
            sort: column.sort,
            sort_part: column.part || "",
            descending: isSorted(column) && isDown ? "false" : "",
          }),
      },
      column.title,
      element("span", { "aria-hidden": "true" }, isSorted(column) ? (isDown ? " ↓" : " ↑") : ""),
    );
    return element("th", { scope: "col", class: column.class, "aria-sort": order }, button);
  }
  function drawRows() {
    if (!rows.length) {
      replace(
        place,
        element(
          "p",
          { class: "empty" },
          facets.rows ? "No rollout meets the conditions." : "The stage has stored no rollouts yet.",
        ),
      );
      return;
    }
    const body = element(
      "tbody",
      null,
      rows.map((row, index) =>
        element(
          "tr",
          { "data-index": index, onclick: (event) => open(index, event) },
          columns.map((column) => element("td", { class: column.class, "data-title": column.title }, column.cell(row))),
        ),
      ),
    );
    replace(
      place,
      element(
        "div",
        { class: "scroll", tabindex: -1 },
        element("table", { class: "rollouts" }, element("thead", null, element("tr", null, columns.map(head))), body),
      ),
    );
    const before = rows.findIndex((row) => row.id === selected.get(here()));
    select(before >= 0 ? before : Math.min(at, rows.length - 1), false);
  }
  function select(index, isMoved = true) {
    const body = place.querySelector("tbody");
    if (!body) return;
    for (const row of body.querySelectorAll("[aria-current]")) row.removeAttribute("aria-current");
    at = index;
    if (at < 0) return;
    const row = body.children[at];
    row.setAttribute("aria-current", "true");
    selected.set(here(), rows[at].id);
    if (!isMoved) return;
    row.querySelector("a").focus({ preventScroll: true });
    row.scrollIntoView({ block: "nearest" });
  }
  function open(index, event) {
    if (event && (event.target.closest("a, button") || String(getSelection()))) return;
    select(index, false);
    location.hash = link(rows[index]);
  }
  const move = (step) => {
    if (rows.length) select(Math.max(0, Math.min(rows.length - 1, at + step)));
  };

  // ---- means by update

  async function loadMeans() {
    const { response_words: _, prompt_words: __, ...rest } = conditions(state);
    const words = new URLSearchParams(rest);
    for (const part of facets.parts.slice(0, 20)) words.append("parts", part);
    try {
      points = (await get(`${base}/means?${words}`)).points;
    } catch (error) {
      points = [];
    }
    drawMeans();
  }
  const MEASURES = { score: "score", kl: "KL", tokens: "tokens", finished: "share that ended by itself" };
  function drawMeans() {
    const [kind, name] = [measure.value.slice(0, 5), measure.value.slice(5)];
    const value = kind === "part:" ? (point) => point.parts[name] : (point) => point[measure.value];
    const choose = (point) =>
      change({ first_update: String(point.first_update), last_update: String(point.last_update) });
    const picture = curve(
      points,
      kind === "part:" ? name : MEASURES[measure.value],
      (point) => (isNumber(value(point)) ? value(point) : null),
      choose,
    );
    replace(means, picture ? element("div", { class: "means-row" }, measure, picture) : null);
  }
  const measures = Object.entries(MEASURES).filter(([name]) => name !== "kl" || facets.columns.kl);
  replace(
    measure,
    measures.map(([value, title]) => element("option", { value }, title)),
    facets.parts.map((part) => element("option", { value: "part:" + part }, part)),
  );

  // ---- the page

  replace(main, form.node, chips, means, status, place);
  setKeys(main, [
    { keys: ["/"], does: "words in the response", run: () => form.focus() },
    { keys: ["f"], does: "show or hide the filters", run: () => form.toggle() },
    { keys: ["j", "ArrowDown"], does: "next row", run: () => move(1) },
    { keys: ["k", "ArrowUp"], does: "previous row", run: () => move(-1) },
    {
      keys: ["Enter"],
      does: "open the row",
      run: () => {
        if (at >= 0) location.hash = link(rows[at]);
      },
    },
    {
      keys: ["p"],
      does: "the row's prompt across the updates",
      run: () => {
        if (at >= 0)
          location.hash = address("rollouts", [run, stage, "prompt"], {
            prompt_id: rows[at].prompt_id,
            folder: state.folder,
          });
      },
    },
    { keys: ["ArrowRight"], does: "next page", run: () => turn(1) },
    { keys: ["ArrowLeft"], does: "previous page", run: () => turn(-1) },
    {
      keys: ["r"],
      does: "read again",
      run: () => {
        load();
        loadMeans();
      },
    },
  ]);
  loadMeans();
  await load();
  return () => {
    form.end();
    if (stop) stop.abort();
  };
}

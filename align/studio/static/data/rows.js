// Rows of a build, page by page: as texts, or as a model's tokens with the trained ones in color.
import { get } from "../api.js";
import { element, problem, replace } from "../dom.js";
import { amount } from "../tables.js";

const PAGE = 10;
const SPLITS = ["train", "test"];
const SPECIAL = { trained: "t", special: "s" };

// Marks the words of a finding in the text of a piece, if the piece has them.
function marked(text, words) {
  const at = words ? text.indexOf(words) : -1;
  return at < 0 ? text : [text.slice(0, at), element("mark", null, words), text.slice(at + words.length)];
}

function tokenView(view, words) {
  const pieces = view.pieces.map((piece) =>
    element(
      "span",
      {
        class:
          Object.keys(SPECIAL)
            .filter((name) => piece[name])
            .map((name) => SPECIAL[name])
            .join(" ") || null,
      },
      marked(piece.text, words),
    ),
  );
  return element(
    "div",
    null,
    element(
      "div",
      { class: "small" },
      `${view.title} · ${amount(view.tokens)} tokens, ${amount(view.trained)} trained`,
      view.notes.map((note) => ` · ${note}`),
    ),
    element("div", { class: "tokens", tabindex: "0" }, pieces),
  );
}

const turn = (each, words) =>
  element(
    "div",
    { class: "turn" },
    element("div", { class: "role" }, each.role),
    element("div", { class: "text" }, marked(each.text, words)),
  );

export function rowView(row, words = "") {
  const head = element(
    "div",
    { class: "small row-head" },
    `row ${row.number + 1} · `,
    element("code", null, row.id || row.where || ""),
    row.source ? ` · ${row.source}` : "",
  );
  if (row.reason !== undefined) {
    return element(
      "article",
      { class: "sample" },
      head,
      element(
        "p",
        { class: "dropped-why" },
        element("b", null, row.reason),
        ` in ${row.step}`,
        row.detail && row.detail !== "{}" ? ` · ${row.detail}` : "",
      ),
      element("div", { class: "text dropped-row" }, row.text),
    );
  }
  const kept = row.kept.length
    ? element(
        "dl",
        { class: "facts" },
        row.kept.map((column) => [element("dt", null, column.name), element("dd", null, column.text)]),
      )
    : null;
  if (row.views)
    return element(
      "article",
      { class: "sample" },
      head,
      row.views.map((view) => tokenView(view, words)),
      kept,
    );
  return element(
    "article",
    { class: "sample" },
    head,
    row.turns.map((each) => turn(each, words)),
    element(
      "div",
      { class: row.answers.length > 1 ? "answers" : null },
      row.answers.map((answer) =>
        element(
          "div",
          { class: "answer-box" },
          element(
            "div",
            { class: "role" },
            answer.title,
            answer.score === null || answer.score === undefined ? "" : ` · score ${answer.score}`,
          ),
          element("div", { class: "text" }, marked(answer.text, words)),
        ),
      ),
    ),
    kept,
  );
}

export class Rows {
  constructor(page, split) {
    this.page = page;
    this.split = split;
    this.offset = 0;
    const { content, query } = page;
    const sources = content.sources.map((source) => source.source);
    const select = (label, name, values, chosen) =>
      element(
        "label",
        null,
        label,
        element(
          "select",
          { name, onchange: () => this.load(0) },
          element("option", { value: "" }, "all"),
          values.map((value) => element("option", { value, selected: value === chosen }, value)),
        ),
      );
    const parts = [];
    if (split !== "dropped") {
      this.splitField = element(
        "select",
        {
          onchange: () => {
            this.split = this.splitField.value;
            this.load(0);
          },
        },
        SPLITS.map((name) =>
          element("option", { value: name, selected: name === split }, `${name} (${amount(content.splits[name])})`),
        ),
      );
      parts.push(
        element("label", null, "Split", this.splitField),
        element(
          "label",
          null,
          "Id begins with",
          element("input", { name: "id", type: "search", onchange: () => this.load(0) }),
        ),
      );
      const models = content.models;
      parts.push(
        element(
          "label",
          null,
          "Tokens of",
          element(
            "select",
            { name: "model", disabled: !models.length, onchange: () => this.load(0) },
            element("option", { value: "" }, models.length ? "no model: texts" : "no stage has a tokenizer"),
            models.map((name) => element("option", { value: name, selected: name === query.model }, name)),
          ),
        ),
      );
    } else {
      const reasons = [...new Set(content.steps.flatMap((step) => step.reasons.map((reason) => reason.reason)))];
      parts.push(select("Reason", "reason", reasons, query.reason));
    }
    if (sources.length > 1) parts.push(select("Source", "source", sources, query.source));
    this.form = element("form", { class: "controls" }, parts);
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.load(0);
    });
    this.count = element("span", { class: "small num" });
    this.list = element("div", { "aria-live": "polite" });
    this.node = element(
      "div",
      null,
      this.form,
      split !== "dropped" &&
        content.models.length > 0 &&
        element(
          "p",
          { class: "small legend" },
          element("span", { class: "tokens" }, element("span", { class: "t" }, "trained")),
          " ",
          element("span", { class: "tokens" }, element("span", { class: "s" }, "special")),
          " with a model's tokens",
        ),
      element(
        "div",
        { class: "pager" },
        element("button", { type: "button", onclick: () => this.turn(-1) }, "← previous"),
        element("button", { type: "button", onclick: () => this.turn(1) }, "next →"),
        this.count,
      ),
      this.list,
    );
  }

  async load(offset) {
    const fields = Object.fromEntries(new FormData(this.form));
    const request = (this.request = {});
    try {
      const content = await get(`${this.page.place}/rows`, { ...fields, split: this.split, offset, limit: PAGE });
      if (this.request !== request) return;
      this.offset = offset;
      this.matches = content.matches;
      const last = Math.min(offset + PAGE, content.matches);
      this.count.textContent = content.matches
        ? `${amount(offset + 1)} to ${amount(last)} of ${amount(content.matches)}`
        : "no rows";
      replace(
        this.list,
        content.rows.map((row) => rowView(row)),
      );
    } catch (error) {
      replace(this.list, problem(error));
    }
  }

  turn(by) {
    const offset = this.offset + by * PAGE;
    if (offset >= 0 && offset < (this.matches || 0)) this.load(offset);
  }
}

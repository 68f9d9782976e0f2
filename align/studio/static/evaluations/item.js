// One item of an evaluation: the answers of all systems side by side, and the judges' replies in both orders.
import { get, path as encode } from "../api.js";
import { address } from "../app.js";
import { element, replace } from "../dom.js";
import { backKey, setKeys } from "../keys.js";
import { conversation, difference, messages, number, textBox, thought } from "../rollouts/format.js";
import { tokenView } from "../rollouts/tokens.js";
import { completeQuery, listed } from "./items.js";

const VERDICTS = {
  first: "prefers the answer that it reads first",
  second: "prefers the answer that it reads second",
  tie: "prefers neither",
};
const OUTCOMES = {
  tie: "a tie",
  disagreement: "no preference: the verdict changes with the order",
  unreadable: "no readable verdict",
};

export async function showItem(main, run, stage, place, query) {
  const base = encode("evaluations", run, stage);
  const facts = await get(base);
  const state = completeQuery(facts, query);
  const item = await get(`${base}/items/${encodeURIComponent(place)}`, { first: state.first, second: state.second });
  const known = Object.keys(item.answers);
  const names = [...new Set([state.first, state.second, ...facts.systems, ...known])].filter((name) =>
    known.includes(name),
  );
  let isMarked = Boolean(item.pieces);
  const answers = element("div", { class: "across" });
  const button = item.pieces ? element("button", { type: "button", onclick: () => mark() }) : null;

  function draw() {
    replace(
      answers,
      names.map((name) =>
        element(
          "div",
          { class: "column" },
          element(
            "h3",
            null,
            name,
            name === facts.reference ? element("span", { class: "small" }, " reference") : null,
          ),
          item.answers[name]
            .slice(0, 1)
            .map((answer) =>
              card(answer, isMarked && name === state.first ? item.pieces : null, item.answers[name].length > 1),
            ),
          numbers(item, name),
          item.answers[name].length > 1
            ? element(
                "details",
                null,
                element("summary", { class: "small" }, `${item.answers[name].length - 1} more`),
                item.answers[name].slice(1).map((answer) => card(answer, null, true)),
              )
            : null,
        ),
      ),
    );
    if (button) {
      button.setAttribute("aria-pressed", String(isMarked));
      replace(
        button,
        isMarked
          ? `Hide what ${state.first} changes from ${state.second}`
          : `Mark what ${state.first} changes from ${state.second}`,
      );
    }
  }
  function mark() {
    if (!button) return;
    isMarked = !isMarked;
    draw();
  }
  const index = listed.key === `${run}/${stage}` ? listed.numbers.indexOf(item.number) : -1;
  const go = (step) => {
    const next = index < 0 ? item.number + step : listed.numbers[index + step];
    if (next !== undefined && next >= 0) location.replace(address("evaluations", [run, stage, String(next)], state));
  };

  draw();
  replace(
    main,
    element(
      "section",
      { class: "panel" },
      element(
        "h2",
        null,
        item.title,
        " ",
        element("span", { class: "small" }, [item.source, item.id].filter(Boolean).join(" · ")),
      ),
      messages(item.prompt),
      columnsOf(item.row),
    ),
    element("div", { class: "controls" }, button),
    answers,
    judgments(item.judgments),
  );
  setKeys(main, [
    backKey("back to the items", () => {
      location.hash = address("evaluations", [run, stage], state);
    }),
    { keys: ["j", "ArrowDown", "n"], does: "next item", run: () => go(1) },
    { keys: ["k", "ArrowUp"], does: "previous item", run: () => go(-1) },
    { keys: ["d"], does: "mark what one system changes", run: mark },
    {
      keys: ["s"],
      does: "swap the two systems",
      run: () =>
        location.replace(
          address("evaluations", [run, stage, place], { ...state, first: state.second, second: state.first }),
        ),
    },
  ]);
}

// The item's metrics, which are means over the answers.
function numbers(item, name) {
  const values = item.values[name];
  if (!values) return null;
  return element(
    "dl",
    { class: "facts numbers" },
    Object.entries(values).map(([name, value]) => [element("dt", null, name), element("dd", null, number(value))]),
  );
}

function columnsOf(row) {
  if (!row) return null;
  return element(
    "details",
    null,
    element("summary", { class: "small" }, "columns of the row"),
    element(
      "dl",
      { class: "facts" },
      Object.entries(row).map(([name, value]) => [
        element("dt", null, name),
        element("dd", null, typeof value === "string" ? value : JSON.stringify(value)),
      ]),
    ),
  );
}

function card(answer, pieces, isOneOfSeveral) {
  const scores = isOneOfSeveral
    ? Object.entries({ reward: answer.reward, KL: answer.kl, ...answer.scores }).filter(
        ([, value]) => value !== undefined && value !== null,
      )
    : [];
  const facts = [
    `${number(answer.tokens)} tokens`,
    answer.thought_tokens ? `${number(answer.thought_tokens)} of a thought` : null,
    ...scores.map(([name, value]) => `${name} ${number(value)}`),
  ].filter(Boolean);
  const body = answer.conversation
    ? conversation(answer.conversation)
    : [
        (answer.turns || [])
          .slice(0, -1)
          .map((turn, index) => [
            index ? textBox("follow-up", turn.prompt) : null,
            thought(turn.thought),
            textBox("text", turn.text),
          ]),
        answer.turns && answer.turns.length > 1
          ? textBox("follow-up", answer.turns[answer.turns.length - 1].prompt)
          : null,
        thought(answer.thought),
        textBox("text", pieces ? difference(pieces) : answer.text),
      ];
  return element(
    "article",
    { class: "answer" },
    element("div", { class: "small" }, facts.join(" · ")),
    body,
    answer.finished === false ? element("div", { class: "cut" }, "✂ cut at the token limit") : null,
    byToken(answer),
    explanation(answer.explanation),
  );
}

// Numbers by token, which are drawn when they are asked for.
function byToken(answer) {
  if (!answer.token_texts) return null;
  const fold = element("details", null, element("summary", { class: "small" }, "numbers by token"));
  fold.addEventListener(
    "toggle",
    () => {
      if (fold.children.length === 1) fold.append(tokenView(answer).node);
    },
    { once: true },
  );
  return fold;
}

function explanation(reasons) {
  if (!reasons) return null;
  return element(
    "details",
    null,
    element("summary", { class: "small" }, "the judge's reasons"),
    Object.entries(reasons).map(([name, reason]) =>
      element(
        "div",
        null,
        element("b", null, name),
        textBox("text", typeof reason === "string" ? reason : JSON.stringify(reason, null, 1)),
      ),
    ),
  );
}

function judgments(list) {
  if (!list.length) return null;
  return element(
    "section",
    { class: "panel" },
    element("h2", null, "Judge"),
    list.map((line) =>
      line.orders
        ? comparison(line)
        : element(
            "div",
            { class: "judgment" },
            element("h3", null, `${line.system}, answer ${line.turn}: grade ${number(line.grade)}`),
            textBox("text", line.text),
          ),
    ),
  );
}
function verdictText({ verdict, shown }) {
  if (!VERDICTS[verdict]) return "no readable verdict";
  if (verdict === "tie") return VERDICTS.tie;
  return `${VERDICTS[verdict]}: ${shown[verdict === "first" ? 0 : 1]}`;
}

function comparison(line) {
  const winner =
    { one: `${line.one} wins`, other: `${line.other} wins` }[line.outcome] || OUTCOMES[line.outcome] || line.outcome;
  return element(
    "div",
    { class: "judgment" },
    element("h3", null, `${line.one} against ${line.other}: ${winner}`),
    element(
      "div",
      { class: "answers" },
      line.orders.map((order) =>
        element(
          "div",
          { class: "answer" },
          element("div", { class: "title" }, `${order.shown[0]}, then ${order.shown[1]}`),
          element("div", { class: "small" }, verdictText(order)),
          textBox("text", order.text),
        ),
      ),
    ),
  );
}

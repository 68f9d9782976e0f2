// One rollout: its prompt, its response by token or as a conversation, its scores with their reasons.
import { get, path as encode } from "../api.js";
import { address } from "../app.js";
import { element, replace } from "../dom.js";
import { backKey, setKeys } from "../keys.js";
import { conversation, count, messages, number, roleName, textBox, thought } from "./format.js";
import { tokenView } from "./tokens.js";

export async function showRow(main, run, stage, query) {
  const folder = query.folder || "rollouts";
  const row = await get(encode("rollouts", run, stage, folder, "row"), { id: query.id });
  const tokens = tokenView(row);
  const promptLink = address("rollouts", [run, stage, "prompt"], { prompt_id: row.prompt_id, folder: query.folder });
  const updateLink =
    row.update === undefined ? null : address("rollouts", [run, stage], { update: row.update, folder: query.folder });
  const others = row.group_rows;
  const place = others.findIndex((other) => other.id === row.id);
  const rowLink = (other) => address("rollouts", [run, stage, "row"], { id: other.id, folder: query.folder });
  const go = (step) => {
    if (others[place + step]) location.replace(rowLink(others[place + step]));
  };

  const answer = element(
    "section",
    { class: "panel" },
    element("h2", null, row.conversation ? "Episode" : "Response"),
    body(row),
  );
  replace(
    main,
    element(
      "div",
      { class: "row-page" },
      element(
        "div",
        null,
        element(
          "section",
          { class: "panel" },
          element("h2", null, "Prompt"),
          row.conversation && row.conversation.prompt.length
            ? row.conversation.prompt.map((turn) =>
                element("div", { class: "turn" }, roleName(turn.role), textBox("text", turn.text)),
              )
            : messages(row.prompt),
          row.reference
            ? element("p", { class: "small" }, "Reference answer: ", element("b", null, row.reference))
            : null,
        ),
        answer,
        tokens ? element("section", { class: "panel" }, element("h2", null, "Tokens"), tokens.node) : null,
      ),
      element(
        "aside",
        null,
        scores(row),
        facts(row, promptLink, updateLink),
        others.length > 1
          ? element(
              "section",
              { class: "panel" },
              element("h2", null, "Responses of the group"),
              element(
                "ol",
                { class: "siblings" },
                others.map((other) =>
                  element(
                    "li",
                    null,
                    element(
                      "a",
                      { href: rowLink(other), "aria-current": other.id === row.id ? "true" : null },
                      `score ${number(other.score)}`,
                    ),
                  ),
                ),
              ),
            )
          : null,
      ),
    ),
  );
  setKeys(main, [
    backKey("back", () => history.back()),
    {
      keys: ["p"],
      does: "the prompt across the updates",
      run: () => {
        location.hash = promptLink;
      },
    },
    { keys: ["j", "ArrowDown"], does: "next response of the group", run: () => go(1) },
    { keys: ["k", "ArrowUp"], does: "previous response of the group", run: () => go(-1) },
    ...(tokens
      ? [
          { keys: ["c"], does: "next color of the tokens", run: () => tokens.next(1) },
          { keys: ["x"], does: "move along the tokens", run: () => tokens.focus() },
        ]
      : []),
  ]);
}

function body(row) {
  if (row.conversation) return conversation(row.conversation);
  const text = row.response || "";
  const end = row.thought_end || 0;
  return [
    thought(text.slice(0, end)),
    textBox("text response", text.slice(end)),
    row.finished === false ? element("div", { class: "cut" }, "✂ cut at the token limit") : null,
  ];
}

// The parts of the score, each with its reason and a judge's explanation.
function scores(row) {
  const explanations = row.explanation && typeof row.explanation === "object" ? row.explanation : {};
  const reasons = row.reasons || {};
  const names = [...new Set([...Object.keys(row.scores || {}), ...Object.keys(reasons), ...Object.keys(explanations)])];
  return element(
    "section",
    { class: "panel" },
    element("h2", null, "Score ", element("span", { class: "score-number" }, number(row.score))),
    names.length
      ? element(
          "table",
          { class: "parts" },
          element(
            "tbody",
            null,
            names.map((name) =>
              element(
                "tr",
                null,
                element(
                  "th",
                  { scope: "row" },
                  name,
                  reasons[name]
                    ? element("div", { class: "small" }, "reason: ", element("b", null, reasons[name]))
                    : null,
                  explained(explanations[name]),
                ),
                element("td", { class: "num" }, (row.scores || {})[name] === undefined ? "" : number(row.scores[name])),
              ),
            ),
          ),
        )
      : null,
    typeof row.explanation === "string" ? textBox("text", row.explanation) : null,
  );
}
function explained(reason) {
  if (reason === undefined || reason === null) return null;
  return element(
    "details",
    null,
    element("summary", { class: "small" }, "explanation"),
    textBox("text", typeof reason === "string" ? reason : JSON.stringify(reason, null, 1)),
  );
}

function tokenCount(row) {
  const thoughts = row.thought_tokens ? `, ${number(row.thought_tokens)} of a thought` : "";
  return number(row.tokens) + thoughts + (row.open_thought ? " (not closed)" : "");
}

function facts(row, promptLink, updateLink) {
  const list = [
    ["update", updateLink ? element("a", { href: updateLink }, number(row.update)) : null],
    ["prompt", element("a", { href: promptLink }, row.prompt_id || "–")],
    ["split", row.split],
    ["place", `${row.round ? `round ${row.round}, ` : ""}group ${row.group ?? "–"}, ${row.index ?? "–"}`],
    ["tokens", tokenCount(row)],
    ["prompt tokens", row.prompt_ids ? number(row.prompt_ids.length) : null],
    ["end", row.stop || (row.finished === false ? "cut at the token limit" : "by itself")],
    ["failure", row.failure],
    ["gold", row.gold === undefined ? null : number(row.gold)],
    ["KL", row.kl === undefined ? null : `${number(row.kl)} nats`],
    ["turns", row.turns === undefined ? null : count(row.turns, "turn")],
    ["turn scores", row.turn_scores ? row.turn_scores.map((value) => number(value)).join(", ") : null],
    ["learned from", row.learned === undefined ? null : row.learned ? "yes" : "no"],
    ...(row.conversation ? row.conversation.facts.map((fact) => ["episode", fact]) : []),
  ];
  return element(
    "section",
    { class: "panel" },
    element("h2", null, "Facts"),
    element(
      "dl",
      { class: "facts" },
      list
        .filter(([, value]) => value)
        .map(([title, value]) => [element("dt", null, title), element("dd", null, value)]),
    ),
  );
}

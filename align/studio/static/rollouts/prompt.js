// One prompt across the updates: its answers side by side, with the words that changed marked.
import { get, path as encode } from "../api.js";
import { address } from "../app.js";
import { element, replace } from "../dom.js";
import { backKey, setKeys } from "../keys.js";
import { curve } from "./chart.js";
import { count, difference, messages, number, textBox, thought } from "./format.js";

const MOST = 12;

export async function showPrompt(main, run, stage, query) {
  const folder = query.folder || "rollouts";
  const base = query.base || "previous";
  const content = await get(encode("rollouts", run, stage, folder, "prompt"), {
    prompt_id: query.prompt_id,
    updates: query.updates,
    base,
  });
  const link = (patch) => address("rollouts", [run, stage, "prompt"], { ...query, ...patch });
  const go = (patch) => location.replace(link(patch));
  const chosen = content.chosen.filter((update) => update !== null);
  const byUpdate = chosen.length > 0;
  const sample = Number(query.sample || 0);
  const columns = byUpdate
    ? chosen.map((update) => content.answers.filter((answer) => answer.update === update))
    : [content.answers];
  const most = Math.max(...columns.map((answers) => answers.length));

  function toggle(update) {
    const next = chosen.includes(update) ? chosen.filter((each) => each !== update) : [...chosen, update].slice(-MOST);
    if (next.length) go({ updates: next.sort((a, b) => a - b).join(",") });
  }
  const points = content.updates
    .filter((each) => each.update !== null)
    .map((each) => ({ ...each, first_update: each.update, last_update: each.update }));
  const picture = curve(
    points,
    "score",
    (point) => (typeof point.score === "number" ? point.score : null),
    (point) => toggle(point.update),
  );
  const isOne = most > 1 && byUpdate;
  const sampleChoice = isOne
    ? element(
        "label",
        null,
        "answers of an update",
        element(
          "select",
          { onchange: (event) => go({ sample: event.target.value === "all" ? "all" : event.target.value || "" }) },
          [["all", "all"], ...Array.from({ length: most }, (_, index) => [String(index), `number ${index + 1}`])].map(
            ([value, title]) => element("option", { value, selected: (query.sample || "0") === value }, title),
          ),
        ),
      )
    : null;
  const baseChoice = byUpdate
    ? element(
        "label",
        null,
        "mark what differs from",
        element(
          "select",
          { onchange: (event) => go({ base: event.target.value }) },
          [
            ["previous", "the update to the left"],
            ["first", "the first update"],
            ["none", "nothing"],
          ].map(([value, title]) => element("option", { value, selected: base === value }, title)),
        ),
      )
    : null;

  const strip =
    byUpdate && points.length > 1
      ? element(
          "div",
          { class: "updates", role: "group", "aria-label": "updates" },
          thin(points, chosen).map((point) =>
            element(
              "button",
              {
                type: "button",
                "aria-pressed": String(chosen.includes(point.update)),
                onclick: () => toggle(point.update),
                title: `${count(point.rows, "answer")}, mean score ${number(point.score)}`,
              },
              String(point.update),
            ),
          ),
        )
      : null;

  replace(
    main,
    element(
      "section",
      { class: "panel" },
      element("h2", null, "Prompt ", element("span", { class: "small" }, content.prompt_id)),
      messages(content.prompt),
      content.reference
        ? element("p", { class: "small" }, "Reference answer: ", element("b", null, content.reference))
        : null,
    ),
    byUpdate
      ? element(
          "section",
          { class: "panel" },
          element("h2", null, `Answers in ${count(points.length, "update")}`),
          picture,
          element("div", { class: "controls" }, sampleChoice, baseChoice),
          strip,
        )
      : null,
    element(
      "div",
      { class: "across" },
      columns.map((answers, index) =>
        element(
          "div",
          { class: "column" },
          byUpdate
            ? element(
                "h3",
                null,
                element(
                  "a",
                  { href: address("rollouts", [run, stage], { update: chosen[index], folder: query.folder }) },
                  `Update ${chosen[index]}`,
                ),
                " ",
                element("span", { class: "small" }, meanOf(content, chosen[index])),
              )
            : null,
          (isOne && query.sample !== "all" ? answers.slice(sample, sample + 1) : answers).map((answer) =>
            card(answer, index && base !== "none"),
          ),
        ),
      ),
    ),
  );
  setKeys(main, [
    backKey("back", () => history.back()),
    {
      keys: ["j", "ArrowDown"],
      does: "next answer of each update",
      run: () => {
        if (isOne && sample + 1 < most) go({ sample: sample + 1 });
      },
    },
    {
      keys: ["k", "ArrowUp"],
      does: "previous answer of each update",
      run: () => {
        if (isOne && sample > 0) go({ sample: sample - 1 || "" });
      },
    },
    {
      keys: ["d"],
      does: "mark what differs: from the left, the first, nothing",
      run: () => go({ base: { previous: "first", first: "none", none: "previous" }[base] }),
    },
  ]);

  function card(answer, isMarked) {
    const parts = Object.entries(answer.scores || {}).map(([name, value]) => `${name} ${number(value)}`);
    const text = answer.response || "";
    const end = answer.thought_end || 0;
    const facts = [
      `${number(answer.tokens)} tokens`,
      answer.kl === undefined ? null : `KL ${number(answer.kl)}`,
      ...parts,
    ].filter(Boolean);
    const reasons = Object.entries(answer.reasons || {}).map(([name, reason]) =>
      element("span", { class: "chip" }, `${name}: ${reason}`),
    );
    return element(
      "article",
      { class: "answer" },
      element(
        "div",
        { class: "title" },
        element(
          "a",
          { href: address("rollouts", [run, stage, "row"], { id: answer.id, folder: query.folder }) },
          `score ${number(answer.score)}`,
        ),
        " ",
        reasons,
      ),
      element("div", { class: "small" }, facts.join(" · ")),
      isMarked && answer.pieces
        ? textBox("text", difference(answer.pieces))
        : [thought(text.slice(0, end)), textBox("text", text.slice(end))],
      isMarked && answer.pieces === null ? element("div", { class: "small" }, "too long to mark differences") : null,
      answer.finished === false ? element("div", { class: "cut" }, "✂ cut at the token limit") : null,
    );
  }
}

function meanOf(content, update) {
  const here = content.updates.find((each) => each.update === update);
  return here && here.rows > 1 ? `mean score ${number(here.score)} of ${here.rows}` : "";
}
// At most 40 updates as buttons: the chosen updates and others evenly.
function thin(points, chosen) {
  const step = Math.ceil(points.length / 40);
  return points.filter(
    (point, index) => index % step === 0 || index === points.length - 1 || chosen.includes(point.update),
  );
}

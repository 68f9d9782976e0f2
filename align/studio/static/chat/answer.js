// One reply on the page: its thought, text and calls while it grows, its numbers, and its buttons.
import { element, problem, replace } from "../dom.js";
import { number } from "../rollouts/format.js";
import { tokenView } from "./tokens.js";

export const isRunning = (answer) => answer.state === "waiting" || answer.state === "streaming";
export const isUsable = (answer) =>
  Boolean(answer) && !isRunning(answer) && answer.state !== "failed" && answer.text.trim() !== "";
export const answerText = (answer) => answer.text.slice(answer.thoughtEnd);

export function newAnswer() {
  return {
    state: "waiting",
    status: "waiting",
    text: "",
    thought: "",
    thoughtEnd: 0,
    tokens: [],
    settings: null,
    note: "",
    finished: false,
    count: null,
    seconds: null,
    calls: [],
    callErrors: [],
    error: "",
    scores: {},
  };
}

// Handlers of the events of a reply's stream, which change an answer and call `changed`.
export function readReply(answer, changed) {
  return {
    status: ({ text }) => {
      answer.status = text;
      changed();
    },
    start: (event) => {
      answer.state = "streaming";
      answer.settings = event.settings;
      answer.text = event.text;
      if (event.dropped_turns)
        answer.note = `The context is full: the oldest ${event.dropped_turns} messages were dropped.`;
      changed();
    },
    piece: (event) => {
      answer.text += event.text;
      answer.thought += event.thought || "";
      answer.thoughtEnd = event.thought_end;
      answer.tokens.push(...event.tokens);
      changed();
    },
    done: (event) => {
      Object.assign(answer, {
        state: "done",
        text: event.text,
        thoughtEnd: event.thought_end,
        finished: event.finished,
        count: event.count,
        seconds: event.seconds,
        calls: event.calls,
        callErrors: event.call_errors,
      });
      changed();
    },
    problem: ({ error }) => {
      answer.state = "failed";
      answer.error = error;
      changed();
    },
  };
}

function numbers(answer) {
  const words = [];
  if (answer.count) words.push(`${number(answer.count)} tokens`);
  if (answer.seconds) words.push(`${number(answer.seconds)} s`);
  if (answer.count && answer.seconds) words.push(`${number(answer.count / answer.seconds)} tokens/s`);
  const names = { temperature: "temperature", top_p: "top-p", top_k: "top-k", seed: "seed", thinking: "thinking" };
  for (const [name, title] of Object.entries(names)) {
    const value = answer.settings && answer.settings[name];
    if (value !== null && value !== undefined && !(name === "top_k" && value === 0))
      words.push(`${title} ${name === "seed" ? value : number(value)}`);
  }
  return words.join(" · ");
}

const argumentsText = (call) => (typeof call.arguments === "string" ? call.arguments : JSON.stringify(call.arguments));

export class AnswerView {
  // `actions` has the functions regenerate, stop, and choose; choose is null if there is only one answer.
  constructor(answer, letter, title, actions) {
    this.answer = answer;
    this.actions = actions;
    this.tokens = null;
    this.status = element("span", { class: "small status-word", role: "status" });
    this.scores = element("span", { class: "scores num" });
    this.thoughtText = element("div", { class: "text", dir: "auto" });
    this.thought = element(
      "details",
      { class: "thought" },
      element("summary", { class: "small" }, "thought"),
      this.thoughtText,
    );
    this.text = element("div", { class: "text response", dir: "auto" });
    this.calls = element("div", { class: "calls" });
    this.end = element("div");
    this.numbers = element("p", { class: "small numbers" });
    this.probabilities = element("div");
    this.buttons = element("div", { class: "buttons" });
    this.node = element(
      "section",
      { class: "panel reply", "aria-label": `Answer ${letter}, ${title}`, tabindex: -1 },
      element(
        "div",
        { class: "reply-head" },
        element("b", { class: "letter" }, letter),
        element("span", { class: "model-name" }, title),
        element("span", { class: "grow" }),
        this.status,
        this.scores,
      ),
      this.thought,
      this.text,
      this.calls,
      this.end,
      this.numbers,
      this.probabilities,
      this.buttons,
    );
    this.update();
  }

  update() {
    const { answer } = this;
    const running = isRunning(answer);
    this.node.setAttribute("aria-busy", String(running));
    this.status.textContent = {
      waiting: `${answer.status}…`,
      streaming: "answering…",
      stopped: "stopped",
      failed: "failed",
      done: "",
    }[answer.state];
    this.status.classList.toggle("failed", answer.state === "failed");
    this.text.hidden = answer.state === "failed" && !answer.text;
    const thought = answer.thought + answer.text.slice(0, answer.thoughtEnd);
    this.thought.hidden = !thought;
    replace(this.thoughtText, thought);
    replace(this.text, answerText(answer));
    this.text.classList.toggle("growing", answer.state === "streaming");
    replace(
      this.scores,
      Object.entries(answer.scores).map(([name, score]) =>
        element(
          "span",
          { class: "reward-score", title: `score of ${name}` },
          score === null
            ? "scoring…"
            : [element("span", { class: "small" }, "score "), element("b", null, number(score))],
        ),
      ),
    );
    if (running) {
      replace(this.buttons, element("button", { type: "button", onclick: this.actions.stop }, "Stop"));
      return;
    }
    replace(
      this.calls,
      answer.calls.map((call) =>
        element("div", { class: "call" }, element("code", null, `${call.name}(${argumentsText(call)})`)),
      ),
      answer.callErrors.map((text) => element("div", { class: "call wrong" }, text)),
    );
    replace(
      this.end,
      answer.note ? element("p", { class: "small" }, answer.note) : null,
      answer.state === "failed" ? problem(answer.error) : null,
      answer.state === "done" && !answer.finished ? element("div", { class: "cut" }, "✂ cut at the token limit") : null,
    );
    replace(this.numbers, numbers(answer));
    replace(
      this.buttons,
      element("button", { type: "button", onclick: this.actions.regenerate }, "Again"),
      answer.tokens.length
        ? element(
            "button",
            {
              type: "button",
              class: "show-tokens",
              "aria-pressed": String(this.tokens !== null),
              onclick: () => this.toggleTokens(),
            },
            "Probabilities",
          )
        : null,
      this.actions.choose && isUsable(answer)
        ? element(
            "button",
            {
              type: "button",
              class: "choose",
              "aria-pressed": String(this.actions.isChosen()),
              title: "All models continue from this answer",
              onclick: this.actions.choose,
            },
            "Continue from this",
          )
        : null,
    );
  }

  toggleTokens() {
    this.tokens = this.tokens || !this.answer.tokens.length ? null : tokenView(this.answer.tokens);
    replace(this.probabilities, this.tokens && this.tokens.node);
    this.update();
  }
}

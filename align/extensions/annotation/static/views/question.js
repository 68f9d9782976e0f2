// Questions of a set: two answers side by side, and a verdict by one key. The next pair is loaded before it is needed.
//
// An answer stays in the browser's storage until the studio says that it is in the journal. A studio that was killed
// gets it when it is back, under the same id, so it is neither lost nor stored twice.
import { get, path, post } from "../api.js";
import { address } from "../app.js";
import { element, problem, replace } from "../dom.js";
import { setKeys } from "../keys.js";

const VERDICTS = [
  { key: "1", verdict: "much_better", choice: "left", text: "much better" },
  { key: "2", verdict: "better", choice: "left", text: "better" },
  { key: "3", verdict: "tie", choice: null, text: "tie" },
  { key: "4", verdict: "better", choice: "right", text: "better" },
  { key: "5", verdict: "much_better", choice: "right", text: "much better" },
  { key: "0", verdict: "both_bad", choice: null, text: "both bad" },
];
const RETRY = 1500; // ms
const LONGEST = 600; // seconds that a pair counts, so that a pause is not taken for thinking

const newId = () =>
  [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

class Questions {
  constructor(main, set, annotator) {
    this.set = set;
    this.annotator = annotator;
    this.store = `annotate.outbox.${set}.${annotator}`;
    this.outbox = JSON.parse(localStorage.getItem(this.store) || "[]");
    this.state = { question: null, following: null, done: 0, total: 0 };
    this.ended = false;
    this.sending = false;
    this.status = element("span", { class: "small", role: "status", id: "saved" });
    this.count = element("span", { class: "small num", id: "count" });
    this.meter = element("progress", { max: 1, value: "0", "aria-label": "Pairs answered" });
    this.message = element("div");
    this.hints = element("div", { id: "hints", role: "note" });
    this.body = element("div", { class: "question" });
    this.tags = element("input", {
      id: "tags",
      placeholder: "tags, separated by commas",
      "aria-label": "Tags",
      autocomplete: "off",
    });
    this.comment = element("input", {
      id: "comment",
      placeholder: "comment",
      "aria-label": "Comment",
      autocomplete: "off",
    });
    this.rewrite = element("textarea", {
      id: "rewrite",
      rows: "3",
      placeholder: "a better answer",
      "aria-label": "A better answer",
    });
    this.notes = element(
      "div",
      { class: "notes-row" },
      element("label", null, element("kbd", null, "t"), this.tags),
      element("label", null, element("kbd", null, "c"), this.comment),
      element("label", { class: "wide-note" }, element("kbd", null, "r"), this.rewrite),
    );
    for (const field of [this.tags, this.comment])
      field.addEventListener("keydown", (event) => {
        if (event.key === "Enter") field.blur();
      });
    this.buttons = VERDICTS.map((each) =>
      element(
        "button",
        {
          type: "button",
          class: "verdict",
          "aria-label": each.choice ? `${each.choice} is ${each.text}` : each.text,
          "data-key": each.key,
          onclick: () => this.answer(each),
        },
        element("kbd", null, each.key),
        element("span", null, each.choice === "left" ? "← " : "", each.text, each.choice === "right" ? " →" : ""),
      ),
    );
    this.others = element(
      "div",
      { class: "buttons" },
      element("button", { type: "button", id: "undo", onclick: () => this.undo() }, element("kbd", null, "u"), "undo"),
      element("button", { type: "button", id: "skip", onclick: () => this.skip() }, element("kbd", null, "s"), "skip"),
    );
    this.panel = element(
      "div",
      { class: "verdicts" },
      element("div", { class: "verdict-row" }, this.buttons),
      this.notes,
      this.others,
    );
    replace(
      main,
      element(
        "div",
        { class: "view-head" },
        element("h1", null, element("a", { href: address("annotate", [set]), class: "crumb" }, set), " / ", annotator),
        this.count,
        this.meter,
        element("span", { class: "grow" }),
        this.status,
      ),
      this.message,
      this.hints,
      this.body,
      this.panel,
    );
    setKeys(main, [
      ...VERDICTS.map((each) => ({
        keys: [each.key],
        does: each.choice ? `the ${each.choice} answer is ${each.text}` : each.text,
        run: () => this.answer(each),
      })),
      { keys: ["t"], does: "tags", run: () => this.tags.focus() },
      { keys: ["c"], does: "comment", run: () => this.comment.focus() },
      { keys: ["r"], does: "write a better answer", run: () => this.rewrite.focus() },
      { keys: ["u"], does: "undo", run: () => this.undo() },
      { keys: ["s"], does: "skip", run: () => this.skip() },
      {
        keys: ["q"],
        does: "the report of the set",
        run: () => {
          location.hash = address("annotate", [set]);
        },
      },
    ]);
    this.warn = (event) => {
      if (this.outbox.length) event.preventDefault();
    };
    addEventListener("beforeunload", this.warn);
  }

  // ---- what is shown ----

  draw() {
    const { question, done, total } = this.state;
    const waiting = this.outbox.length;
    this.count.textContent = `${Math.min(total, done + waiting)} of ${total}`;
    this.meter.max = Math.max(1, total);
    this.meter.value = done + waiting;
    this.status.textContent = waiting ? `${waiting} not saved yet` : done ? "saved ✓" : "";
    this.status.classList.toggle("lost", waiting > 1);
    const shown = question ? question.pair : waiting ? "waiting" : "end";
    this.panel.hidden = !question;
    if (this.shown === shown) return;
    this.shown = shown;
    this.started = performance.now();
    for (const field of [this.tags, this.comment, this.rewrite]) field.value = "";
    if (document.activeElement && this.notes.contains(document.activeElement)) document.activeElement.blur();
    if (!question) {
      replace(
        this.body,
        element(
          "section",
          { class: "panel" },
          element(
            "p",
            null,
            waiting ? "Waiting for the studio…" : "No question is left. ",
            !waiting && element("a", { href: address("annotate", [this.set]) }, "Report"),
          ),
        ),
      );
      return;
    }
    const side = (name, text) =>
      element(
        "section",
        { class: "panel answer", "aria-label": `${name} answer`, tabindex: "0" },
        element("div", { class: "role" }, name),
        element("div", { class: "text" }, text),
      );
    replace(
      this.body,
      element(
        "section",
        { class: "panel prompt", tabindex: "0", "aria-label": "Prompt" },
        question.prompt.map((message) =>
          element(
            "div",
            { class: "turn" },
            element("div", { class: "role" }, message.role),
            element("div", { class: "text" }, message.content),
          ),
        ),
      ),
      element("div", { class: "sides" }, side("left", question.left), side("right", question.right)),
    );
  }

  // The state after the question on the screen is answered, as far as this page knows.
  advance() {
    this.state = { ...this.state, question: this.state.following, following: null };
  }

  accept(state) {
    const { question } = this.state;
    this.state = state;
    replace(this.hints, ...state.notes.map((text) => element("p", { class: "small" }, text)));
    // Answers that the studio does not have yet are answered all the same.
    const answered = new Set(this.outbox.map((each) => each.pair));
    while (this.state.question && answered.has(this.state.question.pair)) {
      answered.delete(this.state.question.pair);
      this.advance();
    }
    // The question on the screen stays, unless the studio asks another question.
    if (question && this.state.question && question.pair === this.state.question.pair) this.state.question = question;
    this.draw();
  }

  // ---- what an annotator does ----

  answer({ key, verdict, choice }) {
    const question = this.state.question;
    if (!question || this.outbox.length > 1) return;
    const seconds = Math.min(LONGEST, (performance.now() - this.started) / 1000);
    const tags = this.tags.value
      .split(",")
      .map((tag) => tag.trim())
      .filter(Boolean);
    this.outbox.push({
      id: newId(),
      annotator: this.annotator,
      pair: question.pair,
      verdict,
      choice,
      tags,
      rewrite: this.rewrite.value,
      comment: this.comment.value,
      seconds,
    });
    this.keep();
    for (const button of this.buttons) button.classList.toggle("pressed", button.dataset.key === key);
    setTimeout(() => this.buttons.forEach((button) => button.classList.remove("pressed")), 180);
    this.advance();
    this.draw();
    this.send();
  }

  keep() {
    if (this.outbox.length) localStorage.setItem(this.store, JSON.stringify(this.outbox));
    else localStorage.removeItem(this.store);
  }

  async send() {
    if (this.sending) return;
    this.sending = true;
    while (this.outbox.length && !this.ended) {
      try {
        const state = await post(path("annotate", this.set, "answers"), this.outbox[0]);
        this.outbox.shift();
        this.keep();
        replace(this.message);
        this.accept(state);
      } catch (error) {
        // A refusal is final: repeating it would block the answers after it.
        const isFinal = error.status >= 400 && error.status < 500 && ![401, 408, 429].includes(error.status);
        replace(this.message, problem(isFinal ? error : `${error.message} The answer is kept here and sent again.`));
        if (isFinal) {
          this.outbox.shift();
          this.keep();
          await this.load();
        } else {
          await new Promise((resolve) => setTimeout(resolve, RETRY));
        }
      }
    }
    this.sending = false;
  }

  async act(name) {
    if (this.outbox.length) return;
    try {
      const state = await post(path("annotate", this.set, name), {
        annotator: this.annotator,
        pair: this.state.question ? this.state.question.pair : "",
      });
      replace(this.message);
      this.shown = null;
      this.accept(state);
    } catch (error) {
      replace(this.message, problem(error));
    }
  }
  undo() {
    return this.act("undo");
  }
  skip() {
    return this.state.question ? this.act("skip") : null;
  }

  async load() {
    this.accept(await get(path("annotate", this.set, "questions"), { annotator: this.annotator }));
  }

  end() {
    this.ended = true;
    removeEventListener("beforeunload", this.warn);
  }
}

export async function show(main, set, annotator) {
  if (!annotator) {
    location.hash = address("annotate", [set]);
    return null;
  }
  const questions = new Questions(main, set, annotator);
  await questions.load();
  questions.send();
  return () => questions.end();
}

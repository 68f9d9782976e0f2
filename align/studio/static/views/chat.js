// Chat: one to four checkpoints or endpoints answer the same conversation, side by side. Each reply is a request of its
// own: closing it, or the page, ends the reply.
import { get, post, postStream } from "../api.js";
import { readAddress } from "../app.js";
import { AnswerView, isRunning, isUsable, answerText, newAnswer, readReply } from "../chat/answer.js";
import { download, keep, messagesBefore, restore, showModels } from "../chat/conversation.js";
import { columnTitle, LETTERS, MOST, requestSettings, Setup } from "../chat/setup.js";
import { sendForm } from "../chat/send.js";
import { element, problem, replace, useStyle } from "../dom.js";
import { setKeys } from "../keys.js";

class Chat {
  constructor(main, state, lists) {
    this.state = state;
    this.lists = lists;
    this.running = new Map(); // answer → its AbortController
    this.views = new Map(); // answer → its AnswerView
    this.editing = null;
    this.setup = new Setup(state, lists, (what) => this.change(what));
    this.thread = element("div", { class: "chat-thread" });
    this.message = element("div");
    this.input = element("textarea", {
      id: "message",
      rows: 2,
      placeholder: "Message",
      "aria-label": "Message",
      dir: "auto",
    });
    this.button = element("button", { type: "submit", id: "send", class: "primary" }, "Send");
    this.stopButton = element(
      "button",
      { type: "button", id: "stop", hidden: true, onclick: () => this.stop() },
      "Stop",
    );
    this.hint = element("span", { class: "small composer-hint" }, "Enter sends, Shift+Enter begins a line");
    this.composer = element(
      "form",
      { class: "composer" },
      this.message,
      element(
        "div",
        { class: "composer-row" },
        this.input,
        element("div", { class: "composer-buttons" }, this.button, this.stopButton),
      ),
      this.hint,
    );
    this.composer.addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.input.addEventListener("keydown", (event) => this.type(event));
    replace(
      main,
      element(
        "div",
        { class: "view-head" },
        element("h1", null, "Chat"),
        element("span", { class: "small" }, "Models answer the same conversation."),
        element("span", { class: "grow" }),
        element(
          "div",
          { class: "buttons" },
          element("button", { type: "button", id: "new", onclick: () => this.clear() }, "New"),
          element("button", { type: "button", id: "keep", onclick: () => download(this.state) }, "Save as JSON"),
        ),
      ),
      this.setup.node,
      this.thread,
      this.composer,
    );
    this.draw();
  }

  // ---- the conversation ----

  change(what) {
    if (what === "columns") this.draw();
    if (what === "reward") this.scoreTurn(this.last());
    this.keep();
  }

  last() {
    return this.state.turns[this.state.turns.length - 1];
  }

  type(event) {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      this.send();
    } else if (event.key === "Escape" && (this.running.size || this.editing !== null)) {
      event.preventDefault();
      if (this.running.size) this.stop();
      else this.edit(null);
    }
  }

  send() {
    const text = this.input.value;
    if (!this.state.columns.length) return this.tell("Choose a model first.");
    if (!text.trim()) return this.input.focus();
    if (this.running.size) return this.tell("Wait for the answers, or stop them with Esc.");
    this.tell(null);
    if (this.editing !== null) this.state.turns.length = this.editing;
    this.editing = null;
    this.input.value = "";
    this.state.turns.push({ text, answers: {}, chosen: null });
    this.draw();
    this.answer(this.state.columns);
    return null;
  }

  // Asks columns for their answers to the last turn.
  answer(columns) {
    const turn = this.last();
    for (const column of columns) turn.answers[column.id] = { ...newAnswer(), title: columnTitle(column) };
    if (columns.some((column) => column.id === turn.chosen)) turn.chosen = null;
    this.draw();
    for (const column of columns) this.ask(column, turn, turn.answers[column.id]);
    this.thread.lastElementChild.scrollIntoView({ block: "nearest" });
  }

  async ask(column, turn, answer) {
    const controller = new AbortController();
    this.running.set(answer, controller);
    this.showRunning();
    const number = this.state.turns.indexOf(turn);
    const body = {
      ...(column.endpoint ? { endpoint: column.endpoint } : { model: column.model }),
      messages: messagesBefore(this.state, number, column),
      ...requestSettings(this.state.settings),
    };
    try {
      await postStream(
        "chat/reply",
        body,
        readReply(answer, () => this.refresh(answer)),
        controller.signal,
      );
      if (controller.signal.aborted) answer.state = "stopped";
      else if (isRunning(answer))
        Object.assign(answer, { state: "failed", error: "The answer was cut off. Is `align studio` still running?" });
    } catch (error) {
      Object.assign(answer, { state: "failed", error: error.message || String(error) });
    }
    this.running.delete(answer);
    this.showRunning();
    this.refresh(answer);
    this.keep();
    if (!this.running.size && this.state.turns.includes(turn)) this.drawSend(turn);
    this.score(turn, column, answer);
  }

  stop(answers = [...this.running.keys()]) {
    for (const answer of answers) if (this.running.has(answer)) this.running.get(answer).abort();
  }

  again(columns = this.state.columns) {
    const turn = this.last();
    if (!turn || !columns.length) return;
    this.stop(columns.map((column) => turn.answers[column.id]).filter(Boolean));
    this.answer(columns);
  }

  edit(number) {
    if (this.running.size) this.stop();
    this.editing = number;
    this.input.value = number === null ? "" : this.state.turns[number].text;
    this.button.textContent = number === null ? "Send" : "Send again";
    this.tell(null);
    this.markEdited();
    this.input.focus();
  }

  choose(turn, column) {
    turn.chosen = turn.chosen === column.id ? null : column.id;
    for (const answer of Object.values(turn.answers)) if (this.views.has(answer)) this.views.get(answer).update();
    this.keep();
  }

  clear() {
    this.stop();
    this.state.turns = [];
    this.editing = null;
    this.draw();
    this.keep();
    this.input.focus();
  }

  // ---- scores ----

  scoreTurn(turn) {
    if (turn) for (const column of this.state.columns) this.score(turn, column, turn.answers[column.id]);
  }

  async score(turn, column, answer) {
    const { reward } = this.state.settings;
    if (!answer || !isUsable(answer)) return;
    if (!reward || !answerText(answer).trim()) {
      answer.scores = {};
      this.refresh(answer);
      return;
    }
    const number = this.state.turns.indexOf(turn);
    if (number < 0) return;
    answer.scores = { [reward]: null };
    this.refresh(answer);
    const { tools } = requestSettings(this.state.settings);
    try {
      const { scores } = await post("chat/scores", {
        reward,
        messages: messagesBefore(this.state, number, column),
        answers: [[answerText(answer), answer.state === "done" && answer.finished]],
        ...(tools ? { tools } : {}),
      });
      answer.scores = this.state.settings.reward === reward ? { [reward]: scores[0] } : {};
    } catch (error) {
      answer.scores = {};
      this.tell(error);
    }
    this.refresh(answer);
    this.keep();
  }

  // ---- the page ----

  tell(error) {
    replace(this.message, error ? problem(error) : null);
  }

  refresh(answer) {
    if (answer.frame) return;
    answer.frame = requestAnimationFrame(() => {
      answer.frame = 0;
      const view = this.views.get(answer);
      const follows = innerHeight + scrollY >= document.documentElement.scrollHeight - 60;
      if (view) view.update();
      if (follows && isRunning(answer)) scrollTo({ top: document.documentElement.scrollHeight });
    });
  }

  showRunning() {
    this.stopButton.hidden = this.running.size === 0;
    this.button.disabled = this.running.size > 0;
  }

  draw() {
    const { columns, turns } = this.state;
    this.views.clear();
    this.button.textContent = "Send";
    if (!turns.length) {
      replace(
        this.thread,
        element(
          "p",
          { class: "empty" },
          columns.length
            ? "Write a message."
            : this.lists.models.length
              ? "Choose up to four models, and write a message."
              : "No finished stage of this store has a model. Add an endpoint.",
        ),
      );
      return;
    }
    replace(
      this.thread,
      turns.map((turn, number) => this.turnNode(turn, number)),
    );
    this.drawSend(this.last());
  }

  turnNode(turn, number) {
    const isLast = number === this.state.turns.length - 1;
    const shown = this.state.columns.filter((column) => turn.answers[column.id]);
    const answers = shown.map((column) => {
      const answer = turn.answers[column.id];
      const view = new AnswerView(answer, LETTERS[this.state.columns.indexOf(column)], answer.title, {
        stop: () => this.stop([answer]),
        regenerate: () => this.again([column]),
        choose: shown.length > 1 ? () => this.choose(turn, column) : null,
        isChosen: () => turn.chosen === column.id,
        isLast,
      });
      this.views.set(answer, view);
      return view.node;
    });
    return element(
      "div",
      { class: "chat-turn", "data-number": number },
      element(
        "section",
        { class: "said user", "aria-label": "Message" },
        element(
          "div",
          { class: "said-head" },
          element("span", { class: "role" }, "user"),
          element("button", { type: "button", class: "link small", onclick: () => this.edit(number) }, "Edit"),
        ),
        element("div", { class: "text", dir: "auto" }, turn.text),
      ),
      element("div", { class: `replies of-${answers.length}` }, answers),
      isLast ? element("div", { class: "send-pair" }) : null,
    );
  }

  markEdited() {
    for (const node of this.thread.children)
      if (node.dataset)
        node.classList.toggle("replaced", this.editing !== null && Number(node.dataset.number) >= this.editing);
  }

  // The form that adds two answers to a set of annotations, if both answered the same messages.
  drawSend(turn) {
    const place = this.thread.querySelector(".send-pair");
    if (!place) return;
    const number = this.state.turns.indexOf(turn);
    const answered = this.state.columns.filter((column) => isUsable(turn.answers[column.id]));
    replace(
      place,
      !this.running.size && answered.length > 1
        ? sendForm({
            columns: answered.map((column) => ({
              letter: LETTERS[this.state.columns.indexOf(column)],
              title: columnTitle(column),
              answer: turn.answers[column.id],
              prompt: messagesBefore(this.state, number, column),
            })),
            tools: requestSettings(this.state.settings).tools,
            sets: this.lists.sets,
          })
        : null,
    );
  }

  // ---- keeping ----

  keep() {
    keep(this.state);
  }

  keys() {
    const focus = (selector) => {
      const node = this.thread.querySelector(selector);
      if (node) node.focus();
    };
    setKeys(this.thread, [
      { keys: ["i", "/"], does: "write a message", run: () => this.input.focus() },
      { keys: ["Escape"], does: "stop the answers, also while writing", run: () => this.stop() },
      { keys: ["r"], does: "answer again", run: () => this.again() },
      {
        keys: ["e"],
        does: "edit the last message",
        run: () => {
          if (this.last()) this.edit(this.state.turns.length - 1);
        },
      },
      { keys: ["p"], does: "probabilities of the last answers", run: () => this.toggleTokens() },
      { keys: ["a"], does: "send two answers to annotation", run: () => focus(".send-pair input") },
      { keys: ["m"], does: "add a model", run: () => this.setup.picker.focus() },
      { keys: ["s"], does: "settings and system prompt", run: () => this.setup.toggleSettings() },
      { keys: ["n"], does: "new conversation", run: () => this.clear() },
      { keys: ["k"], does: "save as JSON", run: () => download(this.state) },
    ]);
  }

  toggleTokens() {
    const turn = this.last();
    const shown = turn
      ? this.state.columns
          .map((column) => this.views.get(turn.answers[column.id]))
          .filter((view) => view && view.answer.tokens.length && !isRunning(view.answer))
      : [];
    const isOpen = shown.some((view) => view.tokens);
    for (const view of shown) if (Boolean(view.tokens) === isOpen) view.toggleTokens();
    const opened = shown.find((view) => view.tokens);
    if (opened) opened.tokens.focus();
  }

  end() {
    this.stop();
    this.keep();
  }
}

export async function show(main) {
  useStyle("chat");
  const [models, sets] = await Promise.all([get("chat"), get("annotate").catch(() => ({ sets: [] }))]);
  const state = restore();
  showModels(state, (readAddress().query.models || "").split(",").filter(Boolean).slice(0, MOST));
  const chat = new Chat(main, state, { ...models, sets: sets.sets.map((set) => set.name) });
  chat.keys();
  if (state.columns.length) chat.input.focus({ preventScroll: true });
  return () => chat.end();
}

// A conversation: its messages, its copy that survives a reload of the page, and its download.
import { element } from "../dom.js";
import { isRunning, isUsable } from "./answer.js";

const STORE = "chat.conversation";
const LARGEST = 4e6; // characters that a browser keeps for a page

export function restore() {
  try {
    const state = JSON.parse(sessionStorage.getItem(STORE));
    for (const turn of state.turns)
      for (const answer of Object.values(turn.answers)) if (isRunning(answer)) answer.state = "stopped";
    return state;
  } catch (error) {
    return { columns: [], turns: [], settings: {} };
  }
}

// The answer of a turn that a column's conversation continues from; null if it has none.
function continuedAnswer(turn, column) {
  const own = turn.answers[turn.chosen || column.id];
  if (isUsable(own)) return own;
  return Object.values(turn.answers).find(isUsable) || null;
}

// The messages before a column's answer to turn number `count`, that turn's own message included.
export function messagesBefore(state, count, column) {
  const { system } = state.settings;
  const messages = system && system.trim() ? [{ role: "system", content: system }] : [];
  for (const turn of state.turns.slice(0, count)) {
    const answer = continuedAnswer(turn, column);
    if (answer) messages.push({ role: "user", content: turn.text }, { role: "assistant", content: answer.text });
  }
  return [...messages, { role: "user", content: state.turns[count].text }];
}

// Replaces the models by those of an address, and begins a new conversation if they differ.
export function showModels(state, ids) {
  const current = new Set(state.columns.map((column) => column.model));
  if (!ids.length || (ids.length === state.columns.length && ids.every((id) => current.has(id)))) return;
  state.columns = ids.map((model, index) => ({ id: `c${Date.now()}${index}`, model }));
  state.turns = [];
}

export function keep(state) {
  const text = JSON.stringify(state, (name, value) => (name === "frame" ? undefined : value));
  try {
    if (text.length < LARGEST) sessionStorage.setItem(STORE, text);
  } catch (error) {
    // The page works without its copy; only a reload loses the conversation.
  }
}

// Downloads a conversation as JSON.
export function download({ columns, turns, settings }) {
  const { open, ...kept } = settings;
  const models = columns.map((column) => (column.endpoint ? { endpoint: column.endpoint } : { model: column.model }));
  const conversation = turns.map((turn) => ({
    user: turn.text,
    answers: columns
      .filter((column) => turn.answers[column.id])
      .map((column) => {
        const { frame, status, title, ...answer } = turn.answers[column.id];
        return { model: title, continued: turn.chosen === column.id, ...answer };
      }),
  }));
  const text = JSON.stringify(
    { saved: new Date().toISOString(), models, settings: kept, turns: conversation },
    null,
    1,
  );
  const link = element("a", {
    download: `chat-${new Date().toISOString().slice(0, 19).replace(/[:T]/g, "-")}.json`,
    href: URL.createObjectURL(new Blob([text], { type: "application/json" })),
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

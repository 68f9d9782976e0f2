// The models of a conversation, and the settings of their replies.
import { element, problem, replace } from "../dom.js";

export const MOST = 4;
export const LETTERS = ["A", "B", "C", "D"];

const FIELDS = [
  ["temperature", "Temperature", { type: "number", min: 0, max: 5, step: "any", placeholder: "checkpoint's" }],
  ["top_p", "Top-p", { type: "number", min: 0.001, max: 1, step: "any", placeholder: "checkpoint's" }],
  ["max_tokens", "Tokens at most", { type: "number", min: 1, max: 32768, step: 1, placeholder: "512" }],
  ["seed", "Seed", { type: "number", min: 0, max: 2147483647, step: 1, placeholder: "random" }],
];

export function columnTitle(column) {
  return column.endpoint ? column.endpoint.model : column.model;
}

// The settings as a request has them: an empty field is left to the checkpoint.
export function requestSettings(settings) {
  const value = {};
  for (const [name] of FIELDS)
    if (settings[name] !== "" && settings[name] !== undefined) value[name] = Number(settings[name]);
  if (settings.thinking) value.thinking = settings.thinking;
  if (settings.tools && settings.tools.trim()) value.tools = settings.tools;
  return value;
}

const option = (value, text, chosen) => element("option", { value, selected: value === chosen }, text);

export class Setup {
  // `state` has columns and settings; `changed` is called after the user has changed them.
  constructor(state, lists, changed) {
    this.state = state;
    this.lists = lists;
    this.changed = changed;
    this.chips = element("div", { class: "model-chips" });
    this.message = element("div");
    this.picker = element("select", { id: "add-model", "aria-label": "Add a model", onchange: () => this.pick() });
    this.node = element(
      "section",
      { class: "panel chat-setup" },
      element("div", { class: "setup-row" }, this.chips, this.picker, this.rewardField()),
      this.message,
      this.endpointForm(),
      this.settingsFields(),
    );
    this.draw();
  }

  draw() {
    const { columns } = this.state;
    replace(
      this.chips,
      columns.map((column, index) =>
        element(
          "span",
          { class: "chip model" },
          element("b", { class: "letter" }, LETTERS[index]),
          " ",
          columnTitle(column),
          column.endpoint ? element("span", { class: "small" }, ` at ${column.endpoint.url}`) : null,
          element(
            "button",
            {
              type: "button",
              class: "remove-model",
              "aria-label": `Remove ${columnTitle(column)}`,
              onclick: () => this.remove(column),
            },
            "×",
          ),
        ),
      ),
    );
    replace(
      this.picker,
      option("", columns.length ? "Add a model…" : "Choose a model…", ""),
      this.lists.models.map((model) => option(model.id, model.id + (model.loaded ? " (in memory)" : ""), "")),
    );
    this.picker.disabled = columns.length >= MOST;
    this.endpointButton.disabled = columns.length >= MOST;
  }

  pick() {
    const id = this.picker.value;
    this.picker.value = "";
    if (id) this.add({ model: id });
  }
  add(column) {
    if (this.state.columns.length >= MOST) return;
    this.state.columns.push({ id: `c${Date.now()}${Math.floor(Math.random() * 1e6)}`, ...column });
    this.draw();
    this.changed("columns");
  }
  remove(column) {
    this.state.columns.splice(this.state.columns.indexOf(column), 1);
    this.draw();
    this.changed("columns");
  }

  rewardField() {
    const { settings } = this.state;
    const select = element(
      "select",
      {
        id: "reward",
        onchange: () => {
          settings.reward = select.value;
          this.changed("reward");
        },
      },
      option("", "no scores", settings.reward),
      this.lists.rewards.map((reward) => option(reward.id, reward.id, settings.reward)),
    );
    return element("label", { class: "reward-field" }, "Scores by ", select);
  }

  endpointForm() {
    const field = (name, title, attributes) =>
      element("label", null, title, element("input", { name, autocomplete: "off", ...attributes }));
    this.endpointButton = element("button", { type: "submit" }, "Add the endpoint");
    const form = element(
      "form",
      { class: "controls endpoint-form" },
      field("url", "Address, up to /v1", { type: "url", required: true, placeholder: "http://127.0.0.1:8000/v1" }),
      field("model", "Model", { required: true }),
      field("key_variable", "Variable with the key", { placeholder: "none", pattern: "[A-Za-z_][A-Za-z0-9_]*" }),
      element(
        "label",
        { class: "check" },
        element("input", { type: "checkbox", name: "logprobs" }),
        " ask for probabilities",
      ),
      this.endpointButton,
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const data = new FormData(form);
      replace(this.message);
      this.add({
        endpoint: {
          url: data.get("url").trim(),
          model: data.get("model").trim(),
          key_variable: data.get("key_variable").trim(),
          logprobs: data.get("logprobs") !== null,
        },
      });
    });
    return element(
      "details",
      { class: "more-setup" },
      element("summary", null, "An endpoint"),
      element(
        "p",
        { class: "small" },
        "Only the name of the environment variable is sent and kept. ",
        "The studio reads the key from its own environment.",
      ),
      form,
    );
  }

  settingsFields() {
    const { settings } = this.state;
    const keep = (name) => (event) => {
      settings[name] = event.target.value;
      this.changed("settings");
    };
    const inputs = FIELDS.map(([name, title, attributes]) =>
      element(
        "label",
        null,
        title,
        element("input", { name, value: settings[name] ?? "", ...attributes, oninput: keep(name) }),
      ),
    );
    const thinking = element(
      "select",
      { name: "thinking", onchange: keep("thinking") },
      option("", "checkpoint's", settings.thinking || ""),
      option("on", "on", settings.thinking),
      option("off", "off", settings.thinking),
    );
    const area = (name, title, rows, placeholder) =>
      element(
        "label",
        { class: "wide-field" },
        title,
        element("textarea", { name, rows, placeholder, value: settings[name] || "", oninput: keep(name) }),
      );
    this.settings = element(
      "details",
      { class: "more-setup", open: settings.open || null },
      element("summary", null, "Settings and system prompt"),
      element("div", { class: "controls" }, inputs, element("label", null, "Thinking", thinking)),
      area("system", "System prompt", 2, "none"),
      area(
        "tools",
        "Tools, a JSON list of functions",
        2,
        '[{"type": "function", "function": {"name": …, "parameters": {…}}}]',
      ),
    );
    this.settings.addEventListener("toggle", () => {
      settings.open = this.settings.open;
      this.changed("settings");
    });
    return this.settings;
  }

  toggleSettings() {
    this.settings.open = !this.settings.open;
    if (this.settings.open) this.settings.querySelector("input").focus();
  }

  tell(error) {
    replace(this.message, error ? problem(error) : null);
  }
}

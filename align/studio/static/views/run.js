// One run: its graph, progress, alarms, and a stage's curves, log and settings, which follow the run while it works.
import { get, path, post, stream } from "../api.js";
import { address, showConnection } from "../app.js";
import { MOST } from "../chat/setup.js";
import { ago, element, moment, problem, replace, update } from "../dom.js";
import { setKeys } from "../keys.js";
import { showPanels } from "../panels.js";
import { alarmList, drawGraph, healthTable, progressRows, rowLink, settingsBlock, stageTable } from "../runs/parts.js";
import { stateChip } from "./runs.js";

// Milliseconds.
const CURVE_PAUSE = 4000;
const LOG_PAUSE = 1500;
const LOOK_EVERY = 1500;
const TABS = ["curves", "log", "settings"];
const ALL_RUNS = {
  keys: ["u", "Escape"],
  does: "all runs",
  run: () => {
    location.hash = address("runs");
  },
};

function confirmed(text, action) {
  return new Promise((resolve) => {
    const dialog = element(
      "dialog",
      { class: "keys" },
      element("p", null, text),
      element(
        "div",
        { class: "buttons" },
        element("button", { type: "button", class: "danger", onclick: () => dialog.close("yes") }, action),
        element("button", { type: "button", onclick: () => dialog.close("") }, "Cancel"),
      ),
    );
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes");
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

// Chat compares at most four models; the last stages of a run are the trained ones.
function chatAddress(models) {
  return address("chat", [], { models: models.slice(-MOST).join(",") });
}

class RunPage {
  constructor(main, name, query) {
    this.name = name;
    this.stage = query.stage || null;
    this.tab = [...TABS, "console"].includes(query.tab) ? query.tab : null;
    this.run = null;
    this.loaded = {};
    this.step = null; // the step that was read off a curve last
    this.ended = false;
    this.head = element("div", { class: "view-head" });
    this.notice = element("div");
    this.progress = element("div");
    this.graph = element("div", { class: "scroll" });
    this.alarms = element("div");
    this.stages = element("div");
    this.tabs = element("div", { class: "tabs", role: "tablist", "aria-label": "Stage" });
    this.body = element("div", { class: "tab-body" });
    replace(
      main,
      this.head,
      this.notice,
      element("section", { class: "panel" }, this.graph, this.progress),
      element("section", { class: "panel" }, this.tabs, this.body),
      this.alarms,
      this.stages,
    );
  }

  show(run) {
    this.run = run;
    const names = run.stages.map((stage) => stage.stage);
    if (!names.includes(this.stage)) this.stage = this.firstStage();
    if (this.tab === null) this.tab = this.firstTab();
    const isActive = run.stages.some((stage) => stage.state === "runs" || stage.state === "waits");
    const isDone = run.stages.every((stage) => stage.state === "done");
    const models = run.stages.filter((stage) => stage.can_chat).map((stage) => `${run.name}:${stage.stage}`);
    document.title = `${run.name} · align studio`;
    update(
      this.head,
      [run.name, run.title, run.description, run.when, run.page, models, isActive, isDone, ago(run.when)],
      () => [
        element("h1", null, element("a", { href: address("runs"), class: "crumb" }, "Runs"), " / ", run.name),
        element(
          "span",
          { class: "small" },
          run.title !== run.name ? run.title : "",
          " started ",
          element("time", { title: moment(run.when) }, ago(run.when)),
        ),
        element("span", { class: "grow" }),
        models.length > 0 && element("a", { href: chatAddress(models), id: "chat" }, "Chat with its models"),
        run.page && element("a", { href: run.page, target: "_blank", rel: "noopener" }, "Report page"),
        element(
          "button",
          { type: "button", class: "action", id: "report", onclick: () => this.writeReport() },
          run.page ? "Write it again" : "Write the report page",
        ),
        isActive &&
          element("button", { type: "button", class: "action danger", id: "stop", onclick: () => this.stop() }, "Stop"),
        !isActive &&
          !isDone &&
          element("button", { type: "button", class: "action", id: "resume", onclick: () => this.resume() }, "Resume"),
        run.description ? element("p", { class: "small description" }, run.description) : null,
      ],
    );
    update(this.graph, [run.graph, this.stage], () => drawGraph(run.graph, this.stage, (stage) => this.choose(stage)));
    update(
      this.progress,
      run.stages.map((stage) => stage.progress),
      () => progressRows(run.stages),
    );
    update(this.alarms, [run.health, run.stages.map((stage) => stage.warnings)], () => [
      healthTable(run.health),
      alarmList(run.name, run.stages),
    ]);
    update(
      this.stages,
      [run.stages.map((stage) => [stage.state, stage.what, stage.cost, stage.warnings.length]), this.stage],
      () => stageTable(run.stages, this.stage, (stage) => this.choose(stage)),
    );
    this.showTabs();
    this.load();
  }

  firstStage() {
    const stages = this.run.stages;
    const find = (...states) => stages.find((stage) => states.includes(stage.state));
    const chosen =
      find("runs") ||
      find("failed", "damaged", "stopped") ||
      [...stages].reverse().find((stage) => stage.has_curves) ||
      stages[0];
    return chosen ? chosen.stage : null;
  }

  // A stage that failed without curves has its reason in the log.
  firstTab() {
    const stage = this.current();
    return stage && !stage.has_curves && ["failed", "damaged", "stopped", "runs"].includes(stage.state)
      ? "log"
      : "curves";
  }

  current() {
    return this.run.stages.find((stage) => stage.stage === this.stage);
  }

  choose(stage, tab = this.tab) {
    if (stage !== this.stage) this.step = null;
    this.stage = stage;
    this.tab = tab;
    // The address tells where the reader is, without a new view.
    history.replaceState(null, "", address("runs", [this.name], { stage, tab: tab === "curves" ? "" : tab }));
    this.show(this.run);
  }

  move(by) {
    const names = this.run.stages.map((stage) => stage.stage);
    this.choose(names[(names.indexOf(this.stage) + by + names.length) % names.length]);
  }

  showTabs() {
    const tabs = this.run.console ? [...TABS, "console"] : TABS;
    const stage = this.current();
    if (!stage) return;
    const state = ["failed", "damaged"].includes(stage.state)
      ? problem(stage.what)
      : element("span", { class: "small" }, stage.what);
    update(this.tabs, [this.stage, this.tab, tabs, stage.state, stage.what], () => [
      element("h2", null, this.stage),
      stateChip(stage.state),
      state,
      element("span", { class: "grow" }),
      tabs.map((tab) =>
        element(
          "button",
          {
            type: "button",
            role: "tab",
            "aria-selected": String(tab === this.tab),
            onclick: () => this.choose(this.stage, tab),
          },
          tab,
        ),
      ),
    ]);
  }

  // Loads the tab again if its file has changed, and not too often.
  async load() {
    const stage = this.current();
    if (!stage) return;
    const version = JSON.stringify(
      { curves: stage.events, log: stage.log, console: this.run.console, settings: stage.state }[this.tab],
    );
    const what = `${this.stage} ${this.tab}`;
    const pause = this.tab === "curves" ? CURVE_PAUSE : LOG_PAUSE;
    const { loaded } = this;
    if (loaded.what === what && (loaded.version === version || loaded.busy || Date.now() - loaded.time < pause)) return;
    const isNew = loaded.what !== what;
    const turn = (this.loaded = { what, version, time: Date.now(), busy: true });
    if (isNew) replace(this.body, element("p", { class: "small" }, "…"));
    try {
      const base =
        this.tab === "console"
          ? path("runs", this.name, "console")
          : path("runs", this.name, "stages", this.stage, this.tab);
      const value = await get(base);
      if (this.loaded === turn && !this.ended) this.fill(value, isNew);
    } catch (error) {
      if (this.loaded === turn) replace(this.body, problem(error));
    } finally {
      turn.busy = false;
    }
  }

  fill(value, isNew) {
    if (this.tab === "curves") this.fillCurves(value);
    else if (this.tab === "settings") replace(this.body, settingsBlock(value));
    else this.fillLog(value, isNew);
  }

  fillCurves(value) {
    if (!value.panels.length) {
      replace(this.body, element("p", { class: "small" }, "This stage has no curves yet."));
      return;
    }
    let node = this.body.querySelector(".all-panels");
    if (!node) {
      node = element("div", { class: "all-panels" });
      const rows = element("p", { class: "small rows-link", role: "status" });
      if (this.current().has_rollouts) {
        node.addEventListener("curve-step", (event) => {
          this.step = Math.ceil(Math.round(event.detail) / node.stepsPerUpdate); // its update
          replace(rows, rowLink(this.name, this.stage, this.step), " ", element("kbd", null, "o"));
        });
      }
      replace(
        this.body,
        node,
        rows,
        element(
          "p",
          { class: "small hint" },
          "Point at a curve, or press ← → on a focused curve, to read its values. ",
          "⤢, a double click or Enter enlarges it.",
        ),
        value.left_out.length ? element("p", { class: "small" }, `Not drawn: ${value.left_out.join(", ")}`) : null,
        (value.changes || []).map(({ x, text }) =>
          element("p", { class: "small" }, `After step ${x} (dotted line): ${text}`),
        ),
        value.averaged > 1
          ? element("p", { class: "small" }, `A point is the mean of up to ${value.averaged} logged steps.`)
          : null,
      );
    }
    node.stepsPerUpdate = value.steps_per_update;
    // A reader who points at a panel keeps it; the next change comes later.
    if (!showPanels(node, this.stage, value.panels, value.changes)) this.loaded.version = null;
  }

  fillLog(value, isNew) {
    let box = this.body.querySelector("pre.log");
    if (!box) {
      box = element("pre", { class: "log", tabindex: 0 });
      replace(
        this.body,
        value.path &&
          element("p", { class: "small" }, element("code", null, value.path), value.is_cut ? " (its end)" : ""),
        box,
      );
    }
    const wasAtEnd = isNew || box.scrollHeight - box.scrollTop - box.clientHeight < 30;
    replace(box, value.text || "The log is empty.");
    if (wasAtEnd) box.scrollTop = box.scrollHeight;
  }

  async writeReport() {
    await this.act("report", "report", "Writing the report page …");
  }

  async act(button, action, text) {
    const control = document.getElementById(button);
    if (control) control.disabled = true;
    replace(this.notice, element("p", { class: "small", role: "status" }, text));
    try {
      const answer = await post(path("runs", this.name, action));
      replace(this.notice, element("p", { class: "done-note", role: "status" }, this.doneText(action, answer)));
      if (!this.ended) this.show(await get(path("runs", this.name)));
    } catch (error) {
      replace(this.notice, problem(error));
    } finally {
      if (control) control.disabled = false;
    }
  }

  doneText(action, answer) {
    if (action === "report")
      return [
        element("a", { href: answer.page, target: "_blank", rel: "noopener" }, "The report page"),
        " is written.",
      ];
    return action === "stop" ? this.stopText(answer) : `The run continues as process ${answer.process}.`;
  }

  stopText({ jobs, processes }) {
    const ended = [...jobs.map((job) => `job ${job}`), ...processes.map((process) => `process ${process}`)];
    return ended.length
      ? `Asked ${ended.join(", ")} to end; finished stages and checkpoints are kept.`
      : "Nothing of this run waits or runs on this machine.";
  }

  async stop() {
    const text = `Stop ${this.name}? Its current stage ends after a checkpoint; finished stages are kept.`;
    if (await confirmed(text, "Stop the run")) await this.act("stop", "stop", "Stopping …");
  }

  async resume() {
    const text = `Resume ${this.name}? align run starts again with the stored pipeline, in a separate process.`;
    if (await confirmed(text, "Resume the run")) await this.act("resume", "resume", "Starting …");
  }

  press(button) {
    const control = document.getElementById(button);
    if (control && !control.disabled) control.click();
  }

  keys() {
    return [
      { keys: ["j", "]"], does: "next stage", run: () => this.move(1) },
      { keys: ["k", "["], does: "previous stage", run: () => this.move(-1) },
      { keys: ["c"], does: "curves", run: () => this.choose(this.stage, "curves") },
      { keys: ["l"], does: "log", run: () => this.choose(this.stage, "log") },
      { keys: ["e"], does: "settings", run: () => this.choose(this.stage, "settings") },
      {
        keys: ["o"],
        does: "rollouts of the step that was read off a curve",
        run: () => {
          if (this.step !== null) location.hash = address("rollouts", [this.name, this.stage], { update: this.step });
        },
      },
      { keys: ["x"], does: "stop the run", run: () => this.press("stop") },
      { keys: ["r"], does: "resume the run", run: () => this.press("resume") },
      { keys: ["m"], does: "chat with its models", run: () => this.press("chat") },
      { keys: ["w"], does: "write the report page", run: () => this.press("report") },
      ALL_RUNS,
    ];
  }
}

export async function show(main, parameters) {
  const page = new RunPage(main, parameters.path[0], parameters.query);
  setKeys(main, [ALL_RUNS]);
  const run = await get(path("runs", page.name));
  page.show(run);
  setKeys(main, page.keys());
  const end = stream(
    `${path("runs", page.name)}/stream`,
    {
      state: (value) => page.show(value),
      problem: (error) => replace(page.notice, problem(error.error)),
    },
    showConnection,
  );
  // A file may change for the last time while a load is not due yet.
  const timer = setInterval(() => page.load(), LOOK_EVERY);
  return () => {
    page.ended = true;
    clearInterval(timer);
    end();
  };
}

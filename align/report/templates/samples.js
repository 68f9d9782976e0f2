// Filters and sorts the samples, and shows numbers by token. Text of a model is set as textContent and never becomes
// markup.
"use strict";
(function () {
  const source = document.getElementById("samples-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const STEP = 10, LEVELS = 4, HUNDREDTHS = 100;
  const byId = (id) => document.getElementById(id);
  const list = byId("list"), find = byId("find"), task = byId("task"), from = byId("source"), sort = byId("sort"), more = byId("more");
  let limit = STEP;

  function add(parent, tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    parent.appendChild(element);
    return element;
  }
  const show = (value) => (value === null || value === undefined ? "–" : value.toFixed(2).replace(/^-(?=0\.00$)/, "").replace("-", "−"));
  const signed = (value) => (value > 0 ? "+" : "") + show(value);
  const option = (select, value, label) => { add(select, "option", "", label).value = value; };
  const columns = (item) => item.columns || data.policies;
  const largest = (item) => Math.max(0, ...Object.values(item.change).map(Math.abs));

  // ---- filters and order

  const tasks = Object.keys(data.tasks);
  for (const name of tasks) option(task, name, data.tasks[name].title);
  byId("tasks").hidden = tasks.length < 2;
  function sources() {
    const names = data.items.filter((item) => !task.value || item.task === task.value).map((item) => item.source);
    while (from.options.length > 1) from.remove(1);
    for (const name of [...new Set(names)].sort()) option(from, name, name);
  }
  option(sort, "change", "largest score change");
  for (const policy of data.policies) {
    if (policy === data.reference) continue;
    option(sort, "up:" + policy, policy + " gained most over " + data.reference);
    option(sort, "down:" + policy, policy + " lost most against " + data.reference);
  }
  option(sort, "long", "longest responses");
  option(sort, "order", "as they came");

  function episodeTexts(answer) {
    if (!answer.episode) return [];
    const calls = (entry) => entry.calls.flatMap((call) => [call.name, call.arguments, call.result, call.note]);
    return [...answer.episode.entries.flatMap((entry) => [entry.thought || "", entry.text, ...calls(entry)]), answer.episode.end];
  }

  const words = new Map();  // filled by the first search
  function haystack(item) {
    if (!words.has(item)) {
      words.set(item, [
        ...item.prompt.map((turn) => turn.text),
        ...columns(item).flatMap((policy) => item.answers[policy].flatMap((answer) =>
          [answer.thought || "", answer.text, ...episodeTexts(answer),
            ...(answer.turns || []).flatMap((turn) => [turn.prompt, turn.thought || "", turn.text])])),
      ].join("\n").toLowerCase());
    }
    return words.get(item);
  }

  const scale = {};  // tasks have scores on different scales: a change counts as a share of its task's largest
  for (const item of data.items) scale[item.task] = Math.max(scale[item.task] || 1e-12, largest(item));
  function rank(item) {
    const [kind, ...rest] = sort.value.split(":");
    const policy = rest.join(":");
    const change = item.change[policy] === undefined ? -Infinity : item.change[policy] / scale[item.task];
    if (kind === "up") return -change;
    if (kind === "down") return change === -Infinity ? Infinity : change;
    if (kind === "order") return 0;
    if (kind === "long") return -Math.max(0, ...columns(item).flatMap((p) => item.answers[p].map((answer) => answer.tokens || 0)));
    return -largest(item) / scale[item.task];
  }

  // ---- numbers by token: color and, for color-blind readers, thickness of the underline; dotted is below zero

  const MEASURES = { k: { name: "KL by token", unit: "nats", short: "KL" }, v: { name: "Value by token", unit: "", short: "value" },
    a: { name: "Advantage by token", unit: "", short: "advantage" } };
  const isFromEnvironment = (heat, index) => heat.s !== undefined && heat.s[index] === 0;
  const ends = {};
  function end(key) {  // one scale for the whole page: all but the largest hundredth
    if (ends[key] === undefined) {
      const all = data.items.flatMap((item) => columns(item).flatMap((policy) => {
        const heat = item.answers[policy].length ? item.answers[policy][0].heat : undefined;
        if (!heat || !heat[key]) return [];
        return heat[key].filter((value, index) => !isFromEnvironment(heat, index)).map((value) => Math.abs(value || 0));
      })).sort((a, b) => a - b);
      ends[key] = Math.max(1, all[Math.floor(0.99 * (all.length - 1))] || 1);
    }
    return ends[key];
  }

  function tokens(box, reading, heat, key) {
    const fragment = document.createDocumentFragment();
    heat.t.forEach((text, index) => {
      const value = heat[key][index];
      const level = value === null ? 0 : Math.min(LEVELS, Math.round((Math.abs(value) / end(key)) * LEVELS));
      const look = isFromEnvironment(heat, index) ? "env" : "l" + level + (value < 0 ? " below" : "");
      const span = add(fragment, "span", "tok " + look + (text ? "" : " part"), text);
      span.tabIndex = index ? -1 : 0;
      span.dataset.index = index;
    });
    box.replaceChildren(fragment);
    box.classList.add("heat");
    const read = (event) => {
      const index = event.target.dataset ? event.target.dataset.index : undefined;
      if (index === undefined) return;
      const value = heat[key][index];
      const number = value === null ? "–" : (value > 0 ? "+" : "") + (value / HUNDREDTHS).toFixed(2).replace("-", "−");
      reading.textContent = "token " + (Number(index) + 1) + " of " + heat.t.length + " “" + heat.t[index] + "” · "
        + (isFromEnvironment(heat, index) ? "from the environment" : MEASURES[key].short + " " + number + " " + MEASURES[key].unit);
    };
    const stop = new AbortController(), until = { signal: stop.signal };
    box.addEventListener("pointerover", read, until);
    box.addEventListener("focusin", read, until);
    box.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const next = step && box.children[Number(event.target.dataset.index) + step];
      if (!next) return;
      event.preventDefault();
      event.target.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    }, until);
    reading.textContent = "Point at a token, or go with ← →, to read its number. Thicker: further from zero; dotted: below zero."
      + (heat.s ? " Gray: from the environment, not learned from." : "");
    return stop;
  }

  function heatButtons(parent, text, response, restore) {
    const bar = add(parent, "div", "heat-buttons");
    const reading = document.createElement("div");
    reading.className = "small reading";
    reading.setAttribute("role", "status");
    let stop = null;
    const buttons = Object.keys(MEASURES).filter((key) => response.heat[key]).map((key) => {
      const button = add(bar, "button", "", MEASURES[key].name);
      button.type = "button";
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => {
        const open = button.getAttribute("aria-pressed") === "true";
        for (const each of buttons) each.setAttribute("aria-pressed", "false");
        reading.remove();
        if (stop) stop.abort();
        text.classList.remove("heat");
        if (open) {
          restore();
          return;
        }
        button.setAttribute("aria-pressed", "true");
        bar.after(reading);  // below the buttons, so that they stay where they are while readings of other lengths come
        stop = tokens(text, reading, response.heat, key);
      });
      return button;
    });
  }

  // ---- one sample

  function textBox(parent, className, text) {
    const box = add(parent, "div", className, text);
    box.dir = "auto";
    return box;
  }

  function addThought(parent, said) {
    if (!said.thought) return;
    const fold = add(parent, "details", "thought");
    add(fold, "summary", "small", "thought");
    textBox(fold, "text", said.thought);
  }

  function addConversation(box, episode) {
    for (const entry of episode.entries) {
      const said = add(box, "div", "said" + (entry.policy ? " policy" : ""));
      add(said, "span", "role", entry.role);
      if (entry.note) add(said, "span", "small", " " + entry.note);
      addThought(said, entry);
      if (entry.text) textBox(said, "text", entry.text);
      for (const call of entry.calls) {
        const called = add(said, "div", "call" + (call.ok ? "" : " wrong"));
        if (call.name) add(called, "code", "", call.name + "(" + call.arguments + ")");
        if (call.note) add(called, "span", "small", (call.name ? " " : "") + call.note);
        if (call.result) textBox(called, "text", call.result);
      }
      if (entry.left_out) add(said, "div", "small", entry.left_out);
    }
    if (episode.left_out) add(box, "div", "small", episode.left_out);
  }

  function addEpisode(parent, response) {
    const box = add(parent, "div", "conversation");
    const restore = () => { box.replaceChildren(); addConversation(box, response.episode); };
    restore();
    if (response.heat) {
      heatButtons(parent, box, response, restore);
      const shown = response.heat.t.length;
      if (shown < response.tokens) add(parent, "div", "small", "By token: the first " + shown + " of " + response.tokens + " tokens.");
    }
    add(parent, "div", response.episode.ok ? "small" : "cut", response.episode.end);
  }

  function addAnswer(parent, item, response, isOneOfSeveral) {
    const thinking = response.thought_tokens ? ", " + response.thought_tokens + " of a thought" : "";
    const facts = [response.tokens + " tokens" + thinking, ...(response.episode ? response.episode.facts : [])];
    const numbers = { gold: response.gold, reward: response.reward, kl: response.kl, ...response.scores };
    for (const [name, value] of Object.entries(numbers)) {
      const isInTitle = name === data.tasks[item.task].key && !isOneOfSeveral;  // shown next to the system's name
      if (typeof value === "number" && !isInTitle) facts.push(name + " " + show(value));
    }
    add(parent, "div", "small", facts.join(" · "));
    if (response.episode) {
      addEpisode(parent, response);
      return;
    }
    (response.turns || []).slice(0, -1).forEach((turn, index) => {
      if (index) textBox(parent, "follow-up", turn.prompt);
      addThought(parent, turn);
      textBox(parent, "text", turn.text);
    });
    if (response.turns && response.turns.length > 1) textBox(parent, "follow-up", response.turns[response.turns.length - 1].prompt);
    addThought(parent, response);
    const box = textBox(parent, "text", response.text);
    if (response.heat) heatButtons(parent, box, response, () => { box.textContent = response.text; });
    if (response.finished === false) add(parent, "div", "cut", "✂ cut at the token limit");
  }

  function answerCard(parent, item, policy) {
    const card = add(parent, "div", "answer");
    const title = add(card, "div", "title", policy + " ");
    const change = item.change[policy], answers = item.answers[policy];
    add(title, "span", "small", answers.length ? data.tasks[item.task].metric + " " + show(item.score[policy]) : "no answer");
    if (change) add(title, "span", "chip v-unclear", (change > 0 ? "↑ " : "↓ ") + signed(change));
    answers.slice(0, 1).forEach((response) => addAnswer(card, item, response, answers.length > 1));
    if (answers.length < 2) return;
    const rest = add(card, "details", "");
    rest.dataset.fold = data.items.indexOf(item) + " " + policy;
    add(rest, "summary", "small", answers.length - 1 + " more");
    answers.slice(1).forEach((response) => addAnswer(rest, item, response, true));
  }

  function draw() {
    const query = find.value.trim().toLowerCase();
    const chosen = data.items.filter((item) => (!task.value || item.task === task.value)
      && (!from.value || item.source === from.value) && (!query || haystack(item).includes(query)));
    const ranks = new Map(chosen.map((item) => [item, rank(item)]));
    chosen.sort((a, b) => ranks.get(a) - ranks.get(b) || 0);
    const fragment = document.createDocumentFragment();
    for (const item of chosen.slice(0, limit)) {
      const article = add(fragment, "article", "sample");
      item.prompt.forEach((turn, index) => {
        const block = add(article, "div", "turn");
        add(block, "span", "role", turn.role);
        const where = index ? [] : [tasks.length > 1 ? data.tasks[item.task].title : "", item.source].filter(Boolean);
        if (where.length) add(block, "span", "small", " " + where.join(" · "));
        textBox(block, "text", turn.text);
      });
      const answers = add(article, "div", "answers");
      for (const policy of columns(item)) answerCard(answers, item, policy);
    }
    list.replaceChildren(fragment);
    byId("shown").textContent = Math.min(limit, chosen.length) + " of " + chosen.length + " prompts";
    more.hidden = chosen.length <= limit;
  }

  byId("controls").hidden = false;
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  task.addEventListener("input", sources);
  for (const control of [find, task, from, sort]) control.addEventListener("input", () => { limit = STEP; draw(); });
  more.addEventListener("click", () => { limit += STEP; draw(); });
  sources();
  draw();
})();

// Filters and sorts the samples. Everything a model wrote goes through textContent, never through markup.
"use strict";
(function () {
  const source = document.getElementById("data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const STEP = 20;
  const at = (id) => document.getElementById(id);
  const list = at("list"), find = at("find"), from = at("source"), sort = at("sort"), more = at("more");
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

  for (const name of [...new Set(data.items.map((item) => item.source))].sort()) add(from, "option", "", name).value = name;
  const orders = [["change", "largest score change"]];
  for (const policy of data.policies) {
    if (policy === data.reference) continue;
    orders.push(["up:" + policy, policy + " gained most over " + data.reference]);
    orders.push(["down:" + policy, policy + " lost most against " + data.reference]);
  }
  orders.push(["long", "longest responses"]);
  for (const [value, label] of orders) add(sort, "option", "", label).value = value;

  const haystack = new Map(data.items.map((item) => [item, [
    ...item.prompt.map((turn) => turn.text),
    ...data.policies.flatMap((policy) => item.answers[policy].map((one) => one.text)),
  ].join("\n").toLowerCase()]));

  function rank(item) {
    const [kind, ...rest] = sort.value.split(":");
    const policy = rest.join(":");
    if (kind === "up") return -(item.change[policy] ?? -Infinity);
    if (kind === "down") return item.change[policy] ?? Infinity;
    if (kind === "long") return -Math.max(0, ...data.policies.flatMap((p) => item.answers[p].map((one) => one.tokens)));
    return -Math.max(0, ...Object.values(item.change).map(Math.abs));
  }

  function answerCard(parent, item, policy) {
    const card = add(parent, "div", "answer");
    const who = add(card, "div", "who", policy + " ");
    const change = item.change[policy];
    add(who, "span", "small", data.metric + " " + show(item.score[policy]));
    if (change) add(who, "span", "chip v-" + (change > 0 ? "better" : "worse"), (change > 0 ? "▲ " : "▼ ") + signed(change));
    let target = card;
    item.answers[policy].forEach((one, index) => {
      if (index === 1) {
        target = add(card, "details", "");
        add(target, "summary", "small", item.answers[policy].length - 1 + " more");
      }
      const facts = [one.tokens + " tokens"];
      for (const name of ["gold", "reward", "kl"]) if (typeof one[name] === "number") facts.push(name + " " + show(one[name]));
      add(target, "div", "small", facts.join(" · "));
      const text = add(target, "div", "text", one.text);
      text.dir = "auto";
      if (!one.finished) add(target, "div", "cut", "✂ cut at the token limit");
    });
  }

  function draw() {
    const words = find.value.trim().toLowerCase();
    const chosen = data.items.filter((item) => (!from.value || item.source === from.value) && haystack.get(item).includes(words));
    const ranks = new Map(chosen.map((item) => [item, rank(item)]));
    chosen.sort((a, b) => ranks.get(a) - ranks.get(b) || 0);
    const fragment = document.createDocumentFragment();
    for (const item of chosen.slice(0, limit)) {
      const article = add(fragment, "article", "sample");
      for (const turn of item.prompt) {
        const block = add(article, "div", "turn");
        add(block, "span", "role", turn.role + (turn === item.prompt[0] ? " · " + item.source : ""));
        add(block, "div", "text", turn.text).dir = "auto";
      }
      const answers = add(article, "div", "answers");
      for (const policy of data.policies) answerCard(answers, item, policy);
    }
    list.replaceChildren(fragment);
    at("shown").textContent = Math.min(limit, chosen.length) + " of " + chosen.length + " prompts";
    more.hidden = chosen.length <= limit;
  }

  at("controls").hidden = false;
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const control of [find, from, sort]) control.addEventListener("input", () => { limit = STEP; draw(); });
  more.addEventListener("click", () => { limit += STEP; draw(); });
  draw();
})();

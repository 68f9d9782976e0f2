"""Samples for the page's script: answers side by side, bounded in size, sorted by score change; rollouts of training.

Torch-free.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from align.report.escape import script_json
from align.report.tables import PROMPTS, task_title

MAX_BYTES = 7_000_000
"""Text on the page; beyond it the prompts with the smallest score changes are left out, and counted."""
MAX_HEAT_BYTES = 2_500_000
"""The same for numbers by token, which come on top."""
MAX_TEXT = 6_000
"""Characters of one response or turn on the page."""
MAX_TOKENS = 2_000
"""Tokens of a response that are shown with numbers."""
STATIC = 8
"""Samples that are there without a script."""
FIELDS = ("tokens", "finished", "gold", "reward", "kl")
MOST_ROLLOUTS = 48
BY_TOKEN = ("k", "v", "a")
"""KL, value and advantage, as a line of rollouts has them behind each token's text."""
HUNDREDTHS = 100

Sample = dict[str, Any]


def read_samples(path: Path) -> list[Sample]:
    """Lines of a ``samples.jsonl``; a missing file is an empty list, a damaged line is left out."""
    return [sample for sample in _lines(path) if "responses" in sample and "prompt" in sample]


def read_rollouts(path: Path) -> list[Sample]:
    """Some lines of a ``completions.jsonl``, evenly from its first update to its last."""
    found = [one for one in _lines(path) if "response" in one and "prompt" in one]
    most = min(MOST_ROLLOUTS, len(found))
    return [found[round(at * (len(found) - 1) / max(1, most - 1))] for at in range(most)]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    found = json.loads(line)
                except ValueError:
                    continue
                if isinstance(found, dict):
                    yield found
    except OSError:
        return


def for_page(
    samples: list[Sample], card: dict[str, Any] | None, rollouts: Mapping[str, list[Sample]] | None = None
) -> dict[str, Any]:
    """What the page's script shows: ``policies``, ``reference``, ``tasks``, ``items`` (and as JSON in ``encoded``).

    ``left_out`` counts the samples for which there was no room, ``without_heat`` those whose numbers by token had none.

    An item has its ``task``, ``source`` and ``prompt`` turns, per policy its ``answers`` and mean ``score`` (the task's
    own metric, named in ``tasks``), and ``change`` per policy against the reference. The items with the largest change
    come first; across tasks a change counts as a share of its task's largest. Numbers by token go with the first items
    until their room is full. ``rollouts`` (stage → lines) come last, each with a column of its own in ``columns``.
    """
    policies = list(card["policies"]) if card else sorted({name for one in samples for name in one["responses"]})
    reference = str(card["reference"]) if card else (policies[0] if policies else "")
    metrics = {task: _metric(card, task) for task in dict.fromkeys(str(one.get("task", PROMPTS)) for one in samples)}
    items = [_item(sample, policies, reference, metrics) for sample in samples]
    largest: dict[str, float] = {}
    for item in items:
        largest[item["task"]] = max(largest.get(item["task"], 0.0), _change(item))
    for item in items:
        item["weight"] = round(_change(item) / largest[item["task"]], 4) if largest[item["task"]] else 0.0
    order = sorted(range(len(items)), key=lambda at: (-items[at]["weight"], at))
    shown, encoded, used, room, without = [], [], 0, MAX_HEAT_BYTES, 0
    for at in order:
        item, text = items[at], script_json(items[at])
        used += len(text.encode())
        if used > MAX_BYTES:
            break
        if _has_heat(samples[at], policies):
            heat = _heat(samples[at], policies) if room > 0 else {}
            room -= len(script_json(heat).encode())
            if room > 0:
                for policy, numbers in heat.items():
                    item["answers"][policy][0]["heat"] = numbers
                text = script_json(item)
            else:
                without += 1
        shown.append(item)
        encoded.append(text)
    tasks = {
        task: {"title": _title(card, task), "metric": metric[1], "key": metric[0]} for task, metric in metrics.items()
    }
    for stage, lines in (rollouts or {}).items():
        if lines:
            tasks[f"rollouts {stage}"] = {"title": f"rollouts of {stage}", "metric": "score", "key": "score"}
    more = [_rollout(stage, line) for stage, lines in (rollouts or {}).items() for line in lines]
    return {
        "policies": policies,
        "reference": reference,
        "tasks": tasks,
        "items": shown + more,
        "encoded": encoded + [script_json(item) for item in more],
        "left_out": len(items) - len(shown),
        "without_heat": without,
    }


def page_json(page: Mapping[str, Any]) -> Markup:
    """The samples for the page's script; its items are encoded already."""
    about = script_json({name: page[name] for name in ("policies", "reference", "tasks")})
    return Markup(f'{about[:-1]},"items":[{",".join(page["encoded"])}]}}')  # noqa: S704  (parts are encoded)


def lengths(samples: Iterable[Sample], policies: list[str]) -> dict[str, dict[str, list[int]]]:
    """Task → policy → response lengths in tokens, over prompts and samples; conversations of several turns left out."""
    found: dict[str, dict[str, list[int]]] = {}
    for sample in samples:
        if "columns" in sample:
            continue
        per = found.setdefault(str(sample.get("task", PROMPTS)), {policy: [] for policy in policies})
        for policy in policies:
            per[policy] += [one["tokens"] for one in sample["responses"].get(policy, []) if "turns" not in one]
    return found


def _metric(card: dict[str, Any] | None, task: str) -> tuple[str, str]:
    """The metric whose change sorts a task's samples, as ``samples.jsonl`` names it, and its title."""
    if card is None:
        return "gold", "gold"
    if task in card["tasks"]:
        primary = str(card["tasks"][task]["primary"])
        scorers = [str(one.get("stage")) for one in card.get("reward_models", ()) if one.get("task") == task]
        if primary not in card["metrics"] and scorers:
            return scorers[0], f"score by {scorers[0]}"
        return primary.removeprefix(f"{task}."), str(card["metrics"].get(primary, {}).get("title", primary))
    name = card["primary"] if card["primary"] in ("gold", "reward") else "gold"
    return name, name


def _title(card: dict[str, Any] | None, task: str) -> str:
    return task_title(card, task) if card else task


def _change(item: Mapping[str, Any]) -> float:
    return max((abs(change) for change in item["change"].values()), default=0.0)


def _item(sample: Sample, policies: list[str], reference: str, metrics: Mapping[str, tuple[str, str]]) -> Sample:
    task = str(sample.get("task", PROMPTS))
    metric = metrics[task][0]
    columns = sample.get("columns")  # of answers that no compared system gave
    policies = policies if columns is None else [str(name) for name in columns]
    answers = {policy: sample["responses"].get(policy) or [] for policy in policies}
    scores = {policy: _mean(_score(one, metric) for one in answers[policy]) for policy in policies}
    start = scores.get(reference)
    return ({} if columns is None else {"columns": policies}) | {
        "id": str(sample.get("id", "")),
        "task": task,
        "source": str(sample.get("source", "")),
        "prompt": _turns(sample["prompt"]),
        "answers": {policy: [_answer(one) for one in answers[policy]] for policy in policies},
        "score": {policy: _round(score) for policy, score in scores.items()},
        "change": {
            policy: _round(score - start)
            for policy, score in scores.items()
            if policy != reference and score is not None and start is not None
        },
    }


def _rollout(stage: str, line: Sample) -> dict[str, Any]:
    """A response sampled in training, with what the policy, the reference and the critic made of each token."""
    answer = _answer({**line, "text": line["response"]})
    tokens = [one for one in (line.get("by_token") or [])[:MAX_TOKENS] if len(one) >= len(BY_TOKEN) + 1]
    if tokens:
        answer["heat"] = {"t": [str(one[0]) for one in tokens]}
        answer["heat"] |= {key: [_hundredths(one[at]) for one in tokens] for at, key in enumerate(BY_TOKEN, 1)}
    return {
        "id": "",
        "task": f"rollouts {stage}",
        "source": f"update {line.get('update', '?')}",
        "prompt": _turns(line["prompt"]),
        "columns": [stage],
        "answers": {stage: [answer]},
        "score": {stage: _round(line.get("score"))},
        "change": {},
        "weight": 0.0,
    }


def _turns(prompt: Any) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": str(turn["role"]), "text": _cut(str(turn.get("content") or ""))} for turn in turns]


def _answer(one: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: _round(one[key]) for key in FIELDS if one.get(key) is not None}
    found["text"] = _cut(str(one.get("text", "")))
    if one.get("scores"):
        found["scores"] = {str(name): _round(value) for name, value in one["scores"].items()}
    if one.get("turns"):  # the last one is the answer itself
        found["turns"] = [
            {"prompt": _cut(str(turn.get("prompt", ""))), "text": _cut(str(turn.get("text", "")))}
            for turn in one["turns"]
        ]
    return found


def _has_heat(sample: Sample, policies: list[str]) -> bool:
    return any(one.get("token_kl") for policy in policies for one in (sample["responses"].get(policy) or [])[:1])


def _heat(sample: Sample, policies: list[str]) -> dict[str, dict[str, Any]]:
    """Numbers by token of each policy's first response: ``t`` texts, ``k`` KL and ``v`` value in hundredths."""
    found = {}
    for policy in policies:
        first: Mapping[str, Any] = next(iter(sample["responses"].get(policy) or []), {})
        pairs = (first.get("token_kl") or [])[:MAX_TOKENS]
        if not pairs:
            continue
        heat = {"t": [str(text) for text, _ in pairs], "k": [_hundredths(value) for _, value in pairs]}
        values = first.get("token_value") or []
        if len(values) >= len(pairs):
            heat["v"] = [_hundredths(value) for value in values[: len(pairs)]]
        found[policy] = heat
    return found


def _hundredths(value: float | None) -> int | None:
    return None if value is None or not math.isfinite(value) else round(value * HUNDREDTHS)


def _score(one: Mapping[str, Any], metric: str) -> float | None:
    if one.get(metric) is not None:
        return float(one[metric])
    value = (one.get("scores") or {}).get(metric)
    return None if value is None else float(value)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _round(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return round(value, 4) if math.isfinite(value) else None


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}… ({len(text) - MAX_TEXT:,} more characters)"

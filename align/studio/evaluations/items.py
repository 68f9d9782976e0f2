"""The items of an evaluation: answers of all systems, their numbers, and the judges' replies.

Only places, numbers and the beginnings of prompts are in memory; texts are read from the files of the stage.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from align.evaluation.scorecard import ITEMS, JUDGMENTS, SAMPLES, SCORECARD
from align.report.scorecard.rollouts import episode_view, is_episode
from align.report.scorecard.samples import answer_view
from align.report.scorecard.scorecard_tables import PROMPTS, task_title
from align.studio.rollouts.details import diff_words
from align.studio.rollouts.filters import MAX_NAME, MAX_WORDS, split_words, word_pattern
from align.studio.rollouts.queries import excerpt, finite, finite_map, last_message

JUDGE = "judge"
"""Name of the metric that is a judge's verdict on two systems in both orders."""
WIN_RATE = "win_rate"
EVEN = 0.5
"""Win rate of the opponent, which has none in the file."""
MAX_TOKENS = 4_000
"""Tokens of an answer that have numbers."""
OUTCOMES = {"one": "win", "other": "loss", "tie": "tie", "disagreement": "disagreement", "unreadable": "unreadable"}
"""Outcome of a judge's comparison → outcome from the side of the first system."""
OTHER_SIDE = {"win": "loss", "loss": "win"}

Name = Annotated[str, Field(max_length=MAX_NAME)]
Values = dict[str, dict[str, float | None]]
"""System → metric → mean over the samples."""


class ItemQuery(BaseModel):
    """A page of items: conditions and order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Name = ""
    source: Name = ""
    metric: Name = ""
    """Metric that decides who wins; empty is the primary metric of each task."""
    first: Name = ""
    """System whose wins and losses are counted."""
    second: Name = ""
    """System that it is compared with."""
    outcome: Literal["", "win", "loss", "tie", "disagreement", "unreadable", "none"] = ""
    words: Annotated[str, Field(max_length=MAX_WORDS)] = ""
    sort: Literal["order", "change"] = "change"
    descending: bool = True
    limit: int = Field(50, ge=1, le=200)
    offset: int = Field(0, ge=0)


@dataclass(frozen=True)
class ItemEntry:
    """An item: its place in ``samples.jsonl``, and what the table shows of it."""

    number: int
    start: int
    task: str
    id: str
    source: str
    prompt: str
    values: Values


@dataclass
class EvaluationItems:
    """The items of an evaluate stage."""

    folder: Path
    card: dict[str, Any]
    entries: list[ItemEntry] = field(default_factory=list)
    judgments: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    """Task and item → the places of its judgments in ``judgments.jsonl``."""
    outcomes: dict[tuple[str, str, str, str], str] = field(default_factory=dict)
    """Task, item and two systems → the judge's outcome."""

    @classmethod
    def read(cls, folder: Path) -> EvaluationItems:
        """Read the files of a finished stage; damaged lines are skipped."""
        items = cls(folder, json.loads((folder / SCORECARD).read_text(encoding="utf-8")))
        values = defaultdict(list)
        for _, line in _read_lines(folder / ITEMS):
            values[_key(line)].append(_means(line.get("values")))
        for number, (start, line) in enumerate(_read_lines(folder / SAMPLES)):
            numbers = values.get(_key(line))
            entry = ItemEntry(
                number,
                start,
                *_key(line),
                source=str(line.get("source", "")),
                prompt=excerpt(last_message(json.dumps(line.get("prompt"))), None),
                # Items of one identity are in the same order in both files.
                values=numbers.pop(0) if numbers else {},
            )
            items.entries.append(entry)
        for start, line in _read_lines(folder / JUDGMENTS):
            items.judgments.setdefault(_key(line), []).append(start)
            if "outcome" in line:
                items.outcomes[*_key(line), str(line["one"]), str(line["other"])] = str(line["outcome"])
        return items

    def facts(self) -> dict[str, Any]:
        """Return systems, tasks with their metrics and numbers of items, and sources: what filters choose from."""
        counts = Counter(entry.task for entry in self.entries)
        tasks = []
        for task, number in counts.items():
            entries = [entry for entry in self.entries if entry.task == task]
            columns = [by_metric for entry in entries for by_metric in entry.values.values()]
            names = dict.fromkeys(name for by_metric in columns for name in by_metric)
            metrics = [
                {"name": name, "title": self._title(task, name), "better": self._better(task, name)} for name in names
            ]
            if any(key[0] == task for key in self.outcomes):
                metrics.insert(0, {"name": JUDGE, "title": "judge, in both orders", "better": "higher"})
            title = task_title(self.card, task)
            primary = self.primary(task)
            tasks.append({"name": task, "title": title, "items": number, "metrics": metrics, "primary": primary})
        return {
            "systems": list(self.card["policies"]),
            "reference": self.card["reference"],
            "tasks": tasks,
            "sources": sorted({entry.source for entry in self.entries if entry.source}),
            "has_judgments": bool(self.judgments),
        }

    def page(self, query: ItemQuery) -> dict[str, Any]:
        """Return the items that meet the conditions, and the numbers of wins, losses and ties among them.

        ``outcomes`` counts all that meet the other conditions, whatever their outcome.
        """
        matching = self._matching_words(query.words)
        rows = []
        for entry in self.entries:
            is_shown = query.task in ("", entry.task) and query.source in ("", entry.source)
            if is_shown and (matching is None or entry.number in matching):
                rows.append(self._row(entry, query))
        outcomes = Counter(row["outcome"] for row in rows)
        if query.outcome:
            rows = [row for row in rows if row["outcome"] == query.outcome]
        if query.sort == "change":
            sign = -1 if query.descending else 1
            rows.sort(key=lambda row: (row["change"] is None, sign * (row["change"] or 0.0)))
        page = rows[query.offset : query.offset + query.limit]
        return {"rows": page, "matches": len(rows), "total": len(self.entries), "outcomes": outcomes}

    def item(self, number: int, first: str = "", second: str = "") -> dict[str, Any] | None:
        """Return an item with all answers and judgments, or None.

        ``pieces`` are the differences of the answer of ``first`` from the answer of ``second``.
        """
        if not 0 <= number < len(self.entries):
            return None
        entry = self.entries[number]
        line = _line_at(self.folder / SAMPLES, entry.start)
        answers = {
            str(name): [_answer(response) for response in responses or []]
            for name, responses in (line.get("responses") or {}).items()
        }
        pieces = None
        if answers.get(first) and answers.get(second):
            pieces = diff_words(answers[second][0]["text"], answers[first][0]["text"])
        places = self.judgments.get((entry.task, entry.id), ())
        return {
            "number": number,
            "task": entry.task,
            "title": task_title(self.card, entry.task),
            "id": entry.id,
            "source": entry.source,
            "prompt": line.get("prompt"),
            "row": line.get("row"),
            "answers": answers,
            "values": {system: finite_map(by_metric) for system, by_metric in entry.values.items()},
            "pieces": pieces,
            "judgments": [_line_at(self.folder / JUDGMENTS, place) for place in places],
        }

    def primary(self, task: str) -> str:
        """Return the metric that decides a task."""
        if task in self.card["tasks"]:
            return str(self.card["tasks"][task]["primary"]).removeprefix(f"{task}.")
        return str(self.card["primary"])

    def _title(self, task: str, metric: str) -> str:
        return str(self._description(task, metric).get("title", metric))

    def _better(self, task: str, metric: str) -> str | None:
        better: str | None = self._description(task, metric).get("better", "higher")
        return better

    def _description(self, task: str, metric: str) -> Mapping[str, Any]:
        name = metric if task == PROMPTS else f"{task}.{metric}"
        described: Mapping[str, Any] = self.card["metrics"].get(name, {})
        return described

    def _row(self, entry: ItemEntry, query: ItemQuery) -> dict[str, Any]:
        metric = query.metric or self.primary(entry.task)
        first = _value(entry.values, query.first, metric)
        second = _value(entry.values, query.second, metric)
        if metric == WIN_RATE and first is not None and second is None:
            second = EVEN
        change = first - second if first is not None and second is not None else None
        if metric == JUDGE:
            outcome = self._verdict(entry, query.first, query.second)
        else:
            outcome = _outcome(change, self._better(entry.task, metric))
        return {
            "number": entry.number,
            "task": entry.task,
            "id": entry.id,
            "source": entry.source,
            "prompt": entry.prompt,
            "scores": {system: _value(entry.values, system, metric) for system in entry.values},
            "change": change,
            "outcome": outcome,
        }

    def _verdict(self, entry: ItemEntry, first: str, second: str) -> str:
        outcome = self.outcomes.get((entry.task, entry.id, first, second))
        if outcome is not None:
            return OUTCOMES.get(outcome, "none")
        swapped = OUTCOMES.get(self.outcomes.get((entry.task, entry.id, second, first), ""), "none")
        return OTHER_SIDE.get(swapped, swapped)

    def _matching_words(self, words: str) -> set[int] | None:
        """Return the numbers of the items whose prompt or answers have all words; None without words."""
        needles = split_words(words)
        if not needles:
            return None
        patterns = [pattern for needle in needles if (pattern := word_pattern(f'"{needle}"')) is not None]
        # Most lines lack a word, so only lines whose bytes have all of them are parsed. JSON escapes other letters.
        plain = [needle.lower().encode() for needle in needles if needle.isascii() and needle.isalnum()]
        matches = set()
        places = {entry.start: entry.number for entry in self.entries}
        start = 0
        with (self.folder / SAMPLES).open("rb") as file:
            for raw in file:
                lowered = raw.lower()
                if start in places and all(word in lowered for word in plain):
                    texts = "\n".join(_texts(json.loads(raw)))
                    if all(pattern.search(texts) for pattern in patterns):
                        matches.add(places[start])
                start += len(raw)
        return matches


def _read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a file with the places of their lines; a missing file has none."""
    if not path.is_file():
        return
    start = 0
    with path.open("rb") as file:
        for raw in file:
            try:
                line = json.loads(raw)
            except (ValueError, RecursionError):
                line = None
            if isinstance(line, dict):
                yield start, line
            start += len(raw)


def _line_at(path: Path, start: int) -> dict[str, Any]:
    with path.open("rb") as file:
        file.seek(start)
        line: dict[str, Any] = json.loads(file.readline())
        return line


def _key(line: Mapping[str, Any]) -> tuple[str, str]:
    return str(line.get("task", PROMPTS)), str(line.get("id", ""))


def _means(values: Any) -> Values:
    means: Values = {}
    for system, by_metric in (values or {}).items():
        means[str(system)] = {str(metric): _mean(numbers) for metric, numbers in by_metric.items()}
    return means


def _mean(numbers: Any) -> float | None:
    known = [number for number in numbers or () if isinstance(number, int | float)]
    return round(sum(known) / len(known), 6) if known else None


def _value(values: Values, system: str, metric: str) -> float | None:
    value = values.get(system, {}).get(metric)
    return value if value is not None and isinstance(finite(value), int | float) else None


def _outcome(change: float | None, better: str | None) -> str:
    """Return the outcome of the first system; a metric without a better side counts more as a win."""
    if change is None:
        return "none"
    if change == 0:
        return "tie"
    return "win" if (change > 0) != (better == "lower") else "loss"


def _answer(response: Mapping[str, Any]) -> dict[str, Any]:
    """Return an answer as the report shows it, with numbers by token and its conversation if it is an episode."""
    if is_episode(response):
        turns = response.get("turns")
        line = {**response, "turns": len(turns) if isinstance(turns, list) else turns, "response": response.get("text")}
        return answer_view({**response, "turns": None}) | {"conversation": episode_view(line)}
    answer = answer_view(response)
    pairs = (response.get("token_kl") or [])[:MAX_TOKENS]
    if pairs:
        answer["token_texts"] = [str(text) for text, _ in pairs]
        answer["token_kl"] = [finite(number) for _, number in pairs]
        values = response.get("token_value") or []
        if len(values) >= len(pairs):
            answer["values"] = [finite(value) for value in values[: len(pairs)]]
    if response.get("explanation"):
        answer["explanation"] = response["explanation"]
    return answer


def _texts(line: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts of a sample that a search reads: its prompt, its answers, and the messages of episodes."""
    prompt = line.get("prompt")
    for message in [{"content": prompt}] if isinstance(prompt, str) else prompt or ():
        yield str(message.get("content") or "")
    for responses in (line.get("responses") or {}).values():
        for response in responses or ():
            yield str(response.get("text", ""))
            for turn in response.get("turns") if isinstance(response.get("turns"), list) else ():
                yield f"{turn.get('prompt', '')}\n{turn.get('text', '')}"
            for message in response.get("messages") or ():
                yield str(message.get("content") or "")

"""The ``decontaminate`` step: rows that contain questions of evaluation sets, found by shared n-grams of words.

The rule is Tülu 3's (arXiv 2411.15124, section 3.2), applied to replies too: an item is contained when more than half
of its words are in n-grams of eight words that a row shares. A shorter item is contained if a row has all of its
words in succession: five or more anywhere, three or four as a sentence or a line, one or two as a full turn. Shorter
n-grams also find items of eight or more words with a few changed words. Not covered: paraphrases and translations.
Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from align.config.recipe.step_settings import DecontaminateStep, EvaluationSet
from align.config.validation import suggest
from align.data.overlap import Index, best_of_pairs
from align.data.row_texts import prompt_texts, reply_texts
from align.data.rows import BadRecord, Row, is_text, normalized
from align.data.sources import identity, read
from align.data.steps.step import ModelLoaders, StepContext, Table, Verdict, keep_all
from align.errors import UserError

RULES = 2
"""Version of the rules, in the keys of builds. Raise it when the same settings drop other rows."""
MOST = 4
"""Items that are stored of a row, those with the highest coverage; further ones are only counted."""
CONTAMINATED = 0.02
"""Share of a set's items from which Tülu 3 calls a dataset contaminated."""
EXCERPT = 200
EXAMPLES = 20


class Decontaminate:
    """Searches rows for the items of evaluation sets. Raises ``UserError`` for a set that cannot be read."""

    def __init__(self, config: DecontaminateStep, context: StepContext) -> None:
        self.config = config
        self.items = [item for settings in config.sets for item in read_items(settings, context.base)]
        number_of_set = {evaluation_set.name: number for number, evaluation_set in enumerate(config.sets)}
        self.set_of_item = np.array([number_of_set[item.set] for item in self.items], dtype=np.int64)
        # An item may have several texts. The index searches texts, and hits are counted by item.
        self.item_of_text = np.repeat(np.arange(len(self.items)), [len(item.texts) for item in self.items])
        texts = [text for item in self.items for text in item.texts]
        self.index = Index(texts, config.ngram, self.set_of_item[self.item_of_text], config.template)
        self.first_equal = self._first_equal(texts)
        self.equal_items = np.bincount(self.first_equal, minlength=len(self.items))

    def _first_equal(self, texts: list[str]) -> np.ndarray:
        """Return (items,) for each item the first item of its set with the same words; one hit counts for all."""
        words = [normalized(text) for text in texts]
        starts = np.searchsorted(self.item_of_text, np.arange(len(self.items) + 1))
        first: dict[tuple[int, tuple[str, ...]], int] = {}
        numbers = []
        for item in range(len(self.items)):
            key = (int(self.set_of_item[item]), tuple(words[starts[item] : starts[item + 1]]))
            numbers.append(first.setdefault(key, item))
        return np.array(numbers, dtype=np.int64)

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """Return the items of each row: ``item`` (N, MOST) int32, -1 for none, ``coverage``, and ``hits`` (N,)."""
        hits = self.index.search([searched_texts(row, self.config.of) for row in rows], self.config.coverage)
        contained = hits.coverage > self.config.coverage
        item = self.first_equal[self.item_of_text[hits.text[contained]]]
        # An item may have several texts: keep the text with the highest coverage, once per row and item.
        row, item, coverage = best_of_pairs(hits.row[contained], item, hits.coverage[contained])
        # Then the MOST items of each row by coverage; ``rank`` is an item's column.
        order = np.lexsort((item, -coverage, row))
        row = row[order]
        item = item[order]
        coverage = coverage[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        top = rank < MOST
        columns = {
            "item": np.full((len(rows), MOST), -1, dtype=np.int32),
            "coverage": np.zeros((len(rows), MOST), dtype=np.float32),
            "hits": np.bincount(row, minlength=len(rows)).astype(np.int32),
        }
        columns["item"][row[top], rank[top]] = item[top]
        columns["coverage"][row[top], rank[top]] = coverage[top]
        return columns

    def decide(self, table: Table) -> Verdict:
        """Drop rows with a hit: the reason is the set of the item with the highest coverage, the detail all items."""
        names = [evaluation_set.name for evaluation_set in self.config.sets]
        items = table.columns["item"]
        rows = np.flatnonzero(table.alive & (items[:, 0] >= 0))
        code = keep_all(len(table))
        details = {}
        if self.config.action == "drop":
            code[rows] = self.set_of_item[items[rows, 0]]
            details = {int(row): self._detail(table, int(row)) for row in rows}
        notes: dict[str, Any] = {"sets": self._summarize_sets(items[rows])}
        has_more = table.columns["hits"][rows] > MOST
        if has_more.any():
            notes[f"rows_with_more_than_{MOST}_items"] = int(has_more.sum())
        if self.config.action == "report":
            notes["rows"] = len(rows)
            notes["examples"] = [
                {"id": table.row(int(row))["id"], **self._detail(table, int(row))} for row in rows[:EXAMPLES]
            ]
        return Verdict(code, [f"contains an item of {name}" for name in names], notes=notes, details=details)

    def _detail(self, table: Table, row: int) -> dict[str, Any]:
        hits = [
            self._hit(int(item), float(coverage))
            for item, coverage in zip(table.columns["item"][row], table.columns["coverage"][row], strict=True)
            if item >= 0
        ]
        if len(hits) == 1:
            return hits[0]
        return {**hits[0], "others": [{name: hit[name] for name in ("set", "item", "coverage")} for hit in hits[1:]]}

    def _hit(self, number: int, coverage: float) -> dict[str, Any]:
        item = self.items[number]
        excerpt = " ".join(" / ".join(item.texts).split())
        return {"set": item.set, "item": item.place, "coverage": round(coverage, 3), "excerpt": excerpt[:EXCERPT]}

    def _summarize_sets(self, items: np.ndarray) -> dict[str, dict[str, Any]]:
        """Return each set's hits, from ``items`` (rows, MOST) of the rows with one."""
        hit = np.unique(items[items >= 0])
        row_sets = np.where(items >= 0, self.set_of_item[items], -1)
        summary = {}
        for number, evaluation_set in enumerate(self.config.sets):
            count = int((self.set_of_item == number).sum())
            # Searches name the first of equal items, and a hit on it counts for all of them.
            items_hit = int(self.equal_items[hit[self.set_of_item[hit] == number]].sum())
            share = items_hit / count
            summary[evaluation_set.name] = {
                "items": count,
                "items_hit": items_hit,
                "share": round(share, 4),
                "rows": int((row_sets == number).any(axis=1).sum()),
                "contaminated": share > CONTAMINATED,
            }
        return summary


def searched_texts(row: Row, of: Literal["user", "all"]) -> list[str]:
    """Return the texts of a row that evaluation items are searched for in."""
    if is_text(row):
        return [row["text"]]
    if of == "user":
        return [text for _, text in prompt_texts(row, "user")]
    return [text for _, text in (*prompt_texts(row), *reply_texts(row, "both"))]


QUESTIONS = ("prompt", "question", "turns", "instruction", "problem", "goal", "query", "text")
"""Fields that may hold a record's question, tried in this order, in any case."""


@dataclass(frozen=True)
class Item:
    """One question of a set."""

    set: str
    place: str
    """File and line, or the record's number."""
    texts: tuple[str, ...]
    """Texts that a row must not contain; several if the question has several turns."""


def evaluation_set_identities(config: DecontaminateStep, base: Path, models: ModelLoaders | None) -> dict[str, str]:
    """Return digests of the files of all sets of a step, and the version of the rules.

    A commit of the Hub is among the settings.
    """
    identities = {"rules": str(RULES)}
    for settings in config.sets:
        if settings.files is not None:
            digests = identity(settings.source(), base)
            identities |= {f"{settings.name}: {file}": digest for file, digest in digests.items()}
    return identities


def read_items(settings: EvaluationSet, base: Path) -> list[Item]:
    """Return a set's questions. Raises ``UserError`` for records that have none, and for a set without records."""
    items = []
    for item in read(settings.source(), base):
        if isinstance(item, BadRecord):
            raise item
        where, record = item
        texts = tuple(text for text in _texts(settings, record, where) if text.strip())
        if not texts:
            raise UserError(f"evaluation set '{settings.name}': {where}: the question is empty.")
        items.append(Item(settings.name, where.replace("\\", "/").rsplit("/", 1)[-1], texts))
    if not items:
        raise UserError(f"evaluation set '{settings.name}' has no records; there is nothing to look for.")
    return items


def _texts(settings: EvaluationSet, record: dict[str, Any], where: str) -> list[str]:
    """Return the texts of a record's question: a single text for a list of fields, else a text per turn."""
    # One field may hold several turns, which are searched one by one; several fields make one text.
    if settings.fields is not None:
        values = [_field(settings.name, record, field, where) for field in settings.fields]
        if len(values) == 1:
            return _strings(values[0], settings.name, settings.fields[0], where)
        parts = []
        for value, field in zip(values, settings.fields, strict=True):
            parts.append(" ".join(_strings(value, settings.name, field, where)))
        return ["\n".join(parts)]
    # Field names of evaluation sets differ in their case.
    names = {name.lower(): name for name in record}
    question = next((names[name] for name in QUESTIONS if record.get(names.get(name, "")) is not None), None)
    if question is None:
        raise UserError(
            f"evaluation set '{settings.name}': {where}: no field looks like a question; there are "
            f"{', '.join(sorted(record)) or 'none'}. Name it: fields: [{next(iter(sorted(record)), 'question')}]."
        )
    return _strings(record[question], settings.name, question, where)


def _field(name: str, record: dict[str, Any], path: str, where: str) -> Any:
    value: Any = record
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            names = sorted(value) if isinstance(value, dict) else []
            raise UserError(
                f"evaluation set '{name}': {where}: there is no field '{path}'; there are "
                f"{', '.join(names) or 'none'}.{suggest(part, names)}"
            )
        value = value[part]
    return value


def _strings(value: Any, name: str, field: str, where: str) -> list[str]:
    """Return the texts of a field: itself, the items of a list, or the user turns of a list of messages."""
    values = value if isinstance(value, list) else [value]
    messages = [item for item in values if isinstance(item, dict)]
    if messages:
        values = [item.get("content") for item in messages if item.get("role", "user") == "user"]
    wrong = next((item for item in values if not isinstance(item, str)), None)
    if wrong is not None or not values:
        kind = type(wrong).__name__ if values else "an empty list"
        raise UserError(
            f"evaluation set '{name}': {where}: field '{field}' holds {kind}; expected text or a list of texts."
        )
    return list(values)

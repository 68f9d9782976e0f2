"""Rows that contain questions of evaluation sets, found by runs of words they share, and reported hit by hit.

The rule is Tülu 3's (arXiv 2411.15124, section 3.2), in replies too: an item counts as contained when more than half of
its words lie in runs of eight words that a row has too. An item of fewer words is contained where a row has all of them
in a row: five or more anywhere, three or four as a sentence or a line, one or two as a whole turn. Torch-free. Left
out: paraphrases and translations, which no run of words gives away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from align.data.compared import reply_parts
from align.data.evaluation_sets import EvaluationSet, Item, all_items
from align.data.overlap import Index
from align.data.rows import Row, is_text, normalized
from align.data.steps.base import StepConfig, StepContext, Table, Verdict, keep_all

MOST = 4
"""Items that are remembered of a row, those of the highest coverage; further ones are counted."""
CONTAMINATED = 0.02
"""Share of a set's items from which Tülu 3 calls a dataset contaminated."""
EXCERPT = 200
EXAMPLES = 20


class Decontaminate(StepConfig):
    """Drop, or report, every row that contains an item of an evaluation set."""

    type: Literal["decontaminate"]
    sets: list[EvaluationSet] = Field(min_length=1)
    """The evaluation sets the rows must not contain."""
    ngram: int = Field(8, ge=2, le=50)
    """Words in a run. Tülu 3 and open-r1 use 8, datatrove 12, lm-eval 13."""
    coverage: float = Field(0.5, ge=0, lt=1)
    """An item is contained when more than this share of its words lies in shared runs; at 0 any shared run is a hit."""
    template: float = Field(0.1, gt=0, le=1)
    """A run that more than this share of a set's items have, and more than ten, is the set's template (``Answer format:
    answer1/answer2``): it shows nothing, and its words do not count. At 1 there are no templates, as in Tülu 3."""
    of: Literal["user", "all"] = "all"
    """What of a row is searched: ``all`` of it, replies included, or its ``user`` turns alone, as Tülu 3 does."""
    action: Literal["drop", "report"] = "drop"
    """``report`` keeps the rows and names the hits in the ledger."""
    decides: ClassVar[bool] = True

    @model_validator(mode="after")
    def _names_once(self) -> Self:
        names = [one.name for one in self.sets]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two evaluation sets are named '{twice}'; hits could not be told apart. Rename one")
        return self

    def identities(self, base: Path) -> dict[str, str]:
        """Digests of the sets' files."""
        return {name: value for one in self.sets for name, value in one.identities(base).items()}

    def start(self, context: StepContext) -> _Decontaminate:
        """The step itself. Raises ``UserError`` for a set that cannot be read."""
        return _Decontaminate(self, list(all_items(list(self.sets), context.base)))


class _Decontaminate:
    def __init__(self, config: Decontaminate, items: list[Item]) -> None:
        self.config, self.items = config, items
        number = {one.name: place for place, one in enumerate(config.sets)}
        self.set_of_item = np.array([number[item.set] for item in items], dtype=np.int64)
        self.item_of_text = np.repeat(np.arange(len(items)), [len(item.texts) for item in items])
        texts = [text for item in items for text in item.texts]
        self.index = Index(texts, config.ngram, self.set_of_item[self.item_of_text], config.template)
        self.first_equal = self._first_equal(texts)
        self.equal_items = np.bincount(self.first_equal, minlength=len(items))

    def _first_equal(self, texts: list[str]) -> np.ndarray:
        """(items,) of each item the first of its set that has the same words, for which one hit counts."""
        words = [normalized(text) for text in texts]
        first: dict[tuple[int, tuple[str, ...]], int] = {}
        begins = np.searchsorted(self.item_of_text, np.arange(len(self.items) + 1))
        return np.array(
            [
                first.setdefault((int(self.set_of_item[item]), tuple(words[begins[item] : begins[item + 1]])), item)
                for item in range(len(self.items))
            ],
            dtype=np.int64,
        )

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """The items each row contains: ``item`` (N, MOST) int32, -1 for none, their ``coverage``, and ``hits`` (N,)."""
        hits = self.index.search([searched(row, self.config.of) for row in rows], self.config.coverage)
        contained = hits.coverage > self.config.coverage
        item = self.first_equal[self.item_of_text[hits.text[contained]]]
        row, coverage = hits.row[contained], hits.coverage[contained]
        order = np.lexsort((-coverage, item, row))  # of the texts of an item, the one most covered
        row, item, coverage = row[order], item[order], coverage[order]
        first = np.ones(len(row), dtype=bool)
        first[1:] = (row[1:] != row[:-1]) | (item[1:] != item[:-1])
        row, item, coverage = row[first], item[first], coverage[first]
        order = np.lexsort((item, -coverage, row))
        row, item, coverage = row[order], item[order], coverage[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        kept = rank < MOST
        found = {
            "item": np.full((len(rows), MOST), -1, dtype=np.int32),
            "coverage": np.zeros((len(rows), MOST), dtype=np.float32),
            "hits": np.bincount(row, minlength=len(rows)).astype(np.int32),
        }
        found["item"][row[kept], rank[kept]] = item[kept]
        found["coverage"][row[kept], rank[kept]] = coverage[kept]
        return found

    def decide(self, table: Table) -> Verdict:
        """The set of the item most covered is the reason; each row's items are its detail."""
        names = [one.name for one in self.config.sets]
        items = table.columns["item"]
        rows = np.flatnonzero(table.alive & (items[:, 0] >= 0))
        code = keep_all(len(table))
        details = {}
        if self.config.action == "drop":
            code[rows] = self.set_of_item[items[rows, 0]]
            details = {int(row): self._detail(table, int(row)) for row in rows}
        notes: dict[str, Any] = {"sets": self._per_set(items[rows])}
        beyond = table.columns["hits"][rows] > MOST
        if beyond.any():
            notes[f"rows_with_more_than_{MOST}_items"] = int(beyond.sum())
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
        others = {"others": [{name: hit[name] for name in ("set", "item", "coverage")} for hit in hits[1:]]}
        return hits[0] | (others if len(hits) > 1 else {})

    def _hit(self, item: int, coverage: float) -> dict[str, Any]:
        found = self.items[item]
        excerpt = " ".join(" / ".join(found.texts).split())
        return {"set": found.set, "item": found.place, "coverage": round(coverage, 3), "excerpt": excerpt[:EXCERPT]}

    def _per_set(self, items: np.ndarray) -> dict[str, dict[str, Any]]:
        hit = np.unique(items[items >= 0])
        set_of_item, equal = self.set_of_item, self.equal_items
        row_sets = np.where(items >= 0, set_of_item[items], -1)
        found = {}
        for number, one in enumerate(self.config.sets):
            count = int((set_of_item == number).sum())
            items_hit = int(equal[hit[set_of_item[hit] == number]].sum())
            share = items_hit / count
            found[one.name] = {
                "items": count,
                "items_hit": items_hit,
                "share": round(share, 4),
                "rows": int((row_sets == number).any(axis=1).sum()),
                "contaminated": share > CONTAMINATED,
            }
        return found


def searched(row: Row, of: Literal["user", "all"]) -> list[str]:
    """The texts of a row that evaluation items are looked for in."""
    if is_text(row):
        return [row["text"]]
    prompt = [message.get("content") or "" for message in row["prompt"] if of == "all" or message["role"] == "user"]
    return prompt + ([text for text, _ in reply_parts(row)] if of == "all" else [])

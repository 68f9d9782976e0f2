"""Reward models on sets of pairs: local pairs in a recipe's formats, RewardBench, RewardBench 2, or files shaped so.

Nothing here is about the compared systems: the stage's ``reward``, and its ``second_reward`` beside it, score both
answers of every pair, and what comes of it stands in the scorecard's ``reward_models``. A tie is wrong.

Records of RewardBench 2 have one good answer and three bad ones (in the Ties subset several of both). Its own numbers
use them all; for calibration, length and the like, which are about pairs, one good and one bad answer of each record
are drawn by seed. Left out: answers that call tools.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from align.config.validation import suggest
from align.data.formats import PAIRED, Format, FormatOptions, convert, detect
from align.data.formats.fields import renamed
from align.data.rows import Dropped, Message, Row, assistant, user
from align.errors import UserError
from align.evaluation.pairs import Scores, pair_reports
from align.evaluation.reward_bench import SECTIONS, TIES, best_sections, pair_sections
from align.evaluation.tasks.base import Answers, Bench, Given, Item, Measured, Task, TaskConfig
from align.evaluation.tasks.reading import TaskData, TaskRecord, draw, item_ids, read_records

Layout = Literal["pairs", "reward_bench", "reward_bench_2"]
TITLES: dict[Layout, str] = {
    "pairs": "Reward-model pairs", "reward_bench": "RewardBench", "reward_bench_2": "RewardBench 2",
}  # fmt: skip
HUB = {"allenai/reward-bench": {"dataset": "allenai/reward-bench", "split": "filtered"}}
"""Datasets whose usual split is not called test."""
CATEGORY = "subset"
_TIES_ID = re.compile(r"(ref|tied):\S+")


class RewardPairsConfig(TaskData, TaskConfig):
    """Pairs that the stage's reward models are measured on."""

    task: Literal["reward_pairs"] = "reward_pairs"
    layout: Literal["auto"] | Layout = "auto"
    """``pairs``: in one of a recipe's formats. ``reward_bench``: the same with one of RewardBench's subsets each, which
    gives its four sections. ``reward_bench_2``: ``chosen`` and ``rejected`` are lists of texts. ``auto`` looks at the
    records."""
    category: str | None = None
    """Field of a record that says its category; by default ``subset`` where there is one, else the file's name."""
    format: Format = "auto"
    """How a pair is spelled, as in a recipe's source."""
    options: FormatOptions = FormatOptions()
    """What is taken of a pair where its format leaves a choice, as in a recipe's source."""

    def usual(self) -> Mapping[str, str] | None:
        """Settings of the known datasets."""
        return HUB.get(self.dataset or "")

    def build(self, name: str, given: Given) -> RewardPairsTask:
        """Read the pairs. Raises ``UserError`` without a reward model, and for records that are no pairs."""
        if not given.has_reward:
            raise UserError(f"{name} measures a reward model; name a reward stage as the evaluate stage's `reward`.")
        records = read_records(self.source(), given.base)
        layout = self._layout(records)
        if layout == "reward_bench_2":
            comparisons = draw_prompts(read_best_of(records, self.category or CATEGORY), self.max_items, given.seed)
        else:
            comparisons = draw(self._read_pairs(name, records, given), self.max_items, given.seed)
        described = {**self.described(given.base), "layout": layout}
        return RewardPairsTask(name, layout, comparisons, given, described)

    def _layout(self, records: Sequence[TaskRecord]) -> Layout:
        field = self.category or CATEGORY
        known = {subset for members in SECTIONS.values() for subset in members}
        strange = next((record for record in records if record.get(field) not in known), None)
        if self.layout == "reward_bench" and strange is not None:
            found = strange.text(field)
            raise UserError(f"{strange.where}: '{found}' is no subset of RewardBench.{suggest(found, known)}")
        if self.layout != "auto":
            return self.layout
        if all(_is_texts(record.get("chosen")) and _is_texts(record.get("rejected")) for record in records):
            return "reward_bench_2"
        return "reward_bench" if strange is None else "pairs"

    def _read_pairs(self, name: str, records: Sequence[TaskRecord], given: Given) -> list[Comparison]:
        """One comparison of each record that makes a pair; the others are counted in a warning."""
        form = self.format
        if form == "auto":
            found = detect([renamed(record, self.options) for record in records[:100]], "preferences")
            print(f"{name}: format {found.why}")
            form = found.form  # type: ignore[assignment]  # rows are never detected
        if form not in PAIRED:
            raise UserError(
                f"{name}: format {form} has no chosen and rejected answer; formats that have are {', '.join(PAIRED)}. "
                "Make pairs with a recipe's `pairs` step, and name its stage as the evaluate stage's `pairs`."
            )
        comparisons: list[Comparison] = []
        dropped: Counter[str] = Counter()
        for record, label in zip(records, item_ids(list(records)), strict=True):
            category = self._category(record)
            for row in convert(dict(record), form, record.where, "preferences", self.options):
                why = row.reason if isinstance(row, Dropped) else _unusable(row)
                if why is not None:
                    dropped[why] += 1
                elif isinstance(row, dict):
                    sides = [[row[side][-1]["content"]] for side in ("chosen", "rejected")]
                    comparisons.append(Comparison(label, category, row["prompt"], sides[0], sides[1], row))
        if dropped:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in dropped.most_common())
            given.warn(f"{name}: {dropped.total()} of {len(records)} records make no pair: {reasons}")
        if not comparisons:
            raise UserError(f"{name}: none of {len(records)} records makes a pair; nothing could be scored.")
        return comparisons

    def _category(self, record: TaskRecord) -> str:
        if self.category is not None:
            return str(record[self.category])
        named = record.get(CATEGORY)
        return str(named) if named not in (None, "") else _file_of(record.where)


@dataclass(frozen=True)
class Comparison:
    """A prompt's good and bad answers; one of each for a pair."""

    id: str
    category: str
    prompt: list[Message]
    chosen: list[str]
    rejected: list[str]
    row: Row | None = None
    """The pair as a row of preferences, with what else it says, such as gold scores."""


def read_best_of(records: Sequence[TaskRecord], category: str = CATEGORY) -> list[Comparison]:
    """Records of RewardBench 2: ``prompt``, ``chosen`` and ``rejected`` (lists of texts), ``subset``, ``id``.

    Raises ``UserError`` for one of another shape, and for an ``id`` that says no place in the Ties subset.
    """
    found = []
    seen: set[tuple[str, str]] = set()
    for record, label in zip(records, item_ids(list(records), "id"), strict=True):
        subset = record.text(category)
        if subset.lower() == TIES:
            name = record.text("id")
            if not _TIES_ID.fullmatch(name):
                raise record.wrong("id", "tied:N or ref:N, which says what it is compared with in the Ties subset")
            if (subset, name) in seen:
                raise UserError(f"{record.where}: '{name}' of the Ties subset is there twice; delete one.")
            seen.add((subset, name))
            label = name
        chosen, rejected = record.texts("chosen"), record.texts("rejected")
        prompt = [user(record.text("prompt"))]
        found.append(Comparison(label, subset, prompt, chosen, rejected))
    return found


def draw_prompts(comparisons: list[Comparison], most: int | None, seed: int) -> list[Comparison]:
    """At most ``most`` prompts; what belongs together in the Ties subset is drawn together and counts as one."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for one in comparisons:
        tied = one.category.lower() == TIES
        groups.setdefault((one.category if tied else "", one.id.partition(":")[2] if tied else one.id), []).append(one)
    chosen = {id(one) for group in draw(list(groups.values()), most, seed) for one in group}
    return [one for one in comparisons if id(one) in chosen]


class RewardPairsTask(Task):
    """See the module."""

    kind = "reward_pairs"

    def __init__(
        self, name: str, layout: Layout, comparisons: Sequence[Comparison], given: Given, described: dict[str, Any]
    ) -> None:
        self.name, self.layout, self.title = name, layout, TITLES[layout]
        self.comparisons, self.described = list(comparisons), described
        self.items = [Item(one.id, one.category, list(one.prompt)) for one in self.comparisons]
        self.metrics, self.primary = {}, ""  # its numbers are no system's
        self.models = ("reward", "second_reward") if given.has_second_reward else ("reward",)
        generator = random.Random(given.seed)  # noqa: S311
        self.drawn = [(generator.randrange(len(c.chosen)), generator.randrange(len(c.rejected))) for c in comparisons]
        self.reports: list[dict[str, Any]] = []
        self.scored: list[tuple[str, list[tuple[list[float], list[float]]]]] = []
        """Stage of each reward model, and its scores of each comparison's chosen and rejected answers."""

    def settings(self) -> dict[str, Any]:
        """Data, layout, and how many answers are scored."""
        answers = sum(len(one.chosen) + len(one.rejected) for one in self.comparisons)
        return {**self.described, "pairs": len(self.comparisons), "answers": answers}

    def score(self, answers: Mapping[str, Answers], bench: Bench) -> dict[str, Measured]:
        """Have the reward models score every answer; nothing is measured of the systems."""
        scores = self.scored = []
        for which in self.models:
            scores.append((bench.reward_stage(which) or which, self._scores(bench, which)))
            bench.progress(len(scores), len(self.models), "reward models")
        pairs: list[tuple[str, Scores]] = [(stage, self._pair_scores(found)) for stage, found in scores]
        self.reports = pair_reports(self._rows(), pairs, seed=bench.seed, task=self.name)
        for report, (_, found) in zip(self.reports, scores, strict=True):
            report["sections"] = self._sections(found, bench.seed)
        return {}

    def extras(self) -> dict[str, Any]:
        """``reward_models``: a report of each."""
        return {"reward_models": self.reports}

    def item_values(self) -> dict[str, list[dict[str, list[float | None]]]]:
        """Of each reward model: ``chosen`` and ``rejected`` (the scores of all such answers), ``margin``, ``correct``.

        The latter two are of the pair that the report is about: one of each side, drawn where there are several. A
        score that is no number is null.
        """
        return {
            stage: [_numbers(*sides, *drawn) for sides, drawn in zip(scores, self.drawn, strict=True)]
            for stage, scores in self.scored
        }

    def item_answers(self) -> list[dict[str, list[dict[str, Any]]]]:
        """``chosen`` and ``rejected``: texts, each with its score by every reward model."""
        return [
            {
                side: [
                    {
                        "text": text,
                        "finished": True,
                        "scores": {stage: _finite(scores[place][which][number]) for stage, scores in self.scored},
                    }
                    for number, text in enumerate(texts)
                ]
                for which, (side, texts) in enumerate((("chosen", pair.chosen), ("rejected", pair.rejected)))
            }
            for place, pair in enumerate(self.comparisons)
        ]

    def _scores(self, bench: Bench, which: str) -> list[tuple[list[float], list[float]]]:
        """Scores of each comparison's chosen and rejected answers."""
        prompts = [one.prompt for one in self.comparisons for _ in (*one.chosen, *one.rejected)]
        texts = [text for one in self.comparisons for text in (*one.chosen, *one.rejected)]
        flat = iter(bench.reward_scores(prompts, texts, [True] * len(texts), which))
        return [([next(flat) for _ in one.chosen], [next(flat) for _ in one.rejected]) for one in self.comparisons]

    def _pair_scores(self, scores: Sequence[tuple[list[float], list[float]]]) -> Scores:
        both = [(good[at], bad[other]) for (good, bad), (at, other) in zip(scores, self.drawn, strict=True)]
        return [good for good, _ in both], [bad for _, bad in both]

    def _rows(self) -> list[Row]:
        return [
            {
                **(one.row or {}),
                "source": one.category,
                "chosen": [assistant(one.chosen[at])],
                "rejected": [assistant(one.rejected[other])],
            }
            for one, (at, other) in zip(self.comparisons, self.drawn, strict=True)
        ]

    def _sections(self, scores: Sequence[tuple[list[float], list[float]]], seed: int) -> dict[str, Any] | None:
        categories = [one.category for one in self.comparisons]
        if self.layout == "reward_bench_2":
            return best_sections(categories, [one.id for one in self.comparisons], scores, seed=seed)
        if self.layout == "reward_bench":
            return pair_sections(categories, [good[0] > bad[0] for good, bad in scores], seed=seed)
        return None


def _numbers(chosen: list[float], rejected: list[float], good: int, bad: int) -> dict[str, list[float | None]]:
    """What ``item_values`` says of one comparison; ``good`` and ``bad`` are the answers of the drawn pair."""
    margin = chosen[good] - rejected[bad]
    return {
        "chosen": [_finite(score) for score in chosen],
        "rejected": [_finite(score) for score in rejected],
        "margin": [_finite(margin)],
        "correct": [float(margin > 0)],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _unusable(row: Row) -> str | None:
    """Why a reward model is not asked about a pair; None for one it is."""
    answers = (*row["chosen"], *row["rejected"])
    if row.get("tools") or any(message.get("tool_calls") for message in (*row["prompt"], *answers)):
        return "it has tools"
    return None if all(message["content"].strip() for message in answers) else "an answer is empty"


def _file_of(where: str) -> str:
    """``pairs.jsonl`` of ``/data/pairs.jsonl:12`` and ``/data/pairs.json: record 12``."""
    return re.sub(r":(?: record | row )?\d+$", "", where.replace("\\", "/").rsplit("/", 1)[-1])

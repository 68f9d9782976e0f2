"""Reward models on sets of pairs: your pairs in a recipe's formats, RewardBench, RewardBench 2, or files of that form.

The compared systems play no part here: the stage's ``reward`` and its ``second_reward`` score both answers of every
pair, and the results go to the scorecard's ``reward_models``. A tie is wrong.

Records of RewardBench 2 have one good answer and three bad ones (in the Ties subset several of both). Its own numbers
use them all. Calibration, length and the like are about pairs; for these, one good and one bad answer of each record
are drawn by seed. Pairs whose answers call tools are skipped.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.config.stages.evaluation.tasks import PairLayout, RewardPairsConfig
from align.config.validation import suggest
from align.data.formats import convert
from align.data.rows import Dropped, Message, Row, assistant, user
from align.errors import UserError
from align.evaluation.answers import Answers, Item, Measured, RewardField
from align.evaluation.reward_accuracy import SECTIONS, TIES, Scores, best_sections, pair_reports, pair_sections
from align.evaluation.tasks.base import Task, TaskInputs
from align.evaluation.tasks.likelihood import choose_pair_format, format_counts
from align.evaluation.tasks.records import TaskRecord, describe_records, draw, item_ids, read_records, record_source

if TYPE_CHECKING:
    from align.evaluation.scoring import ScoringContext

TITLES: dict[PairLayout, str] = {
    "pairs": "Reward-model pairs",
    "reward_bench": "RewardBench",
    "reward_bench_2": "RewardBench 2",
}
CATEGORY = "subset"
"""Default field of a record's category."""
_TIES_ID = re.compile(r"(ref|tied):\S+")


@dataclass(frozen=True)
class Comparison:
    """A prompt's good and bad answers; a pair has one good and one bad answer."""

    id: str
    category: str
    prompt: list[Message]
    chosen: list[str]
    rejected: list[str]
    row: Row | None = None
    """The pair as a row of preferences, with its further fields, such as gold scores."""


def build(name: str, config: RewardPairsConfig, inputs: TaskInputs) -> RewardPairsTask:
    """Build the task from its pairs. Raises ``UserError`` for records that are not pairs."""
    records = read_records(record_source(config), inputs.base)
    layout = _choose_layout(config, records)
    if layout == "reward_bench_2":
        comparisons = draw_prompts(read_best_of(records, config.category or CATEGORY), config.max_items, inputs.seed)
    else:
        comparisons = draw(_read_pairs(name, config, records, inputs), config.max_items, inputs.seed)
    description = {**describe_records(config, inputs.base), "layout": layout}
    return RewardPairsTask(name, layout, comparisons, inputs, description)


def _choose_layout(config: RewardPairsConfig, records: Sequence[TaskRecord]) -> PairLayout:
    field = config.category or CATEGORY
    known_subsets = {subset for members in SECTIONS.values() for subset in members}
    unknown = next((record for record in records if record.get(field) not in known_subsets), None)
    if config.layout == "reward_bench" and unknown is not None:
        subset = unknown.text(field)
        raise UserError(f"{unknown.where}: '{subset}' is no subset of RewardBench.{suggest(subset, known_subsets)}")
    if config.layout != "auto":
        return config.layout
    # ``auto``: lists of answers are RewardBench 2's, only known subsets are RewardBench's, all else are pairs.
    if all(_is_texts(record.get("chosen")) and _is_texts(record.get("rejected")) for record in records):
        return "reward_bench_2"
    return "reward_bench" if unknown is None else "pairs"


def _read_pairs(
    name: str, config: RewardPairsConfig, records: Sequence[TaskRecord], inputs: TaskInputs
) -> list[Comparison]:
    """Return a comparison of each record that makes a pair; the others are counted in a warning."""
    source = record_source(config).model_copy(update={"format": config.format, "options": config.options})
    choice = choose_pair_format(source, iter([(record.where, dict(record)) for record in records]), inputs, name)
    comparisons: list[Comparison] = []
    dropped: Counter[str] = Counter()
    for record, id in zip(records, item_ids(list(records)), strict=True):
        category = _category(config, record)
        for row in convert(dict(record), choice.format, record.where, "preferences"):
            reason = row.reason if isinstance(row, Dropped) else _unusable_reason(row)
            if reason is not None:
                dropped[reason] += 1
            elif isinstance(row, dict):
                chosen, rejected = ([row[side][-1]["content"]] for side in ("chosen", "rejected"))
                comparisons.append(Comparison(id, category, row["prompt"], chosen, rejected, row))
    if dropped:
        inputs.warn(f"{name}: {dropped.total()} of {len(records)} records make no pair: {format_counts(dropped)}")
    if not comparisons:
        raise UserError(f"{name}: none of {len(records)} records makes a pair; nothing could be scored.")
    return comparisons


def _category(config: RewardPairsConfig, record: TaskRecord) -> str:
    if config.category is not None:
        return str(record[config.category])
    subset = record.get(CATEGORY)
    return str(subset) if subset not in (None, "") else _file_name(record.where)


def read_best_of(records: Sequence[TaskRecord], category: str = CATEGORY) -> list[Comparison]:
    """Parse records of RewardBench 2: ``prompt``, ``chosen`` and ``rejected`` (lists of texts), ``subset``, ``id``.

    Raises ``UserError`` for a record of another form, and for an ``id`` of the Ties subset that names no partner.
    """
    comparisons = []
    tie_ids: set[tuple[str, str]] = set()
    for record, item_id in zip(records, item_ids(list(records), "id"), strict=True):
        id = item_id
        subset = record.text(category)
        if subset.lower() == TIES:
            id = record.text("id")
            if not _TIES_ID.fullmatch(id):
                raise record.field_error("id", "tied:N or ref:N, which names its partner in the Ties subset")
            if (subset, id) in tie_ids:
                raise UserError(f"{record.where}: '{id}' of the Ties subset is there twice; delete one.")
            tie_ids.add((subset, id))
        chosen = record.texts("chosen")
        rejected = record.texts("rejected")
        prompt = [user(record.text("prompt"))]
        comparisons.append(Comparison(id, subset, prompt, chosen, rejected))
    return comparisons


def draw_prompts(comparisons: list[Comparison], limit: int | None, seed: int) -> list[Comparison]:
    """Draw at most ``limit`` prompts; partners in the Ties subset are drawn together and count as one."""
    # ``ref:7`` and ``tied:7`` are scored together, so one must not be drawn without the other.
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in comparisons:
        key = ("", comparison.id)
        if comparison.category.lower() == TIES:
            key = (comparison.category, comparison.id.partition(":")[2])
        groups.setdefault(key, []).append(comparison)
    chosen = {id(comparison) for group in draw(list(groups.values()), limit, seed) for comparison in group}
    return [comparison for comparison in comparisons if id(comparison) in chosen]


class RewardPairsTask(Task):
    """Pairs, and the reports on every reward model that scored them."""

    kind = "reward_pairs"

    def __init__(
        self,
        name: str,
        layout: PairLayout,
        comparisons: Sequence[Comparison],
        inputs: TaskInputs,
        description: dict[str, Any],
    ) -> None:
        self.name = name
        self.layout = layout
        self.title = TITLES[layout]
        self.comparisons = list(comparisons)
        self.description = description
        self.items = [Item(comparison.id, comparison.category, list(comparison.prompt)) for comparison in comparisons]
        self.metrics = {}
        self.primary = ""  # its numbers belong to no system
        self.models: tuple[RewardField, ...] = ("reward",)
        if inputs.has_second_reward:
            self.models = ("reward", "second_reward")
        # Comparisons with several answers are reduced to one random pair each, so pair statistics apply.
        generator = random.Random(inputs.seed)  # noqa: S311
        self.pair_indices = [
            (generator.randrange(len(comparison.chosen)), generator.randrange(len(comparison.rejected)))
            for comparison in comparisons
        ]
        """Indices of the chosen and the rejected answer that stand for each comparison as a pair."""
        self.reports: list[dict[str, Any]] = []
        self.scored: list[tuple[str, list[tuple[list[float], list[float]]]]] = []
        """Stage of each reward model, and its scores of each comparison's chosen and rejected answers."""

    def settings(self) -> dict[str, Any]:
        """Return data, layout, and the number of scored answers."""
        answers = sum(len(comparison.chosen) + len(comparison.rejected) for comparison in self.comparisons)
        return {**self.description, "pairs": len(self.comparisons), "answers": answers}

    def score(self, answers: Mapping[str, Answers], context: ScoringContext) -> dict[str, Measured]:
        """Have the reward models score every answer. The systems are not measured."""
        self.scored = []
        for field in self.models:
            self.scored.append((context.reward_stage(field) or field, self._scores(context, field)))
            context.progress(len(self.scored), len(self.models), "reward models")
        pairs: list[tuple[str, Scores]] = [(stage, self._pair_scores(scores)) for stage, scores in self.scored]
        self.reports = pair_reports(self._rows(), pairs, seed=context.seed, task=self.name)
        for report, (_, scores) in zip(self.reports, self.scored, strict=True):
            report["sections"] = self._sections(scores, context.seed)
        return {}

    def extras(self) -> dict[str, Any]:
        """Return ``reward_models``: a report on each."""
        return {"reward_models": self.reports}

    def item_values(self) -> dict[str, list[dict[str, list[float | None]]]]:
        """Return each reward model's ``chosen`` and ``rejected`` scores, ``margin`` and ``correct``.

        The latter two are of the pair that the report is about: one answer of each side, drawn if there are several.
        A score that is not finite is null.
        """
        return {
            stage: [_item_numbers(*sides, *pair) for sides, pair in zip(scores, self.pair_indices, strict=True)]
            for stage, scores in self.scored
        }

    def item_answers(self) -> list[dict[str, list[dict[str, Any]]]]:
        """Return ``chosen`` and ``rejected``: texts, each with its score by every reward model."""
        return [
            {"chosen": self._scored_texts(row, 0, pair.chosen), "rejected": self._scored_texts(row, 1, pair.rejected)}
            for row, pair in enumerate(self.comparisons)
        ]

    def _scored_texts(self, row: int, side: int, texts: Sequence[str]) -> list[dict[str, Any]]:
        return [
            {
                "text": text,
                "finished": True,
                "scores": {stage: _finite(scores[row][side][number]) for stage, scores in self.scored},
            }
            for number, text in enumerate(texts)
        ]

    def _scores(self, context: ScoringContext, field: RewardField) -> list[tuple[list[float], list[float]]]:
        """Return the scores of each comparison's chosen and rejected answers."""
        prompts = []
        texts = []
        for comparison in self.comparisons:
            for text in (*comparison.chosen, *comparison.rejected):
                prompts.append(comparison.prompt)
                texts.append(text)
        flat = iter(context.reward_scores(prompts, texts, [True] * len(texts), field))
        return [
            ([next(flat) for _ in comparison.chosen], [next(flat) for _ in comparison.rejected])
            for comparison in self.comparisons
        ]

    def _pair_scores(self, scores: Sequence[tuple[list[float], list[float]]]) -> Scores:
        chosen = []
        rejected = []
        for (good_scores, bad_scores), (good, bad) in zip(scores, self.pair_indices, strict=True):
            chosen.append(good_scores[good])
            rejected.append(bad_scores[bad])
        return chosen, rejected

    def _rows(self) -> list[Row]:
        return [
            {
                **(comparison.row or {}),
                "source": comparison.category,
                "chosen": [assistant(comparison.chosen[good])],
                "rejected": [assistant(comparison.rejected[bad])],
            }
            for comparison, (good, bad) in zip(self.comparisons, self.pair_indices, strict=True)
        ]

    def _sections(self, scores: Sequence[tuple[list[float], list[float]]], seed: int) -> dict[str, Any] | None:
        categories = [comparison.category for comparison in self.comparisons]
        if self.layout == "reward_bench_2":
            return best_sections(categories, [comparison.id for comparison in self.comparisons], scores, seed=seed)
        if self.layout == "reward_bench":
            return pair_sections(categories, [good[0] > bad[0] for good, bad in scores], seed=seed)
        return None


def _item_numbers(chosen: list[float], rejected: list[float], good: int, bad: int) -> dict[str, list[float | None]]:
    """Return one comparison's ``item_values``; ``good`` and ``bad`` index the drawn pair."""
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


def _unusable_reason(row: Row) -> str | None:
    """Return the reason why a reward model cannot score a pair; None if it can."""
    answers = (*row["chosen"], *row["rejected"])
    if row.get("tools") or any(message.get("tool_calls") for message in (*row["prompt"], *answers)):
        return "it has tools"
    return None if all(message["content"].strip() for message in answers) else "an answer is empty"


def _file_name(where: str) -> str:
    """Return ``pairs.jsonl`` for ``/data/pairs.jsonl:12`` and ``/data/pairs.json: record 12``."""
    return re.sub(r":(?: record | row )?\d+$", "", where.replace("\\", "/").rsplit("/", 1)[-1])

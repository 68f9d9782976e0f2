"""Builds judged tasks: MT-Bench, AlpacaEval, or any questions, from the usual records of these. Torch-free.

``grade`` asks an endpoint for 1 to 10, turn by turn; ``compare`` asks for the better of two systems' answers, in both
orders, where verdicts that differ are a tie. The prompts are this project's own, so the numbers compare systems with
each other, and with no published table. A checkpoint of the pipeline judges when it is served as an endpoint. Win rates
weighted by a judge's probabilities are not supported.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.endpoint import PAIR_RUBRIC
from align.config.recipe.source_settings import FilesSource
from align.config.stages.evaluation.tasks import JudgedConfig
from align.data.rows import Message
from align.errors import UserError
from align.evaluation.answers import Answers, Item, Measured, Turn
from align.evaluation.comparisons import length_controlled, obstacle, win_rate
from align.evaluation.judge import JudgeClient, warn_if_unreachable
from align.evaluation.scorecard import Metric, SystemInfo
from align.evaluation.tasks.base import TaskInputs
from align.evaluation.tasks.graded import (
    REFERENCED_CATEGORIES,
    GradedTask,
    JudgedTask,
    answer_notes,
    check_records,
    conversation,
    make_items,
    measured_columns,
    read_references,
)
from align.evaluation.tasks.records import file_identities, load_records
from align.inference.protocol import Response
from align.judges import prompts
from align.judges.prompts import Outcome, Verdict
from align.store.fingerprint import canonical

if TYPE_CHECKING:
    from align.evaluation.scoring import ScoringContext

POINTS: dict[Outcome, float] = {"one": 1.0, "other": 0.0, "tie": 0.5, "disagreement": 0.5}
"""Points of the first system for an outcome; unreadable outcomes are skipped."""
NOT_MEASURED = "not measured"
"""Method of a win rate between answers that are all the same."""
WIN_RATE = "win_rate"
FILE = "file"
"""System name of the answers that came with the questions."""
OPPONENTS = {"base": "the base model", "file": "the answers in the file"}
Pair = tuple[str, str]
Sides = Mapping[str, list[list[Turn]]]
"""System → item → turns."""


def identities(config: JudgedConfig, base: Path) -> dict[str, str]:
    """Return digests of the files, and the judge's identity."""
    from align.data.sources import identity

    digests = file_identities(config, base)
    if config.references_files is not None:
        try:
            references = identity(FilesSource(type="files", paths=config.references_files), base)
        except UserError as error:
            raise UserError(f"references_files: {error}") from None
        digests |= {f"references: {name}": digest for name, digest in references.items()}
    return digests | {"judge": canonical(config.judge.identity())}


def build(name: str, config: JudgedConfig, inputs: TaskInputs) -> JudgedTask:
    """Build the task from its questions, and warn if the judge cannot be reached yet."""
    records = load_records(config, inputs.base, inputs.seed)
    check_records(config, records)
    references = None if config.references_files is None else read_references(config.references_files, inputs.base)
    is_mt_bench = config.preset == "mt_bench"
    items = make_items(records, references, REFERENCED_CATEGORIES if is_mt_bench else None, name)
    task: JudgedTask
    if config.judging_mode == "grade":
        task = GradedTask(name, config, items, inputs)
    else:
        task = ComparedTask(name, config, items, inputs)
    if config.judge.endpoint is not None:
        warn_if_unreachable(config.judge.endpoint, f"tasks.{name}.judge.endpoint", inputs.warn)
        lacking = [item for item in items if item.source in REFERENCED_CATEGORIES and not item.data["references"]]
        if is_mt_bench and lacking:
            inputs.warn(
                f"tasks.{name}: {len(lacking)} questions of math, reasoning and coding have no reference answer, "
                "and judges are often wrong there; name references_files"
            )
    return task


@dataclass(frozen=True)
class Contest:
    """Two systems' answers to the same questions, compared question by question."""

    first: str
    second: str
    outcomes: list[Outcome]
    gaps: list[int]
    """Characters of ``first``'s answers minus ``second``'s, question by question."""
    verdicts: list[Verdict | None] = field(default_factory=list)
    """All verdicts of a judge that was asked in both orders; empty for a reward model."""
    same: int = 0
    """Questions with word-for-word equal answers: ties that no judge was asked about."""

    @property
    def decided(self) -> list[int]:
        """Indices of the questions with a readable outcome."""
        return [index for index, outcome in enumerate(self.outcomes) if outcome in POINTS]

    def points(self) -> list[float]:
        """Return the points of the decided questions: 1 for a win, 0 for a loss, 0.5 for neither."""
        return [POINTS[self.outcomes[index]] for index in self.decided]

    @property
    def is_copy(self) -> bool:
        """True if no two answers differ, so there was no comparison."""
        return bool(self.outcomes) and self.same == len(self.outcomes)

    def rate(self) -> dict[str, Any]:
        """Return the win rate with its interval; copies have no interval, as no noise was measured."""
        # Copies tie in every question by construction, and an interval around 0.5 would claim a measurement.
        rate = win_rate(self.points()).as_dict()
        return {**rate, "low": None, "high": None, "method": NOT_MEASURED} if self.is_copy else rate

    def row(self, task: str, judge: str) -> dict[str, Any]:
        """Return the contest as a row of the scorecard's ``win_rates``."""
        counts = Counter(self.outcomes)
        points = self.points()
        gaps = [self.gaps[index] for index in self.decided]
        equal_length = None if self.is_copy else length_controlled(points, gaps)
        return {
            "task": task,
            "judge": judge,
            "one": self.first,
            "other": self.second,
            "n": len(points),
            "wins": counts["one"],
            "ties": counts["tie"],
            "losses": counts["other"],
            "disagreements": counts["disagreement"],
            "unreadable": counts["unreadable"],
            "same_answers": self.same,
            "win_rate": self.rate(),
            "length_controlled": None if equal_length is None else equal_length.as_dict(),
        }


def verdict_counts(contests: Sequence[Contest]) -> dict[str, Any]:
    """Count a judge's verdicts; ``first_share`` is the share of the first answer among verdicts that name an answer.

    0.5 is no position bias, since every pair is shown in both orders.
    """
    counts = Counter(verdict or "unreadable" for contest in contests for verdict in contest.verdicts)
    decisive = counts["first"] + counts["second"]
    return {
        **{name: counts[name] for name in ("first", "second", "tie", "unreadable")},
        "first_share": round(counts["first"] / decisive, 4) if decisive else None,
    }


def outcome_by_score(first: float, second: float) -> Outcome:
    """Return the outcome by a scorer: the higher score wins; a score that is not finite is unreadable."""
    if not (math.isfinite(first) and math.isfinite(second)):
        return "unreadable"
    if first == second:
        return "tie"
    return "one" if first > second else "other"


class ComparedTask(JudgedTask):
    """``win_rate`` of every system against one opponent; the ``win_rates`` extra has every compared pair."""

    primary = WIN_RATE
    prompt = prompts.COMPARISON_PROMPT
    rubric = PAIR_RUBRIC

    def __init__(self, name: str, config: JudgedConfig, items: list[Item], inputs: TaskInputs) -> None:
        super().__init__(name, config, items, inputs)
        self.title = f"{self.label}, compared by {self.judge_name}"
        opponent = OPPONENTS.get(config.against or "", "the reference")
        meaning = f"share of questions where {self.judge_name} prefers the answer to that of {opponent}; a tie is half"
        self.metrics = {WIN_RATE: Metric(f"{self.label} win rate against {opponent}", "higher", "share", meaning, True)}
        self.contests: list[Contest] = []

    def settings(self) -> dict[str, Any]:
        """Return the base's settings, and the opponent."""
        return {**super().settings(), "against": self.config.against or "reference"}

    def extras(self) -> dict[str, Any]:
        """Return ``win_rates``: a row for every two systems that were compared."""
        return {"win_rates": [contest.row(self.name, self.judge_name) for contest in self.contests]}

    def check(self, info: SystemInfo) -> None:
        """Refuse a system with the name of the records' answers."""
        self._check_name(info.name)

    def check_systems(self, systems: Sequence[SystemInfo]) -> None:
        """Check that there is an opponent."""
        if self.config.against == "base" and all(info.role != "base" for info in systems):
            raise self._no_base_error()

    def score(self, answers: Mapping[str, Answers], context: ScoringContext) -> dict[str, Measured]:
        """Return the win rates of every system but the opponent.

        Raises ``UserError`` for a judge whose verdicts are unreadable or if there is no opponent, ``EndpointLost``
        for a server that is gone; its replies until then are cached.
        """
        first_samples = {name: [samples[0] for samples in per_item] for name, per_item in answers.items()}
        opponent = self._opponent(first_samples, context)
        pairs = [(name, opponent) for name in first_samples if name != opponent]
        if self.config.against == "all":
            names = [name for name, _ in pairs]
            # Every two systems once; the later one is the first of its pair, as in the scorecard's differences.
            pairs += [(later, earlier) for earlier, later in itertools.combinations(names, 2)]
        if not pairs:
            context.warn(f"tasks.{self.name}: there is one system, and nothing to compare it with")
            self.contests = []
            return {}
        sides = dict(first_samples)
        # The file's answers are compared as if a system had given them.
        if opponent == FILE:
            sides[FILE] = [[Turn(item.prompt, Response([], [], True, item.data["output"]))] for item in self.items]
        if self.config.judge.endpoint is not None:
            self.contests = self._judge_by_endpoint(pairs, sides, context)
        else:
            self.contests = self._judge_by_reward(pairs, sides, context)
        return {
            # Contests with the opponent are a system's metric. All others are only in the ``win_rates`` extra.
            contest.first: self._measured(contest, first_samples[contest.first])
            for contest in self.contests
            if contest.second == opponent
        }

    def _opponent(self, systems: Mapping[str, Any], context: ScoringContext) -> str:
        against = self.config.against
        if against == "file":
            for name in systems:
                self._check_name(name)
            return FILE
        if against == "base":
            if context.base is None:
                raise self._no_base_error()
            return context.base
        return context.reference

    def _check_name(self, name: str) -> None:
        if self.config.against == "file" and name == FILE:
            raise UserError(f"tasks.{self.name}: a system is called '{FILE}', as the records' answers are; rename it.")

    def _no_base_error(self) -> UserError:
        return UserError(
            f"tasks.{self.name}.against: base, but no stage of kind `model` is among policies; add it, or compare with "
            "the reference."
        )

    def _judge_by_endpoint(self, pairs: Sequence[Pair], sides: Sides, context: ScoringContext) -> list[Contest]:
        """Ask for a verdict in both orders wherever two answers differ; equal answers are a tie without a question."""
        differing = [
            (first, second, index)
            for first, second in pairs
            for index in range(len(self.items))
            if _texts(sides[first][index]) != _texts(sides[second][index])
        ]
        # Both orders of every pair, since judges prefer the answer they read first.
        questions: list[list[Message]] = []
        groups: list[str] = []
        for first, second, index in differing:
            reference = self.reference(index, self.turns)
            rubric = self.rubric_of(index)
            for shown_first, shown_second in ((first, second), (second, first)):
                a = conversation(sides[shown_first][index][-1])
                b = conversation(sides[shown_second][index][-1])
                questions.append(prompts.comparison_prompt(a, b, rubric, reference))
                groups.append(f"{first} and {second}")
        client = JudgeClient(self.config.judge, self.name, context)
        replies = client.ask(questions, groups, lambda text: prompts.read_verdict(text) is not None)
        self.usage = client.usage()
        verdicts = [prompts.read_verdict(reply.text) for reply in replies]
        # Two verdicts per differing place: straight, then swapped.
        by_place = {place: verdicts[2 * number : 2 * number + 2] for number, place in enumerate(differing)}
        contests = []
        for first, second in pairs:
            both = [by_place.get((first, second, index)) for index in range(len(self.items))]
            # A verdict counts only if both orders agree; see ``combine_verdicts``.
            outcomes: list[Outcome] = [
                "tie" if orders is None else prompts.combine_verdicts(*orders) for orders in both
            ]
            pair_verdicts = [verdict for orders in both for verdict in orders or ()]
            gaps = _length_gaps(sides[first], sides[second])
            contests.append(Contest(first, second, outcomes, gaps, pair_verdicts, both.count(None)))
        texts = iter(reply.text for reply in replies)
        self.judgment_lines = [
            self._judgment_line(place, by_place[place], [next(texts), next(texts)]) for place in differing
        ]
        return contests

    def _judgment_line(
        self, place: tuple[str, str, int], verdicts: Sequence[Verdict | None], texts: Sequence[str]
    ) -> dict[str, Any]:
        """Return a comparison as a line of ``judgments.jsonl``; ``orders`` has the systems as they were shown."""
        first, second, index = place
        orders = [
            {"shown": shown, "verdict": verdict, "text": text}
            for shown, verdict, text in zip(([first, second], [second, first]), verdicts, texts, strict=True)
        ]
        outcome = prompts.combine_verdicts(*verdicts)
        pair = {"one": first, "other": second, "outcome": outcome}
        return {"task": self.name, "id": self.items[index].id, **pair, "orders": orders}

    def _judge_by_reward(self, pairs: Sequence[Pair], sides: Sides, context: ScoringContext) -> list[Contest]:
        """Compare scores: the higher one wins; of several turns the higher mean."""
        scores = {name: self._scores(sides[name], context) for name in dict.fromkeys(itertools.chain(*pairs))}
        limit = self.config.judge.max_unreadable
        contests = []
        for first, second in pairs:
            outcomes = [outcome_by_score(a, b) for a, b in zip(scores[first], scores[second], strict=True)]
            unreadable = outcomes.count("unreadable")
            if unreadable > limit * len(outcomes):
                raise UserError(
                    f"tasks.{self.name}: the reward model's scores are no numbers in {unreadable} of {len(outcomes)} "
                    f"comparisons of {first} and {second}; max_unreadable is {limit:g}. Train it again, with a lower "
                    "learning rate."
                )
            same = sum(_texts(a) == _texts(b) for a, b in zip(sides[first], sides[second], strict=True))
            gaps = _length_gaps(sides[first], sides[second])
            contests.append(Contest(first, second, outcomes, gaps, same=same))
        return contests

    def _scores(self, answers: list[list[Turn]], context: ScoringContext) -> list[float]:
        """Return the mean score of each item's turns."""
        turns = [turn for item_turns in answers for turn in item_turns]
        scores = iter(
            context.reward_scores(
                [turn.prompt for turn in turns],
                [str(turn.response.answer_text) for turn in turns],
                [turn.response.finished for turn in turns],
                self.config.judge.reward_field or "reward",
            )
        )
        return [sum(next(scores) for _ in item_turns) / len(item_turns) for item_turns in answers]

    def _measured(self, contest: Contest, answers: list[list[Turn]]) -> Measured:
        involved = [other for other in self.contests if contest.first in (other.first, other.second)]
        notes: dict[str, Any] = {
            "unreadable": contest.outcomes.count("unreadable"),
            "disagreements": contest.outcomes.count("disagreement"),
            **answer_notes(answers),
        }
        if any(other.verdicts for other in involved):
            notes["verdicts"] = verdict_counts(involved)
        reason = obstacle([contest.gaps[index] for index in contest.decided])
        if reason is not None:
            notes["no_length_control"] = reason
        measured = measured_columns({WIN_RATE: [POINTS.get(outcome) for outcome in contest.outcomes]}, notes)
        measured.estimates[WIN_RATE] = contest.rate()
        return measured


def _texts(turns: list[Turn]) -> list[str]:
    return [turn.response.answer_text.strip() for turn in turns]


def _length_gaps(first: list[list[Turn]], second: list[list[Turn]]) -> list[int]:
    """Return the characters of one side's answers minus the other's, item by item."""
    return [sum(map(len, _texts(a))) - sum(map(len, _texts(b))) for a, b in zip(first, second, strict=True)]

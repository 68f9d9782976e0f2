"""Answers of two systems compared with each other, by an endpoint in both orders or by a reward model. Torch-free."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from align.config.judge import PAIR_RUBRIC
from align.config.stages.evaluation_tasks import JudgedConfig
from align.data.rows import Message
from align.errors import UserError
from align.evaluation.judges import judge_prompts as prompts
from align.evaluation.judges.client import JudgeClient
from align.evaluation.judges.graded import JudgedTask, answer_notes, conversation, measured_columns
from align.evaluation.judges.judge_prompts import Outcome
from align.evaluation.judges.length_control import obstacle
from align.evaluation.judges.win_rates import POINTS, Contest, outcomes_by_score, verdict_counts
from align.evaluation.tasks.base import (
    Answers,
    Item,
    Measured,
    Metric,
    ScoringContext,
    SystemInfo,
    TaskInputs,
    Turn,
)
from align.inference.protocol import Response

WIN_RATE = "win_rate"
FILE = "file"
"""System name of the answers that came with the questions."""
OPPONENTS = {"base": "the base model", "file": "the answers in the file"}
Pair = tuple[str, str]
Sides = Mapping[str, list[list[Turn]]]
"""System → item → turns."""


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

        Raises ``UserError`` for a judge whose verdicts are unreadable and where there is no opponent, ``EndpointLost``
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
        # The file's answers take part as if a system had given them.
        if opponent == FILE:
            sides[FILE] = [[Turn(item.prompt, Response([], [], True, item.data["output"]))] for item in self.items]
        if self.config.judge.endpoint is not None:
            self.contests = self._judge_by_endpoint(pairs, sides, context)
        else:
            self.contests = self._judge_by_reward(pairs, sides, context)
        return {
            # Contests with the opponent are a system's metric. All others are in the ``win_rates`` extra alone.
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
        return contests

    def _judge_by_reward(self, pairs: Sequence[Pair], sides: Sides, context: ScoringContext) -> list[Contest]:
        """Compare scores: the higher one wins; of several turns the higher mean."""
        scores = {name: self._scores(sides[name], context) for name in dict.fromkeys(itertools.chain(*pairs))}
        limit = self.config.judge.max_unreadable
        contests = []
        for first, second in pairs:
            outcomes = outcomes_by_score(scores[first], scores[second])
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
                [turn.response.text for turn in turns],
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
    return [turn.response.text.strip() for turn in turns]


def _length_gaps(first: list[list[Turn]], second: list[list[Turn]]) -> list[int]:
    """Return the characters of one side's answers minus the other's, item by item."""
    return [sum(map(len, _texts(a))) - sum(map(len, _texts(b))) for a, b in zip(first, second, strict=True)]

"""Answers of systems compared two by two, by an endpoint in both orders or by a reward model. Torch-free."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from align.data.rows import Message
from align.errors import UserError
from align.evaluation.judges import judge
from align.evaluation.judges.contests import POINTS, Contest, by_scores, verdict_counts
from align.evaluation.judges.judge import Outcome
from align.evaluation.judges.judgments import Judgments
from align.evaluation.judges.length_control import obstacle
from align.evaluation.tasks.base import Answers, Bench, Given, Item, Measured, Metric, Respondent, SystemInfo, Turn
from align.evaluation.tasks.judged_task import JudgedTask, answer_notes, measured, talk
from align.inference.protocol import Response

if TYPE_CHECKING:
    from align.evaluation.tasks.judged import JudgedConfig

WIN_RATE = "win_rate"
FILE = "file"
"""What the answers that came with the questions are called as a system."""
OPPONENTS = {"base": "the base model", "file": "the answers in the file"}
Pair = tuple[str, str]
Sides = Mapping[str, list[list[Turn]]]
"""System → item → turns."""


class ComparedTask(JudgedTask):
    """``win_rate`` against one system, which itself has none; ``win_rates`` has every two that were compared."""

    primary = WIN_RATE
    question = judge.COMPARISON
    rubric = judge.RUBRIC

    def __init__(self, name: str, config: JudgedConfig, items: list[Item], given: Given) -> None:
        super().__init__(name, config, items, given)
        self.title = f"{self.label}, compared by {self.by}"
        opponent = OPPONENTS.get(config.against or "", "the reference")
        meaning = f"share of questions where {self.by} prefers the answer to that of {opponent}; a tie is half"
        self.metrics = {WIN_RATE: Metric(f"{self.label} win rate against {opponent}", "higher", "share", meaning, True)}
        self.contests: list[Contest] = []
        self._roles: set[str] = set()

    def settings(self) -> dict[str, Any]:
        """The same, and whom systems are compared with."""
        return {**super().settings(), "against": self.config.against or "reference"}

    def extras(self) -> dict[str, Any]:
        """``win_rates``: a row for every two systems that were compared."""
        return {"win_rates": [contest.row(self.name, self.by) for contest in self.contests]}

    def check(self, info: SystemInfo) -> None:
        """Remembers who takes part; no system may be called what the records' answers are."""
        self._roles.add(info.role)
        self._name_is_free(info.name)

    def respond(self, respondent: Respondent) -> Answers:
        """The same, once it is known that there is someone to be compared with."""
        if self.config.against == "base" and self._roles and "base" not in self._roles:
            raise self._no_base()
        return super().respond(respondent)

    def score(self, answers: Mapping[str, Answers], bench: Bench) -> dict[str, Measured]:
        """Win rates of every system but the one they are compared with.

        Raises ``UserError`` for a judge whose verdicts cannot be read and where there is no such system,
        ``EndpointLost`` for a judge that is gone; what it said until then is kept.
        """
        given = {name: [samples[0] for samples in per_item] for name, per_item in answers.items()}
        opponent = self._opponent(given, bench)
        pairs = [(name, opponent) for name in given if name != opponent]
        if self.config.against == "all":
            pairs += [(later, earlier) for earlier, later in itertools.combinations([one for one, _ in pairs], 2)]
        if not pairs:
            bench.warn(f"tasks.{self.name}: there is one system, and nothing to compare it with")
        sides = dict(given)
        if opponent == FILE:
            sides[FILE] = [[Turn(item.prompt, Response([], [], True, item.data["output"]))] for item in self.items]
        decide = self._by_endpoint if self.config.judge.endpoint is not None else self._by_reward
        self.contests = decide(pairs, sides, bench) if pairs else []
        return {
            contest.one: self._measured(contest, given[contest.one])
            for contest in self.contests
            if contest.other == opponent
        }

    def _opponent(self, given: Mapping[str, Any], bench: Bench) -> str:
        against = self.config.against
        if against == "file":
            for name in given:
                self._name_is_free(name)
            return FILE
        if against == "base":
            if bench.base is None:
                raise self._no_base()
            return bench.base
        return bench.reference

    def _name_is_free(self, name: str) -> None:
        if self.config.against == "file" and name == FILE:
            raise UserError(f"tasks.{self.name}: a system is called '{FILE}', as the records' answers are; rename it.")

    def _no_base(self) -> UserError:
        return UserError(
            f"tasks.{self.name}.against: base, but no stage of kind `model` is among policies; add it, or compare with "
            "the reference."
        )

    def _by_endpoint(self, pairs: Sequence[Pair], sides: Sides, bench: Bench) -> list[Contest]:
        """Both orders of all answers that differ; the same answer twice is a tie that nobody is asked about."""
        differ = [
            (one, other, at)
            for one, other in pairs
            for at in range(len(self.items))
            if _said(sides[one][at]) != _said(sides[other][at])
        ]
        questions: list[list[Message]] = []
        groups: list[str] = []
        for one, other, at in differ:
            reference = self.reference(at, self.turns)
            for first, second in ((one, other), (other, one)):
                a, b = talk(sides[first][at][-1]), talk(sides[second][at][-1])
                questions.append(judge.comparison(a, b, self.rubric, reference))
                groups.append(f"{one} and {other}")
        judgments = Judgments(self.config.judge, self.name, bench)
        said = judgments.ask(questions, groups, lambda text: judge.read_verdict(text) is not None)
        self.usage = judgments.usage()
        verdicts = [judge.read_verdict(one.text) for one in said]
        decided = {place: verdicts[2 * number : 2 * number + 2] for number, place in enumerate(differ)}
        contests = []
        for one, other in pairs:
            own = [decided.get((one, other, at)) for at in range(len(self.items))]
            outcomes: list[Outcome] = ["tie" if each is None else judge.settle(*each) for each in own]
            flat = [verdict for each in own for verdict in each or ()]
            same = own.count(None)
            contests.append(Contest(one, other, outcomes, _gaps(sides[one], sides[other]), flat, same))
        return contests

    def _by_reward(self, pairs: Sequence[Pair], sides: Sides, bench: Bench) -> list[Contest]:
        """The higher score wins, of several turns the higher mean."""
        scores = {name: self._scores(sides[name], bench) for name in dict.fromkeys(itertools.chain(*pairs))}
        most = self.config.judge.max_unreadable
        contests = []
        for one, other in pairs:
            outcomes = by_scores(scores[one], scores[other])
            if (bad := outcomes.count("unreadable")) > most * len(outcomes):
                raise UserError(
                    f"tasks.{self.name}: the reward model's scores are no numbers in {bad} of {len(outcomes)} "
                    f"comparisons of {one} and {other}; max_unreadable is {most:g}. Train it anew, with a lower "
                    "learning rate."
                )
            same = sum(_said(a) == _said(b) for a, b in zip(sides[one], sides[other], strict=True))
            contests.append(Contest(one, other, outcomes, _gaps(sides[one], sides[other]), same=same))
        return contests

    def _scores(self, answers: list[list[Turn]], bench: Bench) -> list[float]:
        """One mean score for each item."""
        flat = [turn for turns in answers for turn in turns]
        found = iter(
            bench.reward_scores(
                [turn.prompt for turn in flat], [turn.response.text for turn in flat],
                [turn.response.finished for turn in flat], self.config.judge.which or "reward",
            )
        )  # fmt: skip
        return [sum(next(found) for _ in turns) / len(turns) for turns in answers]

    def _measured(self, contest: Contest, answers: list[list[Turn]]) -> Measured:
        own = [each for each in self.contests if contest.one in (each.one, each.other)]
        notes: dict[str, Any] = {
            "unreadable": contest.outcomes.count("unreadable"),
            "disagreements": contest.outcomes.count("disagreement"),
            **answer_notes(answers),
        }
        if any(each.verdicts for each in own):
            notes["verdicts"] = verdict_counts(own)
        if (why := obstacle([contest.gaps[at] for at in contest.decided])) is not None:
            notes["no_length_control"] = why
        result = measured({WIN_RATE: [POINTS.get(outcome) for outcome in contest.outcomes]}, notes)
        result.estimates[WIN_RATE] = contest.rate()
        return result


def _said(turns: list[Turn]) -> list[str]:
    return [turn.response.text.strip() for turn in turns]


def _gaps(one: list[list[Turn]], other: list[list[Turn]]) -> list[int]:
    """Characters of one side's answers minus the other's, item by item."""
    return [
        sum(map(len, _said(first))) - sum(map(len, _said(second))) for first, second in zip(one, other, strict=True)
    ]

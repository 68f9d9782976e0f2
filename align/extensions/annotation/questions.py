"""The next question for an annotator: overlap, hidden duplicates, gold questions, and active choice.

Every choice follows from the journal and from hashes, so a session that resumes, on any machine, asks what it would
have asked.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from align.errors import UserError
from align.store.annotations import Answer, Pair, Settings, Side
from align.store.fingerprint import digest

GAP = 10
"""Questions between a pair and its hidden duplicate, while there are other questions."""


@dataclass(frozen=True)
class Question:
    """A pair as an annotator sees it."""

    pair: Pair
    left: Side
    repeat: bool = False
    active: bool = False

    @property
    def texts(self) -> tuple[str, str]:
        """The answers on the left and on the right."""
        return (self.pair.a, self.pair.b) if self.left == "a" else (self.pair.b, self.pair.a)


def share_of(*words: str) -> float:
    """Return a number in [0, 1) that depends on the words only."""
    return int(digest(list(words))[:13], 16) / 16**13


class QuestionQueue:
    """The questions of one annotator of a set.

    ``name`` is the set's. Raises ``UserError`` if the order needs scores that the pairs do not have.
    """

    def __init__(self, name: str, pairs: Mapping[str, Pair], settings: Settings, annotator: str) -> None:
        self.name = name
        self.pairs = pairs
        self.settings = settings
        self.annotator = annotator
        ranks = rank_pairs(list(pairs.values()), settings.order, f"annotations {name}")
        # Each annotator has another order, so two who start at once rarely answer the same pair.
        self._order = sorted(pairs, key=lambda pair: (ranks[pair], share_of("order", name, annotator, pair)))

    def is_shared(self, pair: Pair) -> bool:
        """Return True for a pair that every annotator answers: a share of all pairs, and gold questions."""
        return pair.gold is not None or share_of("overlap", self.name, pair.id) < self.settings.overlap

    def next(self, answers: Sequence[Answer], skipped: Collection[str] = ()) -> Question | None:
        """Return the next question, or None if all are answered. ``skipped`` are pairs to leave for another session."""
        own_answers = [answer for answer in answers if answer.annotator == self.annotator]
        repeat = self._due_repeat(own_answers, skipped, GAP)
        if repeat is not None:
            return self.ask(repeat, repeat=True)
        # Duplicates come first, because their gap has passed. Then each ``gold_every``-th question checks the
        # annotator.
        answered = {answer.pair for answer in own_answers}
        others_pairs = {answer.pair for answer in answers if answer.annotator != self.annotator}
        remaining = [self.pairs[name] for name in self._order if name not in answered and name not in skipped]
        gold = [pair for pair in remaining if pair.gold is not None]
        if gold and len(own_answers) % self.settings.gold_every == self.settings.gold_every - 1:
            return self.ask(gold[0])
        # Other pairs go to the first annotator who reaches them; only shared pairs are answered by all.
        for pair in remaining:
            if pair.gold is None and (pair.id not in others_pairs or self.is_shared(pair)):
                return self.ask(pair)
        if gold:
            return self.ask(gold[0])
        # No other question is left, so duplicates no longer wait for their gap.
        repeat = self._due_repeat(own_answers, skipped, 1)
        return None if repeat is None else self.ask(repeat, repeat=True)

    def left_to_others(self, answers: Sequence[Answer]) -> int:
        """Return the number of pairs that only other annotators answered, and that this one does not get."""
        total = self.count(answers)[1]
        return len(self.pairs) - total

    def count(self, answers: Sequence[Answer]) -> tuple[int, int]:
        """Return the number of pairs that the annotator has answered, and of those that they have or may get."""
        own_pairs = {answer.pair for answer in answers if answer.annotator == self.annotator}
        others_pairs = {answer.pair for answer in answers if answer.annotator != self.annotator}
        open_pairs = {name for name, pair in self.pairs.items() if name not in others_pairs or self.is_shared(pair)}
        return len(own_pairs & self.pairs.keys()), len((own_pairs | open_pairs) & self.pairs.keys())

    def ask(self, pair: Pair, repeat: bool = False) -> Question:
        """Return a pair as the annotator sees it at its first showing, or as its hidden duplicate."""
        is_flipped = share_of("left", self.name, self.annotator, pair.id) < 0.5
        # A duplicate has the other order, so consistency does not come from the position.
        left_side: Side = "b" if is_flipped != repeat else "a"
        is_active = self.settings.order != "random" and pair.gold is None
        return Question(pair, left_side, repeat, is_active)

    def _due_repeat(self, own_answers: Sequence[Answer], skipped: Collection[str], gap: int) -> Pair | None:
        """Return the oldest pair whose duplicate is due: ``gap`` other answers after its first answer."""
        repeated = {answer.pair for answer in own_answers if answer.repeat}
        firsts = [answer for answer in own_answers if not answer.repeat]
        places = {answer.id: place for place, answer in enumerate(own_answers)}
        for answer in firsts:
            if answer.pair in repeated or answer.pair in skipped or answer.pair not in self.pairs:
                continue
            is_old = len(own_answers) - 1 - places[answer.id] >= gap
            if is_old and share_of("repeat", self.name, self.annotator, answer.pair) < self.settings.duplicates:
                return self.pairs[answer.pair]
        return None


def rank_pairs(pairs: Sequence[Pair], order: str, place: str) -> dict[str, float]:
    """Return a number for each pair by which questions are sorted: 0 for ``random``.

    ``closeness`` is the mean distance of the two scores, ``disagreement`` minus the spread of the models' margins. Both
    are in units of each model's typical margin. Pairs without the scores come last.
    """
    if order == "random":
        return {pair.id: 0.0 for pair in pairs}
    fewest = 2 if order == "disagreement" else 1
    if not any(len(pair.scores) >= fewest for pair in pairs):
        needed = "scores of two reward models" if fewest == 2 else "scores"
        raise UserError(f"{place}: --order {order} needs pairs with {needed}, and none has them; use --order random.")
    scales = _typical_margins(pairs)
    ranks = {}
    for pair in pairs:
        margins = [(a - b) / scales[model] for model, (a, b) in pair.scores.items()]
        if len(margins) < fewest:
            ranks[pair.id] = float("inf")
        elif order == "closeness":
            ranks[pair.id] = statistics.fmean(map(abs, margins))
        else:
            ranks[pair.id] = -statistics.pstdev(margins)
    return ranks


def _typical_margins(pairs: Sequence[Pair]) -> dict[str, float]:
    """Return each model's median distance of two scores; 1 if it is 0."""
    margins: dict[str, list[float]] = {}
    for pair in pairs:
        for model, (a, b) in pair.scores.items():
            margins.setdefault(model, []).append(abs(a - b))
    return {model: statistics.median(values) or 1.0 for model, values in margins.items()}

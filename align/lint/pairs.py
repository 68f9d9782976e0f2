"""Checks on the two sides of a pair, and on all pairs: lengths, and sides that were swapped in a part of the rows.

Swapped sides: if a feature separates the two answers of every pair clearly (a length, the words shared with the
prompt), its differences form two groups, one for each sign. Labels that follow the feature in most pairs and contradict
it in a good share of them are then no matter of taste: sides were swapped. In pairs that people labeled, differences
gather around zero instead, and nothing is reported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev

from align.data.rows import Message, Row, is_finished
from align.evaluation.statistics import wilson
from align.lint.chat_format import squeezed
from align.lint.encodings import TokenSequence
from align.lint.findings import Findings, Place

LENGTH_FACTOR, TOKENS, LOPSIDED_SHARE = 8, 64, 0.05
"""A pair is lopsided when one answer has ``LENGTH_FACTOR`` times the tokens of the other and ``TOKENS`` more. More than
``LOPSIDED_SHARE`` of such pairs is a warning."""
BIAS, MIN_PAIRS = 0.75, 50
"""A length bias: from ``MIN_PAIRS`` pairs on, the longer (or shorter) side wins more than this share, and the lower end
of the share's 95 % interval (Wilson) is above it too."""
SEPARATION = 2.0
"""Mean over standard deviation of the absolute differences, above which they are two groups. A normal distribution
around zero has 1.3, an exponential one 1.0."""
SWAPPED_SHARE = 0.1
"""Share of contradicting pairs, its lower 95 % bound, from which sides count as swapped. Near one half the feature
tells nothing."""
CONFIDENT_MARGIN = 2.0
"""Margin of a reward model, in logits, from which it is confident of a pair: 0.88 for one side."""
CONFIDENT_SHARE = 0.15
"""Share of the confident pairs in which the model prefers the rejected side, its lower 95 % bound, that is reported."""
WORD = re.compile(r"\w{3,}")
MARKS = re.compile(r"[.,!?…]+(?=\s|\Z)")
"""Marks at the end of a word or a sentence; those inside of numbers and words are left."""
CODE = re.compile(r"```|[{}=<>;]")
"""Signs of code, in which every mark matters."""


Score = Callable[[list[list[Message]], list[str], list[bool], list[str | None]], list[float]]
"""A reward model's ``score``: prompts, answers, flags of finished answers, and the rows' tools."""


@dataclass
class PairChecks:
    """Checks pairs one by one, and collects what ``finish`` judges over all of them."""

    lopsided: list[tuple[Place, str]] = field(default_factory=list)
    longer: int = 0
    shorter: int = 0
    count: int = 0
    differences: dict[str, list[float]] = field(default_factory=lambda: {"length": [], "words of the prompt": []})
    """Feature → chosen minus rejected, pair by pair."""

    def check(self, chosen: TokenSequence, rejected: TokenSequence, findings: Findings) -> None:
        """Check one pair for equal sides and differing prompts, and record its lengths."""
        place = chosen.place
        if chosen.ids == rejected.ids:
            same = chosen.messages == rejected.messages
            findings.add("chosen-equals-rejected", place, ("" if same else "after truncation: ") + chosen.text)
            return
        if _letters(chosen) == _letters(rejected):
            findings.add("sides-differ-in-case-alone", place, f"{_answer(chosen)!r} and {_answer(rejected)!r}")
        elif _have_same_turns(chosen, rejected) and differ_in_punctuation(_answer(chosen), _answer(rejected)):
            findings.add("sides-differ-in-punctuation", place, f"{_answer(chosen)!r} and {_answer(rejected)!r}")
        self._add_differences(chosen, rejected)
        # Tokens behind the common beginning are the answers' own.
        shared = _shared_length(chosen.ids, rejected.ids)
        _check_prompts(chosen, shared, findings)
        chosen_length, rejected_length = len(chosen.ids) - shared, len(rejected.ids) - shared
        self.count += 1
        self.longer += chosen_length > rejected_length
        self.shorter += chosen_length < rejected_length
        low, high = sorted((chosen_length, rejected_length))
        if high > LENGTH_FACTOR * max(1, low) and high - low > TOKENS:
            self.lopsided.append((place, f"chosen has {chosen_length} tokens of its own, rejected {rejected_length}"))

    def finish(self, findings: Findings) -> None:
        """Judge the lengths and features of all pairs."""
        if len(self.lopsided) > LOPSIDED_SHARE * self.count:
            for place, excerpt in self.lopsided:
                findings.add("length-imbalance", place, excerpt)
        decided = self.longer + self.shorter
        if self.count < MIN_PAIRS:
            return
        side, wins = ("longer", self.longer) if self.longer >= self.shorter else ("shorter", self.shorter)
        if decided and wilson(wins, decided).low > BIAS:
            findings.add("length-bias", None, f"the chosen answer is the {side} one in {wins} of {decided} pairs")
        self._check_swapped(findings)

    def _add_differences(self, chosen: TokenSequence, rejected: TokenSequence) -> None:
        """Record a pair's features; pairs whose turns are not known are skipped."""
        if not chosen.messages or not rejected.messages:
            return
        prompt = " ".join(message["content"] or "" for message in chosen.messages[: chosen.prompt_turns])
        answers = [str(side.messages[-1]["content"] or "") for side in (chosen, rejected)]
        lengths = [math.log(1 + len(answer)) for answer in answers]
        shares = [_share_of_prompt(answer, prompt) for answer in answers]
        self.differences["length"].append(lengths[0] - lengths[1])
        self.differences["words of the prompt"].append(shares[0] - shares[1])

    def _check_swapped(self, findings: Findings) -> None:
        for name, differences in self.differences.items():
            sizes = [abs(difference) for difference in differences]
            # The feature must separate the sides in nearly all pairs, else its sign means nothing.
            if len(sizes) < MIN_PAIRS or fmean(sizes) <= SEPARATION * pstdev(sizes):
                continue
            # Each sign is one group of labels, and the smaller group contradicts the larger one.
            positive = sum(difference > 0 for difference in differences)
            minority = wilson(min(positive, len(sizes) - positive), len(sizes))
            if minority.low > SWAPPED_SHARE and minority.high < 0.5:
                excerpt = f"{minority.value:.0%} of {len(sizes)} pairs contradict the rest, by {name}"
                findings.add("sides-swapped", None, excerpt)


def check_with_reward_model(rows: Sequence[tuple[Place, Row]], score: Score, findings: Findings) -> None:
    """Compare the labels of pairs with a reward model, if it is confident."""
    pairs = [(place, row) for place, row in rows if row.get("chosen") and row.get("rejected")]
    chosen, rejected = (_side_scores([row for _, row in pairs], side, score) for side in ("chosen", "rejected"))
    margins = [chosen_score - rejected_score for chosen_score, rejected_score in zip(chosen, rejected, strict=True)]
    confident = sum(abs(margin) >= CONFIDENT_MARGIN for margin in margins)
    against = [place for (place, _), margin in zip(pairs, margins, strict=True) if margin <= -CONFIDENT_MARGIN]
    # By the interval's lower end, so a few hard pairs do not accuse the labels.
    if confident < MIN_PAIRS or wilson(len(against), confident).low <= CONFIDENT_SHARE:
        return
    for place in against:
        excerpt = f"the reward model prefers rejected, as in {len(against)} of {confident} pairs"
        findings.add("sides-swapped", place, excerpt)


def _side_scores(rows: Sequence[Row], side: str, score: Score) -> list[float]:
    return score(
        [[*row["prompt"], *row[side][:-1]] for row in rows],
        [str(row[side][-1]["content"] or "") for row in rows],
        [is_finished(row, side) for row in rows],
        [row.get("tools") for row in rows],
    )


def _check_prompts(chosen: TokenSequence, shared: int, findings: Findings) -> None:
    """Check that both sides share the prompt, up to its last turn's text; ``shared`` ids are equal."""
    prompt = chosen.messages[: chosen.prompt_turns]
    if not prompt:
        return
    last = prompt[-1]["content"] or ""
    # The sides must part in the answers: the shared ids have to cover the prompt's last turn.
    start = squeezed(chosen.chat_format.decode(chosen.ids[:shared]))
    if not chosen.chat_format.has_text(start, last):
        findings.add("pair-prompts-differ", chosen.place, f"the tokens part within {last!r}")


def _shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the common beginning."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def _share_of_prompt(answer: str, prompt: str) -> float:
    """Return the share of an answer's words that the prompt has too."""
    words = set(WORD.findall(answer.casefold()))
    return len(words & set(WORD.findall(prompt.casefold()))) / len(words) if words else 0.0


def _answer(side: TokenSequence) -> str:
    return str(side.messages[-1]["content"] or "") if side.messages else side.text


def differ_in_punctuation(chosen: str, rejected: str) -> bool:
    """Return True for different texts that are equal without marks at the ends of words, white space and case.

    In code every mark matters, so code never counts.
    """
    if chosen == rejected or CODE.search(chosen):
        return False
    first, second = (squeezed(MARKS.sub("", text)).casefold() for text in (chosen, rejected))
    return first == second and squeezed(chosen).casefold() != squeezed(rejected).casefold()


def _have_same_turns(chosen: TokenSequence, rejected: TokenSequence) -> bool:
    """Return True for answers whose turns before the last, and whose calls, are the same."""
    first, second = (_letters(side) for side in (chosen, rejected))
    return bool(first and second) and first[:-1] == second[:-1] and first[-1][2] == second[-1][2]


def _letters(side: TokenSequence) -> list[tuple[str, str, str]]:
    """Return the role, the text without white space and case, and the calls of each of the answer's turns."""
    if not side.messages:
        return [("", squeezed(side.text).casefold(), "")]
    # The case of a call's arguments counts: they name files, places and keys.
    return [
        (message["role"], squeezed(message["content"] or "").casefold(), message.get("tool_calls") or "")
        for message in side.messages[side.prompt_turns :]
    ]

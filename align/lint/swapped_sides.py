"""A quick probe for pairs whose sides were swapped in a part of the rows.

Where a feature tells the two answers of every pair clearly apart (a length, the words shared with the prompt), its
differences form two separate groups, one for each sign. Labels that follow the feature in most pairs and contradict it
in a good share of them are then no matter of taste: sides were swapped. In pairs that people labeled, differences
gather around zero instead, and the probe says nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev

from align.data.rows import Message, Row, is_finished
from align.evaluation.statistics import wilson
from align.lint.batches import Tokens
from align.lint.findings import Findings, Place

FEWEST = 50
"""Pairs below which nothing is said."""
SEPARATION = 2.0
"""Mean over standard deviation of the absolute differences, above which they are two groups. A normal distribution
around zero has 1.3, an exponential one 1.0."""
SHARE = 0.1
"""Share of contradicting pairs, its lower 95 % bound, from which sides count as swapped; above one half less this,
the feature says nothing."""
SURE = 2.0
"""Margin of a reward model, in logits, from which it is sure of a pair: 0.88 for one side."""
SURE_SHARE = 0.15
"""Share of the pairs it is sure of in which it prefers the rejected side, its lower 95 % bound, that is reported."""
WORD = re.compile(r"\w{3,}")


@dataclass
class SwappedSides:
    """Collects differences of features, chosen minus rejected, while pairs are looked at."""

    differences: dict[str, list[float]] = field(default_factory=lambda: {"length": [], "words of the prompt": []})

    def add(self, chosen: Tokens, rejected: Tokens) -> None:
        """Measure one pair; pairs whose turns are not known are left out."""
        if not chosen.messages or not rejected.messages:
            return
        prompt = " ".join(message["content"] or "" for message in chosen.messages[:-1])
        answers = [str(side.messages[-1]["content"] or "") for side in (chosen, rejected)]
        lengths = [math.log(1 + len(answer)) for answer in answers]
        shares = [_share_of_prompt(answer, prompt) for answer in answers]
        self.differences["length"].append(lengths[0] - lengths[1])
        self.differences["words of the prompt"].append(shares[0] - shares[1])

    def finish(self, found: Findings) -> None:
        """Judge the differences of all pairs."""
        for name, differences in self.differences.items():
            sizes = [abs(difference) for difference in differences]
            if len(sizes) < FEWEST or fmean(sizes) <= SEPARATION * pstdev(sizes):
                continue
            positive = sum(difference > 0 for difference in differences)
            minority = wilson(min(positive, len(sizes) - positive), len(sizes))
            if minority.low > SHARE and minority.high < 0.5:
                excerpt = f"{minority.value:.0%} of {len(sizes)} pairs contradict the rest, by {name}"
                found.add("sides-swapped", None, excerpt)


def _share_of_prompt(answer: str, prompt: str) -> float:
    """Share of an answer's words that the prompt has too."""
    words = set(WORD.findall(answer.casefold()))
    return len(words & set(WORD.findall(prompt.casefold()))) / len(words) if words else 0.0


Score = Callable[[list[list[Message]], list[str], list[bool], list[str | None]], list[float]]
"""A reward model's ``score``: prompts, answers, whether each came to its end, and the tools of its row."""


def check_with_reward_model(rows: Sequence[tuple[Place, Row]], score: Score, found: Findings) -> None:
    """Compare the labels of pairs with a reward model, where it is sure."""
    pairs = [(place, row) for place, row in rows if row.get("chosen") and row.get("rejected")]
    scores = {
        side: score(
            [row["prompt"] for _, row in pairs],
            [str(row[side][-1]["content"] or "") for _, row in pairs],
            [is_finished(row, side) for _, row in pairs],
            [row.get("tools") for _, row in pairs],
        )
        for side in ("chosen", "rejected")
    }
    margins = [chosen - rejected for chosen, rejected in zip(scores["chosen"], scores["rejected"], strict=True)]
    sure = sum(abs(margin) >= SURE for margin in margins)
    against = [place for (place, _), margin in zip(pairs, margins, strict=True) if margin <= -SURE]
    if sure < FEWEST or wilson(len(against), sure).low <= SURE_SHARE:
        return
    for place in against:
        found.add("sides-swapped", place, f"the reward model prefers rejected, as in {len(against)} of {sure} pairs")

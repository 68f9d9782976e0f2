"""Checks on the two sides of a pair, and on pairs as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from align.evaluation.statistics import wilson
from align.lint.batches import Tokens
from align.lint.dialect import squeezed
from align.lint.findings import Findings, Place
from align.lint.swapped_sides import SwappedSides

TIMES, TOKENS, SHARE = 8, 64, 0.05
"""A pair is lopsided when one answer has ``TIMES`` the tokens of the other and ``TOKENS`` more; a warning, when more
than ``SHARE`` of the pairs are."""
BIAS, FEWEST = 0.75, 50
"""A bias: from ``FEWEST`` pairs on, the longer (or shorter) side wins more than this share, and the lower end of the
share's 95 % interval (Wilson) is above it too."""


@dataclass
class Pairs:
    """Collects lengths while pairs are looked at; ``finish`` judges them."""

    lopsided: list[tuple[Place, str]] = field(default_factory=list)
    longer: int = 0
    shorter: int = 0
    count: int = 0
    probe: SwappedSides = field(default_factory=SwappedSides)

    def check(self, chosen: Tokens, rejected: Tokens, found: Findings) -> None:
        """One pair: equal sides, prompts that differ; its lengths are kept."""
        place = chosen.place
        if chosen.ids == rejected.ids:
            same = chosen.messages == rejected.messages
            found.add("chosen-equals-rejected", place, ("" if same else "after truncation: ") + chosen.text)
            return
        if _letters(chosen) == _letters(rejected):
            found.add("sides-differ-in-case-alone", place, f"{_answer(chosen)!r} and {_answer(rejected)!r}")
        self.probe.add(chosen, rejected)
        shared = next(
            (at for at, pair in enumerate(zip(chosen.ids, rejected.ids, strict=False)) if pair[0] != pair[1]),
            min(len(chosen.ids), len(rejected.ids)),
        )
        self._check_prompts(chosen, rejected, shared, found)
        lengths = len(chosen.ids) - shared, len(rejected.ids) - shared
        self.count += 1
        self.longer += lengths[0] > lengths[1]
        self.shorter += lengths[0] < lengths[1]
        low, high = sorted(lengths)
        if high > TIMES * max(1, low) and high - low > TOKENS:
            self.lopsided.append((place, f"chosen has {lengths[0]} tokens of its own, rejected {lengths[1]}"))

    @staticmethod
    def _check_prompts(chosen: Tokens, rejected: Tokens, shared: int, found: Findings) -> None:
        """Both sides begin with the whole prompt, up to its last turn's text."""
        prompts = [seen.messages[:-1] for seen in (chosen, rejected)]
        if prompts[0] != prompts[1]:
            one = next((m for m in prompts[1] if m not in prompts[0]), {"content": "fewer turns"})
            found.add("pair-prompts-differ", chosen.place, f"only before rejected: {one['content']}")
            return
        if not prompts[0]:
            return
        last = prompts[0][-1]["content"] or ""
        start = squeezed(chosen.dialect.decode(chosen.ids[:shared]))
        if not chosen.dialect.has_text(start, last):
            found.add("pair-prompts-differ", chosen.place, f"the tokens part within {last!r}")

    def finish(self, found: Findings) -> None:
        """Judge the lengths of all pairs."""
        if len(self.lopsided) > SHARE * self.count:
            for place, excerpt in self.lopsided:
                found.add("length-imbalance", place, excerpt)
        decided = self.longer + self.shorter
        if self.count < FEWEST or not decided:
            return
        side, wins = ("longer", self.longer) if self.longer >= self.shorter else ("shorter", self.shorter)
        if wilson(wins, decided).low > BIAS:
            found.add("length-bias", None, f"the chosen answer is the {side} one in {wins} of {decided} pairs")
        self.probe.finish(found)


def _answer(side: Tokens) -> str:
    return str(side.messages[-1]["content"] or "") if side.messages else side.text


def _letters(side: Tokens) -> str:
    """The answer without white space and case."""
    return squeezed(_answer(side)).casefold()

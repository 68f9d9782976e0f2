"""Checks on the two sides of a pair, and on pairs as a whole."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from align.lint.batches import Tokens
from align.lint.dialect import squeezed
from align.lint.findings import Findings, Place

TIMES, TOKENS, SHARE = 8, 64, 0.05
"""A pair is lopsided when one answer has ``TIMES`` the tokens of the other and ``TOKENS`` more; a warning, when more
than ``SHARE`` of the pairs are."""
BIAS, FEWEST = 0.85, 50
"""Share of pairs won by the longer (or shorter) side that is called a bias, from ``FEWEST`` pairs on."""


@dataclass
class Pairs:
    """Collects lengths while pairs are looked at; ``finish`` judges them."""

    lopsided: list[tuple[Place, str]] = field(default_factory=list)
    longer: int = 0
    shorter: int = 0
    count: int = 0

    def check(self, chosen: Tokens, rejected: Tokens, found: Findings) -> None:
        """One pair: equal sides, prompts that differ; its lengths are kept."""
        place = chosen.place
        if chosen.ids == rejected.ids:
            same = chosen.messages == rejected.messages
            found.add("chosen-equals-rejected", place, ("" if same else "after truncation: ") + chosen.text)
            return
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
        if self.count >= FEWEST and decided:
            share = self.longer / decided
            spread = 2 * math.sqrt(0.25 / decided)  # a fair coin's two standard deviations
            if max(share, 1 - share) > BIAS + spread:
                side, wins = ("longer", self.longer) if share > 0.5 else ("shorter", self.shorter)
                found.add("length-bias", None, f"the chosen answer is the {side} one in {wins} of {decided} pairs")

"""Filter by stock phrases: refusals, "as an AI language model", and models that name their makers.

The rules are in boilerplate.json, each with texts that it must match and texts that it must not; English only. A rule
``at`` the ``start`` reads the opening of a reply, where a refusal is; a rule for ``anywhere`` is tried only on texts
with one of the words it ``needs``, which makes the filter fast.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

from align.config.recipe.filter_settings import Boilerplate, Sides
from align.data.row_texts import excerpt, reply_texts
from align.data.rows import Dropped, Row
from align.data.steps.base import RowFilter

_OPENING = 300
"""Characters of a reply that count as its start."""
_GREETING = r"[\s\"'“*_>]*(?:(?:oh|hi|hello|hey|well|hmm|no|ah|yes|okay|ok)(?: there)?[,.!…]+ )?"
"""Greetings and interjections that may precede a refusal."""


def boilerplate_identities() -> dict[str, str]:
    """Return the digest of the rules that come with align."""
    return {"boilerplate.json": f"sha256:{hashlib.sha256(_rules_text().encode()).hexdigest()}"}


@dataclass(frozen=True)
class Rule:
    """One stock phrase. ``pattern`` is tried only on texts with one of the lower-case words in ``needs``."""

    kind: str
    name: str
    position: str
    """``start`` or ``anywhere``."""
    needs: tuple[str, ...]
    pattern: re.Pattern[str]
    finds: tuple[str, ...]
    passes: tuple[str, ...]

    def search(self, text: str, lower: str) -> re.Match[str] | None:
        """Return the match of the phrase; ``lower`` is ``text`` in lower case."""
        if self.position == "start":
            return self.pattern.match(text, 0, _OPENING)
        # Plain search for a word is much faster than the pattern.
        for word in self.needs:
            if word in lower:
                return self.pattern.search(text)
        return None if self.needs else self.pattern.search(text)


def _rules_text() -> str:
    return resources.files("align.data.steps").joinpath("boilerplate.json").read_text(encoding="utf-8")


@cache
def rules() -> tuple[Rule, ...]:
    """Return the rules that come with align, in the order in which they are tried."""
    data = json.loads(_rules_text())
    compiled_rules = []
    for entry in data["rules"]:
        pattern = entry["pattern"]
        # Patterns share lists of words, written as {name}.
        for name, words in data["words"].items():
            pattern = pattern.replace("{" + name + "}", words)
        start = _GREETING if entry["at"] == "start" else ""
        compiled = re.compile(start + f"(?:{pattern})", re.IGNORECASE)
        compiled_rules.append(
            Rule(
                kind=entry["kind"],
                name=entry["name"],
                position=entry["at"],
                needs=tuple(entry.get("needs", ())),
                pattern=compiled,
                finds=tuple(entry["for"]),
                passes=tuple(entry["against"]),
            )
        )
    return tuple(compiled_rules)


class BoilerplateFilter(RowFilter):
    """Drops rows whose reply holds a stock phrase."""

    def __init__(self, config: Boilerplate, sides: Sides) -> None:
        user_rules = [
            Rule("pattern", pattern, "anywhere", (), re.compile(pattern, re.IGNORECASE), (), ())
            for pattern in config.patterns
        ]
        self._rules = [*(rule for rule in rules() if rule.kind in config.kinds), *user_rules]
        self._sides = sides

    def _judge(self, row: Row) -> Dropped | None:
        for field, text in reply_texts(row, self._sides):
            lower = text.lower()
            for rule in self._rules:
                match = rule.search(text, lower)
                if match:
                    detail = {"rule": rule.name, "in": field, "excerpt": excerpt(text, match.start(), match.end())}
                    return Dropped(f"filter: {rule.kind}", detail)
        return None

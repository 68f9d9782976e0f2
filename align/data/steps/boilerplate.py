"""Filter by stock phrases: refusals, "as an AI language model", and models that name their makers.

The rules stand in boilerplate.json, each with texts it must find and texts it must not; English only. A rule ``at`` the
``start`` reads the opening of a reply, where a refusal stands; one for ``anywhere`` is tried only on texts that
hold one of the words it ``needs``, which makes the filter fast.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from align.config.base import Config
from align.data.rows import Dropped, Row
from align.data.steps.base import RowStep, StepContext
from align.data.steps.texts import Sides, excerpt, reply_texts

Kind = Literal["refusal", "self_reference", "developer"]

_OPENING = 300
"""Characters of a reply that count as its start."""
_BEFORE = r"[\s\"'“*_>]*(?:(?:oh|hi|hello|hey|well|hmm|no|ah|yes|okay|ok)(?: there)?[,.!…]+ )?"
"""What may stand before a refusal."""


class Boilerplate(Config):
    """Drop rows whose reply holds stock phrases of chat models."""

    kinds: list[Kind] = Field(["refusal", "self_reference", "developer"])
    """``refusal``: the reply starts by declining. ``self_reference``: as an AI language model, my knowledge cutoff …
    ``developer``: I am ChatGPT, trained by OpenAI."""
    patterns: list[str] = Field([])
    """Regular expressions of your own, found anywhere in a reply, whatever the case."""

    @field_validator("patterns")
    @classmethod
    def _compile(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is not a regular expression: {error}") from None
        return patterns

    def identities(self, base: Path) -> dict[str, str]:
        """Digest of the rules that come with align."""
        return {"boilerplate.json": f"sha256:{hashlib.sha256(_rules_text().encode()).hexdigest()}"}

    def start(self, context: StepContext, sides: Sides = "chosen") -> RowStep:
        """The filter itself."""
        return _Boilerplate(self, sides)


@dataclass(frozen=True)
class Rule:
    """One stock phrase; ``needs`` are lower-case words of which a text must hold one for ``pattern`` to be tried."""

    kind: str
    name: str
    at: str
    needs: tuple[str, ...]
    pattern: re.Pattern[str]
    finds: tuple[str, ...]
    passes: tuple[str, ...]

    def search(self, text: str, lower: str) -> re.Match[str] | None:
        """Where the phrase stands; ``lower`` is ``text`` in lower case."""
        if self.at == "start":
            return self.pattern.match(text, 0, _OPENING)
        for word in self.needs:
            if word in lower:
                return self.pattern.search(text)
        return None if self.needs else self.pattern.search(text)


def _rules_text() -> str:
    return resources.files("align.data.steps").joinpath("boilerplate.json").read_text(encoding="utf-8")


@cache
def rules() -> tuple[Rule, ...]:
    """The rules that come with align, in the order in which they are tried."""
    data = json.loads(_rules_text())
    found = []
    for entry in data["rules"]:
        pattern = entry["pattern"]
        for name, words in data["words"].items():
            pattern = pattern.replace("{" + name + "}", words)
        start = _BEFORE if entry["at"] == "start" else ""
        compiled = re.compile(start + f"(?:{pattern})", re.IGNORECASE)
        examples = tuple(entry["for"]), tuple(entry["against"])
        found.append(
            Rule(entry["kind"], entry["name"], entry["at"], tuple(entry.get("needs", ())), compiled, *examples)
        )
    return tuple(found)


class _Boilerplate:
    def __init__(self, config: Boilerplate, sides: Sides) -> None:
        own = [
            Rule("pattern", pattern, "anywhere", (), re.compile(pattern, re.IGNORECASE), (), ())
            for pattern in config.patterns
        ]
        self._rules = [*(rule for rule in rules() if rule.kind in config.kinds), *own]
        self._sides = sides

    def apply(self, rows: list[Row]) -> Sequence[Row | Dropped]:
        return [self._judge(row) or row for row in rows]

    def _judge(self, row: Row) -> Dropped | None:
        for field, text in reply_texts(row, self._sides):
            lower = text.lower()
            for rule in self._rules:
                match = rule.search(text, lower)
                if match:
                    detail = {"rule": rule.name, "in": field, "excerpt": excerpt(text, match.start(), match.end())}
                    return Dropped(f"filter: {rule.kind}", detail)
        return None

"""The ``filter`` step: rows that are left out, each filter on its own and all of them optional.

Filters run in the order of the fields below, so that a row which several would drop counts under the first; those that
change texts (``urls: strip``, ``personal_data: {action: mask}``) come before those that measure them. A reason begins
with "filter: " and names the setting; the detail says what was found. docs/data_filters.md has the defaults, their
sources, and how often each is wrong on real data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from align.config.user_functions import function_identity
from align.data.rows import Dropped, Row
from align.data.steps.base import RowStep, StepConfig, StepContext
from align.data.steps.boilerplate import Boilerplate
from align.data.steps.language import Language
from align.data.steps.lengths import Chars, Tokens, Turns, Words
from align.data.steps.links import UrlFilter, Urls
from align.data.steps.personal import PersonalData
from align.data.steps.predicate import PredicateFilter
from align.data.steps.repetition import Repetition
from align.data.steps.texts import Sides
from align.data.steps.words import SELF_INSTRUCT, KeywordFilter, PlaceholderFilter


class FilterStep(StepConfig):
    """Leave rows out. At least one filter must be set; the step may stand in a recipe several times."""

    identified = frozenset({"where"})

    type: Literal["filter"]
    sides: Sides = "chosen"
    """Which replies the filters on quality (language, repetition, boilerplate, urls) look at. ``chosen``: those that a
    model is to imitate, since a refusal or a loop makes a good rejected reply. ``both``: every reply. Lengths, personal
    data and placeholders always count in both: both are trained on and published."""
    turns: Turns | None = None
    """Messages in a prompt: {max: 1} keeps single questions."""
    urls: Urls = "keep"
    """``drop`` rows with an address in a user's turn or reply, or ``strip`` addresses from every text."""
    personal_data: PersonalData | None = None
    """E-mail and IP addresses, phone, card and account numbers: drop the row or mask them."""
    chars: Chars | None = None
    """Lengths in characters."""
    words: Words | None = None
    """Lengths in words."""
    placeholders: bool = False
    """Drop rows with an unfilled {{placeholder}} outside code."""
    keywords: list[str] | Literal["self_instruct"] | None = Field(None, min_length=1)
    """Drop rows with one of these words in a user's turn; ``self_instruct`` is that paper's list (image, graph …)."""
    boilerplate: Boilerplate | None = None
    """Refusals, "as an AI language model", and models that name their makers. English."""
    repetition: Repetition | None = None
    """Replies that repeat themselves."""
    language: Language | None = None
    """Keep some languages."""
    tokens: Tokens | None = None
    """Lengths in tokens of a tokenizer that is named."""
    where: str | None = Field(None, pattern=r"^[\w.]+:[\w.]+$")
    """A function of one's own as package.module:function. It gets each row and returns True or None to keep it, False
    or a reason to drop it."""

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if isinstance(self.keywords, list) and not all(word.strip() for word in self.keywords):
            raise ValueError("keywords holds an empty word, which every row has")
        names = [name for name in type(self).model_fields if name not in ("type", "sides")]
        if all(getattr(self, name) in (None, False, "keep") for name in names):
            raise ValueError(f"no filter is set; set one of {', '.join(names)}")
        return self

    def identities(self, base: Path) -> dict[str, str]:
        """What outside the recipe decides: rules, tokenizer files, package versions, the function's file.

        Raises ``UserError`` for a tokenizer or function that is not there.
        """
        found: dict[str, str] = {}
        for block in (self.boilerplate, self.language, self.personal_data, self.tokens):
            if block is not None:
                found |= block.identities(base)
        if self.where is not None:
            found["where"] = function_identity(self.where, "where")
        return found

    def start(self, context: StepContext) -> RowStep:
        """The step itself; models and tokenizers are loaded here. Raises ``UserError`` for one that cannot be."""
        steps: list[RowStep] = []
        if self.turns is not None:
            steps.append(self.turns.start(context))
        if self.urls != "keep":
            steps.append(UrlFilter(self.urls, self.sides))
        steps += [block.start(context) for block in (self.personal_data, self.chars, self.words) if block is not None]
        if self.placeholders:
            steps.append(PlaceholderFilter())
        if self.keywords is not None:
            steps.append(KeywordFilter(SELF_INSTRUCT if self.keywords == "self_instruct" else self.keywords))
        judges = (self.boilerplate, self.repetition, self.language)
        steps += [block.start(context, self.sides) for block in judges if block is not None]
        if self.tokens is not None:
            steps.append(self.tokens.start(context))
        if self.where is not None:
            steps.append(PredicateFilter(self.where))
        return Filter(steps)


class Filter:
    """Runs filters one after another, each on the rows that are left."""

    def __init__(self, steps: Sequence[RowStep]) -> None:
        self._steps = steps

    def apply(self, rows: list[Row]) -> Sequence[Row | Dropped | list[Row]]:
        """One result a row: the very same row, a changed one, or ``Dropped`` by the first filter that drops it."""
        results: list[Row | Dropped | list[Row]] = list(rows)
        alive = list(range(len(rows)))
        for step in self._steps:
            found = step.apply([rows[index] for index in alive])
            still: list[int] = []
            for index, result in zip(alive, found, strict=True):
                results[index] = result
                if isinstance(result, dict):
                    still.append(index)
            if any(results[index] is not rows[index] for index in still):
                rows = [result if isinstance(result, dict) else row for result, row in zip(results, rows, strict=True)]
            alive = still
        return results

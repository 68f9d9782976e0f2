"""Names of the record formats, the kinds of dataset each can give, and the choices that a format leaves open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.base import Config

Format = Literal[
    "auto",
    "messages",
    "sharegpt",
    "prompt_completion",
    "alpaca",
    "dolly",
    "gsm8k",
    "self_instruct",
    "hh_rlhf",
    "preferences",
    "ranked",
    "scored",
    "oasst",
    "unpaired",
    "stepwise",
    "prompt",
    "text",
    "multiple_choice",
    "rows",
]
"""Format of a record. ``rows`` are align's own rows, as a build writes them; ``auto`` never detects them."""

Form = Format

SEVERAL = ("ranked", "scored", "oasst", "multiple_choice")
"""Formats with several answers to a prompt; the step ``pairs`` makes preferences of them."""
PAIRED = ("hh_rlhf", "preferences")
"""Formats with a chosen and a rejected answer."""

_SINGLE_ANSWER = frozenset({"instructions", "prompts", "texts"})
_LABELED = _SINGLE_ANSWER | {"unpaired"}
_COMPARED = frozenset({"instructions", "prompts", "preferences", "unpaired"})
KINDS: dict[str, frozenset[str]] = {
    "oasst": _COMPARED,
    "hh_rlhf": _COMPARED,
    "stepwise": _LABELED,
    "scored": _COMPARED,
    "ranked": _COMPARED,
    "unpaired": _LABELED,
    "preferences": _COMPARED,
    "gsm8k": _SINGLE_ANSWER,
    "self_instruct": _SINGLE_ANSWER,
    "dolly": _SINGLE_ANSWER,
    "alpaca": _SINGLE_ANSWER,
    "messages": _SINGLE_ANSWER,
    "sharegpt": _SINGLE_ANSWER,
    "prompt_completion": _SINGLE_ANSWER,
    "prompt": frozenset({"prompts"}),
    "text": frozenset({"texts"}),
    "multiple_choice": _COMPARED,
    "rows": _COMPARED | {"texts"},
}
"""Kinds of dataset that the records of each format can give."""


def formats_for(kind: str | None) -> list[str]:
    """Return the formats, except ``rows``, whose records can give ``kind``; all of them for None."""
    formats = [form for form in KINDS if form != "rows"]
    return [form for form in formats if kind in (None, *KINDS[form])]


class FormatOptions(Config):
    """Choices that some formats leave open; each field names the formats it concerns."""

    ignore: list[str] = Field([])
    """Fields to ignore although they hold something that align does not train on: ``[images]``, or with a path
    ``[messages.thinking]``."""
    turns: Literal["last", "all"] = "last"
    """messages, sharegpt, oasst: one row for the last answer of a conversation, or a row for each of its answers."""
    score: str = Field("auto", min_length=1)
    """scored: the field of an answer that holds its score. ``auto`` uses the mean of the ratings per aspect if there
    are any (some values of UltraFeedback's overall_score are ten times too high), else score, rating or the like."""
    paths: Literal["best", "all"] = "best"
    """oasst, for instructions: one conversation per tree, along the best answers, or every conversation whose answers
    rank best."""
    languages: list[str] | None = Field(None, min_length=1)
    """oasst: languages to keep, by the data's own codes (en, pt-BR); all by default."""
    deleted: bool = False
    """oasst: keep deleted messages."""
    synthetic: bool = False
    """oasst: keep messages written by a model."""
    first_choice: Literal[0, 1] | None = None
    """multiple_choice: number of the first choice, if records give the right choice by number. Numbers count from 0 by
    default; a number that is written as text needs this setting."""
    choice_reply: Literal["both", "letter", "text"] = "both"
    """multiple_choice: an answer is the letter and the text of a choice (``B. Paris``), or only the letter or the
    text."""

    thoughts: Literal["all", "last"] = "all"
    """Thoughts that answers have in a separate field (reasoning_content, thinking, reasoning) are written into their
    text, as ``<think>``: of all answers, or only of the last message (docs/thinking.md)."""

    keyed_when_set: ClassVar[frozenset[str]] = frozenset({"first_choice", "choice_reply", "thoughts"})

    @model_validator(mode="after")
    def _check_thoughts_fit_turns(self) -> Self:
        if self.thoughts == "last" and self.turns == "all":
            raise ValueError(
                "turns: all learns every answer, and thoughts: last drops their thoughts; write thoughts: all"
            )
        return self

    retired: ClassVar[Mapping[str, Any]] = {"columns": {}, "roles": {}}


class ReadingOptions(FormatOptions):
    """A format's choices as the converters get them, with the role names of the source."""

    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field({})
    """More role names, as the data writes them."""

"""Names of the record formats, the kinds of dataset each can give, and the choices that a format leaves open."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

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
]
"""How a record is written. ``rows`` is not among them: only artifacts hold finished rows."""

Form = Format | Literal["rows"]

SEVERAL = ("ranked", "scored", "oasst")
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
    "rows": _COMPARED | {"texts"},
}
"""Kinds of dataset that the records of each format can give."""


class FormatOptions(Config):
    """Choices that some formats leave open; each field names the formats it concerns."""

    columns: dict[str, str] = Field({})
    """Fields to rename before anything else, from the record's name to the format's: ``{response_j: chosen}``."""
    ignore: list[str] = Field([])
    """Fields to ignore although they hold something that align does not train on: ``[images]``, or with a path
    ``[messages.thinking]``."""
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field({})
    """messages, sharegpt: more role names, as the data writes them: ``{bot: assistant}``."""
    turns: Literal["last", "all"] = "last"
    """messages, sharegpt, oasst: one row for the last answer of a conversation, or one for each of its answers."""
    score: str = Field("auto", min_length=1)
    """scored: the field of an answer that holds its score. ``auto`` takes the mean of the ratings per aspect where
    there are any (some values of UltraFeedback's overall_score are ten times too high), else score, rating or the
    like."""
    paths: Literal["best", "all"] = "best"
    """oasst, for instructions: one conversation per tree, along the best answers, or every conversation whose answers
    rank best."""
    languages: list[str] | None = Field(None, min_length=1)
    """oasst: languages to keep, by the data's own codes (en, pt-BR); all by default."""
    deleted: bool = False
    """oasst: keep deleted messages."""
    synthetic: bool = False
    """oasst: keep messages written by a model."""

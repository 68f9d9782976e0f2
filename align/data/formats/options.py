"""Names of the formats, and what a recipe may choose where a format leaves a choice. Torch-free."""

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
"""How a record is spelled. ``rows`` is not among them: only artifacts have finished rows."""

Form = Format | Literal["rows"]


class FormatOptions(Config):
    """What is taken of a record; each setting matters to the formats it names."""

    columns: dict[str, str] = Field({})
    """Field names to rename before anything else, the record's own first: ``{response_j: chosen}``."""
    ignore: list[str] = Field([])
    """Fields to leave aside although they mean something that align does not train on: ``[images]``, or with a path
    ``[messages.thinking]``."""
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field({})
    """messages, sharegpt: roles beside the known ones, as they are written there: ``{bot: assistant}``."""
    turns: Literal["last", "all"] = "last"
    """messages, sharegpt, oasst: one row for the last answer of a conversation, or one for each of its answers."""
    score: str = Field("auto", min_length=1)
    """scored: the field of an answer that is its score. ``auto`` takes the mean of the ratings per aspect where there
    are some (UltraFeedback's overall_score has ones that were written as tens), else score, rating or the like."""
    paths: Literal["best", "all"] = "best"
    """oasst, for instructions: one conversation a tree, by the best answers, or every conversation whose answers rank
    best."""
    languages: list[str] | None = Field(None, min_length=1)
    """oasst: languages to keep, by the data's own codes (en, pt-BR); all by default."""
    deleted: bool = False
    """oasst: keep messages that were deleted."""
    synthetic: bool = False
    """oasst: keep messages that a model wrote."""

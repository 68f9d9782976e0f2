"""Tasks of the stage ``synthesize``. Torch-free."""

from __future__ import annotations

import string
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from align.config.base import Config

PROMPT = """\
Here is the beginning of a list of varied tasks that people give to an assistant which reads and writes text only.
Continue it with tasks {first} to {last}, as a numbered list. Each new task differs in subject and wording from the
others, can be done without pictures or files, and brings along whatever text or numbers it is about. Write tasks only,
not their answers.

{tasks}"""

BLACKLIST = (
    "image",
    "images",
    "graph",
    "graphs",
    "picture",
    "pictures",
    "photo",
    "photos",
    "file",
    "files",
    "map",
    "maps",
    "draw",
    "plot",
    "go to",
    "video",
    "videos",
    "audio",
    "music",
    "flowchart",
    "diagram",
)
"""Words of tasks that a text model cannot do; close to self-instruct's list."""


class InstructionsTask(Config):
    """New instructions like the seeds (self-instruct, arXiv 2212.10560)."""

    type: Literal["instructions"]
    count: int = Field(100, ge=1)
    """Number of new instructions."""
    max_requests: int | None = Field(None, ge=1)
    """Most requests, even if ``count`` is not reached; by default ``count``."""
    seed_examples: int = Field(6, ge=1, le=64)
    """Seeds per request."""
    made_examples: int = Field(2, ge=0, le=64)
    """New instructions per request, in addition to the seeds; replaced by seeds until there are some."""
    per_request: int = Field(8, ge=1, le=64)
    """Instructions to generate per request."""
    at_once: int = Field(8, ge=1, le=1024)
    """Requests with the same pool of examples; more run in parallel, and repeat each other more."""
    min_words: int = Field(4, ge=1)
    """Shorter instructions are dropped."""
    max_words: int = Field(150, ge=1)
    """Longer instructions are dropped."""
    max_similarity: float = Field(0.7, gt=0, le=1)
    """Highest ROUGE-L against every seed and every instruction kept so far; 1 drops no instruction."""
    blacklist: tuple[str, ...] = Field(BLACKLIST, strict=False)
    """Words or phrases that no instruction may contain (case-insensitive)."""
    blacklist_starts: tuple[str, ...] = Field(("write a program",), strict=False)
    """Phrases that no instruction may begin with (case-insensitive)."""
    prompt: str = PROMPT
    """Template of the request: ``{tasks}`` are the examples, ``{first}`` and ``{last}`` the numbers to continue
    with."""
    test_size: float = Field(0.1, gt=0, lt=1)
    """Share of the new instructions that goes to the test split, by prompt."""

    @field_validator("prompt")
    @classmethod
    def _has_its_places(cls, prompt: str) -> str:
        try:
            names = {name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None}
        except ValueError as error:
            raise ValueError(f"cannot be filled in ({error}); write a brace of its own twice") from None
        if "tasks" not in names or names - {"tasks", "first", "last"}:
            raise ValueError(f"needs {{tasks}}, and may have {{first}} and {{last}}; it has {sorted(names)}")
        return prompt

    @model_validator(mode="after")
    def _lengths_fit(self) -> InstructionsTask:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is more than max_words {self.max_words}")
        return self


class ResponsesTask(Config):
    """Answers to the prompts of an earlier stage, as instruction data."""

    type: Literal["responses"]
    n: int = Field(1, ge=1, le=64)
    """Answers per prompt; each becomes a row."""
    cut_off: Literal["drop", "keep"] = "drop"
    """Answers that reached ``max_tokens``: training on them teaches the model not to stop."""


class BestOfTask(Config):
    """The best of several answers to each prompt (rejection sampling), as instruction data."""

    type: Literal["best_of"]
    n: int = Field(8, ge=2, le=256)
    """Answers to choose from; more give a better one, and cost proportionally more."""
    keep: int = Field(1, ge=1)
    """Number of best different answers per prompt that become rows."""
    min_score: float | None = None
    """Answers with a lower score are dropped, and prompts without a better answer. null always keeps the best."""
    cut_off: Literal["drop", "keep"] = "drop"
    """Answers that reached ``max_tokens``."""

    @model_validator(mode="after")
    def _keeps_fewer(self) -> BestOfTask:
        if self.keep > self.n:
            raise ValueError(f"keep {self.keep} is more than n {self.n}")
        return self


class PairsTask(Config):
    """Pairs of the model's own answers, labeled, as preference data."""

    type: Literal["pairs"]
    n: int = Field(4, ge=2, le=64)
    """Answers per prompt. A judge compares every two in both orders: n (n - 1) requests per prompt."""
    pairs: Literal["best_worst", "all"] = "best_worst"
    """One pair per prompt (best and worst answer), or every two answers."""
    min_margin: float = Field(0.0, ge=0)
    """Pairs whose scores differ by less count as ties; not for a judge, which gives no scores."""


Task = Annotated[InstructionsTask | ResponsesTask | BestOfTask | PairsTask, Field(discriminator="type")]

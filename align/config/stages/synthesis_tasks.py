"""Settings of what is synthesized. Torch-free."""

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
    "image", "images", "graph", "graphs", "picture", "pictures", "photo", "photos", "file", "files", "map", "maps",
    "draw", "plot", "go to", "video", "videos", "audio", "music", "flowchart", "diagram",
)  # fmt: skip
"""What a model of text cannot do; close to self-instruct's list."""


class InstructionsTask(Config):
    """New instructions in the manner of seeds (self-instruct, arXiv 2212.10560)."""

    type: Literal["instructions"]
    count: int = Field(100, ge=1)
    """New instructions wanted."""
    max_requests: int | None = Field(None, ge=1)
    """Requests at most, whether or not ``count`` is reached; as many as ``count`` by default."""
    seed_examples: int = Field(6, ge=1, le=64)
    """Seeds shown in each request."""
    made_examples: int = Field(2, ge=0, le=64)
    """New instructions shown beside them, seeds in their place until there are some."""
    per_request: int = Field(8, ge=1, le=64)
    """Instructions asked for in each request."""
    at_once: int = Field(8, ge=1, le=1024)
    """Requests made from the same pool; more of them run in parallel, and know less of each other."""
    min_words: int = Field(4, ge=1)
    """Shorter instructions are dropped."""
    max_words: int = Field(150, ge=1)
    """Longer instructions are dropped."""
    max_similarity: float = Field(0.7, gt=0, le=1)
    """Highest ROUGE-L against every seed and every instruction kept so far; 1 drops nothing."""
    blacklist: tuple[str, ...] = Field(BLACKLIST, strict=False)
    """Words or phrases no instruction may hold, in any case."""
    blacklist_starts: tuple[str, ...] = Field(("write a program",), strict=False)
    """What no instruction may begin with, in any case."""
    prompt: str = PROMPT
    """The request: ``{tasks}`` becomes the examples, ``{first}`` and ``{last}`` the numbers to go on with."""
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
    """Answers to each prompt; each becomes a row."""
    cut_off: Literal["drop", "keep"] = "drop"
    """What becomes of an answer that reached ``max_tokens``: one that is trained on teaches not to end."""


class BestOfTask(Config):
    """The best of several answers to each prompt (rejection sampling), as instruction data."""

    type: Literal["best_of"]
    n: int = Field(8, ge=2, le=256)
    """Answers to choose from; more find a better one, and cost as much more."""
    keep: int = Field(1, ge=1)
    """The best so many different answers of each prompt become rows."""
    min_score: float | None = None
    """Answers that score less are not kept; a prompt without a better one is dropped. null keeps the best anyway."""
    cut_off: Literal["drop", "keep"] = "drop"
    """What becomes of an answer that reached ``max_tokens``."""

    @model_validator(mode="after")
    def _keeps_fewer(self) -> BestOfTask:
        if self.keep > self.n:
            raise ValueError(f"keep {self.keep} is more than n {self.n}")
        return self


class PairsTask(Config):
    """Pairs of the model's own answers, labeled, as preference data."""

    type: Literal["pairs"]
    n: int = Field(4, ge=2, le=64)
    """Answers to each prompt. A judge compares every two in both orders, n (n - 1) requests a prompt."""
    pairs: Literal["best_worst", "all"] = "best_worst"
    """One pair a prompt (best and worst answer), or every two."""
    min_margin: float = Field(0.0, ge=0)
    """Pairs whose scores differ by less count as ties; not for a judge, who gives no scores."""


Task = Annotated[InstructionsTask | ResponsesTask | BestOfTask | PairsTask, Field(discriminator="type")]

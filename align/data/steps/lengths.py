"""Filter by length: characters, words, tokens, and messages in the prompt.

Torch-free until tokens are counted. A tokenizer comes from a local folder or from the Hub at a commit; no code of its
repository is run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from align.config.base import Config
from align.config.user_paths import user_path
from align.data.rows import Dropped, Row
from align.data.steps.base import RowStep, StepContext
from align.data.steps.texts import prompt_texts, reply_texts
from align.errors import UserError
from align.pipeline.registry import load_object
from align.store.fingerprint import file_digest


class Turns(Config):
    """Messages in a prompt, the system's included; 1 is a single question."""

    min: int | None = Field(None, ge=1)
    """Fewest messages of a prompt that is kept."""
    max: int | None = Field(None, ge=1)
    """Most messages of a prompt that is kept."""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        _check_bounds(self, ("",))
        return self

    def start(self, context: StepContext) -> RowStep:
        """The filter itself."""
        return _Turns(self)


class Lengths(Config):
    """Bounds, all inclusive. A prompt is all its turns together; ``whole`` is the prompt plus its longest reply.

    Every reply counts, rejected ones too: what trains has to hold them all. The longest is held against a maximum, the
    shortest against a minimum.
    """

    min: int | None = Field(None, ge=1)
    """Least of prompt plus longest reply."""
    max: int | None = Field(None, ge=1)
    """Most of prompt plus longest reply."""
    min_prompt: int | None = Field(None, ge=1)
    """Shortest prompt, all turns together."""
    max_prompt: int | None = Field(None, ge=1)
    """Longest prompt, all turns together."""
    min_reply: int | None = Field(None, ge=1)
    """Shortest reply."""
    max_reply: int | None = Field(None, ge=1)
    """Longest reply."""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        _check_bounds(self, ("", "_prompt", "_reply"))
        return self


class Chars(Lengths):
    """Lengths in characters; about four to a token in English."""

    def start(self, context: StepContext) -> RowStep:
        """The filter itself."""
        return LengthFilter("chars", self, partial(map, len))


class Words(Lengths):
    """Lengths in words, which white space parts: of no use for Chinese, Japanese or Thai."""

    def start(self, context: StepContext) -> RowStep:
        """The filter itself."""
        return LengthFilter("words", self, lambda texts: [len(text.split()) for text in texts])


class Tokens(Lengths):
    """Lengths in tokens of the texts alone; a chat template adds some four to ten tokens a turn."""

    identified = frozenset({"tokenizer"})

    tokenizer: str
    """Folder with a tokenizer, relative to the current directory, or its name on the Hub (then with ``revision``)."""
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    """The tokenizer's commit on the Hub, 40 hexadecimal digits."""

    def identities(self, base: Path) -> dict[str, str]:
        """Digests of the tokenizer's files, or its commit. Raises ``UserError`` where there is neither."""
        folder = user_path(self.tokenizer, base)
        if not folder.is_dir():
            if self.revision:
                return {"tokenizer": f"{self.tokenizer}@{self.revision}"}
            raise UserError(
                f"tokens.tokenizer: there is no folder {folder}. For a tokenizer of the Hub, add its revision: the "
                "commit, 40 hexadecimal digits."
            )
        files = sorted(path for path in folder.iterdir() if path.is_file() and _is_read(path.name))
        if not files:
            raise UserError(f"tokens.tokenizer: {folder} holds none of {', '.join(_TOKENIZER_FILES)}.")
        return {f"tokenizer {path.name}": f"sha256:{file_digest(path)}" for path in files}

    def start(self, context: StepContext) -> RowStep:
        """The filter itself. Raises ``UserError`` for a tokenizer that cannot be loaded."""
        tokenizer = _load_tokenizer(self, context.base)

        def count(texts: list[str]) -> list[int]:
            if not texts:
                return []
            found = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            return [len(ids) for ids in found["input_ids"]]

        return LengthFilter("tokens", self, count)


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)


def _is_read(name: str) -> bool:
    """True for a file of a tokenizer; one for newer versions of transformers is called ``tokenizer.4.0.json``."""
    return name in _TOKENIZER_FILES or fnmatch(name, "tokenizer.*.json") or name.endswith(".tiktoken")


def _load_tokenizer(config: Tokens, base: Path) -> Any:
    folder = user_path(config.tokenizer, base)
    name = str(folder) if folder.is_dir() else config.tokenizer
    if not folder.is_dir() and config.revision is None:
        config.identities(base)  # says what is missing
    try:
        return load_object("align.models.pretrained:open_tokenizer")(name, revision=config.revision)
    except Exception as error:  # missing files, unknown class, unreachable Hub: all the user's to mend
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"tokens.tokenizer: '{name}' could not be loaded: {reason}") from error


def _check_bounds(config: Config, suffixes: tuple[str, ...]) -> None:
    pairs = [(f"min{suffix}", f"max{suffix}") for suffix in suffixes]
    bounds = {name: getattr(config, name) for pair in pairs for name in pair}
    if all(bound is None for bound in bounds.values()):
        raise ValueError(f"no bound is given; set one of {', '.join(bounds)}")
    for low, high in pairs:
        if bounds[low] is not None and bounds[high] is not None and bounds[low] > bounds[high]:
            raise ValueError(f"{low} ({bounds[low]}) is more than {high} ({bounds[high]}), so nothing passes")


class _Turns:
    def __init__(self, config: Turns) -> None:
        self._config = config

    def apply(self, rows: list[Row]) -> Sequence[Row | Dropped]:
        return [self._one(row) for row in rows]

    def _one(self, row: Row) -> Row | Dropped:
        found = len(row.get("prompt") or ())
        if self._config.min is not None and found < self._config.min:
            return Dropped("filter: turns.min", {"found": found, "limit": self._config.min})
        if self._config.max is not None and found > self._config.max:
            return Dropped("filter: turns.max", {"found": found, "limit": self._config.max})
        return row


class LengthFilter:
    """Drops rows outside bounds; ``count`` gives the length of each of some texts."""

    def __init__(self, name: str, bounds: Lengths, count: Callable[[list[str]], Any]) -> None:
        self._name = name
        self._bounds = [(key, limit) for key in Lengths.model_fields if (limit := getattr(bounds, key)) is not None]
        self._count = count

    def apply(self, rows: list[Row]) -> Sequence[Row | Dropped]:
        """One result a row; the reason names the bound, the detail what was found."""
        # All texts are counted at once: tokenizers take batches.
        parts = [
            ([text for _, text in prompt_texts(row)], [text for _, text in reply_texts(row, "both")]) for row in rows
        ]
        counts = iter(self._count([text for prompt, replies in parts for text in (*prompt, *replies)]))
        results: list[Row | Dropped] = []
        for row, (prompt, replies) in zip(rows, parts, strict=True):
            asked = sum(next(counts) for _ in prompt)
            answered = [next(counts) for _ in replies]
            results.append(self._judge(asked, answered) or row)
        return results

    def _judge(self, prompt: int, replies: list[int]) -> Dropped | None:
        longest, shortest = max(replies, default=0), min(replies, default=0)
        for key, limit in self._bounds:
            if key.endswith("_prompt"):
                found = prompt
            elif key.endswith("_reply"):
                if not replies:
                    continue
                found = longest if key.startswith("max") else shortest
            else:
                found = prompt + longest
            if found < limit if key.startswith("min") else found > limit:
                return Dropped(f"filter: {self._name}.{key}", {"found": found, "limit": limit})
        return None

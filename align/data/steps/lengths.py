"""Filters by length: characters, words, tokens, and messages in the prompt.

Torch-free until tokens are counted. A tokenizer comes from a local folder or from the Hub at a commit; no code of its
repository is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from align.config.recipe.filter_settings import Chars, Lengths, Tokens, Turns, Words
from align.config.user_paths import user_path
from align.data.row_texts import excerpt, prompt_texts, reply_texts, without_code
from align.data.rows import Dropped, Row
from align.data.steps.base import RowFilter, StepContext, require_models
from align.errors import UserError
from align.store.fingerprint import file_digest


class TurnsFilter(RowFilter):
    """Drops rows with too few or too many messages in the prompt."""

    def __init__(self, config: Turns) -> None:
        self._config = config

    def _judge(self, row: Row) -> Dropped | None:
        count = len(row.get("prompt") or ())
        if self._config.min is not None and count < self._config.min:
            return Dropped("filter: turns.min", {"found": count, "limit": self._config.min})
        if self._config.max is not None and count > self._config.max:
            return Dropped("filter: turns.max", {"found": count, "limit": self._config.max})
        return None


class LengthFilter:
    """Drops rows outside bounds; ``count`` returns the length of each text of a list."""

    def __init__(self, unit: str, bounds: Lengths, count: Callable[[list[str]], Any]) -> None:
        self._unit = unit
        self._bounds = [(key, limit) for key in Lengths.model_fields if (limit := getattr(bounds, key)) is not None]
        self._count = count

    def apply(self, rows: list[Row]) -> Sequence[Row | Dropped]:
        """Return each row or ``Dropped``: the reason names the bound, the detail the length."""
        # All texts are counted at once, since tokenizers are fast on batches.
        parts = [
            ([text for _, text in prompt_texts(row)], [text for _, text in reply_texts(row, "both")]) for row in rows
        ]
        counts = iter(self._count([text for prompt, replies in parts for text in (*prompt, *replies)]))
        results: list[Row | Dropped] = []
        for row, (prompt, replies) in zip(rows, parts, strict=True):
            prompt_length = sum(next(counts) for _ in prompt)
            reply_lengths = [next(counts) for _ in replies]
            results.append(self._judge(prompt_length, reply_lengths) or row)
        return results

    def _judge(self, prompt: int, replies: list[int]) -> Dropped | None:
        longest, shortest = max(replies, default=0), min(replies, default=0)
        # The first bound that a row breaks is its reason.
        for key, limit in self._bounds:
            is_minimum = key.startswith("min")
            if key.endswith("_prompt"):
                length = prompt
            elif key.endswith("_reply"):
                if not replies:
                    continue
                length = shortest if is_minimum else longest
            else:
                length = prompt + longest
            is_outside = length < limit if is_minimum else length > limit
            if is_outside:
                return Dropped(f"filter: {self._unit}.{key}", {"found": length, "limit": limit})
        return None


def chars_filter(config: Chars) -> LengthFilter:
    """Return the filter by characters."""
    return LengthFilter("chars", config, partial(map, len))


def words_filter(config: Words) -> LengthFilter:
    """Return the filter by words."""
    return LengthFilter("words", config, lambda texts: [len(text.split()) for text in texts])


def tokens_filter(config: Tokens, context: StepContext) -> LengthFilter:
    """Return the filter by tokens. Raises ``UserError`` for a tokenizer that cannot be loaded."""
    tokenizer = _load_tokenizer(config, context)

    def count(texts: list[str]) -> list[int]:
        if not texts:
            return []
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]

    return LengthFilter("tokens", config, count)


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


def tokenizer_identities(config: Tokens, base: Path) -> dict[str, str]:
    """Return digests of the tokenizer's files, or its commit. Raises ``UserError`` if there is neither."""
    folder = user_path(config.tokenizer, base)
    if not folder.is_dir():
        if config.revision:
            return {"tokenizer": f"{config.tokenizer}@{config.revision}"}
        raise UserError(
            f"tokens.tokenizer: there is no folder {folder}. For a tokenizer of the Hub, add its revision: the "
            "commit, 40 hexadecimal digits."
        )
    files = sorted(path for path in folder.iterdir() if path.is_file() and _is_tokenizer_file(path.name))
    if not files:
        raise UserError(f"tokens.tokenizer: {folder} holds none of {', '.join(_TOKENIZER_FILES)}.")
    return {f"tokenizer {path.name}": f"sha256:{file_digest(path)}" for path in files}


def _is_tokenizer_file(name: str) -> bool:
    """Return True for a file of a tokenizer; newer versions of transformers may read ``tokenizer.4.0.json``."""
    return name in _TOKENIZER_FILES or fnmatch(name, "tokenizer.*.json") or name.endswith(".tiktoken")


def _load_tokenizer(config: Tokens, context: StepContext) -> Any:
    folder = user_path(config.tokenizer, context.base)
    name = str(folder) if folder.is_dir() else config.tokenizer
    if not folder.is_dir() and config.revision is None:
        tokenizer_identities(config, context.base)  # raises the error that says what is missing
    models = require_models(context.models)
    try:
        return models.open_tokenizer(name, config.revision)
    except Exception as error:  # missing files, unknown class, unreachable Hub: all for the user to fix
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"tokens.tokenizer: '{name}' could not be loaded: {reason}") from error


SELF_INSTRUCT = (
    "image",
    "images",
    "graph",
    "graphs",
    "picture",
    "pictures",
    "file",
    "files",
    "map",
    "maps",
    "draw",
    "plot",
    "go to",
    "video",
    "audio",
    "music",
    "flowchart",
    "diagram",
)
"""Keywords of tasks that a text model cannot do, from the code of Self-Instruct (arXiv 2212.10560)."""

# {{name}} as templates have it and <noinput> as Alpaca's data does. [Your Name] stays: a letter on request ends so.
_PLACEHOLDER = re.compile(r"(?<!\$)\{\{\s*[A-Za-z_][\w .-]{0,40}\}\}|<\s*no ?input\s*>", re.IGNORECASE)
_CODE = re.compile(r"`[^`\n]+`")


def find_placeholder(text: str) -> str | None:
    """Return the first placeholder outside code; inside code ``{{name}}`` belongs to a template engine."""
    if "{{" not in text and "<" not in text:
        return None
    match = _PLACEHOLDER.search(_CODE.sub("", without_code(text)))
    return match[0] if match else None


class PlaceholderFilter(RowFilter):
    """Drops rows with a placeholder in any text: rejected replies teach it just like chosen ones."""

    def _judge(self, row: Row) -> Dropped | None:
        for field, text in (*prompt_texts(row), *reply_texts(row, "both")):
            placeholder = find_placeholder(text)
            if placeholder:
                return Dropped("filter: placeholder", {"in": field, "excerpt": placeholder})
        return None


class KeywordFilter(RowFilter):
    """Drops rows with one of some words in a user's turn; full words, in any case."""

    def __init__(self, words: Sequence[str]) -> None:
        # The longest first, so "go to" wins over "go".
        ordered = sorted(set(words), key=lambda word: (-len(word), word))
        alternatives = "|".join(re.escape(word).replace(r"\ ", r"\s+") for word in ordered)
        self._pattern = re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)", re.IGNORECASE)

    def _judge(self, row: Row) -> Dropped | None:
        for field, text in prompt_texts(row, "user"):
            match = self._pattern.search(text)
            if match:
                word = " ".join(match[0].lower().split())
                detail = {"in": field, "excerpt": excerpt(text, match.start(), match.end())}
                return Dropped(f"filter: keyword {word}", detail)
        return None

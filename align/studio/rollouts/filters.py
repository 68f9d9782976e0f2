"""Conditions and orders of tables of stored rollouts, as SQL for DuckDB.

Every statement is made of the constants below. Values of a request are parameters, also the names of score parts and
reasons: the text of a request never becomes SQL.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_WORDS, MAX_NAME = 200, 500
"""Characters of the words to look for, and of names."""
MAX_LIMIT, MAX_OFFSET = 200, 10_000_000
"""Rows of a page, and rows before it."""
SCORE_OF_PART = "scores[$part]"
SORTED = {
    "update": '"update"',
    "score": "score",
    "gold": "gold",
    "tokens": "tokens",
    "kl": "kl",
    "thought_tokens": "thought_tokens",
    "turns": "turns",
}
"""Sort keys of a table, and their SQL."""
PLACE = ('"update"', "split", '"round"', '"group"', '"index"')
"""Columns that identify a row."""
_FLOATS = {"score", "gold", "kl"}

Name = Annotated[str, Field(max_length=MAX_NAME)]
Words = Annotated[str, Field(max_length=MAX_WORDS)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Update = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]


class RolloutFilter(BaseModel):
    """Conditions of rows; a condition that is not set holds for all rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    first_update: Update | None = None
    last_update: Update | None = None
    prompt_id: Name = ""
    split: Name = ""
    part: Name = ""
    """Name of a part of the score; ``min_score`` and ``max_score`` limit the part. Empty is the score itself."""
    min_score: Number | None = None
    max_score: Number | None = None
    min_tokens: Count | None = None
    max_tokens: Count | None = None
    min_kl: Number | None = None
    max_kl: Number | None = None
    reason: Name = ""
    """Reason that any reward gave, such as ``timed_out``."""
    stop: Name = ""
    """End of an episode."""
    finished: bool | None = None
    learned: bool | None = None
    response_words: Words = ""
    """Words that the response has, in any order and case; words in double quotes follow each other."""
    prompt_words: Words = ""

    @property
    def has_words(self) -> bool:
        """True if texts must be read."""
        return bool(split_words(self.response_words) or split_words(self.prompt_words))

    @property
    def is_unfiltered(self) -> bool:
        """True if all rows meet the conditions."""
        return self.condition({}) == "true"

    def condition(self, parameters: dict[str, Any]) -> str:
        """Return the condition of all set fields, and add its values to ``parameters``."""
        terms: list[str] = []

        def add(sql: str, name: str, value: Any) -> None:
            terms.append(sql)
            parameters[name] = value

        for name, column in (("first_update", '"update" >='), ("last_update", '"update" <=')):
            if (value := getattr(self, name)) is not None:
                add(f"{column} ${name}", name, value)
        for name in ("prompt_id", "split", "stop"):
            if value := getattr(self, name):
                add(f"{name} = ${name}", name, value)
        for name in ("finished", "learned"):
            if (value := getattr(self, name)) is not None:
                add(f"{name} = ${name}", name, value)
        if self.part and (self.min_score is not None or self.max_score is not None):
            parameters["part"] = self.part
        score = SCORE_OF_PART if self.part else "score"
        for name, column in (("score", score), ("tokens", "tokens"), ("kl", "kl")):
            terms += self._range(name, column, parameters)
        if self.reason:
            add("list_contains(map_values(reasons), $reason)", "reason", self.reason)
        for name, column in (("response_words", "response"), ("prompt_words", "prompt")):
            for number, word in enumerate(split_words(getattr(self, name))):
                # A prompt is JSON: quotes and line breaks have an escape there.
                text = word if column == "response" else json.dumps(word, ensure_ascii=False)[1:-1]
                add(f"regexp_matches({column}, ${name}_{number}, 'i')", f"{name}_{number}", re.escape(text))
        return " AND ".join(terms) or "true"

    def _range(self, name: str, column: str, parameters: dict[str, Any]) -> list[str]:
        """Return the terms of a lowest and a highest value."""
        terms = []
        # Stored numbers are float32, so bounds are compared as float32: 0.1 includes a stored 0.1.
        kind = "INTEGER" if name == "tokens" else "FLOAT"
        for prefix, sign in (("min", ">="), ("max", "<=")):
            value = getattr(self, f"{prefix}_{name}")
            if value is not None:
                parameters[f"{prefix}_{name}"] = value
                terms.append(f"{column} {sign} CAST(${prefix}_{name} AS {kind})")
        if terms and kind == "FLOAT":
            terms.append(f"NOT isnan({column})")  # DuckDB sorts nan above all numbers
        return terms


class TableQuery(RolloutFilter):
    """A page of a table: conditions, order and place."""

    sort: Literal["update", "score", "gold", "tokens", "kl", "thought_tokens", "turns", "part"] = "update"
    """Column that rows are sorted by; ``part`` is the part ``sort_part`` of the score."""
    sort_part: Name = ""
    descending: bool = True
    limit: int = Field(50, ge=1, le=MAX_LIMIT)
    offset: int = Field(0, ge=0, le=MAX_OFFSET)
    after: Annotated[str, Field(max_length=120)] = ""
    """Place at which the search for words continues: ``next`` of the page before."""

    @property
    def by_update(self) -> bool:
        """True for the order of the files."""
        return self.sort == "update"

    @property
    def order(self) -> str:
        """The order of rows with the sort key ``key``. Rows without a value come last.

        With equal keys newer updates come first, and the rows of an update as they were written.
        """
        direction = "DESC" if self.descending else "ASC"
        return f'key {direction} NULLS LAST, "update" DESC, file_index, file_row_number'

    def sort_key(self, parameters: dict[str, Any]) -> str:
        """Return the SQL of the sort key."""
        if self.sort == "part":
            parameters["sort_part"] = self.sort_part
            return "CASE WHEN isnan(scores[$sort_part]) THEN NULL ELSE scores[$sort_part] END"
        column = SORTED[self.sort]
        return f"CASE WHEN isnan({column}) THEN NULL ELSE {column} END" if self.sort in _FLOATS else column


def split_words(text: str) -> list[str]:
    """Return the words of a search, and its phrases in double quotes."""
    return [phrase or word for phrase, word in re.findall(r'"([^"]+)"|([^\s"]+)', text)]


def word_pattern(text: str) -> re.Pattern[str] | None:
    """Return an expression that matches each word of a search, None without words."""
    words = split_words(text)
    return re.compile("|".join(map(re.escape, words)), re.IGNORECASE) if words else None

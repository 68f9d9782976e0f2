"""Pages of a table of stored rollouts, with a search for words that returns in time.

The files are listed anew for each query, because a running stage adds and merges them. A page has at most
``MAX_LIMIT`` rows, whose texts are cut, so memory does not grow with the number of rollouts.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.store.rollouts import updates_of
from align.studio.rollouts.filters import PLACE, RolloutFilter, TableQuery, word_pattern
from align.studio.rollouts.parquet_reader import ParquetReader, Result, Rows

SECONDS = 0.3
"""Time after which a search for words begins no further files."""
SEARCH_BYTES = 96 * 2**20
"""Bytes of the files that a search for words reads at a time."""
MAX_TEXT = 240
"""Characters of a text in a table."""
BEFORE_WORD = 60
"""Characters before the first word in a text that is cut."""
MAX_UPDATE = 2**31 - 1
FROM = "FROM read_parquet($files, can_have_nan = true)"
_COLUMNS = (
    *PLACE,
    *("prompt_id", "prompt", "response", "score", "scores", "reasons", "gold", "tokens", "finished", "learned", "kl"),
    *("thought_tokens", "turns", "stop"),
)
_SELECTED = ", ".join(_COLUMNS)


@dataclass(frozen=True)
class Page:
    """Rows of a table, and the part of the files that was searched for them."""

    rows: Rows
    matches: int
    """Rows that meet the conditions, of those that were searched."""
    total: int
    """Rows of all files."""
    searched: int
    """Rows that this request searched."""
    next: str = ""
    """Place at which a search for words continues; empty if it is complete."""


@dataclass(frozen=True)
class RolloutTable:
    """The table of one folder; ``locate`` returns it, which changes when the stage finishes."""

    reader: ParquetReader
    locate: Callable[[], Path]

    def read(self, query: Callable[[list[Path]], Result]) -> Result:
        """Return the result of ``query`` for the files that are there now."""
        return self.reader.read(self.locate, query)

    def page(self, query: TableQuery) -> Page:
        """Return a page of the table.

        Words are looked for in the texts of all rows, which may need more time than a request has. So a search for
        words returns after about :data:`SECONDS`; ``next`` is the ``after`` of the next request. The newest updates
        are searched first, unless the table is sorted by ``update`` in ascending order. With ``sort: update`` a search
        stops when the page is full; ``offset`` is not used. With another order the pages of all requests must be
        merged by ``key``.
        """
        read_page = self._search if query.has_words else self._scan
        return self.read(lambda files: read_page(query, files))

    def _scan(self, query: TableQuery, files: Sequence[Path]) -> Page:
        total = self.count(files)
        if query.is_unfiltered and query.by_update and all(updates_of(path.name) for path in files):
            needed = self._first_files(files, query)
            return Page(self._top(needed, query, query.limit, query.offset)[0], total, total, total)
        rows, matches = self._top(files_of_updates(files, query), query, query.limit, query.offset)
        return Page(rows, matches, total, total)

    def _first_files(self, files: Sequence[Path], query: TableQuery) -> Sequence[Path]:
        """Return the files of the first updates that have the rows of a page without conditions."""
        ordered = files[::-1] if query.descending else files
        number = 1
        while number < len(ordered) and self.count(ordered[:number]) < query.offset + query.limit:
            number *= 4
        return ordered[:number]

    def _search(self, query: TableQuery, files: Sequence[Path]) -> Page:
        deadline = time.monotonic() + SECONDS
        is_newest_first = query.descending or not query.by_update
        ordered = files_of_updates(files, query)[:: -1 if is_newest_first else 1]
        query, remaining, skipped = _continue(query, ordered, is_newest_first)
        rows: Rows = []
        matches = 0
        searched = 0
        following = ""
        for batch, upcoming in _batches(remaining):
            limit = query.limit - len(rows) if query.by_update else query.limit
            top, count = self._top(batch, query, limit, skipped)
            rows += top
            if not skipped:  # the request before has counted these files
                matches += count
                searched += self.count(batch)
            if query.by_update and count > skipped + len(top):
                following = f"{_place(batch[0], query, is_newest_first)}:{skipped + len(top)}"
                break
            skipped = 0
            following = f"{_place(upcoming, query, is_newest_first)}:0" if upcoming else ""
            is_full = query.by_update and len(rows) == query.limit
            if is_full or time.monotonic() > deadline:
                break
        if not query.by_update:
            rows = sorted(rows, key=lambda row: _sort_key(row["key"], query.descending))[: query.limit]
        return Page(rows, matches, self.count(files), searched, following)

    def count(self, files: Sequence[Path]) -> int:
        """Return the number of rows of files, from their metadata."""
        if not files:
            return 0
        return int(self.reader.rows(f"SELECT count(*) AS n {FROM}", file_parameters(files))[0]["n"])

    def _top(self, files: Sequence[Path], query: TableQuery, limit: int, offset: int) -> tuple[Rows, int]:
        """Return rows in the order of the query, and the number of rows that meet its conditions.

        The conditions are evaluated once, on the columns that they and the order need.
        """
        if not files:
            return [], 0
        parameters = file_parameters(files) | {"limit": limit, "offset": offset}
        sql = f"""
            WITH hits AS MATERIALIZED (
                SELECT file_index, file_row_number, "update", {query.sort_key(parameters)} AS key
                {FROM} WHERE {query.condition(parameters)}
            )
            SELECT (SELECT count(*) FROM hits) AS matches, file_index, file_row_number, key
            FROM hits ORDER BY {query.order} LIMIT $limit OFFSET $offset
        """  # noqa: S608  (made of constants: every value of a request is a parameter)
        hits = self.reader.rows(sql, parameters)
        if not hits:
            return [], self._count_matches(files, query) if offset else 0
        pattern = {"response": word_pattern(query.response_words), "prompt": word_pattern(query.prompt_words)}
        rows = self._fetch(files, hits)
        return [_table_row(row, pattern) for row in rows], int(hits[0]["matches"])

    def _fetch(self, files: Sequence[Path], hits: Sequence[Mapping[str, Any]]) -> Rows:
        """Return the columns of the table for the rows of ``hits``, in their order.

        A part of the statement reads one file. With row numbers as constants DuckDB skips the other row groups, which a
        join does not.
        """
        parameters: dict[str, Any] = {}
        parts = []
        for number in dict.fromkeys(hit["file_index"] for hit in hits):
            places = [hit["file_row_number"] for hit in hits if hit["file_index"] == number]
            names = [f"row_{number}_{place}" for place in places]
            parameters |= {f"file_{number}": str(files[number]), **dict(zip(names, places, strict=True))}
            numbers = ", ".join(f"${name}" for name in names)
            parts.append(
                f"SELECT {number} AS file_number, file_row_number AS row_number, {_SELECTED} "  # noqa: S608  (as above)
                f"FROM read_parquet($file_{number}) WHERE file_row_number IN ({numbers})"
            )
        rows = self.reader.rows(" UNION ALL ".join(parts), parameters)
        by_place = {(row.pop("file_number"), row.pop("row_number")): row for row in rows}
        if len(by_place) < len(hits):
            raise OSError("a file changed while it was read")
        return [by_place[hit["file_index"], hit["file_row_number"]] | {"key": hit["key"]} for hit in hits]

    def _count_matches(self, files: Sequence[Path], query: RolloutFilter) -> int:
        parameters = file_parameters(files)
        sql = f"SELECT count(*) AS n {FROM} WHERE {query.condition(parameters)}"
        return int(self.reader.rows(sql, parameters)[0]["n"])


def files_of_updates(files: Sequence[Path], conditions: RolloutFilter) -> list[Path]:
    """Return the files that may have rows of the updates of the conditions, by their names."""
    first = conditions.first_update or 0
    last = math.inf if conditions.last_update is None else conditions.last_update

    def has_updates(path: Path) -> bool:
        updates = updates_of(path.name)
        return updates is None or (updates[0] <= last and updates[1] >= first)

    return list(filter(has_updates, files))


def file_parameters(files: Sequence[Path]) -> dict[str, Any]:
    """Return the parameter of ``FROM``."""
    return {"files": [str(path) for path in files]}


def _place(path: Path, query: TableQuery, is_newest_first: bool) -> str:
    """Return the place of a file at which a search continues: the first update in its order, or the file's name."""
    updates = updates_of(path.name)
    if updates is None:
        return path.name
    if is_newest_first:
        return str(min(updates[1], updates[1] if query.last_update is None else query.last_update))
    return str(max(updates[0], query.first_update or 0))


def _continue(
    query: TableQuery, ordered: Sequence[Path], is_newest_first: bool
) -> tuple[TableQuery, Sequence[Path], int]:
    """Return the query and the files from its place ``after`` on, and the matches there that were on earlier pages."""
    place, _, skipped = query.after.rpartition(":")
    if not place or not skipped.isdecimal():
        return query, ordered, 0
    if place.isdecimal():
        # A running stage merges files, so the file of this update may have rows that were on earlier pages.
        update = min(int(place), MAX_UPDATE)
        query = query.model_copy(update={"last_update" if is_newest_first else "first_update": update})
        remaining = files_of_updates(ordered, query)
        first, last = (remaining and updates_of(remaining[0].name)) or (0, -1)
        is_there = first <= update <= last
    else:
        remaining = [path for path in ordered if (path.name <= place if is_newest_first else path.name >= place)]
        is_there = bool(remaining) and remaining[0].name == place
    # The file itself may be gone: a running stage deletes the oldest.
    return query, remaining, int(skipped) if is_there else 0


def _batches(files: Sequence[Path]) -> Iterator[tuple[Sequence[Path], Path | None]]:
    """Yield files of together about ``SEARCH_BYTES``, and the file after them."""
    start = 0
    size = 0
    for end, path in enumerate(files, start=1):
        size += path.stat().st_size
        if size >= SEARCH_BYTES or end == len(files):
            yield files[start:end], files[end] if end < len(files) else None
            start = end
            size = 0


def _sort_key(key: float | None, is_descending: bool) -> tuple[bool, float]:
    if key is None:
        return True, 0.0
    return False, -key if is_descending else key


# ---- rows as JSON ----


def _table_row(row: Mapping[str, Any], patterns: Mapping[str, re.Pattern[str] | None]) -> dict[str, Any]:
    """Return a row for the table: its ``id``, numbers that JSON has, and texts that are cut around the first word."""
    content = {name: finite(value) for name, value in row.items()}
    content["scores"] = finite_map(row["scores"])
    content["id"] = row_id(row)
    content["prompt"] = excerpt(last_message(row["prompt"]), patterns["prompt"])
    content["response"] = excerpt(row["response"] or "", patterns["response"])
    return content


def row_id(row: Mapping[str, Any]) -> str:
    """Return the identity of a row in its folder: update, split, round, group, index."""
    values = (row[name.strip('"')] for name in PLACE)
    return "-".join("" if value is None else str(value) for value in values)


def finite(value: Any) -> Any:
    """Return a number as JSON can have it: ``nan`` and infinity become text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def finite_map(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the numbers of a mapping as JSON can have them."""
    return {name: finite(value) for name, value in (values or {}).items()}


def last_message(prompt: str | None) -> str:
    """Return the text of the last message of a stored prompt."""
    try:
        messages = json.loads(prompt or '""')
    except (ValueError, RecursionError):
        return prompt or ""
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        return str(messages[-1].get("content") or "")
    return messages if isinstance(messages, str) else str(prompt)


def excerpt(text: str, pattern: re.Pattern[str] | None) -> str:
    """Return the beginning of a text, or the text around the first word of a search."""
    match = pattern.search(text) if pattern else None
    start = max(0, match.start() - BEFORE_WORD) if match else 0
    if start:
        text = f"…{text[start:]}"
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"

"""Queries behind the table of stored rollouts: facets, means by update, answers to a prompt, a row's tokens."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from align.errors import missing_extra
from align.report.scorecard.rollouts import episode_view, is_episode
from align.store.rollouts import JSON_COLUMNS, TOKEN_COLUMNS
from align.studio.rollouts.filters import PLACE, RolloutFilter
from align.studio.rollouts.parquet_reader import Rows
from align.studio.rollouts.queries import (
    FROM,
    MAX_UPDATE,
    RolloutTable,
    file_parameters,
    files_of_updates,
    finite,
    finite_map,
    row_id,
)
from align.verifiers.verdict import reasons_in

MAX_POINTS = 400
"""Points of a curve; with more updates a point is the mean over several."""
MAX_NAMES = 200
"""Names of score parts, reasons and ends of episodes."""
MAX_ANSWERS, MAX_PROMPT_ROWS = 64, 20_000
"""Answers to a prompt that are read with their texts, and all of its rows."""
SHOWN_UPDATES = 8
"""Updates of a prompt that are shown if none are chosen."""
MAX_TOKENS = 20_000
"""Tokens of a row that have numbers."""
DIGITS = 6
COUNTED = ("score", "gold", "kl", "turns", "thought_tokens", "split")
"""Columns that a table may lack."""
Base = Literal["previous", "first", "none"]
"""Answer that an answer to the same prompt is compared with."""
MAX_WORDS = 10_000
"""Words and signs of a text; longer texts are not compared."""
SAME, ADDED, REMOVED = "same", "added", "removed"
Pieces = list[tuple[str, str]]
_WORD = re.compile(r"\w+\s*|[^\w\s]\s*|\s+")
_PLACE_NAMES = [name.strip('"') for name in PLACE]
_ROW_ID = re.compile(r"(\d{0,10})-([a-z]{0,20})-(\d{0,10})-(\d{0,10})-(\d{0,10})")


@dataclass(frozen=True)
class RolloutDetails:
    """Queries of the folder of ``table``."""

    table: RolloutTable

    def facets(self) -> dict[str, Any]:
        """Return what the filters of the folder can choose from.

        ``parts`` are the names of the score's parts, ``reasons`` and ``stops`` have the number of rows by name, and
        ``columns`` the number of rows that have a value.
        """
        return self.table.read(self._facets)

    def _facets(self, files: Sequence[Path]) -> dict[str, Any]:
        # Rows have few different sets of parts and reasons, so one pass groups by them.
        groups = self._rows(
            files,
            f"""SELECT map_keys(scores) AS parts, map_values(reasons) AS reasons, stop, count(*) AS rows,
                min("update") AS first_update, max("update") AS last_update,
                {", ".join(f"count({name}) AS {name}" for name in COUNTED)} {{FROM}} GROUP BY ALL""",
        )
        reasons: Counter[str] = Counter()
        stops: Counter[str] = Counter()
        for group in groups:
            for reason in group["reasons"] or ():
                reasons[reason] += group["rows"]
            if group["stop"] is not None:
                stops[group["stop"]] += group["rows"]
        parts = sorted({name for group in groups for name in group["parts"] or ()})
        updates = [group[name] for group in groups for name in ("first_update", "last_update")]
        known = [update for update in updates if update is not None]
        return {
            "rows": sum(group["rows"] for group in groups),
            "first_update": min(known, default=None),
            "last_update": max(known, default=None),
            # A part such as math_timed_out counts a reason, which is a filter already.
            "parts": [name for name in parts if not reasons_in({name: 1})][:MAX_NAMES],
            "reasons": dict(reasons.most_common(MAX_NAMES)),
            "stops": dict(stops.most_common(MAX_NAMES)),
            "columns": {name: sum(group[name] for group in groups) for name in COUNTED},
        }

    def means(self, conditions: RolloutFilter, parts: Sequence[str] = ()) -> Rows:
        """Return the means of the rows that meet the conditions, by update: at most :data:`MAX_POINTS` points.

        A point has ``first_update``, ``last_update``, ``rows``, ``score``, ``kl``, ``tokens``, ``finished`` (a share)
        and ``parts``, the means of the parts of the score. Conditions on words are not used.
        """
        conditions = conditions.model_copy(update={"response_words": "", "prompt_words": ""})
        return self.table.read(lambda files: self._means(files, conditions, parts))

    def _means(self, files: Sequence[Path], conditions: RolloutFilter, parts: Sequence[str]) -> Rows:
        parameters: dict[str, Any] = {"points": MAX_POINTS}
        condition = conditions.condition(parameters)
        columns = []
        for number, part in enumerate(parts):
            parameters[f"part_{number}"] = part
            columns.append(f", avg({_number(f'scores[$part_{number}]')}) AS part_{number}")
        sql = f"""
            WITH edges AS (
                SELECT min("update") AS low, (max("update") - min("update")) // $points + 1 AS width {{FROM}}
            )
            SELECT min("update") AS first_update, max("update") AS last_update, count(*) AS rows,
            avg({_number("score")}) AS score, avg({_number("kl")}) AS kl, avg(tokens) AS tokens,
            avg(finished::INTEGER) AS finished{"".join(columns)}
            {{FROM}}, edges WHERE "update" IS NOT NULL AND {condition}
            GROUP BY ("update" - low) // width ORDER BY first_update
        """
        points = []
        for row in self._rows(files_of_updates(files, conditions), sql, parameters):
            means = {part: finite(row.pop(f"part_{number}")) for number, part in enumerate(parts)}
            points.append({name: finite(value) for name, value in row.items()} | {"parts": means})
        return points

    def prompt(self, prompt_id: str, updates: Sequence[int] = (), base: Base = "previous") -> dict[str, Any]:
        """Return the answers to one prompt across the updates.

        ``updates`` has the number of answers and the mean score of each update; ``answers`` has the texts of the
        chosen ``updates``, or of :data:`SHOWN_UPDATES` from the first to the last. An answer has ``pieces``, its
        differences from the answer with the same number in the update that ``base`` says.
        """
        content = self.table.read(lambda files: self._prompt(files, prompt_id, updates))
        _mark_differences(content["answers"], base)
        return content

    def _prompt(self, files: Sequence[Path], prompt_id: str, updates: Sequence[int]) -> dict[str, Any]:
        summary = self._rows(
            files,
            f"""SELECT "update", count(*) AS rows, avg({_number("score")}) AS score, avg({_number("kl")}) AS kl,
                avg(tokens) AS tokens {{FROM}} WHERE prompt_id = $prompt_id GROUP BY "update" ORDER BY "update"
                LIMIT {MAX_PROMPT_ROWS}""",
            {"prompt_id": prompt_id},
        )
        available = [row["update"] for row in summary]
        chosen = [update for update in updates if update in available] or _evenly(available, SHOWN_UPDATES)
        # The responses of a stage that does not learn belong to no update.
        is_chosen = '"update" IS NULL' if chosen == [None] else 'list_contains($updates, "update")'
        parameters: dict[str, Any] = {"prompt_id": prompt_id, "answers": MAX_ANSWERS}
        if chosen != [None]:
            parameters["updates"] = chosen
        answers = self._rows(
            files,
            f"""SELECT {", ".join(PLACE)}, prompt, reference, response, score, scores, reasons, gold, tokens, finished,
                learned, kl, thought_end, stop {{FROM}} WHERE prompt_id = $prompt_id AND {is_chosen}
                ORDER BY {", ".join(PLACE)} LIMIT $answers""",
            parameters,
        )
        content: dict[str, Any] = {
            "prompt_id": prompt_id,
            "updates": [{name: finite(value) for name, value in row.items()} for row in summary],
            "chosen": chosen,
            "prompt": _decode(answers[0]["prompt"]) if answers else None,
            "reference": answers[0]["reference"] if answers else None,
            "answers": [],
        }
        for row in answers:
            del row["prompt"], row["reference"]
            content["answers"].append(_json_row(row))
        return content

    def row(self, identity: str) -> dict[str, Any] | None:
        """Return a row with all of its columns, or None. ``tokens_omitted`` counts tokens beyond MAX_TOKENS.

        ``group_rows`` has the ``id`` and the score of the other responses of its group.
        """
        parsed = _ROW_ID.fullmatch(identity)
        if parsed is None:
            return None
        return self.table.read(lambda files: self._row(files, parsed.groups()))

    def _row(self, files: Sequence[Path], place: Sequence[str]) -> dict[str, Any] | None:
        parameters: dict[str, Any] = {}
        if place[0]:
            update = min(int(place[0]), MAX_UPDATE)
            files = files_of_updates(files, RolloutFilter(first_update=update, last_update=update))
        is_row = _place_condition(dict(zip(_PLACE_NAMES, place, strict=True)), parameters)
        rows = self._rows(files, f"SELECT * {{FROM}} WHERE {is_row} LIMIT 1", parameters)
        if not rows:
            return None
        row = rows[0]
        parameters = {}
        group = {name: row[name] for name in ("update", "split", "round", "group")}
        is_group = _place_condition(group, parameters)
        others = self._rows(
            files,
            f'SELECT {", ".join(PLACE)}, score {{FROM}} WHERE {is_group} ORDER BY "index" LIMIT {MAX_ANSWERS}',
            parameters,
        )
        content = _json_row(row)
        if is_episode(content):
            content["conversation"] = episode_view(content)
        content["group_rows"] = [{"id": row_id(other), "score": finite(other["score"])} for other in others]
        return content

    def _rows(self, files: Sequence[Path], sql: str, parameters: Mapping[str, Any] | None = None) -> Rows:
        """Return the rows of a statement of this module; ``{FROM}`` in it becomes the files."""
        if not files:
            return []
        bound = file_parameters(files) | dict(parameters or {})
        return self.table.reader.rows(sql.replace("{FROM}", FROM), bound)


def _mark_differences(answers: Sequence[dict[str, Any]], base: Base) -> None:
    """Add ``pieces`` to the answers, which are in the order of the updates."""
    updates = list(dict.fromkeys(answer.get("update") for answer in answers))
    by_update = {update: [answer for answer in answers if answer.get("update") == update] for update in updates}
    for place, update in enumerate(updates[1:], start=1):
        before = by_update[updates[0 if base == "first" else place - 1]]
        # Samples of an update have no order, so those with the same number are compared.
        for answer, other in zip(by_update[update], before, strict=False):
            if base != "none":
                answer["pieces"] = diff_words(other.get("response", ""), answer.get("response", ""))


def diff_words(before: str, after: str) -> Pieces | None:
    """Return the pieces of ``after`` with the words that ``before`` has in their place. White space is not compared.

    A piece is ``(SAME, text)``, ``(ADDED, text)`` for words that only ``after`` has, or ``(REMOVED, text)`` for words
    that only ``before`` has. The same and the added pieces together are ``after``. None if a text is too long.
    """
    try:
        # difflib needs a minute for a response that repeats one word 1,400 times; rapidfuzz needs a millisecond.
        from rapidfuzz.distance import Indel
    except ImportError:
        raise missing_extra("rapidfuzz", "studio", "align studio") from None
    old = _WORD.findall(before)
    new = _WORD.findall(after)
    if max(len(old), len(new)) > MAX_WORDS:
        return None
    pieces: Pieces = []
    removed = ""
    added = ""
    for step in Indel.opcodes([word.strip() for word in old], [word.strip() for word in new]):
        if step.tag != "equal":
            # Words that replace others come in turns; they are read as one change.
            removed += "".join(old[step.src_start : step.src_end])
            added += "".join(new[step.dest_start : step.dest_end])
            continue
        pieces += _change(removed, added)
        pieces.append((SAME, "".join(new[step.dest_start : step.dest_end])))
        removed = ""
        added = ""
    return pieces + _change(removed, added)


def _change(removed: str, added: str) -> Pieces:
    return [(kind, text) for kind, text in ((REMOVED, removed), (ADDED, added)) if text]


def _number(column: str) -> str:
    """Return SQL for a number without nan."""
    return f"CASE WHEN isnan({column}) THEN NULL ELSE {column} END"


def _place_condition(place: Mapping[str, Any], parameters: dict[str, Any]) -> str:
    terms = []
    for name, value in place.items():
        if value in (None, ""):
            terms.append(f'"{name}" IS NULL')
            continue
        parameters[f"at_{name}"] = value if name == "split" else int(value)
        terms.append(f'"{name}" = $at_{name}')
    return " AND ".join(terms)


def _evenly(values: Sequence[Any], count: int) -> list[Any]:
    """Return at most ``count`` values, evenly from the first to the last."""
    if len(values) <= count:
        return list(values)
    return [values[round(place * (len(values) - 1) / (count - 1))] for place in range(count)]


def _json_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a row that have values, as JSON can have them."""
    content: dict[str, Any] = {"id": row_id(row), "tokens_omitted": max(0, (row.get("tokens") or 0) - MAX_TOKENS)}
    for name, value in row.items():
        if value is None:
            continue
        if name in JSON_COLUMNS:
            content[name] = _decode(value)
        elif name in TOKEN_COLUMNS or name == "turn_scores":
            content[name] = [_rounded(item) for item in value[:MAX_TOKENS]]
        elif name == "scores":
            content[name] = finite_map(value)
        else:
            content[name] = finite(value)
    return content


def _decode(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _rounded(value: Any) -> Any:
    """Return a token's number with the digits that float32 has."""
    if not isinstance(value, float):
        return value
    number = finite(value)
    return float(f"{number:.{DIGITS}g}") if isinstance(number, float) else number

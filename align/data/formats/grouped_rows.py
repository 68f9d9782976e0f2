"""Records with one answer each, joined by their prompt into records with all answers, scored or ranked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from align.config.recipe.record_mapping import GroupedRows, Mean
from align.config.recipe.templates import parse_column
from align.data.formats.column_values import filled, label_number, mean_value
from align.data.formats.fields import Malformed
from align.data.reading import Item
from align.data.rows import BadRecord


def grouped_settings(grouped: GroupedRows) -> list[tuple[str, str]]:
    """Return the settings that name columns, and the columns."""
    settings = [("grouped.by", grouped.by), ("grouped.answer", grouped.answer)]
    if isinstance(grouped.score, str):
        settings.append(("grouped.score", grouped.score))
    elif isinstance(grouped.score, Mean):
        settings.append(("grouped.score", grouped.score.mean))
    elif grouped.score is not None:
        settings += [("grouped.score", name) for name in grouped.score]
    if grouped.rank is not None:
        settings.append(("grouped.rank", grouped.rank))
    return settings


@dataclass
class _Group:
    where: str
    fields: dict[str, Any]
    responses: list[dict[str, Any]] = field(default_factory=list)


def group_records(grouped: GroupedRows, records: Iterator[Item]) -> Iterator[Item]:
    """Yield a record for each prompt, in the order of their first records, with all its answers as ``responses``.

    The other fields are those that all records of the prompt share. A record that cannot be read stays in its place.
    """
    groups: dict[str, _Group] = {}
    for item in records:
        if isinstance(item, BadRecord):
            yield item
            continue
        where, record = item
        try:
            key = json.dumps(filled("grouped.by", grouped.by, record), default=str)
            response = _response(grouped, record)
        except Malformed as error:
            yield BadRecord(where, f"{error}.")
            continue
        # Records of one prompt need not follow each other, so all groups stay open until the end.
        group = groups.get(key)
        if group is None:
            group = groups[key] = _Group(where, dict(record))
        else:
            group.fields = {name: value for name, value in group.fields.items() if record.get(name) == value}
        group.responses.append(response)
    used = [text for place, text in grouped_settings(grouped) if place != "grouped.by"]
    columns = {reference.column for text in used for reference in parse_column(text).references}
    for group in groups.values():
        fields = {name: value for name, value in group.fields.items() if name not in columns}
        yield group.where, {**fields, "responses": group.responses}


def _response(grouped: GroupedRows, record: Mapping[str, Any]) -> dict[str, Any]:
    content = filled("grouped.answer", grouped.answer, record)
    if content is None:
        raise Malformed(f"it has no answer in '{grouped.answer}'")
    if grouped.rank is not None:
        return {"content": content, "rank": _number(grouped.rank, record)}
    if isinstance(grouped.score, Mean):
        mean = mean_value("grouped.score", grouped.score, record)
        if not isinstance(mean, float):
            raise Malformed(f"'{grouped.score.mean}' has no numbers to take the mean of")
        return {"content": content, "score": mean}
    weights = {grouped.score: 1.0} if isinstance(grouped.score, str) else grouped.score or {}
    total = math.fsum(weight * _number(name, record) for name, weight in weights.items())
    return {"content": content, "score": total}


def _number(column: str, record: Mapping[str, Any]) -> float:
    value = parse_column(column).value(record)
    number = label_number(value)
    if number is None:
        raise Malformed(f"'{column}' holds {value!r}, expected a number")
    return number

"""Conversion of one record to rows of the recipe's kind.

A converter makes drafts of a record: rows with all that the record holds. The recipe's kind then decides which fields
stay. A record without its format's fields is a mistake of the data or the recipe (``BadRecord``); one that has them
but makes no row (empty, identical, cut off) is ``Dropped``, and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from align.config.recipe.format_options import KINDS, Form, FormatOptions, ReadingOptions
from align.config.recipe.record_mapping import RecordMapping
from align.config.validation import validate_plain
from align.data.formats.choices import from_multiple_choice, gather_choices
from align.data.formats.compared_columns import LabelRule
from align.data.formats.detection import fitting
from align.data.formats.fields import Malformed, Unusable, describe_unrecognized, missing_groups
from align.data.formats.instructions import (
    from_alpaca,
    from_dolly,
    from_gsm8k,
    from_prompt,
    from_prompt_completion,
    from_self_instruct,
    from_text,
)
from align.data.formats.kept_columns import kept_fields, kept_sources, read_checks
from align.data.formats.kinds import complete_rows
from align.data.formats.mapping import map_record
from align.data.formats.messages import from_messages, parse_conversations
from align.data.formats.oasst import from_oasst
from align.data.formats.own_rows import from_rows
from align.data.formats.preferences import from_hh, from_preferences, from_unpaired
from align.data.formats.responses import from_ranked, from_scored
from align.data.formats.stepwise import from_stepwise
from align.data.formats.tracked_record import TrackedRecord, unused_fields
from align.data.rows import BadRecord, Dropped, Row

Converter = Callable[[dict[str, Any], ReadingOptions, str], list[Row | Dropped]]


@dataclass
class FieldUsage:
    """Records that had each field: those that no conversion read, and those that stayed with their rows."""

    unused: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)


CONVERTERS: dict[str, Converter] = {
    "messages": from_messages,
    "sharegpt": from_messages,
    "prompt_completion": from_prompt_completion,
    "alpaca": from_alpaca,
    "dolly": from_dolly,
    "gsm8k": from_gsm8k,
    "self_instruct": from_self_instruct,
    "hh_rlhf": from_hh,
    "preferences": from_preferences,
    "ranked": from_ranked,
    "scored": from_scored,
    "oasst": from_oasst,
    "unpaired": from_unpaired,
    "stepwise": from_stepwise,
    "prompt": from_prompt,
    "text": from_text,
    "multiple_choice": from_multiple_choice,
    "rows": from_rows,
}


@dataclass(frozen=True)
class SourceFormat:
    """The format of a source's records, and everything that its settings say about them. Picklable."""

    form: Form
    options: FormatOptions = field(default_factory=FormatOptions)
    mapping: RecordMapping = field(default_factory=RecordMapping)
    rule: LabelRule | None = None
    """The meaning of the label that ``mapping.better`` names."""
    is_own: bool = False
    """True for rows of an artifact, whose types need no check."""

    @cached_property
    def reading_options(self) -> ReadingOptions:
        """The options as converters get them."""
        return ReadingOptions(**self.options.model_dump(), roles=self.mapping.roles)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for the files that jobs of a cluster read."""
        return {
            "form": self.form,
            "options": self.options.model_dump(mode="json"),
            "mapping": self.mapping.model_dump(mode="json", exclude_unset=True),
            "rule": None if self.rule is None else self.rule.to_json(),
            "is_own": self.is_own,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SourceFormat:
        """Return the format that ``to_json`` wrote."""
        rule = values["rule"]
        return cls(
            form=values["form"],
            options=validate_plain(FormatOptions, values["options"]),
            mapping=validate_plain(RecordMapping, values["mapping"]),
            rule=None if rule is None else LabelRule.from_json(rule),
            is_own=values["is_own"],
        )


def convert(
    record: dict[str, Any],
    source: SourceFormat,
    where: str,
    kind: str,
    *,
    check: bool = True,
    usage: FieldUsage | None = None,
) -> list[Row | Dropped]:
    """Return the rows of one record, or the reason why there are none; a tree or a task with instances gives several.

    ``kind`` is the recipe's. Rows have ``id`` (of their content; a finished row keeps its own), ``checks`` and the kept
    columns; they have ``source`` only where the record is a row already. ``check=False`` lets through rows that a
    ``normalize`` step can mend, such as two user turns in a row; ``find_fault`` finds them later. ``usage`` counts
    the fields that were not read and those that were kept, of records that made rows.

    Raises ``BadRecord``, which begins with ``where``, for a record that lacks the format's fields or holds a wrong type
    in them, and for one with a meaningful field that would be lost.
    """
    form = source.form
    if kind not in KINDS[form]:
        able = ", ".join(name for name, kinds in KINDS.items() if kind in kinds and name != "rows")
        raise BadRecord(where, f"a record of format {form} cannot give {kind}; formats that can: {able}.")
    try:
        return _convert(record, source, where, kind, check=check, usage=usage or FieldUsage())
    except Malformed as error:
        raise BadRecord(where, f"{error} (format {form}).") from None
    except RecursionError:
        raise BadRecord(where, "nested too deeply.") from None
    except Unusable as error:
        return [Dropped(str(error))]


def _convert(
    record: dict[str, Any], source: SourceFormat, where: str, kind: str, *, check: bool, usage: FieldUsage
) -> list[Row | Dropped]:
    form, mapping = source.form, source.mapping
    # Mapped before the check, since ``columns`` may supply the required names.
    mapped = map_record(record, mapping, source.rule)
    if form == "multiple_choice":
        mapped.fields = gather_choices(mapped.fields)
    if missing_groups(mapped.fields, form):
        raise BadRecord(where, describe_unrecognized(mapped.fields, form, fitting(mapped.fields)))
    if source.is_own:
        return complete_rows(dict(record), kind, check)
    # The tracked record collects the fields that a converter reads. What is left is reported as unused.
    tracked = TrackedRecord(parse_conversations(mapped.fields))
    rows: list[Row | Dropped] = []
    for draft in CONVERTERS[form](tracked, source.reading_options, kind):
        rows += complete_rows(draft, kind, check)
    if form == "rows":
        return rows
    checks = read_checks(tracked)
    columns = kept_fields(record, mapping, {path for path in tracked.read if "." not in path})
    # A record without rows lost nothing that matters, so its unused fields are not reported.
    if not all(isinstance(row, Dropped) for row in rows):
        sources = kept_sources(mapping)
        unused = unused_fields(tracked, [*source.options.ignore, *sources])
        unused += [name for name, value in mapped.hidden.items() if value not in (None, "", [], {})]
        usage.unused.update(path for path in unused if path.partition(".")[0] not in {*sources, *columns})
        usage.kept.update(columns.keys())
    return [row if isinstance(row, Dropped) else _with_fields(row, columns, checks) for row in rows]


def _with_fields(row: Row, columns: dict[str, Any], checks: str) -> Row:
    """Return a row with the kept columns, and with the record's checks where its format has none of its own."""
    if checks and row.get("checks") == "":
        row = {**row, "checks": checks}
    return {**row, **columns} if columns else row

"""Conversion of one record to rows of the recipe's kind.

A converter makes drafts of a record: rows with all that the record holds. The recipe's kind then decides which fields
stay. A record without its format's fields is a mistake of the data or the recipe (``BadRecord``). A record that
has them but makes no row (empty, identical, cut off) is ``Dropped``, and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from align.config.recipe.format_options import KINDS, Form, FormatOptions, ReadingOptions, formats_for
from align.config.recipe.record_mapping import RecordMapping
from align.data.annotated import ANNOTATION, annotated_drafts
from align.data.formats import answers, records
from align.data.formats.columns import LabelRule, kept_fields, kept_sources, read_checks
from align.data.formats.detection import fitting
from align.data.formats.fields import (
    Malformed,
    TrackedRecord,
    Unusable,
    describe_unrecognized,
    missing_groups,
    unused_fields,
)
from align.data.formats.mapping import map_record
from align.data.formats.messages import from_messages, parse_conversations
from align.data.rows import (
    BadRecord,
    Dropped,
    Message,
    Row,
    answer_side,
    assistant,
    is_finished,
    is_text,
    kept_columns,
    row_id,
)

Converter = Callable[[dict[str, Any], ReadingOptions, str], list[Row | Dropped]]


@dataclass
class FieldUsage:
    """Records that had each field: those that no conversion read, and those that stayed with their rows."""

    unused: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)


CONVERTERS: dict[str, Converter] = {
    "messages": from_messages,
    "sharegpt": from_messages,
    "prompt_completion": answers.from_prompt_completion,
    "alpaca": answers.from_alpaca,
    "dolly": answers.from_dolly,
    "gsm8k": answers.from_gsm8k,
    "self_instruct": answers.from_self_instruct,
    "hh_rlhf": answers.from_hh,
    "preferences": answers.from_preferences,
    "ranked": answers.from_ranked,
    "scored": answers.from_scored,
    "oasst": records.from_oasst,
    "unpaired": answers.from_unpaired,
    "stepwise": records.from_stepwise,
    "prompt": answers.from_prompt,
    "text": answers.from_text,
    "multiple_choice": records.from_multiple_choice,
    "rows": records.from_rows,
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
    columns; they have ``source`` only if the record is a row already. ``check=False`` lets through rows that a
    ``normalize`` step can mend, such as two user turns in a row; ``find_fault`` finds them later. ``usage`` counts
    the fields that were not read and those that were kept, of records that made rows.

    Raises ``BadRecord``, which begins with ``where``, for a record that lacks the format's fields or holds a wrong type
    in them, and for a record with a meaningful field that would be lost.
    """
    form = source.form
    if kind not in KINDS[form]:
        able = ", ".join(formats_for(kind))
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
    form = source.form
    mapping = source.mapping
    # Map the record before the check, since ``columns`` may supply the required names.
    mapped = map_record(record, mapping, source.rule)
    if form == "multiple_choice":
        mapped.fields = records.gather_choices(mapped.fields)
    if missing_groups(mapped.fields, form):
        raise BadRecord(where, describe_unrecognized(mapped.fields, form, fitting(mapped.fields)))
    if source.is_own:
        drafts = annotated_drafts(record, kind) if ANNOTATION in record else [dict(record)]
        return [row for draft in drafts for row in complete_rows(draft, kind, check)]
    # The tracked record collects the fields that a converter reads. What is left is reported as unused.
    tracked = TrackedRecord(parse_conversations(mapped.fields))
    rows: list[Row | Dropped] = []
    for draft in CONVERTERS[form](tracked, source.reading_options, kind):
        rows += complete_rows(draft, kind, check)
    if form == "rows":
        return rows
    checks = read_checks(tracked)
    columns = kept_fields(record, mapping, {path for path in tracked.read if "." not in path})
    # The unused fields of a record without rows do not matter, so they are not reported.
    if not all(isinstance(row, Dropped) for row in rows):
        sources = kept_sources(mapping)
        unused = unused_fields(tracked, [*source.options.ignore, *sources])
        unused += [name for name, value in mapped.hidden.items() if value not in (None, "", [], {})]
        usage.unused.update(path for path in unused if path.partition(".")[0] not in {*sources, *columns})
        usage.kept.update(columns.keys())
    return [row if isinstance(row, Dropped) else _with_fields(row, columns, checks) for row in rows]


def _with_fields(row: Row, columns: dict[str, Any], checks: str) -> Row:
    """Return a row with the kept columns, and with the record's checks if its format has none."""
    if checks and row.get("checks") == "":
        row = {**row, "checks": checks}
    return {**row, **columns} if columns else row


COMPLETION_FIELDS = ("completion", "completion_finished")
PAIR_FIELDS = (
    *("chosen", "rejected", "chosen_score", "rejected_score"),
    *("chosen_finished", "rejected_finished", "flipped"),
)
NEXT_ROLES = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}


def complete_rows(draft: Row | Dropped, kind: str, check: bool) -> list[Row | Dropped]:
    """Return the rows of ``kind`` that a draft gives, each checked, without fields that the kind has no use for."""
    if isinstance(draft, Dropped):
        return [draft]
    completed: list[Row | Dropped] = []
    rows = convert_kind(draft, kind)
    for row in rows:
        if isinstance(row, Dropped):
            completed.append(row)
        else:
            fault = find_fault(row, ignore_mendable=not check)
            completed.append(fault or _complete(row, draft, len(rows)))
    return completed


def _complete(row: Row, draft: Row, count: int) -> Row:
    row = {name: value for name, value in row.items() if value is not None}
    if not row.get("tools"):
        row.pop("tools", None)
    if not is_text(row):
        row.setdefault("checks", "")
    # A record's own id can name one row, not several.
    keeps_id = count == 1 and draft.get("id")
    return {"id": draft["id"] if keeps_id else row_id(row), **_without(row, ("id",))}


def _without(row: Row, names: tuple[str, ...]) -> Row:
    return {name: value for name, value in row.items() if name not in names}


def convert_kind(draft: Row, kind: str) -> list[Row | Dropped]:
    """Return the rows that a draft gives for a kind of dataset, unchecked."""
    if kind == "texts":
        return [_text(draft)]
    if is_text(draft):
        return [Dropped("a plain text, which has no turns")]
    if kind == "prompts":
        return [_without(draft, (*COMPLETION_FIELDS, "responses", "label", "steps", *PAIR_FIELDS))]
    if kind == "instructions":
        return [_instruction(draft)]
    if draft.get("responses") is not None:  # the step ``pairs`` compares them
        return [_without(draft, (*COMPLETION_FIELDS, "label", *PAIR_FIELDS))]
    has_pair = draft.get("chosen") is not None and draft.get("rejected") is not None
    if kind == "preferences":
        return [_without(draft, (*COMPLETION_FIELDS, "label")) if has_pair else Dropped("no pair of answers")]
    if draft.get("label") is not None and draft.get("completion") is not None:
        return [_without(draft, PAIR_FIELDS)]
    if not has_pair:
        return [Dropped("no label")]
    if _are_equal(draft["chosen"], draft["rejected"]):
        return [Dropped("chosen equals rejected")]
    # Both answers of a pair become unpaired rows, the chosen one labeled good.
    rest = _without(draft, (*COMPLETION_FIELDS, *PAIR_FIELDS))
    return [{**rest, **_completion(draft, side), "label": side == "chosen"} for side in ("chosen", "rejected")]


def _completion(draft: Row, side: str) -> Row:
    """Return a draft's answer on ``side`` as a completion, with ``completion_finished`` if the draft knows it."""
    is_finished = draft.get(f"{side}_finished")
    if is_finished is None:
        return {"completion": draft[side]}
    return {"completion": draft[side], "completion_finished": is_finished}


def _text(draft: Row) -> Row | Dropped:
    """Return a draft's text; a conversation becomes its turns with blank lines between them, without any template."""
    row = {name: draft[name] for name in ("id", "source") if draft.get(name)} | kept_columns(draft)
    if draft.get("text") is not None:
        if not is_finished(draft, "text"):
            row["text_finished"] = False
        return row | {"text": draft["text"]}
    if draft.get("label") is False:
        return Dropped("labeled as bad")
    side = answer_side(draft)
    turns = [*draft.get("prompt", []), *(draft.get(side) or [])]
    if draft.get(side) and not is_finished(draft, side):
        row["text_finished"] = False
    return row | {"text": "\n\n".join(turn["content"] for turn in turns if (turn.get("content") or "").strip())}


def _instruction(draft: Row) -> Row | Dropped:
    if draft.get("label") is False:
        return Dropped("labeled as bad")
    rest = _without(draft, (*COMPLETION_FIELDS, "responses", "label", *PAIR_FIELDS))
    if draft.get(answer_side(draft)):
        return rest | _completion(draft, answer_side(draft))
    if draft.get("responses") is None:
        return Dropped("last turn is not the assistant's")
    best = best_response(draft["responses"])
    if best is None:
        return Dropped("no answer with a score or a rank")
    cut_off = {"completion_finished": False} if best.get("finished") is False else {}
    return {**rest, "completion": [assistant(str(best["content"]))], **cut_off}


def best_response(responses: list[dict[str, object]]) -> dict[str, object] | None:
    """Return the response with the highest score, or if none has a score, the smallest rank; the first of equals."""
    scored = [(float(item["score"]), item) for item in responses if item.get("score") is not None]  # type: ignore[arg-type]
    ranked = [(-float(item["rank"]), item) for item in responses if item.get("rank") is not None]  # type: ignore[arg-type]
    usable = [(value, item) for value, item in scored or ranked if str(item["content"]).strip()]
    return max(usable, key=lambda pair: pair[0])[1] if usable else None


def find_fault(row: Row, ignore_mendable: bool = False) -> Dropped | None:
    """Return the reason why no trainer can use a row; None for a usable row.

    ``ignore_mendable`` lets through rows that a ``normalize`` step can mend.
    """
    if is_text(row):
        return None if row["text"].strip() else Dropped("empty text")
    prompt: list[Message] = row["prompt"]
    turns = [message for message in prompt if message["role"] != "system"]
    # Faults of the prompt that ``normalize`` can mend.
    if not ignore_mendable:
        if any(message["role"] == "system" for message in prompt[1:]):
            return Dropped("system turn in the middle")
        if any(not _has_content(message) for message in prompt if message["role"] != "tool"):
            return Dropped("empty prompt turn")
        if turns and turns[0]["role"] != "user" and len(turns) > 1:
            return Dropped("first turn is not the user's")
        if any(second["role"] not in NEXT_ROLES[first["role"]] for first, second in pairwise(turns)):
            return Dropped("roles do not alternate")
    # These faults remain even after ``normalize``.
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        return Dropped("last prompt turn is not the user's")
    sides = [row[name] for name in ("completion", "chosen", "rejected") if row.get(name) is not None]
    if any(not side or not _has_content(side[-1]) for side in sides):
        return Dropped("empty reply")
    if any(side[-1]["role"] != "assistant" for side in sides):
        return Dropped("last turn is not the assistant's")
    if row.get("chosen") is not None and _are_equal(row["chosen"], row["rejected"]):
        return Dropped("chosen equals rejected")
    if row.get("responses") is not None and sum(bool(item["content"].strip()) for item in row["responses"]) < 2:
        return Dropped("fewer than two answers")
    return None


def _has_content(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def _are_equal(chosen: list[Message], rejected: list[Message]) -> bool:
    def contents(side: list[Message]) -> list[tuple[str, str]]:
        return [(message["content"].strip(), message.get("tool_calls", "")) for message in side]

    return contents(chosen) == contents(rejected)

"""Detection of a record's format from its fields and their contents, for ``format: auto`` and error messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.config.recipe.format_options import KINDS, Form, formats_for
from align.data.formats import fields
from align.data.formats.answers import CONTENTS, RANKS, SCORES, parse_label
from align.data.formats.fields import Malformed, first
from align.data.formats.messages import is_number
from align.data.formats.records import gather_choices, is_multiple_choice
from align.errors import UserError

DETECTION_RECORDS = 100
"""Records that ``format: auto`` looks at."""
SHARE = 0.9
"""Share of these records that must be in a format; the others count as bad records, not as another format."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Detection:
    """The detected format, and the reason in words."""

    form: Form
    reason: str


def _is_content(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], dict)
    return isinstance(value, str) or is_number(value)


def _message(record: Record) -> dict[str, Any] | None:
    """Return the first message of a conversation in the record, also if it is written as JSON text."""
    name = first(record, fields.CONVERSATIONS)
    value = record[name] if name else None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else None


def _first_response(record: Record) -> Any:
    name = first(record, fields.RESPONSES)
    value = record[name] if name else None
    return value[0] if isinstance(value, list) and value else None


def _has_prompt(record: Record) -> bool:
    name = first(record, fields.PROMPTS)
    return name is not None and _is_content(record[name])


def _is_prompt_completion(record: Record) -> bool:
    pairs = {
        "prompt": ("completion", "response"),
        "question": ("answer", "response"),
        "query": ("response", "answer"),
        "instruction": ("response", "completion"),
    }
    name = first(record, fields.PROMPTS)
    answer = first(record, pairs[name]) if name else None
    return answer is not None and (_is_content(record[answer]) or isinstance(record[answer], dict))


def _is_messages(record: Record) -> bool:
    message = _message(record)
    return message is not None and "role" in message and ("content" in message or "tool_calls" in message)


def _is_sharegpt(record: Record) -> bool:
    message = _message(record)
    return message is not None and "from" in message and "value" in message


def _has_rated_responses(record: Record, list_names: tuple[str, ...], item_names: tuple[str, ...]) -> bool:
    """Return True for a list of answers with scores or ranks, in the answers or in a list next to them."""
    item = _first_response(record)
    if not _has_prompt(record) or item is None:
        return False
    if isinstance(item, dict):
        has_content = first(item, CONTENTS) is not None
        has_rating = first(item, item_names) is not None
    else:
        has_content = isinstance(item, str) or is_number(item)
        has_rating = False
    return has_content and (has_rating or first(record, list_names) is not None)


def _is_stepwise(record: Record) -> bool:
    steps_name = first(record, fields.STEPS)
    labels_name = first(record, fields.STEP_LABELS)
    if steps_name is None or labels_name is None or not _has_prompt(record):
        return False
    steps = record[steps_name]
    labels = record[labels_name]
    if not isinstance(steps, list) or not isinstance(labels, list):
        return False
    return len(steps) == len(labels) > 0 and all(isinstance(step, str) for step in steps)


def _is_unpaired(record: Record) -> bool:
    name = first(record, fields.LABELS)
    try:
        parse_label(record[name] if name else None)
    except Malformed:
        return False
    return _is_prompt_completion(record) or _is_messages(record) or _is_sharegpt(record)


def _are_texts(record: Record, *names: str) -> bool:
    return all(isinstance(record.get(name), str) or is_number(record.get(name)) for name in names)


def _is_pair(record: Record) -> bool:
    chosen = first(record, fields.CHOSEN)
    rejected = first(record, fields.REJECTED)
    if chosen is None or rejected is None or _is_hh_rlhf(record):
        return False
    if first(record, (*fields.PROMPTS, *fields.CONVERSATIONS)) is not None:
        return True
    # Without a prompt field, each side must be a conversation that begins with it.
    return all(isinstance(record[name], list) and len(record[name]) > 1 for name in (chosen, rejected))


def _is_hh_rlhf(record: Record) -> bool:
    sides = [str(record.get(name)) for name in ("chosen", "rejected")]
    return all("\n\nHuman:" in side and "\n\nAssistant:" in side for side in sides)


SHAPES: dict[str, Callable[[Record], bool]] = {
    "oasst": lambda record: isinstance(record.get("prompt"), dict) and "replies" in record["prompt"],
    "hh_rlhf": _is_hh_rlhf,
    "stepwise": _is_stepwise,
    "scored": lambda record: _has_rated_responses(record, ("scores", "ratings", "rewards"), (*SCORES, "annotations")),
    "ranked": lambda record: _has_rated_responses(record, ("ranks", "ranking"), RANKS),
    "unpaired": _is_unpaired,
    "preferences": _is_pair,
    "gsm8k": lambda record: _are_texts(record, "question", "answer") and "####" in str(record["answer"]),
    "self_instruct": lambda record: _are_texts(record, "instruction") and isinstance(record.get("instances"), list),
    "dolly": lambda record: _are_texts(record, "instruction", "response") and "context" in record,
    "alpaca": lambda record: _are_texts(record, "instruction", "output"),
    "messages": _is_messages,
    "sharegpt": _is_sharegpt,
    "prompt_completion": _is_prompt_completion,
    "multiple_choice": is_multiple_choice,
    "prompt": _has_prompt,
    "text": lambda record: isinstance(record.get(first(record, fields.TEXTS) or ""), str),
}
"""Tests for each format, by the contents of a record's fields."""


def fitting(record: Record) -> list[str]:
    """Return all formats that a record is in, except ``text``, which fits any record with a field of that name."""
    return [form for form, fits in SHAPES.items() if form != "text" and fits(record)]


def detect(records: Sequence[Record], kind: str | None = None, ignored: Sequence[str] = ()) -> Detection:
    """Return the format of the records, of those that can make ``kind``; ``ignored`` fields are left aside on purpose.

    If several formats fit, the format whose fields include the fields of the others wins; among equals, the stricter
    format wins. Raises ``UserError`` if no format fits, with the fields and the nearest formats, or if two formats fit
    that read different fields, since a guess would silently make another dataset.
    """
    if not records:
        raise UserError("format: auto has no record to look at; the source is empty.")
    records = [gather_choices(record, ignored) for record in records]
    # A recipe that ignores choices means only the question and its answer.
    shapes = dict(SHAPES)
    if not set(fields.CHOICES).isdisjoint(ignored):
        del shapes["multiple_choice"]
    counts = {form: sum(fits(record) for record in records) for form, fits in shapes.items()}
    # A few bad records must not decide, so a share of them is enough.
    fit = [form for form, count in counts.items() if count >= SHARE * len(records)]
    able = {form: counts[form] for form in fit if not kind or kind in KINDS[form]}
    if not able:
        raise UserError(_describe_no_format(records, counts, kind))
    if len(able) > 1:
        able.pop("prompt", None)  # every other format also has a prompt, and more
    # Compare the formats by the fields that they would read from a record that fits.
    sample = {form: _used_fields(next(record for record in records if SHAPES[form](record)), form) for form in able}
    order = list(able)
    chosen = max(order, key=lambda form: (len(sample[form]), -order.index(form)))
    # A format that reads a field which the chosen one ignores says something else about the data.
    others = [form for form in order if not sample[form] <= sample[chosen]]
    if others:
        both = "; ".join(f"{form} ({', '.join(sorted(sample[form]))})" for form in (chosen, *others))
        raise UserError(f"format: auto cannot choose: the records fit {both}. Write the format that is meant.")
    reason = f"{chosen}: {able[chosen]} of {len(records)} records have {', '.join(sorted(sample[chosen]))}"
    covered = [form for form in order if form != chosen]
    if covered:
        reason += f"; that covers {', '.join(covered)}"
    unable = [form for form in fit if form not in {"prompt", *able}]
    if unable:
        reason += f"; {', '.join(unable)} would fit too, but cannot give {kind}"
    return Detection(chosen, reason)  # type: ignore[arg-type]


def _used_fields(record: Record, form: str) -> frozenset[str]:
    """Return the record's fields that a format reads."""
    required = [first(record, group) for group in fields.FIELDS[form]]
    optional = [name for name in fields.OPTIONAL.get(form, ()) if record.get(name) is not None]
    return frozenset([name for name in required if name] + optional)


def _list_of_records(record: Record) -> str | None:
    """Return the field of a file's only record that holds a list of records."""
    return next((name for name, value in record.items() if _holds_records(value)), None)


def _holds_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _describe_no_format(records: Sequence[Record], counts: dict[str, int], kind: str | None) -> str:
    record = records[0]
    text = f"format: auto finds no format for the first {len(records)} records"
    text += f" that can give {kind}. " if kind else ". "
    text += f"They have {fields.describe_fields(record)}."
    fits = []
    for form, count in counts.items():
        if count:
            limit = "" if kind in (None, *KINDS[form]) else f" (no {kind})"
            fits.append(f"{form} fits {count}{limit}")
    if fits:
        sentence = ", ".join(fits)
        text += f" {sentence[0].upper()}{sentence[1:]}."
    key = _list_of_records(record) if len(records) == 1 else None
    if key is not None:
        text += f" Its '{key}' is a list of records: write records: {key} where the file is named."
    near = fields.nearest_formats(record, kind)[:4]
    for name, meant in fields.misspelled(record, [group for form in near for group in fields.FIELDS[form]]).items():
        text += f" Is '{name}' meant as '{meant}'?"
    if near:
        text += f" Nearly: {'; '.join(map(fields.describe_format, near))}."
    if "ranked" in near and _first_response(record) is not None:
        text += " A list of answers without ranks or scores is read with format: ranked, the best first."
    formats = ", ".join(sorted(formats_for(kind)))
    return f"{text} Map fields with columns: {{prompt: FIELD}}. The formats are {formats}."

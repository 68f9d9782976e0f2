"""Which format records are in, from their fields and what these hold: for ``format: auto`` and error messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from align.data.formats.fields import (
    CHOSEN,
    CONVERSATIONS,
    FIELDS,
    KINDS,
    LABELS,
    OPTIONAL,
    PROMPTS,
    REJECTED,
    RESPONSES,
    STEP_LABELS,
    STEPS,
    TEXTS,
    Malformed,
    first,
    names_of,
    nearly,
    slips,
    spelled,
)
from align.data.formats.messages import is_number
from align.data.formats.options import Form
from align.data.formats.pairs import truth
from align.data.formats.responses import CONTENTS, RANKS, SCORES
from align.errors import UserError

LOOKED_AT = 100
"""Records that ``format: auto`` looks at."""
SHARE = 0.9
"""Of the records looked at that must be in a format: some bad ones among them are no other format."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Detection:
    """What was chosen, and why, in words."""

    form: Form
    why: str


def _said(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], dict)
    return isinstance(value, str) or is_number(value)


def _message(record: Record) -> dict[str, Any] | None:
    """First message of a conversation in the record, also where it is written as JSON text."""
    name = first(record, CONVERSATIONS)
    value = record[name] if name else None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else None


def _item(record: Record) -> Any:
    name = first(record, RESPONSES)
    value = record[name] if name else None
    return value[0] if isinstance(value, list) and value else None


def _asks(record: Record) -> bool:
    name = first(record, PROMPTS)
    return name is not None and _said(record[name])


def _answered(record: Record) -> bool:
    pairs = {
        "prompt": ("completion", "response"),
        "question": ("answer", "response"),
        "query": ("response", "answer"),
        "instruction": ("response", "completion"),
    }
    name = first(record, PROMPTS)
    answer = first(record, pairs[name]) if name else None
    return answer is not None and (_said(record[answer]) or isinstance(record[answer], dict))


def _chat(record: Record) -> bool:
    found = _message(record)
    return found is not None and "role" in found and ("content" in found or "tool_calls" in found)


def _sharegpt(record: Record) -> bool:
    found = _message(record)
    return found is not None and "from" in found and "value" in found


def _answers(record: Record, list_name: tuple[str, ...], item_names: tuple[str, ...]) -> bool:
    item = _item(record)
    if not _asks(record) or item is None:
        return False
    whole = isinstance(item, str) or is_number(item) or (isinstance(item, dict) and first(item, CONTENTS) is not None)
    return whole and (
        first(record, list_name) is not None or (isinstance(item, dict) and first(item, item_names) is not None)
    )


def _marked_steps(record: Record) -> bool:
    texts, marks = first(record, STEPS), first(record, STEP_LABELS)
    if texts is None or marks is None or not _asks(record):
        return False
    given, labels = record[texts], record[marks]
    return (
        isinstance(given, list)
        and isinstance(labels, list)
        and len(given) == len(labels) > 0
        and (all(isinstance(step, str) for step in given))
    )


def _labeled(record: Record) -> bool:
    name = first(record, LABELS)
    try:
        truth(record[name] if name else None)
    except Malformed:
        return False
    return _answered(record) or _chat(record) or _sharegpt(record)


def _texts(record: Record, *names: str) -> bool:
    return all(isinstance(record.get(name), str) or is_number(record.get(name)) for name in names)


def _pair(record: Record) -> bool:
    better, worse = first(record, CHOSEN), first(record, REJECTED)
    if better is None or worse is None or _transcripts(record):
        return False
    beside = first(record, (*PROMPTS, *CONVERSATIONS)) is not None
    return beside or all(isinstance(record[name], list) and len(record[name]) > 1 for name in (better, worse))


def _transcripts(record: Record) -> bool:
    sides = [str(record.get(name)) for name in ("chosen", "rejected")]
    return all("\n\nHuman:" in side and "\n\nAssistant:" in side for side in sides)


SHAPES: dict[str, Callable[[Record], bool]] = {
    "oasst": lambda record: isinstance(record.get("prompt"), dict) and "replies" in record["prompt"],
    "hh_rlhf": _transcripts,
    "stepwise": _marked_steps,
    "scored": lambda record: _answers(record, ("scores", "ratings", "rewards"), (*SCORES, "annotations")),
    "ranked": lambda record: _answers(record, ("ranks", "ranking"), RANKS),
    "unpaired": _labeled,
    "preferences": _pair,
    "gsm8k": lambda record: _texts(record, "question", "answer") and "####" in str(record["answer"]),
    "self_instruct": lambda record: _texts(record, "instruction") and isinstance(record.get("instances"), list),
    "dolly": lambda record: _texts(record, "instruction", "response") and "context" in record,
    "alpaca": lambda record: _texts(record, "instruction", "output"),
    "messages": _chat,
    "sharegpt": _sharegpt,
    "prompt_completion": _answered,
    "prompt": _asks,
    "text": lambda record: isinstance(record.get(first(record, TEXTS) or ""), str),
}
"""Whether a record is in a format, by what its fields hold."""


def fitting(record: Record) -> list[str]:
    """All formats a record is in, but for ``text``, which whatever has a field of that name is in."""
    return [form for form, fits in SHAPES.items() if form != "text" and fits(record)]


def detect(records: Sequence[Record], kind: str | None = None) -> Detection:
    """The format that the records are in, of those that can make ``kind``.

    Where several fit, one whose fields include those of the others wins; of equals, the one that asks for more.
    Raises ``UserError`` where none fits, naming the fields and the formats that nearly do, or where two fit that say
    different things, since a guess would silently make another dataset.
    """
    if not records:
        raise UserError("format: auto has no record to look at; the source is empty.")
    counts = {form: sum(fits(record) for record in records) for form, fits in SHAPES.items()}
    able = {form: n for form, n in counts.items() if n >= SHARE * len(records) and (not kind or kind in KINDS[form])}
    if not able:
        raise UserError(_nothing(records, counts, kind))
    if len(able) > 1:
        able.pop("prompt", None)  # every other format has a prompt too, and says more
    sample = {form: _used(next(r for r in records if SHAPES[form](r)), form) for form in able}
    order = list(able)
    chosen = max(order, key=lambda form: (len(sample[form]), -order.index(form)))
    others = [form for form in order if not sample[form] <= sample[chosen]]
    if others:
        both = "; ".join(f"{form} ({', '.join(sorted(sample[form]))})" for form in (chosen, *others))
        raise UserError(f"format: auto cannot choose: the records fit {both}. Write the format that is meant.")
    why = f"{chosen}: {able[chosen]} of {len(records)} records have {', '.join(sorted(sample[chosen]))}"
    covered = [form for form in order if form != chosen]
    if covered:
        why += f"; that covers {', '.join(covered)}"
    fit = [form for form, n in counts.items() if n >= SHARE * len(records) and form != "prompt"]
    elsewhere = [form for form in fit if form not in able]
    if elsewhere:
        why += f"; {', '.join(elsewhere)} would fit too, but cannot give {kind}"
    return Detection(chosen, why)  # type: ignore[arg-type]


def _used(record: Record, form: str) -> frozenset[str]:
    """The record's fields that a format takes."""
    names = [first(record, group) for group in FIELDS[form]]
    return frozenset(
        [name for name in names if name] + [n for n in OPTIONAL.get(form, ()) if record.get(n) is not None]
    )


def _nothing(records: Sequence[Record], counts: dict[str, int], kind: str | None) -> str:
    record = records[0]
    text = f"format: auto finds no format for the {len(records)} records looked at"
    text += f" that can give {kind}. " if kind else ". "
    text += f"They have {names_of(record)}."
    some = {form: n for form, n in counts.items() if n}
    if some:
        found = ", ".join(
            f"{form} fits {n}" + ("" if kind in (None, *KINDS[form]) else f" (no {kind})") for form, n in some.items()
        )
        text += f" {found[0].upper()}{found[1:]}."
    near = nearly(record, kind)[:4]
    for name, meant in slips(record, [group for form in near for group in FIELDS[form]]).items():
        text += f" Is '{name}' meant as '{meant}'?"
    if near:
        text += f" Nearly: {'; '.join(map(spelled, near))}."
    if "ranked" in near and _item(record) is not None:
        text += " A list of answers without ranks or scores is read with format: ranked, the best first."
    every = sorted(form for form, kinds in KINDS.items() if form != "rows" and kind in (None, *kinds))
    return f"{text} options.columns renames fields. The formats are {', '.join(every)}."

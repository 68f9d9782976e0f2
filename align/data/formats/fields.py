"""What each format is made of: its fields, the kinds of dataset it gives, and what an unrecognized record is told."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from align.data.formats.options import Form, FormatOptions

Groups = tuple[tuple[str, ...], ...]

PROMPTS = ("prompt", "question", "query", "instruction")
COMPLETIONS = ("completion", "response", "answer")
CONVERSATIONS = ("messages", "conversations", "conversation")
RESPONSES = ("responses", "completions", "answers", "outputs", "generations", "candidates", "output")
CHOSEN = ("chosen", "response_j")
REJECTED = ("rejected", "response_k")
LABELS = ("label", "kto_tag")
STEPS = ("completions", "steps")
STEP_LABELS = ("labels", "step_labels")
TEXTS = ("text", "content", "document", "page")

FIELDS: dict[str, Groups] = {
    "oasst": (("prompt",), ("message_tree_id",)),
    "hh_rlhf": (("chosen",), ("rejected",)),
    "stepwise": (PROMPTS, STEPS, STEP_LABELS),
    "scored": (PROMPTS, RESPONSES),
    "ranked": (PROMPTS, RESPONSES),
    "unpaired": ((*PROMPTS, *CONVERSATIONS), LABELS),
    "preferences": (CHOSEN, REJECTED),
    "gsm8k": (("question",), ("answer",)),
    "self_instruct": (("instruction",), ("instances",)),
    "dolly": (("instruction",), ("response",)),
    "alpaca": (("instruction",), ("output",)),
    "messages": (CONVERSATIONS,),
    "sharegpt": (CONVERSATIONS,),
    "prompt_completion": (PROMPTS, COMPLETIONS),
    "prompt": ((*PROMPTS, *CONVERSATIONS),),
    "text": (TEXTS,),
    "rows": (("prompt", "text"),),
}
"""What a record of each format has: every group needs one of its names. Those that ask for more come first."""

NAMES = frozenset(name for groups in FIELDS.values() for group in groups for name in group)
"""Every name that a format asks for."""

OPTIONAL: dict[str, tuple[str, ...]] = {
    "scored": ("scores", "system"),
    "ranked": ("ranks", "ranking", "system"),
    "stepwise": ("system", "tools"),
    "unpaired": (*COMPLETIONS, "tools", "system"),
    "preferences": (*PROMPTS, *CONVERSATIONS, "input", "system", "tools", "history"),
    "dolly": ("context",),
    "alpaca": ("input", "system", "history"),
    "messages": ("system", "tools"),
    "sharegpt": ("system", "tools"),
    "prompt_completion": ("system", "tools"),
}
"""Fields that a format takes where a record has them."""

SEVERAL = ("ranked", "scored", "oasst")
"""Formats with several answers to a prompt; preferences are made of them by a ``pairs`` step."""
PAIRED = ("hh_rlhf", "preferences")
"""Formats with a chosen and a rejected answer."""

_ONE = frozenset({"instructions", "prompts", "texts"})
_MORE = frozenset({"instructions", "prompts", "preferences", "unpaired"})
KINDS: dict[str, frozenset[str]] = {
    **dict.fromkeys(FIELDS, _ONE),
    **dict.fromkeys((*SEVERAL, *PAIRED), _MORE),
    "rows": _MORE | {"texts"},
    "unpaired": _ONE | {"unpaired"},
    "stepwise": _ONE | {"unpaired"},
    "prompt": frozenset({"prompts"}),
    "text": frozenset({"texts"}),
}
"""Kinds of dataset that a format's records can make."""


class Malformed(ValueError):
    """A field holds something its format does not allow: the data's or the recipe's mistake."""


class Unusable(Exception):
    """A record of its format that makes no row, for a reason that rows of like fate share."""


def renamed(record: Mapping[str, Any], options: FormatOptions) -> dict[str, Any]:
    """The record with the recipe's ``columns`` under their new names; a field that had such a name gives way."""
    if not options.columns:
        return dict(record)
    kept = {name: value for name, value in record.items() if name not in options.columns}
    return kept | {new: record[old] for old, new in options.columns.items() if old in record}


def first(record: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """The first of the names under which the record has something."""
    return next((name for name in names if record.get(name) is not None), None)


def present(record: Mapping[str, Any]) -> list[str]:
    """Fields that hold something; data libraries fill the absent ones with None."""
    return [name for name, value in record.items() if value is not None]


def missing(record: Mapping[str, Any], form: Form) -> list[tuple[str, ...]]:
    """The format's groups of names none of which the record has."""
    return [group for group in FIELDS[form] if first(record, group) is None]


def spelled(form: str) -> str:
    """A format and its fields in words: ``alpaca (instruction + output)``."""
    return f"{form} ({' + '.join('/'.join(group) for group in FIELDS[form])})"


def names_of(record: Mapping[str, Any]) -> str:
    """The record's fields in words."""
    return ", ".join(repr(name) for name in present(record)) or "no fields"


def nearly(record: Mapping[str, Any], kind: str | None = None) -> list[str]:
    """Formats (that can give ``kind``) of which the record has a field, those first of which it has the greatest part.

    A misspelled field counts, a little less.
    """
    share = {
        form: sum(_near(record, group) for group in groups) / len(groups)
        for form, groups in FIELDS.items()
        if form != "rows" and (form != "text" or kind == "texts") and kind in (None, *KINDS[form])
    }
    return [form for form in sorted(share, key=lambda form: -share[form]) if share[form] > 0]


def _near(record: Mapping[str, Any], group: tuple[str, ...]) -> float:
    return 1.0 if first(record, group) is not None else 0.9 * bool(slips(record, [group]))


def slips(record: Mapping[str, Any], groups: Iterable[tuple[str, ...]]) -> dict[str, str]:
    """Return fields that look like misspelled names of groups the record has nothing of, each with the nearest name."""
    found: dict[str, str] = {}
    for group in groups:
        for name in present(record):
            if name in NAMES:
                continue  # spelled as some format has it
            close = difflib.get_close_matches(name.lower(), group, n=1, cutoff=0.75)
            if close and first(record, group) is None:
                found.setdefault(name, close[0])
                break
    return found


def unrecognized(record: Mapping[str, Any], form: Form, fits: Iterable[str]) -> str:
    """What is said of a record that lacks the format's fields: its fields, and the formats it fits or nearly fits."""
    lacking = missing(record, form)
    needs = ", ".join(" or ".join(f"'{name}'" for name in group) for group in lacking)
    text = f"not a record of format {form}: {needs} missing; it has {names_of(record)}."
    for name, meant in slips(record, lacking).items():
        text += f" Is '{name}' meant as '{meant}'?"
    others = [name for name in fits if name != form]
    near = [name for name in nearly(record) if name != form][:4]
    if others:
        text += f" It fits format: {', '.join(others)}."
    elif near:
        text += f" It nearly fits: {'; '.join(map(spelled, near))}."
    return text

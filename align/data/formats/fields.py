"""Fields of each format, and the description of a record that is in none."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from align.config.recipe.format_options import Form, formats_for

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
CHOICES = ("choices", "options", "endings", "answer_choices", "alternatives")
ANSWER_KEYS = ("answer", "answerKey", "answer_key", "answer_index", "key", "label", "target", "gold")

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
    "multiple_choice": (PROMPTS, CHOICES, ANSWER_KEYS),
    "prompt": ((*PROMPTS, *CONVERSATIONS),),
    "text": (TEXTS,),
    "rows": (("prompt", "text"),),
}
"""Required fields of each format: a record needs one name of every group. Stricter formats come first."""

NAMES = frozenset(name for groups in FIELDS.values() for group in groups for name in group)
"""Every name that a format requires."""

OPTIONAL: dict[str, tuple[str, ...]] = {
    "scored": ("scores", "system"),
    "multiple_choice": ("system", "context"),
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
"""Further fields that a format reads."""


_CHOICE_COLUMN = re.compile(
    r"(?P<stem>(?:(?:choice|option|ending|alternative)s?|opt?|sol|)[ _-]?)(?P<end>[A-Za-z]|\d\d?)", re.IGNORECASE
)
"""Name of a column with one of the choices: ``choice0``, ``option_a``, ``A``, ``ending1``, ``opa``, ``sol1``."""


class Malformed(ValueError):
    """A field holds a value that its format does not allow: a mistake of the data or the recipe."""


class Unusable(Exception):
    """A record of its format that makes no row, for a reason that similar records share."""


def first(record: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """Return the first of the names whose field holds a value."""
    return next((name for name in names if record.get(name) is not None), None)


def require(record: Mapping[str, Any], names: Iterable[str]) -> str:
    """Return the same for names of which the record has one, as its format says."""
    name = first(record, names)
    assert name is not None
    return name


def choice_columns(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the longest series of columns with choices, each with the end of its name; empty if there is none."""
    series: dict[str, dict[str, str]] = {}
    for name, value in record.items():
        match = _CHOICE_COLUMN.fullmatch(name)
        if match is not None and value != "" and isinstance(value, (str, int, float)):
            series.setdefault(match["stem"], {})[name] = match["end"]
    best: dict[str, str] = {}
    for stem, columns in series.items():
        ends = list(columns.values())
        starts = [start for start in "Aa01" if ends[0] == start]
        is_run = starts and ends == [_end(starts[0], index) for index in range(len(ends))]
        # Bare letters are often the numbers of a sum, so they need an answer that may name a column.
        is_named = stem or (first(record, ANSWER_KEYS) and (ends[0] == "A" or len(ends) > 2))
        if is_run and is_named and len(columns) > len(best):
            best = columns
    return best


def _end(start: str, index: int) -> str:
    """Return the end of a series' column: ``_end("a", 2)`` is ``c``, ``_end("1", 9)`` is ``10``."""
    return str(int(start) + index) if start.isdigit() else chr(ord(start) + index)


def present(record: Mapping[str, Any]) -> list[str]:
    """Return the fields that hold a value; data libraries fill absent ones with None."""
    return [name for name, value in record.items() if value is not None]


def missing_groups(record: Mapping[str, Any], form: Form) -> list[tuple[str, ...]]:
    """Return the format's groups of names of which the record has none."""
    return [group for group in FIELDS[form] if first(record, group) is None]


def describe_format(form: str) -> str:
    """Return a format and its fields in words: ``alpaca (instruction + output)``."""
    return f"{form} ({' + '.join('/'.join(group) for group in FIELDS[form])})"


def describe_fields(record: Mapping[str, Any]) -> str:
    """Return the record's fields in words."""
    return ", ".join(repr(name) for name in present(record)) or "no fields"


def nearest_formats(record: Mapping[str, Any], kind: str | None = None) -> list[str]:
    """Return formats (for ``kind``) of which the record has a field, the ones with the largest share of fields first.

    A misspelled field counts a little less.
    """
    # The share of required fields decides; ``text`` fits nearly everything, so it is offered to kind texts only.
    able = set(formats_for(kind))
    if kind != "texts":
        able.discard("text")
    share = {
        form: sum(_match(record, group) for group in groups) / len(groups)
        for form, groups in FIELDS.items()
        if form in able
    }
    return [form for form in sorted(share, key=lambda form: -share[form]) if share[form] > 0]


def _match(record: Mapping[str, Any], group: tuple[str, ...]) -> float:
    if first(record, group) is not None:
        return 1.0
    return 0.9 if misspelled(record, [group]) else 0.0


def misspelled(record: Mapping[str, Any], groups: Iterable[tuple[str, ...]]) -> dict[str, str]:
    """Return fields that look like misspelled names of groups that the record lacks, each with the nearest name."""
    nearest: dict[str, str] = {}
    for group in groups:
        for name in present(record):
            if name in NAMES:
                continue  # a correct name of some format
            close = difflib.get_close_matches(name.lower(), group, n=1, cutoff=0.75)
            if close and first(record, group) is None:
                nearest.setdefault(name, close[0])
                break
    return nearest


def describe_unrecognized(record: Mapping[str, Any], form: Form, fits: Iterable[str]) -> str:
    """Return the error text for a record that lacks the format's fields: its fields, and formats that fit or nearly."""
    lacking = missing_groups(record, form)
    needs = ", ".join(" or ".join(f"'{name}'" for name in group) for group in lacking)
    text = f"not a record of format {form}: {needs} missing; it has {describe_fields(record)}."
    for name, meant in misspelled(record, lacking).items():
        text += f" Is '{name}' meant as '{meant}'?"
    others = [name for name in fits if name != form]
    near = [name for name in nearest_formats(record) if name != form][:4]
    if others:
        text += f" It fits format: {', '.join(others)}."
    elif near:
        text += f" It nearly fits: {'; '.join(map(describe_format, near))}."
    return text


OPAQUE = frozenset({"checks", "tools", "functions", "tool_calls", "function_call"})
"""Fields that are read with all their contents."""

_MEDIA = "align trains on text alone. Leave these records out before the build (a source of type python can)"
_THOUGHTS = (
    "a thought belongs to an answer of the assistant, in messages or next to a completion. In other places, write it "
    "into the answer with a template in columns"
)
_CHOICES = "the prompt would lack its choices. Write format: multiple_choice, or quote them in columns: {prompt: ...}"
_PROMPT_PART = (
    "it is part of the prompt, which would lack it. Map it with columns: {prompt: ...}, or choose another format"
)
REFUSED: dict[str, str] = {
    **dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), _MEDIA),
    **dict.fromkeys(("reasoning_content", "thinking", "messages.reasoning", "conversations.reasoning"), _THOUGHTS),
    **dict.fromkeys((*CHOICES, "mc1_targets", "mc2_targets"), _CHOICES),
    **dict.fromkeys(("context", "documents", "input", "history", "system", "system_prompt"), _PROMPT_PART),
    **dict.fromkeys(("tools", "functions"), "the model would not be told its tools. Choose the format messages"),
    "chat_template_kwargs": "the model stage sets the template's variables, for all rows (docs/thinking.md)",
    "train_detail": "align trains on a message as a whole or not at all",
}
"""Fields, by path or by name, that would change the training data, each with the reason why it must not be ignored."""
_ANSWER_COLUMN = re.compile(
    r"(?:(?:(?:in)?correct|wrong)_?)?(?:answer|ans|distractor|candidate)[ _-]?[0-9A-Ea-e]", re.IGNORECASE
)
"""Name of a column that is one of several answers to a question: ``distractor1``, ``answerA``."""


class TrackedRecord(dict[str, Any]):
    """A record that collects the paths of the fields that are read, also in nested objects and lists of objects."""

    def __init__(self, record: Mapping[str, Any], path: str = "", read: set[str] | None = None) -> None:
        super().__init__(record)
        self.path = path
        self.read: set[str] = set() if read is None else read
        self._inside: dict[str, Any] = {}
        """Objects and lists that were read, as tracked ones."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        path = join_path(self.path, name)
        self.read.add(path)
        if not isinstance(value, (dict, list)) or name in OPAQUE:
            return value
        # Wrap each nested object once, so all reads of it are tracked in the same place.
        if name not in self._inside:
            self._inside[name] = self._track(value, path)
        return self._inside[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 - this is get

    def values(self) -> Any:
        return [self[name] for name in self]

    def items(self) -> Any:
        return [(name, self[name]) for name in self]

    def with_fields(self, fields: Mapping[str, Any]) -> TrackedRecord:
        """Return a copy with other values for some fields; both collect their paths in the same set."""
        return TrackedRecord({**dict(self), **fields}, self.path, self.read)

    def _track(self, value: dict[str, Any] | list[Any], path: str) -> Any:
        if isinstance(value, dict):
            return TrackedRecord(value, path, self.read)
        return [TrackedRecord(item, path, self.read) if isinstance(item, dict) else item for item in value]


@lru_cache(maxsize=4096)
def join_path(path: str, name: str) -> str:
    """Return the path of a field inside another."""
    if not path:
        return name
    return path if path.rsplit(".", 1)[-1] == name else f"{path}.{name}"


def unread_paths(record: dict[str, Any], read: set[str], path: str = "") -> Iterator[str]:
    """Yield paths of fields that hold a value and were not read. A path may come several times."""
    for name, value in dict.items(record):  # not record.items(), which would count as reading
        if value is None or value in ("", [], {}):
            continue
        field = join_path(path, name)
        if field not in read:
            yield field
        # The field was read; look for unread fields inside it.
        elif name not in OPAQUE:
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, dict):
                    yield from unread_paths(item, read, field)


def unused_fields(record: TrackedRecord, ignored: Iterable[str]) -> list[str]:
    """Return the paths of the fields that the conversion did not read, each once.

    Raises ``Malformed`` for a meaningful field, unless it is among ``ignored``.
    """
    paths = list(dict.fromkeys(unread_paths(record, record.read)))
    if not paths:
        return paths
    unexpected = [path for path in paths if not _is_named(path, ignored)]
    for path in unexpected:
        refuse_field(path)
    if not record.read.isdisjoint(PROMPTS):
        # A plain copy, because a look at a field of the tracked record counts as reading it.
        names = [name for name in choice_columns(dict(record)) if name in unexpected]
        names = names or [path for path in unexpected if _ANSWER_COLUMN.fullmatch(path)]
        if len(names) > 1:
            raise Malformed(_refusal(f"'{names[0]}' to '{names[-1]}'", "them", _CHOICES, ", ".join(names)))
    return paths


def refuse_field(path: str) -> None:
    """Raise ``Malformed`` for a field that would change the training data and is not read."""
    reason = REFUSED.get(path) or REFUSED.get(path.rsplit(".", 1)[-1])
    if reason:
        raise Malformed(_refusal(f"'{path}'", "it", reason, path))


def _is_named(path: str, names: Iterable[str]) -> bool:
    return any(name in (path, path.rsplit(".", 1)[-1]) for name in names)


def _refusal(fields: str, pronoun: str, reason: str, names: str) -> str:
    return f"{fields} would be lost: {reason}, or leave {pronoun} aside on purpose with options.ignore: [{names}]"

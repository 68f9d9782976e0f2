"""A record that tracks which fields a conversion reads. The ledger lists the others; meaningful ones are refused.

A path names a field: ``images``, or ``messages.weight`` for a field of the objects in a list. A field nested in itself,
like Open Assistant's replies to replies, is named once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from align.data.formats.fields import CHOICES, PROMPTS, Malformed, choice_columns

OPAQUE = frozenset({"checks", "tools", "functions", "tool_calls", "function_call"})
"""Fields that are read with all their contents."""

_MEDIA = "align trains on text alone. Leave these records out before the build (a source of type python can)"
_THOUGHTS = (
    "align does not train on thoughts in a separate field. Write them into the answers of messages with options: "
    "{thoughts: last} (or all), into a single answer with a template in columns"
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
    "chat_template_kwargs": "align renders every row with the template's defaults",
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
        # Wrapped once, so that all reads of a nested object are tracked in the same place.
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

    Raises ``Malformed`` for a meaningful one, unless it is among ``ignored``.
    """
    paths = list(dict.fromkeys(unread_paths(record, record.read)))
    if not paths:
        return paths
    unexpected = [path for path in paths if not _is_named(path, ignored)]
    for path in unexpected:
        reason = REFUSED.get(path) or REFUSED.get(path.rsplit(".", 1)[-1])
        if reason:
            raise Malformed(_refusal(f"'{path}'", "it", reason, path))
    if not record.read.isdisjoint(PROMPTS):
        # A plain copy, because a look at a field of the tracked record counts as reading it.
        names = [name for name in choice_columns(dict(record)) if name in unexpected]
        names = names or [path for path in unexpected if _ANSWER_COLUMN.fullmatch(path)]
        if len(names) > 1:
            raise Malformed(_refusal(f"'{names[0]}' to '{names[-1]}'", "them", _CHOICES, ", ".join(names)))
    return paths


def _is_named(path: str, names: Iterable[str]) -> bool:
    return any(name in (path, path.rsplit(".", 1)[-1]) for name in names)


def _refusal(fields: str, pronoun: str, reason: str, names: str) -> str:
    return f"{fields} would be lost: {reason}, or leave {pronoun} aside on purpose with options.ignore: [{names}]"

"""Which fields of a record a conversion reads. The others are named in the ledger, or refused if they mean something.

A path names a field: ``images``, or ``messages.weight`` for a field of the objects in a list. A field that repeats in
itself, as Open Assistant's replies to replies, is named once. Left out: what a field that is read means.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from align.data.formats.fields import Malformed

READ_WHOLE = frozenset({"tools", "functions", "tool_calls", "function_call"})
"""Fields that are taken with all that is in them."""

_MEDIA = "align trains on text alone. Leave these records out before the build (a source of type python can)"
_THOUGHTS = "align does not train on thoughts in a field of their own. Write them into the answer's text"
_CHOICES = "the prompt would lack its choices. Write them into the prompt's text (a source of type python can)"
_PROMPT_PART = "it is part of the prompt, which would lack it. Rename it with options.columns, or choose another format"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), _MEDIA),
    **dict.fromkeys(("reasoning_content", "thinking", "messages.reasoning", "conversations.reasoning"), _THOUGHTS),
    **dict.fromkeys(("choices", "options", "endings", "mc1_targets", "mc2_targets"), _CHOICES),
    **dict.fromkeys(("context", "documents", "input", "history", "system", "system_prompt"), _PROMPT_PART),
    **dict.fromkeys(("tools", "functions"), "the model would not be told its tools. Choose the format messages"),
    "chat_template_kwargs": "align renders every row with the template's defaults",
    "train_detail": "align trains on a message as a whole or not at all",
}
"""Fields, by path or by name, that would change what is trained on, each with the reason why it must be read."""
_LETTERS = ("A", "B", "C", "D")
"""Columns in which a multiple-choice table has the choices."""


class Watched(dict[str, Any]):
    """A record that notes the paths of the fields that are read, also in objects and lists of objects inside it."""

    def __init__(self, record: Mapping[str, Any], path: str = "", read: set[str] | None = None) -> None:
        super().__init__(record)
        self.path = path
        self.read: set[str] = set() if read is None else read
        self._inside: dict[str, Any] = {}
        """Objects and lists that were read, as watched ones."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        path = joined(self.path, name)
        self.read.add(path)
        if not isinstance(value, (dict, list)) or name in READ_WHOLE:
            return value
        if name not in self._inside:
            self._inside[name] = self._watched(value, path)
        return self._inside[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 - this is get

    def values(self) -> Any:
        return [self[name] for name in self]

    def items(self) -> Any:
        return [(name, self[name]) for name in self]

    def with_fields(self, fields: Mapping[str, Any]) -> Watched:
        """A copy with other values for some fields; reading it is noted in the same place."""
        return Watched({**dict(self), **fields}, self.path, self.read)

    def _watched(self, value: dict[str, Any] | list[Any], path: str) -> Any:
        if isinstance(value, dict):
            return Watched(value, path, self.read)
        return [Watched(item, path, self.read) if isinstance(item, dict) else item for item in value]


@lru_cache(maxsize=4096)
def joined(path: str, name: str) -> str:
    """The path of a field inside another."""
    if not path:
        return name
    return path if path.rsplit(".", 1)[-1] == name else f"{path}.{name}"


def unread(record: dict[str, Any], read: set[str], path: str = "") -> Iterator[str]:
    """Paths of fields that hold something and were not read. A path may come several times."""
    for name, value in dict.items(record):  # of a watched record too, without noting it
        if value is None or value in ("", [], {}):
            continue
        field = joined(path, name)
        if field not in read:
            yield field
        elif name not in READ_WHOLE:
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, dict):
                    yield from unread(item, read, field)


def left_aside(record: Watched, ignored: Iterable[str]) -> list[str]:
    """Paths of the fields that no conversion read, each once.

    Raises ``Malformed`` for one that means something, unless it is among ``ignored``.
    """
    paths = list(dict.fromkeys(unread(record, record.read)))
    if not paths:
        return paths
    wanted = [path for path in paths if not _is_among(path, ignored)]
    for path in wanted:
        reason = REFUSED.get(path) or REFUSED.get(path.rsplit(".", 1)[-1])
        if reason:
            raise Malformed(_refusal(f"'{path}'", "it", reason, path))
    if "question" in record.read and all(letter in wanted for letter in _LETTERS):
        names = ", ".join(_LETTERS)
        raise Malformed(_refusal("'A' to 'D'", "them", _CHOICES, names))
    return paths


def _is_among(path: str, names: Iterable[str]) -> bool:
    return any(name in (path, path.rsplit(".", 1)[-1]) for name in names)


def _refusal(fields: str, pronoun: str, reason: str, names: str) -> str:
    return f"{fields} would be lost: {reason}, or leave {pronoun} aside on purpose with options.ignore: [{names}]"

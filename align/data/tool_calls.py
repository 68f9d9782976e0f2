"""Parse the tool calls in the text of an assistant's turn, in the formats that models are trained on. Torch-free.

Episodes, supervised training and the linter read calls only by these parsers. The text has its special tokens in it;
the end of the turn is removed. Excluded: what a tool's schema says of its arguments, and calls within thoughts, which
are no calls.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

from align.config.environment import AUTO, PATTERN_PREFIX, check_tool_format, compile_call_pattern
from align.data.call_values import MalformedCall, call_from_json, calls_from_code, decode_json
from align.data.call_values import ToolCall as ToolCall
from align.data.final_answers import hide_thoughts
from align.errors import UserError

MATCH_SECONDS = 1.0
"""Longest search of one turn for a user's pattern."""


@dataclass(frozen=True)
class ParsedTurn:
    """An assistant's turn, split into its text and its calls."""

    content: str
    """The text without calls, without white space around it."""
    calls: list[ToolCall] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """One sentence for each malformed call, addressed to the model."""


class ToolCallFormat(Protocol):
    """A way to write calls."""

    name: str

    def parse(self, text: str) -> ParsedTurn:
        """Split an assistant's turn. Never raises: what is malformed is an error of the turn."""
        ...


def tool_call_format(name: str, template: str = "") -> ToolCallFormat:
    """Return the format ``name``; ``auto`` takes the one that the chat template's text shows.

    ``regex:PATTERN`` is a format of the user's, with the groups ``name`` and ``arguments`` (a JSON object). Raises
    ``UserError`` for an unknown name, a pattern that cannot be used, and a template that shows no format.
    """
    try:
        check_tool_format(name)
    except ValueError as error:
        raise UserError(f"tool_format: {error}") from None
    if name.startswith(PATTERN_PREFIX):
        return RegexFormat(name.removeprefix(PATTERN_PREFIX))
    if name == AUTO:
        detected = detect_format(template)
        if detected is None:
            raise UserError(
                "tool_format: the chat template does not show how its model writes calls. Name the format "
                f"({', '.join(FORMATS)}), or give a pattern (regex:PATTERN)."
            )
        return detected
    return FORMATS[name]


def detect_format(template: str) -> ToolCallFormat | None:
    """Return the format of the calls that a chat template writes or asks for; None if it shows none."""
    # The most specific mark first: SmolLM3's template also has Hermes' tags.
    if "[TOOL_CALLS]" in template:
        return FORMATS["mistral"]
    if "<function_calls>" in template:
        return FORMATS["olmo3"]
    if "python_tools" in template:
        return FORMATS["smollm3"]
    if "<tool_call>" in template:
        return FORMATS["hermes"]
    if "<|python_tag|>" in template or ("<|start_header_id|>" in template and '"parameters"' in template):
        return FORMATS["llama3"]
    return None


class _Reader:
    """Collects calls, errors and the remaining text of one turn."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.visible = hide_thoughts(text)
        """The text with spaces for its thoughts, so places in it are those in the text."""
        self.calls: list[ToolCall] = []
        self.errors: list[str] = []
        self._spans: list[tuple[int, int]] = []

    def remove(self, start: int, end: int) -> None:
        """Take the characters of a call out of the turn's text."""
        self._spans.append((start, end))

    def result(self) -> ParsedTurn:
        """Return the turn."""
        pieces, position = [], 0
        for start, end in self._spans:
            pieces.append(self.text[position:start])
            position = end
        pieces.append(self.text[position:])
        return ParsedTurn("".join(pieces).strip(), self.calls, self.errors)


class HermesFormat:
    """``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, of Hermes, Qwen and others.

    Several calls may share tags, as a JSON list. ``code`` also reads SmolLM3's second form,
    ``<code>name(argument=1)</code>``.
    """

    OPEN, CLOSE = "<tool_call>", "</tool_call>"
    EXAMPLE = '<tool_call>{"name": ..., "arguments": {...}}</tool_call>'
    CODE = re.compile(r"<code>(.*?)</code>", re.DOTALL)

    def __init__(self, name: str, code: bool = False) -> None:
        self.name, self._code = name, code

    def parse(self, text: str) -> ParsedTurn:
        """Split an assistant's turn."""
        reader = _Reader(text)
        position = 0
        while (start := reader.visible.find(self.OPEN, position)) >= 0:
            position = self._read(reader, start)
        # The second form counts only in a turn without any call in the first.
        if self._code and not reader.calls and not reader.errors:
            self._read_code(reader)
        return reader.result()

    def _read(self, reader: _Reader, start: int) -> int:
        """Read the call that opens at ``start``; return where the next may begin."""
        body = start + len(self.OPEN)
        # JSON tells where it ends: a string within it may contain the closing tag.
        try:
            value, end = decode_json(reader.visible, body)
        except MalformedCall as error:
            end = reader.visible.find(self.CLOSE, body)
            stop = len(reader.text) if end < 0 else end + len(self.CLOSE)
            reader.errors.append(f"A tool call {error}; write {self.EXAMPLE}.")
            reader.remove(start, stop)
            return stop
        closing = re.compile(r"\s*" + re.escape(self.CLOSE)).match(reader.visible, end)
        if closing is None:
            # Reading continues behind the next closing tag, so one bad call does not hide a good one.
            tag = reader.visible.find(self.CLOSE, end)
            stop = len(reader.text) if tag < 0 else tag + len(self.CLOSE)
            reader.errors.append(f"A tool call is not closed after its JSON; write {self.EXAMPLE}.")
            reader.remove(start, stop)
            return stop
        reader.remove(start, closing.end())
        raw = reader.text[start : closing.end()]
        for entry in value if isinstance(value, list) else [value]:
            _add(reader, entry, raw, self.EXAMPLE)
        return closing.end()

    def _read_code(self, reader: _Reader) -> None:
        for block in self.CODE.finditer(reader.visible):
            reader.remove(block.start(), block.end())
            _add_python(reader, block.group(1), "<code>name(argument=value)</code>")


class Llama3Format:
    """``{"name": …, "parameters": {…}}`` as the whole turn, after an optional ``<|python_tag|>``."""

    name = "llama3"
    TAG = "<|python_tag|>"
    EXAMPLE = '{"name": ..., "parameters": {...}}'
    BUILT_IN = re.compile(r"\s*(\w+)\.call\((.*)\)\s*\Z", re.DOTALL)

    def parse(self, text: str) -> ParsedTurn:
        """Split an assistant's turn: it is calls, or an answer, which may be JSON too."""
        reader = _Reader(text)
        tag = reader.visible.find(self.TAG)
        start = tag + len(self.TAG) if tag >= 0 else len(reader.visible) - len(reader.visible.lstrip())
        body = reader.visible[start:]
        # Without the tag, a turn is a call only if it begins like one.
        if tag < 0 and not re.match(r'\{\s*"(?:name|type|function|parameters)"', body):
            return reader.result()
        reader.remove(tag if tag >= 0 else start, len(text))
        if built_in := self.BUILT_IN.match(body):
            _add_python(reader, f"{built_in.group(1)}({built_in.group(2)})", self.EXAMPLE)
            return reader.result()
        self._read(reader, start)
        # JSON that names no function is an answer, unless the tag says that it is a call.
        if tag < 0 and not reader.calls and not re.search(r'"(?:parameters|arguments|function)"', body):
            return ParsedTurn(text.strip())
        return reader.result()

    def _read(self, reader: _Reader, position: int) -> None:
        separator = re.compile(r"[\s;,]*")
        while True:
            try:
                value, end = decode_json(reader.visible, position)
            except MalformedCall as error:
                reader.errors.append(f"A tool call {error}; write {self.EXAMPLE}.")
                return
            for entry in value if isinstance(value, list) else [value]:
                _add(reader, entry, reader.text[position:end].strip(), self.EXAMPLE)
            separated = separator.match(reader.visible, end)
            position = separated.end() if separated else end
            if position >= len(reader.visible):
                return
            if reader.visible[position] not in "{[":
                reader.errors.append(f"There is text after a tool call; write {self.EXAMPLE} and nothing else.")
                return


class MistralFormat:
    """``[TOOL_CALLS] [{"name": …, "arguments": {…}}]``, and ``[TOOL_CALLS]name[ARGS]{…}`` of newer models."""

    name = "mistral"
    MARK = "[TOOL_CALLS]"
    EXAMPLE = '[TOOL_CALLS] [{"name": ..., "arguments": {...}}]'
    NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*([\w-]*)\s*)?(?:\[ARGS\])?\s*(?=\{)")

    def parse(self, text: str) -> ParsedTurn:
        """Split an assistant's turn."""
        reader = _Reader(text)
        marks = [match.start() for match in re.finditer(re.escape(self.MARK), reader.visible)]
        # A mark's call reaches up to the next mark.
        for start, end in pairwise([*marks, len(text)]):
            reader.remove(start, end)
            self._read(reader, start + len(self.MARK), end)
        return reader.result()

    def _read(self, reader: _Reader, start: int, end: int) -> None:
        # Cut at its end alone, so places in it are those in the turn.
        body = reader.visible[:end]
        named = self.NAMED.match(body, start)
        try:
            value, stop = decode_json(body, named.end() if named else start)
            if body[stop:].strip():
                raise MalformedCall("has text after its JSON")
        except MalformedCall as error:
            reader.errors.append(f"A tool call {error}; write {self.EXAMPLE}.")
            return
        raw = reader.text[start:end].strip()
        if named:
            entry = {"name": named.group(1), "arguments": value, "id": named.group(2) or ""}
            _add(reader, entry, raw, self.EXAMPLE)
            return
        for entry in value if isinstance(value, list) else [value]:
            _add(reader, entry, raw, self.EXAMPLE)


class Olmo3Format:
    """``<function_calls>name(argument="text")</function_calls>``: calls in Python's syntax, a line each; OLMo 3."""

    name = "olmo3"
    BLOCK = re.compile(r"<function_calls>(.*?)(</function_calls>|\Z)", re.DOTALL)
    EXAMPLE = "<function_calls>name(argument=value)</function_calls>"

    def parse(self, text: str) -> ParsedTurn:
        """Split an assistant's turn."""
        reader = _Reader(text)
        for block in self.BLOCK.finditer(reader.visible):
            reader.remove(block.start(), block.end())
            if block.group(2):
                _add_python(reader, block.group(1), self.EXAMPLE)
            else:
                reader.errors.append(f"A tool call is not closed; write {self.EXAMPLE}.")
        return reader.result()


class RegexFormat:
    """A user's pattern with the groups ``name`` and ``arguments``; ``.`` matches line breaks too."""

    def __init__(self, pattern: str) -> None:
        """Raise ``ValueError`` for a pattern that cannot be used."""
        self.name = f"{PATTERN_PREFIX}{pattern}"
        self._pattern = compile_call_pattern(pattern)

    def parse(self, text: str) -> ParsedTurn:
        """Split an assistant's turn."""
        reader = _Reader(text)
        try:
            # All matches come before the first is read: the time is for the whole turn.
            matches = list(self._pattern.finditer(reader.visible, timeout=MATCH_SECONDS))
        except TimeoutError:
            # A model can write a text on which a pattern with nested repetitions would search for years.
            reader.errors.append("This turn could not be searched for tool calls; write the call alone, and shorter.")
            return reader.result()
        for match in matches:
            # A pattern whose parts are all optional matches the empty text everywhere.
            if match.start() == match.end():
                continue
            reader.remove(match.start(), match.end())
            arguments = (match.group("arguments") or "").strip() or "{}"
            try:
                value, end = decode_json(arguments, 0)
                if arguments[end:].strip():
                    raise MalformedCall("has text after its JSON")
            except MalformedCall as error:
                reader.errors.append(f"A tool call {error}; write its arguments as one JSON object.")
                continue
            entry = {"name": (match.group("name") or "").strip(), "arguments": value}
            _add(reader, entry, match.group(), "its name and its arguments as one JSON object")
        return reader.result()


FORMATS: dict[str, ToolCallFormat] = {
    "hermes": HermesFormat("hermes"),
    "llama3": Llama3Format(),
    "mistral": MistralFormat(),
    "smollm3": HermesFormat("smollm3", code=True),
    "olmo3": Olmo3Format(),
}
"""Formats by the name that users give."""


def _add(reader: _Reader, entry: Any, raw: str, example: str) -> None:
    """Add the call that a JSON value describes, or what is wrong with it."""
    try:
        reader.calls.append(call_from_json(entry, raw))
    except MalformedCall as error:
        reader.errors.append(f"A tool call {error}; write {example}.")


def _add_python(reader: _Reader, code: str, example: str) -> None:
    """Add the calls of a block in Python's syntax, or what is wrong with it."""
    try:
        reader.calls.extend(calls_from_code(code))
    except MalformedCall as error:
        reader.errors.append(f"A tool call {error}; write {example}.")

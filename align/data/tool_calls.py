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
from align.data.call_values import MalformedCall, ToolCall, call_from_json, calls_from_code, decode_json, decode_whole
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
    """Return the format ``name``; ``auto`` is the format that the chat template's text shows.

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
    """Collects calls, errors and the remaining text of one turn. ``example`` shows how to write a call."""

    def __init__(self, text: str, example: str) -> None:
        self.text = text
        self.example = example
        self.visible = hide_thoughts(text)
        """The text with spaces for its thoughts, so places in it are those in the text."""
        self.calls: list[ToolCall] = []
        self.errors: list[str] = []
        self._spans: list[tuple[int, int]] = []

    def remove(self, start: int, end: int) -> None:
        """Take the characters of a call out of the turn's text."""
        self._spans.append((start, end))

    def fail(self, problem: object, example: str = "") -> None:
        """Add an error."""
        self.errors.append(f"A tool call {problem}; write {example or self.example}.")

    def add(self, value: Any, raw: str) -> None:
        """Add the call, or the list of calls, that a JSON value describes, or what is wrong with it."""
        for entry in value if isinstance(value, list) else [value]:
            try:
                self.calls.append(call_from_json(entry, raw))
            except MalformedCall as error:
                self.fail(error)

    def add_code(self, code: str, example: str = "") -> None:
        """Add the calls of a block in Python's syntax, or what is wrong with it."""
        try:
            self.calls.extend(calls_from_code(code))
        except MalformedCall as error:
            self.fail(error, example)

    def result(self) -> ParsedTurn:
        """Return the turn."""
        pieces = []
        position = 0
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

    OPEN = "<tool_call>"
    CLOSE = "</tool_call>"
    CODE = re.compile(r"<code>(.*?)</code>", re.DOTALL)

    def __init__(self, name: str, code: bool = False) -> None:
        self.name = name
        self._code = code

    def parse(self, text: str) -> ParsedTurn:
        """Split an assistant's turn."""
        reader = _Reader(text, '<tool_call>{"name": ..., "arguments": {...}}</tool_call>')
        position = 0
        while (start := reader.visible.find(self.OPEN, position)) >= 0:
            position = self._read(reader, start)
        # The second form counts only in a turn without any call in the first.
        if self._code and not reader.calls and not reader.errors:
            for block in self.CODE.finditer(reader.visible):
                reader.remove(block.start(), block.end())
                reader.add_code(block.group(1), "<code>name(argument=value)</code>")
        return reader.result()

    def _read(self, reader: _Reader, start: int) -> int:
        """Read the call that opens at ``start``; return the place at which the next may begin."""
        end = start + len(self.OPEN)
        # JSON tells its own end: a string within it may contain the closing tag.
        try:
            value, end = decode_json(reader.visible, end)
            closing = re.compile(r"\s*" + re.escape(self.CLOSE)).match(reader.visible, end)
            if closing is None:
                raise MalformedCall("is not closed after its JSON")
            stop = closing.end()
        except MalformedCall as error:
            # Reading continues behind the next closing tag, so one bad call does not hide a good one.
            tag = reader.visible.find(self.CLOSE, end)
            stop = len(reader.text) if tag < 0 else tag + len(self.CLOSE)
            reader.fail(error)
        else:
            reader.add(value, reader.text[start:stop])
        reader.remove(start, stop)
        return stop


class Llama3Format:
    """``{"name": …, "parameters": {…}}`` as the whole turn, after an optional ``<|python_tag|>``."""

    name = "llama3"
    TAG = "<|python_tag|>"
    EXAMPLE = '{"name": ..., "parameters": {...}}'
    BUILT_IN = re.compile(r"\s*(\w+)\.call\((.*)\)\s*\Z", re.DOTALL)

    def parse(self, text: str) -> ParsedTurn:
        """Split an assistant's turn: it is calls, or an answer, which may also be JSON."""
        reader = _Reader(text, self.EXAMPLE)
        tag = reader.visible.find(self.TAG)
        start = tag + len(self.TAG) if tag >= 0 else len(reader.visible) - len(reader.visible.lstrip())
        body = reader.visible[start:]
        # Without the tag, a turn is a call only if it begins like one.
        if tag < 0 and not re.match(r'\{\s*"(?:name|type|function|parameters)"', body):
            return reader.result()
        reader.remove(tag if tag >= 0 else start, len(text))
        if built_in := self.BUILT_IN.match(body):
            reader.add_code(f"{built_in.group(1)}({built_in.group(2)})")
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
                reader.fail(error)
                return
            reader.add(value, reader.text[position:end].strip())
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
    NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*([\w-]*)\s*)?(?:\[ARGS\])?\s*(?=\{)")

    def parse(self, text: str) -> ParsedTurn:
        """Split an assistant's turn."""
        reader = _Reader(text, '[TOOL_CALLS] [{"name": ..., "arguments": {...}}]')
        marks = [match.start() for match in re.finditer(re.escape(self.MARK), reader.visible)]
        # A mark's call reaches up to the next mark.
        for start, end in pairwise([*marks, len(text)]):
            reader.remove(start, end)
            body = start + len(self.MARK)
            # Cut the text only at its end, so places in it are places in the turn.
            visible = reader.visible[:end]
            match = self.NAMED.match(visible, body)
            try:
                value = decode_whole(visible, match.end() if match else body)
            except MalformedCall as error:
                reader.fail(error)
                continue
            if match:
                value = {"name": match.group(1), "arguments": value, "id": match.group(2) or ""}
            reader.add(value, reader.text[body:end].strip())
        return reader.result()


class Olmo3Format:
    """``<function_calls>name(argument="text")</function_calls>``: calls in Python's syntax, a line each; OLMo 3."""

    name = "olmo3"
    BLOCK = re.compile(r"<function_calls>(.*?)(</function_calls>|\Z)", re.DOTALL)

    def parse(self, text: str) -> ParsedTurn:
        """Split an assistant's turn."""
        reader = _Reader(text, "<function_calls>name(argument=value)</function_calls>")
        for block in self.BLOCK.finditer(reader.visible):
            reader.remove(block.start(), block.end())
            if block.group(2):
                reader.add_code(block.group(1))
            else:
                reader.fail("is not closed")
        return reader.result()


class RegexFormat:
    """A user's pattern with the groups ``name`` and ``arguments``; ``.`` also matches line breaks."""

    def __init__(self, pattern: str) -> None:
        """Raise ``ValueError`` for a pattern that cannot be used."""
        self.name = f"{PATTERN_PREFIX}{pattern}"
        self._pattern = compile_call_pattern(pattern)

    def parse(self, text: str) -> ParsedTurn:
        """Split an assistant's turn."""
        reader = _Reader(text, "its name and its arguments as one JSON object")
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
            try:
                arguments = decode_whole((match.group("arguments") or "").strip() or "{}", 0)
            except MalformedCall as error:
                reader.fail(error, "its arguments as one JSON object")
                continue
            reader.add({"name": (match.group("name") or "").strip(), "arguments": arguments}, match.group())
        return reader.result()


FORMATS: dict[str, ToolCallFormat] = {
    "hermes": HermesFormat("hermes"),
    "llama3": Llama3Format(),
    "mistral": MistralFormat(),
    "smollm3": HermesFormat("smollm3", code=True),
    "olmo3": Olmo3Format(),
}
"""Formats by the name that users give."""

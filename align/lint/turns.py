"""Checks on the turns of a row before they become tokens: roles, texts, thoughts and tool calls."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any

from align.data.call_values import MalformedCall, ToolCall, call_from_json
from align.data.final_answers import PAIRS, TAGS, answer_text
from align.data.rows import Message, Row, is_finished
from align.data.tool_calls import ParsedTurn, ToolCallFormat, detect_format
from align.environments.environment import argument_problem
from align.errors import UserError
from align.lint.chat_format import ChatFormat
from align.lint.findings import Findings, Place
from align.models.chat.render import render_conversation, render_prompt

ROLES = frozenset({"system", "user", "assistant", "tool"})
PLACEHOLDER = re.compile(r"\{\{ ?[A-Za-z_][\w -]{0,38} ?\}\}")
BROKEN = re.compile("[\ufffd\ud800-\udfff]")
"""Replacement characters of a decoder, and halves of characters that were cut apart."""
FOREIGN = re.compile(
    r"<\|(?:im_start|im_end|endoftext|end_of_text|begin_of_text|start_header_id|end_header_id|eot_id|system|user|"
    r"assistant|end)\|>|<(?:start|end)_of_turn>|</s>|\[/?INST\]|<</?SYS>>|<\uff5c[^<>\uff5c]{1,30}\uff5c>"
)
"""Marks of a turn in the well-known templates. In a text they remain from a rendering for another model."""
SPEAKER = re.compile(r"(?:^|\n\n)(?:Human|Assistant): |^### (?:Instruction|Response):", re.MULTILINE)
"""Labels of speakers in transcripts and prompts of older models; also in ordinary texts that quote a conversation."""
HTML_STRIKE = re.compile(r"<s>[^<>]*</s>")
"""Struck-out text, whose closing tag is no end of sequence."""
INVISIBLE = re.compile("[\u180e\u200b\u2060\ufeff]")
"""Characters without width. The joiners U+200C and U+200D, which scripts and emoji need, are not among them."""
OVERRIDE = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""Characters that change the direction of the text around them: a person reads another text than the model learns."""
ANSWER_FIELDS = ("completion", "chosen", "rejected")


def turns(row: Row) -> Iterator[tuple[str, list[Message]]]:
    """Yield each list of turns in a row with its field: ``prompt``, then the answers."""
    for name in ("prompt", *ANSWER_FIELDS):
        if row.get(name):
            yield name, row[name]


def check_turns(row: Row, place: Place, chat_format: ChatFormat, findings: Findings) -> None:
    """Check the roles and texts of one row."""
    for name, messages in turns(row):
        for message in messages:
            text = message["content"] or ""
            role = message["role"]
            if role not in ROLES:
                findings.add("unknown-role", place, f"role {role!r}: {text}")
            if not text.strip():
                kind = "empty-answer" if name != "prompt" else "empty-turn"
                # An assistant turn that calls a tool may have no text.
                if not message.get("tool_calls"):
                    findings.add(kind, place, f"{name}: {role} says {text!r}")
            _check_text(text, f"{name}: {role}", place, chat_format, findings)
    # Roles must be in order in the prompt with each of its answers.
    answers = [row[name] for name in ANSWER_FIELDS if row.get(name)]
    for answer in answers or [[]]:
        _check_order([*row["prompt"], *answer], place, findings)


def _check_text(text: str, speaker: str, place: Place, chat_format: ChatFormat, findings: Findings) -> None:
    if chat_format.special_pattern and (token := chat_format.special_pattern.search(text)):
        findings.add("special-token-in-content", place, f"{speaker} writes {token.group()!r}: {around(text, token)}")
    for mark in chat_format.marks:
        start = text.find(mark)
        if start >= 0:
            excerpt = f"{speaker} writes {mark!r}: {text[max(0, start - 40) : start + 60]}"
            findings.add("turn-marker-in-content", place, excerpt)
    _check_foreign(text, speaker, place, chat_format, findings)
    if label := SPEAKER.search(text):
        findings.add("speaker-label-in-content", place, f"{speaker}: {around(text, label)}")
    for pattern, name in ((INVISIBLE, "invisible-character"), (OVERRIDE, "direction-override")):
        if character := pattern.search(text):
            findings.add(name, place, f"{speaker} has U+{ord(character.group()):04X}: {around(text, character)}")
    if broken := BROKEN.search(text):
        findings.add("not-utf8", place, f"{speaker}: {around(text, broken)}")
    if placeholder := PLACEHOLDER.search(text):
        findings.add("placeholder", place, f"{speaker}: {around(text, placeholder)}")


def _check_foreign(text: str, speaker: str, place: Place, chat_format: ChatFormat, findings: Findings) -> None:
    """Report marks of other models' templates; marks of the row's template have separate findings."""
    # The first foreign mark is enough: the row counts once.
    for mark in FOREIGN.finditer(text):
        name = mark.group().strip()
        is_html = name == "</s>" and any(mark.end() == html.end() for html in HTML_STRIKE.finditer(text))
        if name in chat_format.special or name in chat_format.marks or is_html:
            continue
        findings.add("foreign-token-in-content", place, f"{speaker} writes {name!r}: {around(text, mark)}")
        return


def _check_order(messages: list[Message], place: Place, findings: Findings) -> None:
    for message, following in pairwise(messages):
        if message["role"] == following["role"] and message["role"] != "tool":
            excerpt = f"two {message['role']} turns: {message['content']!r}, {following['content']!r}"
            findings.add("repeated-role", place, excerpt)
    spoken = [message for message in messages if message["role"] != "system"]
    if len(spoken) > 1 and spoken[0]["role"] == "assistant":
        findings.add("assistant-speaks-first", place, f"{spoken[0]['content']!r}")
    for message in messages[1:]:
        if message["role"] == "system":
            findings.add("system-turn-inside", place, f"{message['content']!r}")


def around(text: str, match: re.Match[str]) -> str:
    """Return the match with some text on both sides."""
    return text[max(0, match.start() - 40) : match.end() + 40]


_OPENED = re.compile(rf"\s*(?:<(?:{'|'.join(TAGS)})>|{'|'.join(map(re.escape, PAIRS))}|<\|channel\|>analysis\b)")
"""A text that begins with a thought. Tags later in a text may be quoted, so they are not checked."""


def check_thoughts(row: Row, place: Place, findings: Findings, *, is_thinking: bool = True) -> None:
    """Check the answers of one row that a stage learns; an answer that was cut off may lack its end.

    ``is_thinking`` is True for a model that may write thoughts.
    """
    for message in row["prompt"]:
        text = message["content"] or ""
        if message["role"] in ("user", "system") and _OPENED.match(text) and answer_text(text):
            findings.add("thought-in-other-turn", place, f"{message['role']}: {text}")
    for name in ANSWER_FIELDS:
        if name == "rejected" or (name == "completion" and row.get("label") is False):
            continue  # such an answer is an example of a bad one
        for message in row.get(name) or []:
            text = message["content"] or ""
            if message["role"] != "assistant" or message.get("train") is False or not _OPENED.match(text):
                continue
            answer = answer_text(text)
            if answer is None and is_finished(row, name):
                findings.add("unclosed-thought", place, f"{name}: {text}")
            elif answer == "" and not message.get("tool_calls"):
                findings.add("thought-without-answer", place, f"{name}: {text}")
            elif answer and not is_thinking:
                findings.add("unexpected-thought", place, f"{name}: {text}")


CALL_SIGN = re.compile(r"[{\[<]|\w\(")
"""Signs of a call that is written as text."""


class CallChecks:
    """Checks the calls of rows for one template."""

    def __init__(self, chat_format: ChatFormat) -> None:
        self._chat_format = chat_format

    @cached_property
    def format(self) -> ToolCallFormat | None:
        """The format of calls that the template shows; None for a template without tools."""
        template = self._chat_format.tokenizer.chat_template
        return detect_format(template if isinstance(template, str) else json.dumps(template, ensure_ascii=False))

    def check(self, row: Row, place: Place, findings: Findings) -> None:
        """Check the answers of one row that are trained on, and those before them."""
        check_results(row, place, findings)
        if not row.get("tools") and not any(message.get("tool_calls") for _, part in turns(row) for message in part):
            return
        schemas = tool_schemas(row.get("tools"))
        for name, messages in turns(row):
            if name == "rejected" or (name == "completion" and row.get("label") is False):
                continue  # such a call is not to be learned
            before = [] if name == "prompt" else list(row["prompt"])
            for index, message in enumerate(messages):
                if message["role"] != "assistant" or message.get("train") is False:
                    continue
                history = [*before, *messages[:index]]
                calls = self._calls(history, message, row.get("tools"), f"{name}: ", place, findings)
                for call in calls:
                    if not schemas:
                        continue
                    if call.name not in schemas:
                        excerpt = f"{name}: {call.name}, offered are {', '.join(sorted(schemas))}"
                        findings.add("unknown-tool", place, excerpt)
                    elif problem := argument_fault(schemas[call.name], call):
                        findings.add("wrong-arguments", place, f"{name}: {problem}")

    def _calls(
        self, history: list[Message], message: Message, tools: str | None, where: str, place: Place, findings: Findings
    ) -> list[ToolCall]:
        """Return the calls of a turn, and report what cannot be read of them."""
        # A call that is plain text is parsed as an episode would parse it.
        if not message.get("tool_calls"):
            parsed = self.format.parse(message["content"] or "") if self.format else ParsedTurn("")
            for error in parsed.errors:
                findings.add("unreadable-call", place, f"{where}{error}")
            return parsed.calls
        try:
            stored = json.loads(message["tool_calls"])
            expected = [call_from_json(call, "") for call in (stored if isinstance(stored, list) else [stored])]
        except (MalformedCall, ValueError) as error:
            findings.add("unreadable-call", place, f"{where}tool_calls: a call {error}: {message['tool_calls']}")
            return []
        # A stored call is rendered and parsed again. It must come back unchanged.
        text = self._turn_text(history, message, tools)
        if self.format is None or text is None:
            return expected
        parsed = self.format.parse(text)
        if parsed.errors or _contents(parsed.calls) != _contents(expected):
            problem = parsed.errors[0] if parsed.errors else f"read as {_shown(parsed.calls)}"
            findings.add("unreadable-call", place, f"{where}{_shown(expected)} is written as {text!r}: {problem}")
        return expected

    def _turn_text(self, history: list[Message], message: Message, tools: str | None) -> str | None:
        """Return what the template writes for a turn, without its end; None where other findings tell why not."""
        tokenizer = self._chat_format.tokenizer
        try:
            # The turn is what the conversation has behind its generation prompt.
            start = render_prompt(tokenizer, history, tools)
            ids = render_conversation(tokenizer, [*history, message], tools=tools)
        except (UserError, UnicodeError, TypeError):
            return None
        if ids[: len(start)] != start:
            return None
        end = len(ids) - 1 if ids[-1] in self._chat_format.ends else len(ids)
        return self._chat_format.decode(ids[len(start) : end])


def check_results(row: Row, place: Place, findings: Findings) -> None:
    """Report the result of a tool that no turn before it has called."""
    answers = [row[name] for name in ANSWER_FIELDS if row.get(name)]
    for answer in answers or [[]]:
        # None: the last turn may have calls that cannot be counted, so its results are not judged.
        waiting: int | None = 0
        for message in [*row["prompt"], *answer]:
            if message["role"] == "assistant":
                waiting = _count_calls(message)
            elif message["role"] == "tool" and waiting is not None:
                if waiting == 0:
                    findings.add("result-without-call", place, f"{message['content']!r}")
                waiting = max(0, waiting - 1)


def _count_calls(message: Message) -> int | None:
    """Return the number of a turn's calls; None if its text may have calls in a format that is not known here."""
    if not message.get("tool_calls"):
        return None if CALL_SIGN.search(message["content"] or "") else 0
    try:
        calls = json.loads(message["tool_calls"])
    except ValueError:
        return None
    return len(calls) if isinstance(calls, list) else 1


def argument_fault(function: dict[str, Any], call: ToolCall) -> str | None:
    """Return what a call's arguments lack under the tool's schema; None for a schema of another form."""
    parameters = _without_nulls(function.get("parameters"))
    if not isinstance(parameters, dict) or not isinstance(parameters.get("properties"), dict):
        return None
    if not all(isinstance(schema, dict) for schema in parameters["properties"].values()):
        return None
    if not isinstance(parameters.get("required", []), list):
        return None
    # Tables fill in null for an argument that a row does not have.
    arguments = {name: value for name, value in call.arguments.items() if value is not None}
    try:
        return argument_problem({"function": function | {"parameters": parameters}}, arguments)
    except (TypeError, AttributeError):  # a keyword holds another type than JSON schema has there
        return None


def _without_nulls(value: Any) -> Any:
    """Return a schema without the keywords that a table has filled with null, at every level."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return value


def tool_schemas(tools: str | None) -> dict[str, dict[str, Any]]:
    """Return the schemas of a row's tools by name; empty if it offers none, or tools of another form."""
    try:
        entries = json.loads(tools) if tools else []
    except ValueError:
        return {}
    functions = [entry.get("function", entry) for entry in entries if isinstance(entry, dict)]
    declared = [function for function in functions if isinstance(function, dict)]
    return {function["name"]: function for function in declared if isinstance(function.get("name"), str)}


def _contents(calls: list[ToolCall]) -> list[tuple[str, Any]]:
    return [(call.name, call.arguments) for call in calls]


def _shown(calls: list[ToolCall]) -> str:
    return ", ".join(f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)})" for call in calls) or "no call"

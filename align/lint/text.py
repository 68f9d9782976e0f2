"""Checks on the turns as they are written, before they become tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from align.data.rows import Message, Row
from align.lint.dialect import Dialect
from align.lint.findings import Findings, Place

ROLES = frozenset({"system", "user", "assistant", "tool"})
PLACEHOLDER = re.compile(r"\{\{ ?[A-Za-z_][\w -]{0,38} ?\}\}")
# What a decoder puts for bytes it cannot read, and halves of characters that were cut apart.
BROKEN = re.compile("[\ufffd\ud800-\udfff]")
FOREIGN = re.compile(
    r"<\|(?:im_start|im_end|endoftext|end_of_text|begin_of_text|start_header_id|end_header_id|eot_id|system|user|"
    r"assistant|end)\|>|<(?:start|end)_of_turn>|</s>|\[/?INST\]|<</?SYS>>|<\uff5c[^<>\uff5c]{1,30}\uff5c>"
)
"""Marks of a turn in the well-known templates. In a text they are what is left of a rendering for another model."""
SPEAKER = re.compile(r"(?:^|\n\n)(?:Human|Assistant): |^### (?:Instruction|Response):", re.MULTILINE)
"""Labels of speakers in transcripts and prompts of older models; also in ordinary texts that quote a conversation."""
HTML_STRIKE = re.compile(r"<s>[^<>]*</s>")
"""Struck-out text, whose closing tag is no end of sequence."""
INVISIBLE = re.compile("[\u180e\u200b\u2060\ufeff]")
"""Characters without width. The joiners U+200C and U+200D, which scripts and emoji need, are not among them."""
OVERRIDE = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""Characters that change the direction of the text around them: what is read is not what the model learns."""
ANSWERS = ("completion", "chosen", "rejected")


def turns(row: Row) -> Iterator[tuple[str, list[Message]]]:
    """Each list of turns a row has: ``prompt``, then its answers."""
    for name in ("prompt", *ANSWERS):
        if row.get(name):
            yield name, row[name]


def check_turns(row: Row, place: Place, dialect: Dialect, found: Findings) -> None:
    """Everything about the roles and texts of one row."""
    for name, messages in turns(row):
        for message in messages:
            text, role = message["content"] or "", message["role"]
            if role not in ROLES:
                found.add("unknown-role", place, f"role {role!r}: {text}")
            if not text.strip():
                kind = "empty-answer" if name != "prompt" else "empty-turn"
                # An assistant turn that calls a tool says nothing else.
                if not message.get("tool_calls"):
                    found.add(kind, place, f"{name}: {role} says {text!r}")
            _check_text(text, f"{name}: {role}", place, dialect, found)
    answers = [row[name] for name in ANSWERS if row.get(name)]
    for answer in answers or [[]]:
        _check_order([*row["prompt"], *answer], place, found)


def _check_text(text: str, who: str, place: Place, dialect: Dialect, found: Findings) -> None:
    if dialect.special_pattern and (token := dialect.special_pattern.search(text)):
        found.add("special-token-in-content", place, f"{who} writes {token.group()!r}: {around(text, token)}")
    for mark in dialect.marks:
        at = text.find(mark)
        if at >= 0:
            found.add(
                "turn-marker-in-content", place, f"{who} writes {mark!r}: {text[max(0, at - 40) : at + 60]}"
            )  # fmt: skip
    _check_foreign(text, who, place, dialect, found)
    if speaker := SPEAKER.search(text):
        found.add("speaker-label-in-content", place, f"{who}: {around(text, speaker)}")
    for pattern, name in ((INVISIBLE, "invisible-character"), (OVERRIDE, "direction-override")):
        if character := pattern.search(text):
            found.add(name, place, f"{who} has U+{ord(character.group()):04X}: {around(text, character)}")
    if broken := BROKEN.search(text):
        found.add("not-utf8", place, f"{who}: {around(text, broken)}")
    if placeholder := PLACEHOLDER.search(text):
        found.add("placeholder", place, f"{who}: {around(text, placeholder)}")


def _check_foreign(text: str, who: str, place: Place, dialect: Dialect, found: Findings) -> None:
    """Look for marks of other models' templates; those of the dialect's template have findings of their own."""
    for mark in FOREIGN.finditer(text):
        name = mark.group().strip()
        is_html = name == "</s>" and any(mark.end() == html.end() for html in HTML_STRIKE.finditer(text))
        if name in dialect.special or name in dialect.marks or is_html:
            continue
        found.add("foreign-token-in-content", place, f"{who} writes {name!r}: {around(text, mark)}")
        return


def _check_order(messages: list[Message], place: Place, found: Findings) -> None:
    for message, following in pairwise(messages):
        if message["role"] == following["role"] and message["role"] != "tool":
            excerpt = f"two {message['role']} turns: {message['content']!r}, {following['content']!r}"
            found.add("repeated-role", place, excerpt)
    turns_of_speakers = [message for message in messages if message["role"] != "system"]
    if len(turns_of_speakers) > 1 and turns_of_speakers[0]["role"] == "assistant":
        found.add("assistant-speaks-first", place, f"{turns_of_speakers[0]['content']!r}")
    for message in messages[1:]:
        if message["role"] == "system":
            found.add("system-turn-inside", place, f"{message['content']!r}")


def around(text: str, match: re.Match[str]) -> str:
    """The match with some text on both sides."""
    return text[max(0, match.start() - 40) : match.end() + 40]

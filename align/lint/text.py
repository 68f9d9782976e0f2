"""Checks on the text of the turns, before they become tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from align.data.rows import Message, Row
from align.lint.chat_format import ChatFormat
from align.lint.findings import Findings, Place

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
            text, role = message["content"] or "", message["role"]
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
    """Report marks of other models' templates; those of the row's template have their own findings."""
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

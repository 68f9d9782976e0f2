"""Checks on thoughts in answers: a thought must end, and an answer must follow it."""

from __future__ import annotations

import re

from align.data.rows import Row, is_finished
from align.data.thoughts import TAGS, answer_text
from align.lint.findings import Findings, Place
from align.lint.text import ANSWER_FIELDS

_OPENED = re.compile(rf"\s*(?:<(?:{TAGS})>|<\|channel\|>analysis\b)")
"""A text that begins with a thought. Tags later in a text may be quoted, so they are not checked."""


def check_thoughts(row: Row, place: Place, findings: Findings) -> None:
    """Check the answers of one row that a stage learns; an answer that was cut off may lack its end."""
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

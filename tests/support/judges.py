"""Judges of criteria that decide by rule, behind a fake server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tests.support.inference.fake_chat import completion

LISTED = re.compile(r"^(criterion_\d+): (.*)$", re.MULTILINE)


def answer_shown(body: dict[str, Any]) -> str:
    """The answer to judge, as it stands between its marks."""
    text = body["messages"][-1]["content"]
    mark = re.search(r"lines that begin with (<[0-9a-f]{12}>)", text)[1]
    return text.rpartition(", the answer to judge\n")[2].partition(f"\n\n{mark} end")[0]


def decisions(body: dict[str, Any], decide: Callable[[str, str], bool]) -> dict[str, Any]:
    """The object that a judge replies with; ``decide(criterion, answer)``."""
    prompt, answer = body["messages"][-1]["content"], answer_shown(body)
    head = prompt.partition("Everything between the lines")[0]
    return {
        key: {"reason": f"About: {text}", "satisfied": "yes" if decide(text, answer) else "no"}
        for key, text in LISTED.findall(head)
    }


def contains_word(criterion: str, answer: str) -> bool:
    """True if the answer contains the criterion's last word: the criterion `It mentions Paris`."""
    return criterion.split()[-1] in answer


def by_word(body: dict[str, Any]) -> dict[str, Any]:
    """A judge for which an answer satisfies a criterion if it has its last word."""
    if "criterion_1" not in body["messages"][-1]["content"]:
        return completion("ready")
    return completion(json.dumps(decisions(body, contains_word)))

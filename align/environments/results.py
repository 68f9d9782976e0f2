"""Results of environments as data: texts, messages, steps, scores and errors. Torch-free.

The return values of a user's methods are converted to these types. ``EnvironmentFailed`` states the expected value.
"""

from __future__ import annotations

import json
import math
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.scores import NAME_RULE, is_metric_name, is_reserved
from align.config.validation import plain_value
from align.data.rows import Message, Row, user
from align.errors import shorten
from align.scoring.functions import SCORE

TURN = "turn"
"""Key for the scores by turn in the mapping that ``score`` may return."""
CHARACTERS_PER_TOKEN = 32
"""Maximum characters of a text for each token of its limit. Longer texts are cut before they are tokenized."""
LONGEST_ERROR = 1000
"""Maximum characters of an exception's text that the model reads."""
ROLES = ("system", "user", "assistant", "tool")
_NOTICE = re.compile(r"\n\[cut: ([\d,]+) characters, of which the first ([\d,]+) are shown\]\Z")


class EnvironmentFailed(Exception):
    """The episode cannot continue. It ends, is recorded as failed with this text, and is not learned from.

    Methods of an environment raise it. The model reads the text of any other exception of a tool.
    """


class ToolError(Exception):
    """A call had no result. The model reads the text, and the episode continues."""

    kind = "raised"
    """Kind of the error in metrics and records: the tool raised an exception."""


class BadCall(ToolError):
    """The model called a tool that does not exist, or with arguments that it does not accept."""

    kind = "arguments"


class ToolTimeout(ToolError):
    """A call took longer than ``tool_seconds`` and was abandoned. Its instance is gone."""

    kind = "timeout"


ERRORS: dict[str, type[ToolError]] = {error.kind: error for error in (ToolError, BadCall, ToolTimeout)}
"""The errors that the model reads, by kind."""


@dataclass(frozen=True)
class Step:
    """An environment's answer to a message of the policy."""

    messages: list[Message]
    """New messages, for the policy to answer; empty if the episode is over."""
    done: bool = False


@dataclass(frozen=True)
class Scores:
    """Scores of an episode."""

    total: float
    parts: dict[str, float]
    """Scores by name, if the environment returns several."""
    turns: list[float] | None = None
    """A score for each turn of the policy; they are part of the total."""


def read_text(value: Any, most_tokens: int) -> str:
    """Return a tool's result as the text that the model reads; any other type as JSON.

    A text that must have more than ``most_tokens`` tokens is cut, with a notice of its length.
    """
    if value is None:
        text = ""
    elif isinstance(value, str):
        text = value
    else:
        try:
            text = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            text = str(value)
    return cut_text(clean(text), most_tokens * CHARACTERS_PER_TOKEN)


def cut_text(text: str, most: int) -> str:
    """Return a text cut to ``most`` characters, with a notice. The notice of an earlier cut keeps its length."""
    shown, length = split_notice(text)
    return text if len(shown) <= most else with_notice(shown[:most], length)


def with_notice(shown: str, length: int) -> str:
    """Return the beginning of a text with a notice that it was cut; ``length`` is the length before the cut."""
    return f"{shown}\n[cut: {length:,} characters, of which the first {len(shown):,} are shown]"


def split_notice(text: str) -> tuple[str, int]:
    """Return a text without the notice that it was cut, and its length before the cut."""
    notice = _NOTICE.search(text)
    # A tool may write such a line itself. Its second number is then rarely the length of the text before it.
    if notice is None or int(notice[2].replace(",", "")) != notice.start():
        return text, len(text)
    return text[: notice.start()], int(notice[1].replace(",", ""))


def clean(text: str) -> str:
    """Return a text that can be encoded: half characters (lone surrogates) become the replacement character."""
    # UTF-16 joins two halves that follow each other to a character. Only single halves are replaced.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def describe_exception(error: BaseException) -> str:
    """Return the type and text of an exception, as the model reads them."""
    text = str(error)
    return shorten(clean(f"{type(error).__name__}: {text}" if text else type(error).__name__), LONGEST_ERROR)


def describe_failure(error: BaseException) -> str:
    """Return an exception that ended an episode, with the file and line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    line = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{describe_exception(error)}{line}."


def read_prompt(value: Any, row: Row, place: str) -> list[Message] | None:
    """Return the messages with which ``reset`` begins an episode; None for the row's prompt.

    A text becomes a user's message after the row's system message.
    """
    if value is None:
        return None
    if isinstance(value, str):
        system = [dict(message) for message in list(row.get("prompt") or [])[:1] if message["role"] == "system"]
        return [*system, user(clean(value))]
    messages = read_messages(value, ROLES, f"{place} returned", "a text, a list of messages, or None")
    if not messages or messages[-1]["role"] == "assistant":
        raise EnvironmentFailed(f"{place} returned messages that do not end with one for the policy to answer.")
    return messages


def read_step(value: Any, most_tokens: int, place: str) -> Step:
    """Return the result of ``step``.

    A text or messages continue the episode, True or None end it, and a pair has messages and a flag for the end.
    """
    expected = "a text, a list of messages, True at the end, or (messages, is_done)"
    if value is None or value is True:
        return Step([], True)
    is_done = False
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], bool):
        value, is_done = value
    if value is None:
        value = []
    if isinstance(value, str):
        value = [user(value)]
    messages = read_messages(value, ("system", "user", "tool"), f"{place} returned", expected)
    if not messages and not is_done:
        raise EnvironmentFailed(f"{place} returned no messages and did not end the episode; return {expected}.")
    most = most_tokens * CHARACTERS_PER_TOKEN
    return Step([message | {"content": cut_text(message["content"], most)} for message in messages], is_done)


def read_messages(value: Any, roles: Sequence[str], place: str, expected: str) -> list[Message]:
    """Return copies of messages. Raises ``EnvironmentFailed``, which begins with ``place``, for any other value."""
    if not isinstance(value, list):
        raise EnvironmentFailed(f"{place} {shorten(repr(value))}; return {expected}.")
    messages = []
    for message in value:
        if not (
            isinstance(message, Mapping) and message.get("role") in roles and isinstance(message.get("content"), str)
        ):
            raise EnvironmentFailed(
                f"{place} the message {shorten(repr(message))}; a message has a 'role' ({', '.join(roles)}) and a text "
                "as 'content'."
            )
        messages.append(dict(message) | {"content": clean(message["content"])})
    try:
        # Round-trip the messages, so they are the same after they are read from the journal.
        copies: list[Message] = json.loads(json.dumps(messages))
    except (TypeError, ValueError) as error:
        raise EnvironmentFailed(f"{place} messages that JSON cannot hold ({error}).") from None
    return copies


def read_scores(value: Any, place: str) -> Scores:
    """Return the scores in a number or a mapping of names to numbers, which may have a list of numbers as ``turn``.

    The total of a mapping is its ``score``, or the sum of all its numbers.
    """
    if isinstance(value, Mapping):
        turns = None
        if value.get(TURN) is not None:
            if not isinstance(value[TURN], Sequence) or isinstance(value[TURN], str):
                raise EnvironmentFailed(f"{place} returned {shorten(repr(value[TURN]))} as 'turn'; return a list.")
            turns = [_finite(number, place, f" as 'turn'[{index}]") for index, number in enumerate(value[TURN])]
        parts = {}
        for name, number in value.items():
            if name == TURN:
                continue
            if not is_metric_name(name):
                raise EnvironmentFailed(f"{place} returned a score called {shorten(repr(name))}; {NAME_RULE}.")
            parts[name] = _finite(number, place, f" as '{name}'")
        if not parts and turns is None:
            raise EnvironmentFailed(f"{place} returned an empty mapping; return a number, or names with numbers.")
        total = parts.pop(SCORE, None)
        if total is None:
            total = math.fsum([*parts.values(), *(turns or [])])
        return Scores(total, parts, turns)
    return Scores(_finite(value, place, ""), {}, None)


def read_package_scores(total: Any, parts: Mapping[str, Any], place: str) -> Scores:
    """Return the scores of another package's environment; their names may have any characters (``judge/style``)."""
    reserved = sorted(filter(is_reserved, parts))
    if reserved:
        raise EnvironmentFailed(
            f"{place} returned a score called '{reserved[0]}', which is the name of another metric."
        )
    finite_parts = {name: _finite(number, place, f" as '{name}'") for name, number in parts.items()}
    return Scores(_finite(total, place, ""), finite_parts)


def _finite(value: Any, place: str, key: str) -> float:
    value = plain_value(value)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise EnvironmentFailed(f"{place} returned {shorten(repr(value))}{key}; return finite numbers.")
    return float(value)
